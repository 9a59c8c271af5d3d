"""Locks between threads and between processes: a fixed number of lock files, never unlinked.

Each file is opened once and locked by filelock's `lock_descriptor` (`flock` on Unix): a native lock or an error, never
a marker file that a killed process leaves behind. The system gives the lock free when its holder dies, however it dies.
Opening it anew for every operation, as a FileLock does, costs about 60 microseconds; locking what is open costs two.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any, Final
from zlib import crc32

from ...errors import StateTimeoutError, StateUnavailableError
from ...operations import NEVER
from .filesystem import FILE_MODE, UPDATE, unavailable

STRIPES: Final = 64

_SHORTEST_PAUSE: Final = 0.0002  # seconds; about as long as a commit takes
_LONGEST_PAUSE: Final = 0.01

_functions: tuple[Any, Any] | None = None


def _native() -> tuple[Any, Any]:
    """filelock's functions, imported late: it takes some 30 ms, and who only reads never needs it."""
    global _functions
    if _functions is None:
        from filelock import lock_descriptor, unlock_descriptor

        _functions = lock_descriptor, unlock_descriptor
    return _functions


class FileLock:
    """One lock file. At most one thread of one process holds it."""

    __slots__ = ("_closed", "_fd", "_identity", "_thread_lock", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._closed = False
        self._fd = -1
        self._identity = (0, 0)
        self._thread_lock = threading.Lock()

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raises StateUnavailableError where locks do not work."""
        if not self._thread_lock.acquire(blocking=False):
            return False
        return self._try_file()

    def acquire(self, deadline: float, context_id: str | None = None) -> None:
        """Wait for the lock until `deadline`, a reading of `time.monotonic()`. Raises StateTimeoutError."""
        patience = deadline - time.monotonic() if deadline < NEVER else threading.TIMEOUT_MAX
        if not self._thread_lock.acquire(timeout=max(0.0, min(patience, threading.TIMEOUT_MAX))):
            raise _timeout(self.path, context_id)
        pause = _SHORTEST_PAUSE
        while not self._try_file():
            # flock queues fairly but knows no timeout, so this asks again and again.
            if time.monotonic() + pause >= deadline:
                raise _timeout(self.path, context_id)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            if not self._thread_lock.acquire(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))):
                raise _timeout(self.path, context_id)

    def _try_file(self) -> bool:
        """With the thread's lock held: take the file's too, or let go of both."""
        taken = False
        try:
            taken = self._lock_current_file()
        except OSError as error:
            raise unavailable(error, "lock", self.path) from error
        finally:
            if not taken:
                self._thread_lock.release()
        return taken

    def _lock_current_file(self) -> bool:
        lock_descriptor = (_functions or _native())[0]
        while True:
            if self._closed:
                raise OSError(errno.EBADF, "this storage was closed")
            if self._fd < 0:
                self._open()
            if not lock_descriptor(self._fd, blocking=False):
                return False
            try:
                now = os.stat(self.path)
            except FileNotFoundError:
                now = None
            if now is not None and (now.st_dev, now.st_ino) == self._identity:
                return True
            self.close()  # somebody removed the file: the lock guards no name any more

    def _open(self) -> None:
        self._fd = os.open(self.path, UPDATE, FILE_MODE)
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)

    def release(self) -> None:
        try:
            _native()[1](self._fd)
        finally:
            self._thread_lock.release()

    def close_for_good(self, deadline: float) -> None:
        """Close the file once no thread of this process holds the lock. Who waits for it then gets an error.

        Who holds it after `deadline` keeps the file, until the process ends: a thread that is still at work, or one
        that a KeyboardInterrupt took away between locking and what would have unlocked.
        """
        self._closed = True
        if self._thread_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                self.close()
            finally:
                self._thread_lock.release()

    def close(self) -> None:
        """Close the file, and so let go of the lock if this is its last descriptor (a fork's copy is not)."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ThreadLock(FileLock):
    """The same between the threads of the only process that uses the store."""

    __slots__ = ()

    def _lock_current_file(self) -> bool:
        if self._closed:
            raise OSError(errno.EBADF, "this storage was closed")
        return True

    def release(self) -> None:
        self._thread_lock.release()


class StripedLocks:
    """The locks of a store: one of a fixed number for each file name."""

    def __init__(self, folder: str, *, between_processes: bool) -> None:
        self._folder = folder
        self._kind = FileLock if between_processes else ThreadLock
        self._locks: dict[int, FileLock] = {}

    def of(self, stem: str) -> FileLock:
        """The lock for the file of this name, without suffix."""
        number = crc32(stem.encode()) % STRIPES
        lock = self._locks.get(number)
        if lock is None:  # of two threads that come here at a time, one wins
            lock = self._locks.setdefault(number, self._kind(os.path.join(self._folder, f"{number:02}.lock")))
        return lock

    def close(self, deadline: float) -> None:
        """Close the files once nobody in this process holds them; from `deadline` on, those that nobody does."""
        for lock in list(self._locks.values()):
            lock.close_for_good(deadline)

    def abandon(self) -> None:
        """In the child of a fork: close the copies of the files; the locks stay the parent's."""
        for lock in self._locks.values():
            lock.close()


class StoreLock:
    """Held by each storage object as long as it is open: alone where it is exclusive, else together with others."""

    def __init__(self, folder: str, exclusive: bool) -> None:
        self._path = os.path.join(folder, "store.lock")
        self._exclusive = exclusive
        self._fd = -1

    def acquire(self, deadline: float) -> None:
        """Raises StateUnavailableError where the others do not let go until `deadline`."""
        pause = _SHORTEST_PAUSE
        while not self._try():
            if time.monotonic() + pause >= deadline:
                raise StateUnavailableError(
                    f"the store {os.path.dirname(os.path.dirname(self._path))} is in use: another storage object "
                    + ("uses it, so it cannot be had exclusively" if self._exclusive else "holds it exclusively")
                    + "; close that one first, or drop exclusive=True on both sides"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 10 * _LONGEST_PAUSE)

    def _try(self) -> bool:
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, UPDATE, FILE_MODE)
            if self._exclusive:
                return bool(_native()[0](self._fd, blocking=False))
            try:
                import fcntl
            except ImportError:  # Windows: other storage objects are not kept away there
                return True
            try:
                # filelock has no shared lock; this is the one it takes on Unix, shared.
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        except OSError as error:
            raise unavailable(error, "lock", self._path) from error
        return True

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _timeout(path: str, context_id: str | None) -> StateTimeoutError:
    return StateTimeoutError(
        f"the lock {path} was held by others until the deadline; nothing was done", context_id=context_id
    )
