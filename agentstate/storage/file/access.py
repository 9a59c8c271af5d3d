"""Who may use a folder now: its preparation, the lock on the store as a whole, and those of single files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import StateUnavailableError
from .folder import LOCKS, Folder
from .locks import FileLock, StoreLock, StripedLocks


class Access:
    """The way into a folder, for all operations of one storage object."""

    def __init__(self, folder: Folder, *, exclusive: bool) -> None:
        self.folder = folder
        self.exclusive = exclusive
        self._begin()

    def _begin(self) -> None:
        locks = self.folder.file(LOCKS)
        self.is_open = False  # whether `open` has succeeded
        self._opening = threading.Lock()
        self._store = StoreLock(locks, self.exclusive)
        self._striped = StripedLocks(locks, between_processes=not self.exclusive)

    def open(self, deadline: float) -> None:
        """Make the folder and take the lock on the store. Raises StateUnavailableError."""
        if self.is_open:
            return
        with self._opening:
            if not self.is_open:
                self.folder.prepare()
                self._store.acquire(deadline)
                self.is_open = True

    def lock(self, stem: str) -> FileLock:
        """The lock for the file of this name, without suffix."""
        return self._striped.of(stem)

    def acquire(self, lock: FileLock, deadline: float, context_id: str) -> None:
        """Wait for a lock. Raises StateTimeoutError, StateUnavailableError."""
        if not self.try_acquire(lock):
            lock.acquire(deadline, context_id)

    def try_acquire(self, lock: FileLock) -> bool:
        """Take a lock if it is free. Raises StateUnavailableError."""
        try:
            return lock.try_acquire()
        except StateUnavailableError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        # The folder of the locks is gone. Is all of it?
        self.folder.prepare()
        return lock.try_acquire()

    @contextmanager
    def holding(self, stem: str) -> Iterator[bool]:
        """The lock for the file of this name, if it is free now: says whether it is held."""
        lock = self.lock(stem)
        if not self.try_acquire(lock):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def close(self, deadline: float) -> None:
        """Let go of everything, once no thread holds a lock; after `deadline`, of what is not held."""
        self.is_open = False
        self._striped.close(deadline)
        self._store.close()
        self.folder.close()

    def after_fork(self) -> None:
        """In the child: close our copies of the descriptors. The locks stay the parent's, and we hold none."""
        self._striped.abandon()
        self._store.close()
        self.folder.after_fork()
        self._begin()
