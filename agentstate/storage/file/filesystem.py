"""The few calls to the file system through which all of the file backend's data goes.

One thin object, so that a test can put itself in between: fail the nth call, record a trace, cut a write short. Lock
files are the exception (`agentstate.storage.file.locks`): they hold no data.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeAlias

from ...errors import StateUnavailableError
from .lateimports import importing

_ABSENT_ON_WINDOWS: Final = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK")
_ALWAYS: Final = sum(getattr(os, name, 0) for name in _ABSENT_ON_WINDOWS) | getattr(os, "O_BINARY", 0)

READ: Final = os.O_RDONLY | _ALWAYS
APPEND: Final = os.O_RDWR | os.O_APPEND | _ALWAYS
"""For a log: read anywhere, write at the end only. Never follows a symbolic link, and never waits for a FIFO."""
CREATE_NEW: Final = APPEND | os.O_CREAT | os.O_EXCL
UPDATE: Final = os.O_RDWR | os.O_CREAT | _ALWAYS

FOLDER: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0)
"""For the storage folder, which may be a symbolic link to one."""

NEW: Final = ".new"
"""What is appended to the name of a file while it is written as a whole."""

_UTF8: Final = sys.getfilesystemencoding().lower() == "utf-8"

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700


def _read_at(fd: int, size: int, offset: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


class FileSystem:
    """The real one. Every method raises OSError as the system call does; `write` may write less than it was given."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    write = staticmethod(os.write)
    truncate = staticmethod(os.truncate)
    stat = staticmethod(os.lstat)
    descriptor_stat = staticmethod(os.fstat)
    follow = staticmethod(os.stat)
    replace = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)
    make_folder = staticmethod(os.mkdir)
    change_mode = staticmethod(os.chmod)

    read_at = staticmethod(_read_at if sys.platform == "win32" else os.pread)

    if sys.platform == "darwin":

        @staticmethod
        def sync(fd: int) -> None:
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # on macOS, fsync leaves the data in the drive's own cache

    elif hasattr(os, "fdatasync"):
        # What fsync adds are the times. The size is data needed to read the file, which fdatasync does write.
        sync = staticmethod(os.fdatasync)
    else:
        sync = staticmethod(os.fsync)

    def sync_folder(self, path: str) -> None:
        """Make what was created, renamed and removed in a folder survive power loss."""
        if os.name == "nt":  # folders cannot be opened there
            return
        fd = os.open(path, FOLDER)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_all(self, fd: int) -> None:
        """Write everything of the file system of `fd` to disk. Only where `can_sync_all`."""
        libc, last_error = _libc()
        if libc.syncfs(fd) != 0:
            raise OSError(last_error(), os.strerror(last_error()))

    @staticmethod
    def most_open_files() -> int:
        """How many files of contexts may be open at a time: half of what this process may have."""
        try:
            import resource

            allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        except ImportError:  # Windows
            allowed = 512
        return max(16, min(2048, allowed // 2 if allowed > 0 else 2048))

    @staticmethod
    def names(path: str) -> Iterator[str]:
        """The names in a folder, in no order."""
        with os.scandir(path) as entries:
            for entry in entries:
                yield name_as_text(entry.name)


def system_name(name: str) -> str:
    """The name of a file as the functions of the system want it: it is UTF-8 on the disk in every locale."""
    return name if _UTF8 or name.isascii() else os.fsdecode(name.encode("utf-8", "surrogateescape"))


def name_as_text(name: str) -> str:
    """The inverse of `system_name`."""
    return name if _UTF8 or name.isascii() else os.fsencode(name).decode("utf-8", "surrogateescape")


@cache
def _libc() -> tuple[Any, Callable[[], int]]:
    with importing:
        import ctypes  # only used to flush many files at once

    return ctypes.CDLL(None, use_errno=True), ctypes.get_errno


@cache
def can_sync_all() -> bool:
    """Whether `sync_all` tells about errors: Linux 5.8 and newer, for descriptors opened before what they cover."""
    if sys.platform != "linux":
        return False
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return version >= (5, 8) and hasattr(_libc()[0], "syncfs")


Owner: TypeAlias = tuple[int, int] | None
"""User and group to whom created files are given; None where that is who creates them."""


def open_for(owner: Owner, open_file: Callable[[str, int, int], int], path: str, flags: int) -> int:
    """Open a file of the store; one that this creates belongs to `owner`. Raises OSError, and then creates nothing."""
    fd = open_file(path, flags, FILE_MODE)
    if owner is not None:
        status = os.fstat(fd)
        try:
            if status.st_uid != owner[0]:
                os.fchown(fd, *owner)
        except OSError:
            os.close(fd)
            if status.st_size == 0:
                os.unlink(path)
            raise
    return fd


def write_whole(
    fs: FileSystem, path: str, pieces: Iterable[bytes], *, owner: Owner, flush: bool = True
) -> os.stat_result:
    """Atomically replace `path` by a file with this content, flushed before it gets the name.

    Hold the lock of `path`: whoever writes it writes the same temporary file beside it. Raises OSError, and then
    `path` is as it was.
    """
    temporary = path + NEW
    try:
        # Never into a file that is there already: it may be open elsewhere, or be a link to something else.
        with suppress(FileNotFoundError):
            fs.unlink(temporary)
        fd = open_for(owner, fs.open, temporary, CREATE_NEW)
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[fs.write(fd, view) :]
            if flush:
                fs.sync(fd)
            status = fs.descriptor_stat(fd)
        finally:
            fs.close(fd)
        fs.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            fs.unlink(temporary)
        raise
    return status


# --- errors in words ------------------------------------------------------------------------------------------------

_ADVICE: Final = {
    errno.ENOSPC: "free some space on that disk",
    getattr(errno, "EDQUOT", -1): "raise the disk quota, or free some space",
    errno.EROFS: "it is mounted read-only; remount it, or set storage_dir to a place that can be written",
    errno.EACCES: "let this user read and write it, or set storage_dir to another folder",
    errno.EPERM: "let this user read and write it, or set storage_dir to another folder",
    errno.EMFILE: "this process has too many open files; raise its limit (ulimit -n)",
    errno.ENFILE: "this machine has too many open files",
    errno.EIO: "the disk reports an error; see the system's log",
    errno.ENOTDIR: "a part of that path is a file; set storage_dir to a folder",
    errno.ELOOP: "it is a symbolic link, and agentstate writes through none; put the file itself there",
    errno.ENOSYS: "this file system has no working locks (flock); put storage_dir on a local disk",
    errno.ENOLCK: "this file system has no working locks (flock); put storage_dir on a local disk",
    getattr(errno, "EOPNOTSUPP", -2): "this file system has no working locks (flock); put storage_dir on a local disk",
}


def unavailable(error: OSError, doing: str, path: str, context_id: str | None = None) -> StateUnavailableError:
    """What to raise from `error`: nothing was done, and this is what to do about it."""
    reason = error.strerror or type(error).__name__
    advice = _ADVICE.get(error.errno or 0)
    message = f"could not {doing} {path}: {reason}" + (f" ({advice})" if advice else "")
    return StateUnavailableError(f"{message}; nothing was done", context_id=context_id)
