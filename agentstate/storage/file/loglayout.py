"""Carries out operations on log files: locks, groups, flushes, and the cache of what is known of the files."""

from __future__ import annotations

import atexit
import copy
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...errors import StateError, StateOutcomeUnknownError, StateTimeoutError, StateUnavailableError
from ...operations import NEVER, Commit, Lease, Listing, Operation, Outcome, Query
from ..base import Settle, check_deadline, now_microseconds
from ..resolve import check_owner
from .access import Access
from .filesystem import can_sync_all, unavailable
from .folder import LEASES
from .leases import Leases
from .locks import FileLock
from .logfile import LogFile, LookAgain, WriteFailed, log_file
from .loglisting import LogListing

if TYPE_CHECKING:
    from ..statistics import CacheStatistics
    from .logrepair import Repair

_SYNC_ALL_FROM: Final = 4  # files

_PAUSE: Final = 0.0005
_PATIENCE_AT_EXIT: Final = 5.0  # seconds
_SYNC_EVERY: Final = 1.0

_logger = logging.getLogger("agentstate.storage.file")


class _Unit:
    """The operations on one context in a group, in order, and what became of them."""

    __slots__ = ("ends", "found", "indexes", "log", "operations", "outcomes", "written")

    def __init__(self) -> None:
        self.indexes: list[int] = []
        self.operations: list[Any] = []
        self.outcomes: list[Outcome | StateError] = []
        self.ends: list[int] = []  # after each operation, where the line of the last commit ends
        self.written = False
        self.found: LogFile | None = None  # the log of the context, as it is known
        self.log: LogFile | None = None  # the same once it is locked

    def settle_all(self, settle: Settle) -> None:
        for index, outcome in zip(self.indexes, self.outcomes, strict=True):
            settle(index, outcome)

    def fail_all(self, error: StateError) -> None:
        self.outcomes = [_for_operation(error, operation) for operation in self.operations]

    def give_up_late(self, now: float, error: StateError, settle: Settle) -> None:
        """Settle the operations whose deadline has passed, and leave the others."""
        for index, operation in list(zip(self.indexes, self.operations, strict=True)):
            if operation.deadline <= now:
                settle(index, _for_operation(error, operation))
                self.indexes.remove(index)
                self.operations.remove(operation)


class _Flushing:
    """Which way to flush several files is the quicker one: each, or the whole file system.

    On an idle disk one flush of everything costs as much as two of a file each; on one to which others write much, it
    may take seconds. So it is measured.
    """

    def __init__(self) -> None:
        self._each = 0.000_15  # seconds for a file
        self._at_once = 0.0  # seconds for everything, by and by forgotten while it is not tried

    def all_at_once(self, files: int) -> bool:
        if files < _SYNC_ALL_FROM or not can_sync_all():
            return False
        if self._at_once < files * self._each:
            return True
        self._at_once *= 0.9
        return False

    def took_at_once(self, seconds: float) -> None:
        self._at_once = seconds

    def took_each(self, seconds: float) -> None:
        self._each += (seconds - self._each) / 4


