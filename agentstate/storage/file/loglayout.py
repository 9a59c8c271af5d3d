"""The layout "log": one append-only log file per context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import StateError
from ...operations import Listing, Operation, Outcome
from ..base import Settle, check_deadline
from .access import Access
from .folder import LEASES
from .lazyflush import lock_until
from .leases import Leases
from .logcache import LogCache
from .loggroup import LogGroups
from .loglisting import LogListing
from .logoperations import LogOperations

if TYPE_CHECKING:
    from ..statistics import CacheStatistics
    from .logrepair import Repair


class LogLayout:
    """The log files of one folder."""

    def __init__(self, access: Access, *, ttl: float | None, fsync: str, cache_bytes: int) -> None:
        self.access = access
        self.folder = access.folder
        self._ttl = ttl
        self._fsync = fsync
        self._cache_bytes = cache_bytes
        self._begin()

    def _begin(self) -> None:
        """As at first. (In the child of a fork too, where threads and their locks are not.)"""
        leases = Leases(self.folder.file(LEASES), self.folder)
        self.cache = LogCache(self.folder, self._cache_bytes, trusted=self.access.exclusive)
        self._operations = LogOperations(self.access, leases, self.cache, ttl=self._ttl, fsync=self._fsync)
        self._groups = LogGroups(self._operations)
        self._listing = LogListing(self.access, leases)

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        on_contexts = []
        for index, operation in enumerate(operations):
            if len(operations) > 1 and not isinstance(operation, Listing):
                on_contexts.append((index, operation))
                continue
            outcome: Outcome | StateError
            try:
                outcome = self.execute_one(operation)
            except StateError as error:
                outcome = error
            settle(index, outcome)
        self._groups.execute(on_contexts, settle)

    def execute_one(self, operation: Operation) -> Outcome:
        """`execute` for one operation, whose error is raised."""
        if isinstance(operation, Listing):
            check_deadline(operation)
            return self._listing.page(operation)
        return self._operations.carry_out(operation)

    def cache_statistics(self, operations: int) -> CacheStatistics:
        """What the cache holds, and what it was good for in so many operations on contexts."""
        return self.cache.statistics(operations)

    def repair(self, context_id: str, deadline: float) -> Repair:
        """Save what is intact of a damaged log. Raises ContextNotFoundError, StateUnavailableError."""
        self.access.open(deadline)
        lock = self._operations.lock_of(self.cache.log_of(context_id))
        return lock.run(deadline, context_id, self._repair, context_id)

    def _repair(self, context_id: str) -> Repair:
        from .logrepair import repair

        log = self.cache.log_of(context_id)
        with log.lock:
            self.cache.discard(log)
            return repair(log)

    def close(self, deadline: float) -> None:
        """Flush and close everything; what another thread still works on at `deadline` is left to it."""
        if self._operations.lazy is not None:
            self._operations.lazy.close(deadline)
        for log in self.cache.logs():
            if lock_until(log, deadline):
                try:
                    self.cache.discard(log)
                finally:
                    log.lock.release()
        self.access.close(deadline)

    def after_fork(self) -> None:
        """In the child: close our copies of descriptors (the parent's stay open), begin as if nothing was known."""
        for log in self.cache.logs():
            log.reader.close()
        self.access.after_fork()
        self._begin()
