"""Locks between threads and between processes: a fixed number of lock files, which are never removed.

Each file is opened once and locked by filelock's `lock_descriptor` (`flock` on Unix): a native lock or an error, never
a marker file that a killed process leaves behind. The system releases the lock when its holder dies, however it dies.
Opening it anew for every operation, as a FileLock does, costs about 60 microseconds; locking what is open costs two.

An exception may come at any moment: a signal handler's, or a RecursionError. No lock outlives the call that took it:

- The lock between threads is an RLock, which knows its owner: releasing it is tried whatever happened before, and does
  nothing unless this thread has it.
- What releases a lock is the first thing in its `finally`, and written in C: Python runs no signal handler before it,
  and it needs no deeper recursion than what took the lock.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar
from zlib import crc32

from ...errors import StateConflictError, StateError, StateTimeoutError
from ...operations import NEVER
from .filesystem import UPDATE, open_for, unavailable
from .folder import Folder
from .lateimports import importing

STRIPES: Final = 64

SHORTEST_PAUSE: Final = 0.0002  # seconds; about as long as a commit takes
LONGEST_PAUSE: Final = 0.01

P = ParamSpec("P")
T = TypeVar("T")

_functions: tuple[Any, Any] | None = None


def native_locks() -> tuple[Any, Any]:
    """filelock's functions, imported late: it takes some 30 ms, and a process that only reads never needs it."""
    global _functions
    if _functions is None:
        with importing:
            from filelock import lock_descriptor, unlock_descriptor

        _functions = lock_descriptor, unlock_descriptor
    return _functions


if sys.platform == "win32":

    def unlocking(fd: int) -> Callable[[], Any]:
        """A function that releases the lock on `fd`."""
        return partial(native_locks()[1], fd)

    def lock_shared(fd: int) -> bool:
        """Lock `fd` together with others, if nobody holds it alone. (Here that is not to be had.)"""
        return True