class LogLayout:
    """The log files of one folder."""

    def __init__(self, access: Access, *, ttl: float | None, fsync: str, cache_bytes: int) -> None:
        self.access = access
        self.folder = folder = access.folder
        self.ttl = ttl
        self.durable = fsync == "always"
        self.lazy = fsync == "everysec"
        self.exclusive = access.exclusive
        self.cache_bytes = cache_bytes
        self._most_open = folder.fs.most_open_files()
        self._flushing = _Flushing()
        self._logs: OrderedDict[str, LogFile] = OrderedDict()
        self._weight = 0
        self._forget_everything()

    def _forget_everything(self) -> None:
        """As at the beginning. (In the child of a fork too, where threads and their locks are not.)"""
        folder = self.folder
        self.leases = Leases(folder.file(LEASES), folder.fs)
        self.listing = LogListing(self)
        self._logs.clear()
        self._logs_lock = threading.Lock()
        self._weight = 0
        self._dirty: set[LogFile] = set()
        self._syncer: threading.Thread | None = None
        self._stop_syncing = threading.Event()

    # --- operations

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        if len(operations) > 1:
            self._execute_group(operations, settle)
            return
        outcome: Outcome | StateError
        try:
            outcome = self.execute_one(operations[0])
        except StateError as error:
            outcome = error
        settle(0, outcome)

    def execute_one(self, operation: Operation) -> Outcome:
        """`execute` for one operation, whose error is raised."""
        if time.monotonic() >= operation.deadline:
            check_deadline(operation)
        if isinstance(operation, Query):
            return self._query(operation)
        if isinstance(operation, Listing):
            return self.listing.page(operation)
        if not self.access.is_open:
            self.access.open(operation.deadline)
        while True:
            log = self.log_of(operation.context_id)
            lock = None if self.exclusive else self._lock_of(log)
            if lock is not None:
                self.access.acquire(lock, operation.deadline, operation.context_id)
            try:
                with log.lock:
                    if not log.discarded:
                        return self._write_one(log, operation)
            finally:
                if lock is not None:
                    lock.release()

    def _write_one(self, log: LogFile, operation: Commit | Lease) -> Outcome:
        try:
            if not self.exclusive:
                self.folder.look_at_names()
            log.ready()
            identity = log.identity
            outcome = self._apply(log, operation)
            if isinstance(operation, Commit):
                try:
                    written = log.write()
                except WriteFailed as failure:
                    written = self._recover(log, failure)
                self._weight += written
                if written or log.identity != identity:
                    self._after_write(log)
                elif self.durable and not log.is_flushed():
                    self._flush(log, False)  # what others wrote, and this commit was answered from
            return outcome
        except StateOutcomeUnknownError as error:
            if isinstance(operation, Commit):
                error.commit_id = operation.commit_id
            raise
        except StateError:
            log.forget_unwritten()
            raise
        except BaseException:  # the image may be ahead of the file, or behind it
            log.forget()
            raise
        finally:
            if not log.weight or self._weight > self.cache_bytes or self.folder.open_files > self._most_open:
                self._keep(log)

    def _recover(self, log: LogFile, failure: WriteFailed) -> int:
        """A commit whose line is whole is done, also if the checkpoint after it is not."""
        if failure.complete < failure.line_end:
            raise failure.error from failure.error.__cause__
        try:
            log.ready()
        except StateError as error:
            raise log.unknown(error) from error
        return 1

    def _after_write(self, log: LogFile) -> None:
        """Flush as the policy says, and clean up where it pays."""
        if self.durable:
            if not log.is_flushed():
                self._flush(log, True)
        elif self.lazy:
            self._sync_later(log)
        image = log.image
        if image is not None and image.log_end >= image.rewrite_due and image.wants_rewriting():
            self._rewrite(log)

    def _flush(self, log: LogFile, written: bool) -> None:
        try:
            log.flush()
        except StateOutcomeUnknownError as error:
            if written:
                raise
            raise _not_done(error) from error

    def _query(self, query: Query) -> Outcome:
        if self.exclusive and not self.access.is_open:
            self.access.open(query.deadline)
        while True:
            log = self.log_of(query.context_id)
            with log.lock:
                if log.discarded:
                    continue
                try:
                    return log.snapshot(query, now_microseconds())
                except LookAgain:
                    check_deadline(query)
                finally:
                    self._keep(log)

    def _apply(self, log: LogFile, operation: Commit | Lease | Query) -> Outcome:
        """Carry out one operation on a log that is `ready`; `log.write` must follow."""
        while True:
            now = now_microseconds()
            try:
                if isinstance(operation, Commit):
                    lease = None if operation.fence is None else self._lease_holder(log)
                    return log.commit(operation, now, self.ttl, lease, not self.durable)
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
            raise unavailable(error, "use the lease in", self.leases.folder, lease.context_id) from error

    def _lease_holder(self, log: LogFile) -> str | None:
        try:
            return self.leases.holder(log.stem)
        except OSError as error:
            raise unavailable(error, "use the lease in", self.leases.folder, log.context_id) from error

    # --- groups

    def _execute_group(self, operations: Sequence[Operation], settle: Settle) -> None:
        units: dict[str, _Unit] = {}
        for index, operation in enumerate(operations):
            if isinstance(operation, Listing):
                self.execute((operation,), lambda _, outcome, index=index: settle(index, outcome))  # type: ignore[misc]
                continue
            unit = units.get(operation.context_id)
            if unit is None:
                unit = units[operation.context_id] = _Unit()
            unit.indexes.append(index)
            unit.operations.append(operation)
        waiting: dict[FileLock, list[_Unit]] = {}
        for context_id, unit in units.items():
            if all(isinstance(operation, Query) for operation in unit.operations):
                unit.outcomes = [_outcome_of(self.execute_one, operation) for operation in unit.operations]
                unit.settle_all(settle)
                continue
            unit.found = log = self.log_of(context_id)
            waiting.setdefault(log.file_lock or self._lock_of(log), []).append(unit)
        try:
            if waiting:
                self.access.open(min(unit.operations[0].deadline for units in waiting.values() for unit in units))
        except StateError as error:
            for unit in (unit for units in waiting.values() for unit in units):
                unit.fail_all(error)
                unit.settle_all(settle)
            return
        pause = 0.0
        while waiting:
            if self._round(waiting, settle):
                pause = 0.0
                continue
            # All that is left is held by others: wait for whatever comes free first, holding nothing meanwhile.
            pause = min(pause * 1.5 + _PAUSE, 0.01)
            time.sleep(pause)
            self._give_up_late(waiting, settle)

    def _round(self, waiting: dict[FileLock, list[_Unit]], settle: Settle) -> bool:
        """Commit what can be locked without waiting, up to a number of files. Whether there was any."""
        held: dict[FileLock, list[_Unit]] = {}
        files = 0
        self.folder.look_at_names()
        try:
            for lock in list(waiting):
                try:
                    if not self.access.try_acquire(lock):
                        continue
                except StateError as error:
                    for unit in waiting.pop(lock):
                        unit.fail_all(error)
                        unit.settle_all(settle)
                    continue
                held[lock] = waiting.pop(lock)
                for unit in held[lock]:
                    self._take_in(unit)
                files += len(held[lock])
                if files >= self._most_open // 2:
                    break
            any_held = bool(held)
            self._flush_and_settle(held, settle)
            return any_held
        finally:
            for lock, units in held.items():  # after an exception: images may be ahead of their files, or behind them
                for unit in units:
                    if unit.log is not None:
                        unit.log.forget()
                self._let_go(lock, units)

    def _flush_and_settle(self, held: dict[FileLock, list[_Unit]], settle: Settle) -> None:
        """Flush the files that were written to, and settle the operations on each as soon as it is done."""
        unflushed: set[_Unit] = set()
        if self.durable:
            written = [unit for units in held.values() for unit in units]
            unflushed.update(unit for unit in written if unit.log is not None and not unit.log.is_flushed())
            if self._is_flushed_at_once(unflushed):
                unflushed.clear()
        spent = 0.0
        for lock, units in list(held.items()):
            for unit in units:
                if unit in unflushed:
                    begun = time.monotonic()
                    self._flush_unit(unit)
                    spent += time.monotonic() - begun
                self._after_flush(unit)
            del held[lock]
            self._let_go(lock, units)
            for unit in units:
                unit.settle_all(settle)
        if len(unflushed) > 1:
            self._flushing.took_each(spent / len(unflushed))

    def _let_go(self, lock: FileLock, units: list[_Unit]) -> None:
        for unit in units:
            if unit.log is not None:
                self._keep(unit.log)
                unit.log.lock.release()
        lock.release()

    def _give_up_late(self, waiting: dict[FileLock, list[_Unit]], settle: Settle) -> None:
        now = time.monotonic()
        for lock, units in list(waiting.items()):
            message = f"the lock {lock.path} was held by others until the deadline; nothing was done"
            for unit in units:
                unit.give_up_late(now, StateTimeoutError(message), settle)
            units[:] = [unit for unit in units if unit.operations]
            if not units:
                del waiting[lock]

    def _take_in(self, unit: _Unit) -> None:
        """Write a unit's commits to their file. Its log stays locked until they are flushed."""
        log = unit.found
        assert log is not None
        log.lock.acquire()
        while log.discarded:
            log.lock.release()
            log = self.log_of(log.context_id)
            log.lock.acquire()
        unit.log = log
        try:
            log.ready()
            for operation in unit.operations:
                identity = log.identity
                try:
                    if time.monotonic() >= operation.deadline:
                        check_deadline(operation)
                    if log.image is None:  # after an error
                        log.ready()
                    unit.outcomes.append(self._apply(log, operation))
                except StateError as error:
                    unit.outcomes.append(_for_operation(error, operation))
                unit.ends.append(log.line_end)
                if log.identity != identity:  # what was before is in the new file, or superseded by it
                    unit.ends = [0] * len(unit.ends)
                    unit.written = True
            written = log.write()
            unit.written = unit.written or written > 0
            self._weight += written
        except WriteFailed as failure:
            self._undo(unit, log, failure)
        except StateError as error:
            log.forget_unwritten()
            unit.fail_all(error)

    def _undo(self, unit: _Unit, log: LogFile, failure: WriteFailed) -> None:
        """A write failed: commits whose lines are whole stay, the others are not done."""
        outcomes, unit.outcomes = unit.outcomes, []
        unit.written = True
        for number, operation in enumerate(unit.operations):
            if number < len(outcomes) and unit.ends[number] <= failure.complete:
                unit.outcomes.append(outcomes[number])
            elif isinstance(operation, Query):
                unit.outcomes.append(_outcome_of(lambda query: log.snapshot(query, now_microseconds()), operation))
            else:
                unit.outcomes.append(_for_operation(failure.error, operation))
        try:
            log.ready()
        except StateError as error:
            _make_unknown(unit, error)

    def _flush_unit(self, unit: _Unit) -> None:
        assert unit.log is not None
        try:
            self._flush(unit.log, unit.written)
        except StateError as error:
            _make_unknown(unit, error)

    def _after_flush(self, unit: _Unit) -> None:
        log = unit.log
        if log is not None and log.image is not None and unit.written:
            if self.lazy:
                self._sync_later(log)
            if log.image.log_end >= log.image.rewrite_due and log.image.wants_rewriting():
                self._rewrite(log)

    def _is_flushed_at_once(self, units: set[_Unit]) -> bool:
        """Flush the file system instead of each file, where that is quicker; whether it was done."""
        devices = {unit.log.identity[0] for unit in units if unit.log is not None and unit.log.identity is not None}
        if not (self._flushing.all_at_once(len(units)) and self.folder.holds_all_of(devices)):
            return False
        begun = time.monotonic()
        self._flush_all_at_once(units)
        self._flushing.took_at_once(time.monotonic() - begun)
        return True

    def _flush_all_at_once(self, units: set[_Unit]) -> None:
        folder = self.folder
        number = folder.begin_sync()
        try:
            folder.fs.sync_all(folder.opened)
        except OSError as error:
            for unit in units:
                assert unit.log is not None
                _make_unknown(unit, unit.log.flush_failed(error))
            return
        folder.end_sync(number)
        for unit in units:
            assert unit.log is not None
            unit.log.note_flushed()

    def _lock_of(self, log: LogFile) -> FileLock:
        lock = log.file_lock
        if lock is None:
            lock = log.file_lock = self.access.lock(log.stem)
        return lock

    # --- the cache

    def log_of(self, context_id: str) -> LogFile:
        logs = self._logs
        log = logs.get(context_id)
        if log is None:
            with self._logs_lock:
                log = logs.get(context_id)
                if log is None:
                    log = logs[context_id] = log_file(self.folder, context_id, trusted=self.exclusive)
            return log
        try:  # noqa: SIM105 - suppress() takes longer than all of this
            logs.move_to_end(context_id)
        except KeyError:  # let go of by another thread meanwhile
            pass
        return log

    def cache(self, operations: int) -> CacheStatistics:
        """What the cache holds, and what it was good for in so many operations on contexts."""
        from ..statistics import CacheStatistics

        tally = self.folder.tally
        return CacheStatistics(
            hits=max(0, operations - tally.cache_misses),
            misses=tally.cache_misses,
            evictions=tally.cache_evictions,
            contexts=len(self._logs),
            size_bytes=self._weight,
            limit_bytes=self.cache_bytes,
            open_files=self.folder.open_files,
        )

    def known(self, context_id: str) -> bool:
        return context_id in self._logs

    def _keep(self, log: LogFile) -> None:
        """After an operation, with the log's lock held: keep what is worth it, within bounds."""
        if log.identity is None:
            self._discard(log)
        elif not log.weight and log.image is not None:
            log.weight = log.image.weight()
            self._weight += log.weight
        if self._weight > self.cache_bytes or self.folder.open_files > self._most_open:
            self._shrink(log)

    def _discard(self, log: LogFile) -> None:
        with self._logs_lock:
            if self._logs.get(log.context_id) is log:
                del self._logs[log.context_id]
        log.discarded = True
        log.forget()

    def _shrink(self, current: LogFile) -> None:
        """Let go of what was used longest ago, and close files."""
        if self.folder.open_files > self._most_open:
            goal = self._most_open * 3 // 4
            for log in list(self._logs.values()):
                if self.folder.open_files <= goal:
                    break
                if log is not current and log.reader.fd >= 0 and log.lock.acquire(blocking=False):
                    log.reader.close()
                    log.lock.release()
        if self._weight > self.cache_bytes:
            logs = list(self._logs.values())
            total = 0
            for log in logs:
                image = log.image
                log.weight = 0 if image is None else image.weight()
                total += log.weight
            for log in logs:
                if total <= self.cache_bytes * 3 // 4:
                    break
                if log is not current and log not in self._dirty and log.lock.acquire(blocking=False):
                    total -= log.weight
                    self._discard(log)
                    self.folder.tally.add(cache_evictions=1)
                    log.lock.release()
            self._weight = total

    # --- maintenance

    def repair(self, context_id: str, deadline: float) -> Repair:
        """Save what is intact of a damaged log. Raises ContextNotFoundError, StateUnavailableError."""
        from .logrepair import repair

        self.access.open(deadline)
        log = self.log_of(context_id)
        lock = self._lock_of(log)
        self.access.acquire(lock, deadline, context_id)
        try:
            with log.lock:
                self._discard(log)
                return repair(log)
        finally:
            lock.release()

    def _rewrite(self, log: LogFile) -> None:
        """Write a file without what is superseded. What was committed is in the old one too: no error of a call."""
        try:
            log.rewrite()
            if self.durable:
                log.ready()
                log.flush()
        except StateError as error:
            _logger.warning("%s could not be written anew without superseded data: %s", log.path, error)

    def _sync_later(self, log: LogFile) -> None:
        self._dirty.add(log)
        if self._syncer is None:
            with self._logs_lock:
                if self._syncer is None:
                    this = weakref.ref(self)
                    syncer = threading.Thread(
                        target=_sync_regularly, args=(this, self._stop_syncing), name="agentstate-fsync", daemon=True
                    )
                    syncer.start()  # where that fails, the next commit tries again
                    self._syncer = syncer
                    atexit.register(_sync_now, this, _PATIENCE_AT_EXIT)

    def sync_dirty(self, deadline: float = NEVER) -> None:
        """Flush what was written since the last time, but for what another thread still works on at `deadline`."""
        while self._dirty:
            try:
                log = self._dirty.pop()
            except KeyError:  # another thread took the last one
                return
            if not _lock(log, deadline):
                _logger.error("%s is still being written, and may not survive a power cut", log.path)
                continue
            try:
                log.flush_lazily()
            except StateError as error:
                _logger.error("the newest commits may not survive a power cut: %s", error)
            finally:
                log.lock.release()

    def close(self, deadline: float) -> None:
        """Flush and close everything; what another thread still works on at `deadline` is left to it."""
        self._stop_syncing.set()
        self.sync_dirty(deadline)
        for log in list(self._logs.values()):
            if _lock(log, deadline):
                try:
                    self._discard(log)
                finally:
                    log.lock.release()
        self.access.close(deadline)

    def after_fork(self) -> None:
        """In the child: close our copies of descriptors (the parent's stay open), begin as if nothing was known."""
        for log in self._logs.values():
            log.reader.close()
        self.access.after_fork()
        self._forget_everything()


