"""The folder of a file store: whether it is there, and whether what was created in it is on disk."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from contextlib import suppress
from typing import Final

from ...errors import StateUnavailableError
from ..tally import Tally
from .filesystem import FOLDER, FOLDER_MODE, FileSystem, Owner, system_name, unavailable

LOCKS: Final = ".locks"
LEASES: Final = ".leases"

_TICK: Final = 50_000_000  # nanoseconds; file systems count time in steps of up to 10 ms

_user_id: Final = getattr(os, "geteuid", lambda: -1)
_ROOT: Final = 0


class Folder:
    """A folder with the files of contexts, and beside them those of locks and leases.

    It is known by its device and inode number from the first look on. Another folder under the same path (its disk is
    not mounted, it was moved away) is another store: an error until a new storage object is made.
    """

    def __init__(self, path: str, fs: FileSystem, tally: Tally) -> None:
        self.path = os.path.abspath(path)
        self.fs = fs
        self.tally = tally
        self.opened = -1  # held since before the first write: the system reports errors to descriptors opened before
        self.owner: Owner = None  # to whom files that are created are given
        self._identity: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self.names: int | None = None  # when they changed last, if that is known
        self._unsynced: set[str] = set()  # folders in which others were made that may not be on disk yet
        self.open_files = 0  # of contexts
        self.syncs_begun = 0
        self.syncs_done = 0

    def file(self, name: str) -> str:
        return f"{self.path}{os.sep}{system_name(name)}"

    # --- the folder itself

    def prepare(self) -> None:
        """Create the folder and those in it, unless they exist. Raises StateUnavailableError."""
        self.check()
        self._unsynced.add(os.path.dirname(self.path))  # a process that made the folder may not have got further
        try:
            self._make(self.path)
            self.check()
            self._check_owner()
            for path in (self.file(LOCKS), self.file(LEASES)):
                self._make(path, owner=self.owner)
            for parent in list(self._unsynced):
                with suppress(PermissionError):  # what may not be listed cannot be opened
                    self.fs.sync_folder(parent)
                self._unsynced.discard(parent)
            if self.opened < 0 and os.name != "nt":
                self.opened = self.fs.open(self.path, FOLDER)
        except OSError as error:
            if isinstance(error, StateUnavailableError):
                raise
            raise unavailable(error, "use the storage folder", self.path) from error

    def _make(self, path: str, *, owner: Owner = None, has_parent: bool = False) -> None:
        parent = os.path.dirname(path)
        try:
            self.fs.make_folder(path, FOLDER_MODE)
        except FileExistsError:
            if not stat.S_ISDIR(self.fs.follow(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        except FileNotFoundError:
            if has_parent:  # which takes no folders, as /proc does
                raise
            self._make(parent)
            self._make(path, owner=owner, has_parent=True)
        else:
            if owner is not None:
                try:
                    os.chown(path, *owner)
                except OSError:
                    os.rmdir(path)
                    raise
            self._unsynced.add(parent)

    def _check_owner(self) -> None:
        """Refuse to be the first to use the folder of another user, who could not open what is created in it."""
        if os.name == "nt" or os.path.lexists(self.file(LOCKS)):
            return
        owner, user = self.fs.follow(self.path).st_uid, _user_id()
        if user not in (_ROOT, owner) and owner != _ROOT:
            raise StateUnavailableError(
                f"the storage folder {self.path} belongs to the user with the id {owner}, who could not open what this "
                f"process (user id {user}) creates in it; run this as that user, or set storage_dir to another folder; "
                "nothing was done"
            )

    def check(self) -> os.stat_result | None:
        """See that the folder is the one that it was; None where it does not exist and never did.

        A folder that nobody has written to may be absent: then there are no contexts. Raises StateUnavailableError.
        """
        try:
            status = self.fs.follow(self.path)
        except FileNotFoundError as error:
            if self._identity is None:
                return None
            raise StateUnavailableError(
                f"the storage folder {self.path} has disappeared; bring it back (is its disk mounted?) or restart; "
                "nothing was done",
            ) from error
        except OSError as error:
            raise unavailable(error, "look into the storage folder", self.path) from error
        if not stat.S_ISDIR(status.st_mode):
            not_one = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            raise unavailable(not_one, "use the storage folder", self.path) from not_one
        identity = status.st_dev, status.st_ino
        if self._identity is None:
            self._identity = identity
            if _user_id() == _ROOT and status.st_uid != _ROOT:
                self.owner = status.st_uid, status.st_gid
        elif identity != self._identity:
            raise StateUnavailableError(
                f"the storage folder {self.path} is not the one that it was: its disk is not mounted, or another "
                "folder has taken its place; bring it back, or restart to use this one; nothing was done"
            )
        return status

    # --- its names

    def look_at_names(self) -> None:
        """Note when the folder changed last, so that nothing about names needs to be looked up until it does again.

        Raises StateUnavailableError where it is another folder.
        """
        try:
            status: os.stat_result | None = self.fs.follow(self.path)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            status = self.check()
        changed = None if status is None else status.st_mtime_ns
        # A change within the same tick of the clock would not be seen.
        self.names = changed if changed is not None and changed < time.time_ns() - _TICK else None

    def sync(self) -> None:
        """Make what was created, renamed and removed in the folder survive power loss. Raises OSError."""
        number = self.begin_sync()
        self.fs.sync_folder(self.path)
        self.end_sync(number)

    def holds_all_of(self, devices: set[int]) -> bool:
        """Whether flushing the file system of `opened` flushes files on these devices."""
        return self.opened >= 0 and self._identity is not None and devices == {self._identity[0]}

    def begin_sync(self) -> int:
        """Number a flush: it covers what was done in the folder while `syncs_begun` was lower."""
        with self._lock:
            self.syncs_begun += 1
            return self.syncs_begun

    def end_sync(self, number: int) -> None:
        """The flush with this number succeeded."""
        with self._lock:
            self.syncs_done = max(self.syncs_done, number)

    def close(self) -> None:
        fd, self.opened = self.opened, -1
        if fd >= 0:
            with suppress(OSError):
                self.fs.close(fd)

    def after_fork(self) -> None:
        """In the child of a fork."""
        self._lock = threading.Lock()
        self.open_files = 0
        self.close()