else:
    import fcntl

    def unlocking(fd: int) -> Callable[[], Any]:
        """A function that releases the lock on `fd`: one written in C."""
        return partial(fcntl.flock, fd, fcntl.LOCK_UN)

    def lock_shared(fd: int) -> bool:
        """Lock `fd` together with others, if nobody holds it alone.

        filelock has no shared lock; this is the one that it takes, shared.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _nothing() -> None:
    """What unlocks a file that was never locked."""


class FileLock:
    """One lock file. At most one thread of one process holds it."""

    __slots__ = ("_closed", "_fd", "_folder", "_identity", "_in_use", "_threads", "_unlock", "path")

    def __init__(self, path: str, folder: Folder) -> None:
        self.path = path
        self._folder = folder
        self._closed = False
        self._fd = -1
        self._identity = (0, 0)
        self._threads = threading.RLock()
        self._in_use = False  # by the thread that has `_threads`
        self._unlock: Callable[[], Any] = _nothing

    def run(self, deadline: float, context_id: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` while the lock is held. It is waited for until `deadline` (`time.monotonic()`).

        Raises StateTimeoutError, StateUnavailableError, and StateConflictError where this very thread holds the lock.
        """
        threads = self._threads
        pause = SHORTEST_PAUSE
        while True:
            try:
                if not threads.acquire(blocking=False) and not threads.acquire(timeout=_seconds_until(deadline)):
                    raise self._timeout(context_id)
                if self._in_use:
                    raise self._entered_again(context_id)
                try:
                    self._in_use = True
                    if self._lock_file():
                        return function(*args, **kwargs)
                finally:
                    self._in_use = False
                    self._unlock()
            finally:
                try:  # noqa: SIM105 - suppress() is Python, and would come before the release
                    threads.release()
                except RuntimeError:  # it was not acquired
                    pass
            # flock queues fairly but knows no timeout, so this asks again and again.
            if time.monotonic() + pause >= deadline:
                raise self._timeout(context_id)
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raises StateUnavailableError where locks do not work, StateConflictError."""
        if not self._threads.acquire(blocking=False):
            return False
        if self._in_use:
            self._threads.release()
            raise self._entered_again(None)
        taken = False
        try:
            taken = self._in_use = self._lock_file()
        finally:
            if not taken:
                self.release()
        return taken

    def release(self) -> None:
        """Release what `try_acquire` took."""
        try:
            self._in_use = False
            self._unlock()
        finally:
            self._threads.release()

    def _lock_file(self) -> bool:
        """With the lock between threads held: lock the file too, if it is free. Raises StateUnavailableError."""
        try:
            return self._lock_current_file()
        except OSError as error:
            if isinstance(error, StateError):
                raise
            raise unavailable(error, "lock", self.path) from error

    def _lock_current_file(self) -> bool:
        lock_descriptor = (_functions or native_locks())[0]
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
            self.close()  # it was removed: another process may have made and locked a new one

    def _open(self) -> None:
        try:
            fd = open_for(self._folder.owner, os.open, self.path, UPDATE)
        except FileNotFoundError:  # the folder of the locks was removed
            self._folder.prepare()
            fd = open_for(self._folder.owner, os.open, self.path, UPDATE)
        self._fd = fd
        # First of all how to unlock it, the identity last: without that, the file is closed and opened again.
        self._unlock = unlocking(fd)
        status = os.fstat(fd)
        self._identity = (status.st_dev, status.st_ino)

    def close_for_good(self, deadline: float) -> None:
        """Close the file once no thread of this process holds the lock; whoever waits for it then gets an error.

        A thread that holds it after `deadline` keeps the file open until the process ends.
        """
        self._closed = True
        if self._threads.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                if not self._in_use:
                    self.close()
            finally:
                self._threads.release()

    def close(self) -> None:
        """Close the file, and so release the lock if this is its last descriptor (a fork's copy is not)."""
        fd, self._fd = self._fd, -1
        self._unlock = _nothing
        if fd >= 0:
            os.close(fd)

    def _timeout(self, context_id: str | None) -> StateTimeoutError:
        return lock_timeout(self.path, context_id)

    def _entered_again(self, context_id: str | None) -> StateConflictError:
        return StateConflictError(
            f"this thread is in the middle of a call that holds the lock {self.path}, so a call from within it (from a "
            "signal handler, for example) cannot wait for it; nothing was done. Call again after the other call has "
            "returned, or from another thread",
            context_id=context_id,
        )


class ThreadLock(FileLock):
    """The same between the threads of the only process that uses the store."""

    __slots__ = ()

    def _lock_current_file(self) -> bool:
        if self._closed:
            raise OSError(errno.EBADF, "this storage was closed")
        return True


class StripedLocks:
    """The locks of a store: one of a fixed number for each context."""

    def __init__(self, path: str, folder: Folder, *, between_processes: bool) -> None:
        self._path = path
        self._folder = folder
        self._kind = FileLock if between_processes else ThreadLock
        self._locks: dict[int, FileLock] = {}

    def of(self, stem: str) -> FileLock:
        """The lock for the context of this `file_stem`."""
        number = crc32(stem.encode()) % STRIPES
        lock = self._locks.get(number)
        if lock is None:  # setdefault: two threads that come here at a time get the same one
            path = os.path.join(self._path, f"{number:02}.lock")
            lock = self._locks.setdefault(number, self._kind(path, self._folder))
        return lock

    def close(self, deadline: float) -> None:
        """Close the files once nobody in this process holds them; from `deadline` on, those that nobody holds."""
        for lock in list(self._locks.values()):
            lock.close_for_good(deadline)

    def abandon(self) -> None:
        """In the child of a fork: close the copies of the files; the locks stay the parent's."""
        for lock in self._locks.values():
            with suppress(OSError):
                lock.close()


def _seconds_until(deadline: float) -> float:
    if deadline >= NEVER:
        return threading.TIMEOUT_MAX
    return max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))


def lock_timeout(path: str, context_id: str | None) -> StateTimeoutError:
    return StateTimeoutError(
        f"the lock {path} was held by others until the deadline; nothing was done", context_id=context_id
    )