def _lock(log: LogFile, deadline: float) -> bool:
    """Lock a log, unless another thread holds it until then: one that was interrupted may hold it for ever."""
    if deadline == NEVER:
        return log.lock.acquire()
    return log.lock.acquire(timeout=max(0.0, deadline - time.monotonic()))


def _sync_regularly(layout: weakref.ref[LogLayout], stop: threading.Event) -> None:
    while not stop.wait(_SYNC_EVERY) and _sync_now(layout):
        pass


def _sync_now(layout: weakref.ref[LogLayout], patience: float = NEVER) -> bool:
    """Flush what a layout wrote lazily; false if it is gone. Called at the exit too: not everybody closes storages."""
    alive = layout()
    if alive is not None:
        alive.sync_dirty(time.monotonic() + patience)
    return alive is not None


def _outcome_of(function: Callable[[Any], Outcome], operation: Any) -> Outcome | StateError:
    try:
        return function(operation)
    except StateError as error:
        return error


def _not_done(error: StateOutcomeUnknownError) -> StateUnavailableError:
    """A flush failed on behalf of a commit that changes nothing: that one is not done."""
    reason = str(error).partition(": whether")[0]
    return StateUnavailableError(f"{reason}; nothing was done", context_id=error.context_id)


def _for_operation(error: StateError, operation: Operation) -> StateError:
    """An error that operations share, as that of one of them: each is raised in a place of its own."""
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    own.context_id = getattr(operation, "context_id", None)
    if isinstance(own, StateOutcomeUnknownError) and isinstance(operation, Commit):
        own.commit_id = operation.commit_id
    return own


def _make_unknown(unit: _Unit, error: StateError) -> None:
    """A flush failed: whether any of the commits is stored for good is not known."""
    for number, operation in enumerate(unit.operations):
        if isinstance(operation, Commit) and not isinstance(unit.outcomes[number], StateError):
            unit.outcomes[number] = _for_operation(error, operation)
