"""Who may use a folder now: its preparation, the lock on the store as a whole, and those of single contexts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .filesystem import NEW
from .folder import LOCKS, Folder
from .locks import FileLock, StripedLocks, native_locks
from .storelock import StoreLock

_logger = logging.getLogger("agentstate.storage.file")


class Access:
    """The way into a folder, for all operations of one storage object."""

    def __init__(self, folder: Folder, *, exclusive: bool) -> None:
        self.folder = folder
        self.exclusive = exclusive
        self._begin()

    def _begin(self) -> None:
        path = self.folder.file(LOCKS)
        self.is_open = False  # whether `open` has succeeded
        self._opening = threading.Lock()
        self._store = StoreLock(path, self.folder, self.exclusive)
        self._striped = StripedLocks(path, self.folder, between_processes=not self.exclusive)

    def open(self, deadline: float) -> None:
        """Create the folder and take the lock on the store. Raises StateUnavailableError."""
        if self.is_open:
            return
        native_locks()  # imported before a lock is held, since it takes long
        with self._opening:
            if not self.is_open:
                self.folder.prepare()
                self._store.acquire(deadline)
                self.is_open = True

    def lock(self, stem: str) -> FileLock:
        """The lock for the context of this `file_stem`, whatever layout it is kept in."""
        return self._striped.of(stem)

    def remove_unfinished(self, suffix: str, stem_of: Callable[[str], str]) -> None:
        """Remove what killed processes wrote and did not get to give its name. Raises StateUnavailableError, OSError.

        `suffix`: of the names that finished files have. `stem_of`: from a name without it to the context's `file_stem`.
        """
        folder = self.folder
        suffix += NEW
        for name in [name for name in folder.fs.names(folder.path) if name.endswith(suffix)]:
            lock = self.lock(stem_of(name.removesuffix(suffix)))
            if not lock.try_acquire():
                continue
            try:
                folder.fs.unlink(folder.file(name))
            except FileNotFoundError:  # it was finished meanwhile
                pass
            except OSError as error:
                _logger.warning("%s, left by a killed process, could not be removed: %s", folder.file(name), error)
            finally:
                lock.release()

    def close(self, deadline: float) -> None:
        """Release everything, once no thread holds a lock; after `deadline`, what is not held."""
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
