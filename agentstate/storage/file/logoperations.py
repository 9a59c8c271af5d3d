"""Carries out single operations on log files."""

from __future__ import annotations

import logging
import time

from ...errors import StateError, StateOutcomeUnknownError, StateUnavailableError
from ...operations import Commit, Lease, Outcome, Query
from ..base import check_deadline, now_microseconds
from ..resolve import check_owner
from .access import Access
from .filesystem import unavailable
from .lazyflush import LazyFlush
from .leases import Leases
from .locks import FileLock
from .logcache import LogCache
from .logfile import LogFile, WriteFailed
from .logview import LookAgain

_logger = logging.getLogger("agentstate.storage.file")


class LogOperations:
    """Operations on the logs of one folder.

    Three kinds of locks, taken in this order: the context's file lock (between processes, and between threads), the
    `lock` of its LogFile (what this process knows of it), and those of the cache and the folder (single statements).
    Who only reads takes no file lock; an exclusive storage takes none at all.
    """

    def __init__(self, access: Access, leases: Leases, cache: LogCache, *, ttl: float | None, fsync: str) -> None:
        self.access = access
        self.folder = access.folder
        self.exclusive = access.exclusive
        self.leases = leases
        self.cache = cache
        self.durable = fsync == "always"
        self.lazy = LazyFlush() if fsync == "everysec" else None
        self._ttl = ttl

    def carry_out(self, operation: Commit | Lease | Query) -> Outcome:
        """Carry out one operation, whose error is raised."""
        if time.monotonic() >= operation.deadline:
            check_deadline(operation)
        if isinstance(operation, Query):
            return self._query(operation)
        if not self.access.is_open:
            self.access.open(operation.deadline)
        if self.exclusive:
            return self._write(operation, self.cache.log_of(operation.context_id))
        log = self.cache.log_of(operation.context_id)
        lock = log.file_lock or self.lock_of(log)
        return lock.run(operation.deadline, operation.context_id, self._write, operation, log)

    def lock_of(self, log: LogFile) -> FileLock:
        lock = log.file_lock
        if lock is None:
            lock = log.file_lock = self.access.lock(log.stem)
        return lock

    def _query(self, query: Query) -> Outcome:
        if self.exclusive and not self.access.is_open:
            self.access.open(query.deadline)
        while True:
            log = self.cache.log_of(query.context_id)
            with log.lock:
                if log.discarded:
                    continue
                try:
                    if log.in_use:
                        log.forget()
                    log.in_use = True
                    outcome = log.snapshot(query, now_microseconds())
                    log.in_use = False
                    return outcome
                except LookAgain:
                    log.in_use = False
                    check_deadline(query)
                except StateError:
                    log.in_use = False
                    raise
                finally:
                    if not log.weight or self.cache.is_full():
                        self.cache.keep(log)

    def _write(self, operation: Commit | Lease, log: LogFile) -> Outcome:
        while True:
            with log.lock:
                if not log.discarded:
                    return self._write_to(log, operation)
            log = self.cache.log_of(operation.context_id)

    def _write_to(self, log: LogFile, operation: Commit | Lease) -> Outcome:
        try:
            if log.in_use:
                log.forget()
            log.in_use = True
            if not self.exclusive:
                self.folder.look_at_names()
            log.ready()
            identity = log.identity
            outcome = self.apply(log, operation)
            if isinstance(operation, Commit):
                try:
                    written = log.write()
                except WriteFailed as failure:
                    written = self._recover(log, failure)
                self.cache.grew(written)
                if written or log.identity != identity:
                    self._after_write(log)
                elif self.durable and not log.is_flushed():
                    self.flush(log, written=False)  # what others wrote, and this commit was answered from
            log.in_use = False
            return outcome
        except StateOutcomeUnknownError as error:
            if isinstance(operation, Commit):
                error.commit_id = operation.commit_id
            raise
        except StateError:
            log.forget_unwritten()
            log.in_use = False
            raise
        finally:
            if not log.weight or self.cache.is_full():
                self.cache.keep(log)

    def _recover(self, log: LogFile, failure: WriteFailed) -> int:
        """A commit whose line is whole is done, also if the checkpoint after it is not."""
        if failure.complete < failure.line_end:
            raise failure.error from failure.error.__cause__
        try:
            log.ready()
        except StateError as error:
            raise log.unknown(error) from error
        return 1

    def apply(self, log: LogFile, operation: Commit | Lease | Query) -> Outcome:
        """Carry out one operation on a log that is `ready`; `log.write` must follow."""
        while True:
            now = now_microseconds()
            try:
                if isinstance(operation, Commit):
                    lease = None if operation.fence is None else self._lease_holder(log)
                    return log.commit(operation, now, self._ttl, lease, not self.durable)
                if isinstance(operation, Query):
                    return log.answer(operation, log.current, now)
                return self._lease(log, operation, now)
            except LookAgain:
                check_deadline(operation)
                log.ready()

    def _lease(self, log: LogFile, lease: Lease, now: int) -> bool:
        if log.current.lives(now):
            check_owner(log.current, lease.user, lease.context_id)
        try:
            return self.leases.carry_out(log.stem, lease)
        except OSError as error:
            raise unavailable(error, "use the lease in", self.leases.path, lease.context_id) from error

    def _lease_holder(self, log: LogFile) -> str | None:
        try:
            return self.leases.holder(log.stem)
        except OSError as error:
            raise unavailable(error, "use the lease in", self.leases.path, log.context_id) from error

    # --- after a write

    def _after_write(self, log: LogFile) -> None:
        """Flush as the policy says, and rewrite the file where that pays."""
        if self.durable:
            if not log.is_flushed():
                self.flush(log, written=True)
        elif self.lazy is not None:
            self.lazy.add(log)
        self.tidy(log)

    def flush(self, log: LogFile, *, written: bool) -> None:
        """Flush a log. `written`: whether it holds something new of the operations that wait for it.

        Raises StateOutcomeUnknownError; where nothing was written, StateUnavailableError.
        """
        try:
            log.flush()
        except StateOutcomeUnknownError as error:
            if written:
                raise
            reason = str(error).partition(": whether")[0]
            raise StateUnavailableError(f"{reason}; nothing was done", context_id=error.context_id) from error

    def tidy(self, log: LogFile) -> None:
        """After a log was written and flushed: rewrite it without what is superseded, where that pays.

        What was committed is in the old file too: a failure is no error of a call.
        """
        image = log.image
        if image is not None and image.log_end >= image.checkpoint_due:
            log.add_checkpoint()
            image = log.image
        if image is None or image.log_end < image.rewrite_due or not image.wants_rewriting():
            return
        try:
            log.rewrite()
            if self.durable:
                log.ready()
                log.flush()
        except StateError as error:
            _logger.warning("%s could not be rewritten without superseded data: %s", log.path, error)
