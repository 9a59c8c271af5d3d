"""The folder of a file store: whether it is there, and whether what was created in it is on disk."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from heapq import nsmallest
from typing import Final

from ...errors import StateConfigError, StateUnavailableError
from ..tally import Tally
from .filesystem import FOLDER, FOLDER_MODE, FileSystem, system_name, unavailable

LOCKS: Final = ".locks"
LEASES: Final = ".leases"

_TICK: Final = 50_000_000  # nanoseconds; file systems count time in steps of up to 10 ms

_NAMES_AT_A_TIME: Final = 8192
_LISTINGS_AT_A_TIME: Final = 8


class Folder:
    """A folder with the files of contexts, and beside them those of locks and leases."""

    def __init__(self, path: str, fs: FileSystem, tally: Tally) -> None:
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            coding = sys.getfilesystemencoding()
            raise StateConfigError(
                f"storage_dir {path!r} cannot be written in {coding}, this locale's encoding"
            ) from error
        self.path = os.path.abspath(path)
        self.fs = fs
        self.tally = tally
        self.opened = -1  # a descriptor held since before the first write: errors are told to those who were there
        self._identity: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self.names: int | None = None  # when they changed last, if that is known
        self._unsynced: set[str] = set()  # folders in which others were made, perhaps not for good yet
        self.open_files = 0  # of contexts
        self.syncs_begun = 0
        self.syncs_done = 0

    def file(self, name: str) -> str:
        return f"{self.path}{os.sep}{system_name(name)}"

    def prepare(self) -> None:
        """Make the folder, if need be, and those in it. Raises StateUnavailableError."""
        if self._identity is not None:
            self.check_there()
        self._unsynced.add(os.path.dirname(self.path))  # a process that made the folder may not have got further
        try:
            self._make(self.path)
            self._make(self.file(LOCKS))
            self._make(self.file(LEASES))
            for parent in list(self._unsynced):
                with suppress(PermissionError):  # what may not be listed cannot be opened
                    self.fs.sync_folder(parent)
                self._unsynced.discard(parent)
            self._found(self.fs.follow(self.path))
            if self.opened < 0 and os.name != "nt":
                self.opened = self.fs.open(self.path, FOLDER)
        except OSError as error:
            raise unavailable(error, "use the storage folder", self.path) from error

    def _make(self, path: str, *, has_parent: bool = False) -> None:
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
            self._make(path, has_parent=True)
        else:
            self._unsynced.add(parent)

    def _found(self, status: os.stat_result) -> None:
        """Note which folder stands under the path now."""
        identity = status.st_dev, status.st_ino
        if identity != self._identity:
            self.close()
        self._identity = identity

    def look_at_names(self) -> None:
        """Note when the folder changed last, so that nothing about names needs to be looked up until it does again."""
        try:
            changed = self.fs.follow(self.path).st_mtime_ns
        except OSError:
            self.names = None
        else:
            # A change within the same tick of the clock would not be seen.
            self.names = changed if changed < time.time_ns() - _TICK else None

    def check_there(self) -> None:
        """Tell a file that does not exist from a folder that is gone. Raises StateUnavailableError.

        A folder that nobody has written to may be absent: then there are no contexts.
        """
        try:
            status = self.fs.follow(self.path)
        except FileNotFoundError as error:
            if self._identity is None:
                return
            raise StateUnavailableError(
                f"the storage folder {self.path} has disappeared; bring it back (is its disk mounted?) or restart",
            ) from error
        except OSError as error:
            raise unavailable(error, "look into the storage folder", self.path) from error
        if not stat.S_ISDIR(status.st_mode):
            not_one = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            raise unavailable(not_one, "use the storage folder", self.path) from not_one
        if self._identity is not None:
            self._found(status)

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


class NamePages:
    """Pages of the names in a folder, in their order. The cursor of a page is the last name of the one before.

    A folder itself has no order, so every so many names it is looked through as a whole; what is needed of the names
    until then is kept in memory, for a few listings at a time.
    """

    def __init__(self, folder: Folder, suffixes: tuple[str, ...]) -> None:
        self._folder = folder
        self._suffixes = suffixes
        self._known: OrderedDict[str, tuple[list[str], bool]] = OrderedDict()  # by cursor: what follows; is that all?

    def page(self, cursor: str, size: int) -> tuple[list[str], str | None]:
        """Names with one of the suffixes, and the next cursor. Raises StateUnavailableError."""
        known = self._known.pop(cursor, None)
        if known is None:
            names = self._look(cursor)
            known = names, len(names) < _NAMES_AT_A_TIME
        names, complete = known
        page, rest = names[:size], names[size:]
        if rest:
            self._known[page[-1]] = rest, complete
            while len(self._known) > _LISTINGS_AT_A_TIME:
                self._known.popitem(last=False)
        return page, None if complete and not rest else page[-1]

    def _look(self, cursor: str) -> list[str]:
        folder = self._folder
        try:
            names = folder.fs.names(folder.path)
            wanted = (name for name in names if name > cursor and name.endswith(self._suffixes))
            return nsmallest(_NAMES_AT_A_TIME, wanted)
        except FileNotFoundError:
            folder.check_there()
            return []
        except OSError as error:
            raise unavailable(error, "list", folder.path) from error
