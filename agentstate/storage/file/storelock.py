"""The lock on a store as a whole, which each storage object holds as long as it is open."""

from __future__ import annotations

import os
import sys
import time
from typing import Final

from ...errors import StateUnavailableError
from .filesystem import FOLDER, UPDATE, open_for, unavailable
from .folder import Folder
from .locks import LONGEST_PAUSE, SHORTEST_PAUSE, lock_shared, native_locks

_NAME: Final = "store.lock"


class StoreLock:
    """Held alone by an exclusive storage object, else together with others.

    On Unix both a lock file and the folder itself are locked: a lock file can be removed from under its holder, and
    then a second one would be let in; a folder that is removed is another store.
    """

    def __init__(self, path: str, folder: Folder, exclusive: bool) -> None:
        self._path = os.path.join(path, _NAME)
        self._folder = folder
        self._exclusive = exclusive
        self._fds: list[int] = []

    def acquire(self, deadline: float) -> None:
        """Raises StateUnavailableError where the others do not release it until `deadline`."""
        pause = SHORTEST_PAUSE
        while not self._try():
            if time.monotonic() + pause >= deadline:
                raise StateUnavailableError(
                    f"the store {self._folder.path} is in use: another storage object "
                    + ("uses it, so it cannot be had exclusively" if self._exclusive else "holds it exclusively")
                    + "; close that one first, or drop exclusive=True on both sides"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 10 * LONGEST_PAUSE)

    def _try(self) -> bool:
        """Take the lock, if it is free. Raises StateUnavailableError."""
        taken = False
        try:
            self._fds.append(open_for(self._folder.owner, os.open, self._path, UPDATE))
            if sys.platform != "win32":
                self._fds.append(os.open(self._folder.path, FOLDER))
            taken = all(map(self._lock, self._fds)) and self._is_current()
        except OSError as error:
            raise unavailable(error, "lock", self._path) from error
        finally:
            if not taken:
                self.close()
        return taken

    def _lock(self, fd: int) -> bool:
        if self._exclusive:
            return bool(native_locks()[0](fd, blocking=False))
        return lock_shared(fd)

    def _is_current(self) -> bool:
        """Whether the locked file is the one that stands under its name: it may have been removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._fds[0]), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
