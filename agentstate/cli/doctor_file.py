"""The checks of doctor on the folder of the file storage."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Final

from ..keys import document_stem, file_stem
from ..storage.file.filesystem import FileSystem
from . import console
from .findings import Finding, note, ok, problem, warning

_NETWORK: Final = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "ocfs2", "gfs2"),
        *("fuse.sshfs", "fuse.glusterfs", "fuse.cephfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "davfs"),
        *("vboxsf", "vmhgfs", "fuse.vmhgfs-fuse", "virtiofs"),
    )
)
_VOLATILE: Final = frozenset(("tmpfs", "ramfs"))
_OWN_FOLDERS: Final = (".locks", ".leases")
_LITTLE_SPACE: Final = 100 * 1000 * 1000
_MOST_FILES: Final = 200_000
"""How many names of files are checked."""


def look_at_folder(path: str, options: dict[str, Any]) -> Iterator[Finding]:
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        yield from _look_at_parent(path)
        return
    except OSError as error:
        yield problem("folder", f"{path}: {error.strerror}", "let this user read and write it")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield problem("folder", f"{path} is not a folder", "set storage_dir to a folder")
        return
    yield from _permissions(path, status)
    yield from _disk(path)
    yield from _durability(options)
    yield from _files(path, str(options.get("layout", "log")))


def _look_at_parent(path: str) -> Iterator[Finding]:
    parent = os.path.dirname(path)
    while not os.path.exists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        yield problem(
            "folder", f"{path} cannot be created: {parent} is not a folder", "set storage_dir to another folder"
        )
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield problem(
            "folder", f"{path} cannot be created: {parent} is not writable", "give this user write permission"
        )
    else:
        yield note("folder", f"{path} does not exist yet: the first write creates it")
        yield from _disk(parent)


def _permissions(path: str, status: os.stat_result) -> Iterator[Finding]:
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield problem("folder", f"{path} is not readable and writable for this user", "change its owner or mode")
        return
    mode = stat.S_IMODE(status.st_mode)
    if os.name != "nt" and mode & 0o077:
        yield warning("folder", f"{path} is accessible to other users (mode {mode:o})", f"chmod 700 {path}")
    else:
        yield ok("folder", f"{path} is readable and writable" + ("" if os.name == "nt" else ", for this user only"))


def _disk(path: str) -> Iterator[Finding]:
    kind = _file_system_of(path)
    if kind in _NETWORK:
        yield problem(
            "file system", f"{path} is on {kind}, a network file system, whose locks are not reliable",
            "use a local disk, or Valkey to share conversations between machines",
        )  # fmt: skip
    elif kind in _VOLATILE:
        yield warning("file system", f"{path} is on {kind}, which is lost when the machine stops", "use a disk")
    elif kind:
        yield ok("file system", f"{kind}, a local file system")
    if not hasattr(os, "statvfs"):
        return
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    if free < _LITTLE_SPACE:
        yield problem("space", f"only {console.size_text(free)} free", "free some space on this disk")
    elif disk.f_files and disk.f_favail < 1000:
        yield problem("space", f"only {disk.f_favail:,} free inodes", "delete some files on this disk")
    else:
        yield ok("space", f"{console.size_text(free)} free")


def _file_system_of(path: str) -> str:
    """The type of the file system of a folder, as Linux names it; "" on other systems."""
    if sys.platform != "linux":
        return ""
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            return _type_at(mounts.read(), os.fsencode(os.path.realpath(path)))
    except OSError:
        return ""


def _type_at(mounts: bytes, path: bytes) -> str:
    """The type of the file system at an absolute path, by the lines of mountinfo; "" where they do not tell."""
    best, kind = b"", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(b" - ")
        fields, types = before.split(b" "), after.split(b" ")
        if len(fields) < 5 or not types[0]:
            continue
        # Blanks, line breaks and backslashes are written in octal digits, other bytes as they are.
        mount = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), fields[4])
        if (path == mount or path.startswith(mount.rstrip(b"/") + b"/")) and len(mount) >= len(best):
            best, kind = mount, types[0].decode("ascii", "replace")
    return kind


def _durability(options: dict[str, Any]) -> Iterator[Finding]:
    fsync = options.get("fsync", "always")
    if fsync == "always":
        yield ok("durability", "acknowledged writes survive power loss (fsync: always)")
    else:
        lost = "the last second of writes" if fsync == "everysec" else "writes that the system has not flushed"
        yield note("durability", f"power loss may lose {lost} (fsync: {fsync})")


def _is_unicode(name: str) -> bool:
    """Whether a name is valid Unicode, as all of ours are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _files(path: str, layout: str) -> Iterator[Finding]:
    logs = documents = adopted = unfinished = 0
    foreign: list[str] = []
    both: list[str] = []
    for name in islice(FileSystem.names(path), _MOST_FILES):
        if not _is_unicode(name):
            foreign.append(name)
        elif name.endswith(".jsonl"):
            logs += 1
        elif name.endswith(".json"):
            documents += 1
            stem = name.removesuffix(".json")
            if stem and document_stem(stem) == stem and os.path.lexists(f"{path}/{file_stem(stem)}.jsonl"):
                both.append(stem)
        elif name.endswith(".adopted"):
            adopted += 1
        elif name.endswith((".new", ".part")):
            unfinished += 1
        elif name not in _OWN_FOLDERS and ".damaged" not in name:
            foreign.append(name)
    for stem in both[:5]:
        yield problem(
            "files", f"another program wrote {stem}.json, although {stem!r} was converted to a log",
            "stop AgentUp, which cannot share a folder with layout: log, and keep one of the two files",
        )  # fmt: skip
    if layout == "log" and documents > len(both):
        yield note(
            "files",
            f"{console.counted(documents - len(both), 'document')} of AgentUp, converted by the first write to each",
        )
    if layout == "document" and logs:
        yield problem(
            "files", f"{console.counted(logs, 'conversation')} stored as logs, which layout: document does not read",
            "use layout: log, or copy them with `agentstate migrate`",
        )  # fmt: skip
    if adopted:
        kept = f"{console.counted(adopted, 'document')} of AgentUp that were converted (.adopted)"
        yield note("files", kept, "a backup that may be deleted")
    if unfinished:
        yield note(
            "files",
            f"{console.counted(unfinished, 'unfinished file')} of killed processes",
            "`agentstate cleanup` removes them",
        )
    if foreign:
        names = ", ".join(sorted(foreign)[:3])
        yield note(
            "files", f"{console.counted(len(foreign), 'file')} of other programs ({names})", "they are not touched"
        )


def remove_file(folder: str, context_id: str) -> None:
    """Remove the file of a cleared conversation, which remembers commit ids for retries that nobody will make."""
    for name in (f"{file_stem(context_id)}.jsonl", f"{document_stem(context_id)}.json"):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(os.path.join(folder, name))
