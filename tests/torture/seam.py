"""Between the file backend and the file system: errors on demand, and a disk that loses power.

Everything goes through to a real folder. `Disk` also writes down what was done, and rebuilds what a disk may hold after
a power cut at any moment: what was synced is there, and of the rest anything that the file system was free to leave.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

from agentstate.storage.file.filesystem import FileSystem

CALLS: Final = (
    "open", "close", "write", "truncate", "stat", "descriptor_stat", "follow", "replace", "unlink", "make_folder",
    "change_mode", "read_at", "sync", "sync_folder", "sync_all", "names",
)  # fmt: skip
CHANGING: Final = frozenset(
    ("write", "truncate", "replace", "unlink", "make_folder", "sync", "sync_folder", "sync_all")
)


class Seam(FileSystem):
    """A file system that passes every call to `around(name, call, arguments)`."""

    def __init__(self, around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        real = FileSystem()
        for name in CALLS:
            setattr(self, name, _between(around, name, getattr(real, name)))


def _between(around: Callable[..., Any], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: around(name, call, arguments)


class Failing:
    """Fails the `nth` call (of those in `names`, or of all), once or from then on.

    `shortly` makes a failing write first write a part of its data, and report it, as a full disk does.
    """

    def __init__(
        self,
        number: int,
        nth: int,
        *,
        names: frozenset[str] | None = None,
        for_good: bool = False,
        shortly: bool = False,
    ) -> None:
        self.error = number
        self.names = names
        self.shortly = shortly
        self.calls = 0
        self.failed = 0
        self._nth = nth
        self._for_good = for_good
        self._full = False

    def around(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "close" or (self.names is not None and name not in self.names):
            return call(*arguments)
        self.calls += 1
        if not (self.calls == self._nth or (self._for_good and self.calls > self._nth) or self._full):
            return call(*arguments)
        self.failed += 1
        if self.shortly and name == "write" and not self._full:
            self._full = True  # until space is freed: the rest of this write finds none
            descriptor, data = arguments
            return call(descriptor, data[: len(data) // 2]) if len(data) > 1 else call(descriptor, data)
        self._full = self._full and self._for_good
        raise OSError(self.error, os.strerror(self.error))


# --- power ----------------------------------------------------------------------------------------------------------


class _Inode:
    """A file's content as it was last synced, and the changes since then."""

    def __init__(self, content: bytes = b"") -> None:
        self.synced = content
        self.pending: list[tuple[int, bytes | None]] = []  # (offset, data), or (size, None): truncated


class Disk:
    """Records changes below `root`. `states` gives what a disk may hold if the power fails now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seam = Seam(self._around)
        self.failing: Failing | None = None
        self.watch: Callable[[str], None] = lambda name: None
        self._live: dict[str, _Inode | None] = {}  # path to file, None for a folder
        self._names: list[tuple[str, str, _Inode | None]] = []  # unsynced: (parent, path, what it names; itself: gone)
        self._open: dict[int, _Inode] = {}
        for folder, _, files in os.walk(root):  # files that exist already count as synced
            if folder != str(root):
                self._live[folder] = None
            for name in files:
                path = os.path.join(folder, name)
                self._live[path] = _Inode(Path(path).read_bytes())
        self._durable = dict(self._live)

    def _around(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Carry out a call; before and after it, report to `around` what could be cut here."""
        if name == "open":
            return self._opened(call, arguments)
        if name not in CHANGING:
            return call(*arguments)
        inode = self._open.get(arguments[0]) if isinstance(arguments[0], int) else None
        size = os.fstat(arguments[0]).st_size if inode is not None and name == "write" else 0
        try:
            failing = self.failing
            result = call(*arguments) if failing is None else failing.around(name, call, arguments)
        except OSError:
            if inode is not None and name == "sync":
                # The kernel marks the pages clean: they look stored, and never will be.
                inode.pending.clear()
            raise
        self._note(name, arguments, inode, size, result)
        self.watch(name)
        return result

    def _opened(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        path, flags = arguments[0], arguments[1]
        descriptor: int = call(*arguments)
        if os.path.isdir(path):
            return descriptor
        inode = self._live.get(path)
        if inode is None:
            inode = self._live[path] = _Inode()
            self._names.append((os.path.dirname(path), path, inode))
            self.watch("open")
        elif flags & os.O_TRUNC:
            inode.pending.append((0, None))
        self._open[descriptor] = inode
        return descriptor

    def _note(self, name: str, arguments: tuple[Any, ...], inode: _Inode | None, size: int, result: Any) -> None:
        if name == "write" and inode is not None:
            inode.pending.append((size, bytes(arguments[1])[:result]))
        elif name == "truncate" and inode is not None:
            inode.pending.append((arguments[1], None))
        elif name == "sync" and inode is not None:
            inode.synced, inode.pending = played(inode.synced, inode.pending), []
        elif name == "sync_all":
            for file in self._live.values():
                if file is not None:
                    file.synced, file.pending = played(file.synced, file.pending), []
            self._durable, self._names = dict(self._live), []
        elif name == "sync_folder":
            for entry in [entry for entry in self._names if entry[0] == arguments[0]]:
                self._names.remove(entry)
                _enter(self._durable, entry)
        elif name == "make_folder":
            self._live[arguments[0]] = None
            self._names.append((os.path.dirname(arguments[0]), arguments[0], None))
        elif name == "replace":
            moved = self._live.pop(arguments[0])
            self._live[arguments[1]] = moved
            # A rename is one step of the journal: its two halves are kept or dropped together.
            self._names.append((os.path.dirname(arguments[1]), f"{arguments[0]}\0{arguments[1]}", moved))
        elif name == "unlink":
            self._live.pop(arguments[0], None)
            self._names.append((os.path.dirname(arguments[0]), f"{arguments[0]}\0", None))

    def states(self, random: Random) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """What the disk may hold: a name for it, and its files (None: a folder) by path."""
        yield "all kept", self._state(self._names, lambda inode: played(inode.synced, inode.pending))
        yield "all dropped", self._state([], lambda inode: inode.synced)
        yield "names without data", self._state(self._names, lambda inode: inode.synced)
        yield "data without names", self._state([], lambda inode: played(inode.synced, inode.pending))
        yield "sizes without data", self._state(self._names, lambda inode: played(inode.synced, _holes(inode.pending)))
        for index in range(len(self._names)):
            rest = self._names[:index] + self._names[index + 1 :]
            yield f"name {index} dropped", self._state(rest, lambda inode: played(inode.synced, inode.pending))
        for inode in {id(entry[2]): entry[2] for entry in self._names}.values():
            rest = [entry for entry in self._names if entry[2] is not inode]
            yield "one file's names dropped", self._state(rest, lambda inode: played(inode.synced, inode.pending))
        dirty = [inode for inode in {id(file): file for file in self._files()}.values() if inode.pending]
        for file in dirty:
            for index in range(len(file.pending)):
                for what, pending in _spoiled(file.pending, index, random):
                    yield (
                        f"write {index} {what}",
                        self._state(
                            self._names,
                            lambda inode, file=file, pending=pending: played(  # type: ignore[misc]
                                inode.synced, pending if inode is file else inode.pending
                            ),
                        ),
                    )

    def _files(self) -> list[_Inode]:
        files = [*self._live.values(), *self._durable.values()]
        return [file for file in files if file is not None]

    def _state(
        self, names: list[tuple[str, str, _Inode | None]], content: Callable[[_Inode], bytes]
    ) -> dict[str, bytes | None]:
        entries = dict(self._durable)
        for entry in names:
            _enter(entries, entry)
        state: dict[str, bytes | None] = {}
        for path, inode in sorted(entries.items(), key=lambda item: item[0]):
            parent = os.path.dirname(path)
            if parent == str(self.root) or parent in state:
                state[path] = None if inode is None else content(inode)
        return state


def _enter(entries: dict[str, _Inode | None], entry: tuple[str, str, _Inode | None]) -> None:
    _, path, inode = entry
    source, renamed, target = path.partition("\0")
    if not renamed:
        entries[source] = inode
    elif target:
        entries.pop(source, None)
        entries[target] = inode
    else:
        entries.pop(source, None)


def played(content: bytes, pending: list[tuple[int, bytes | None]]) -> bytes:
    """The content after these changes. Parts that were never written read as NULs."""
    for offset, data in pending:
        if data is None:
            content = content[:offset].ljust(offset, b"\0")
        else:
            content = content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]
    return content


def _holes(pending: list[tuple[int, bytes | None]]) -> list[tuple[int, bytes | None]]:
    return [(offset, None if data is None else bytes(len(data))) for offset, data in pending]


def _spoiled(
    pending: list[tuple[int, bytes | None]], index: int, random: Random
) -> Iterator[tuple[str, list[tuple[int, bytes | None]]]]:
    """The changes with one of them dropped, incomplete, or with blocks missing."""
    offset, data = pending[index]
    before, rest = pending[:index], pending[index + 1 :]
    yield "dropped", [*before, *rest]
    if not data:
        return
    for cut in {1, len(data) - 1, random.randrange(len(data))}:
        if 0 < cut < len(data):
            yield f"torn at {cut}", [*before, (offset, data[:cut])]
    # Blocks are written in any order, each as a whole: missing ones read as NULs.
    block = (offset // 4096 + 1) * 4096 - offset
    if 0 < block < len(data):
        yield "first block missing", [*before, (offset, bytes(block) + data[block:]), *rest]
        yield "first block only", [*before, (offset, data[:block] + bytes(len(data) - block)), *rest]


def materialize(state: dict[str, bytes | None], root: Path, target: Path) -> None:
    """Write what a disk holds to a real folder: what was below `root` is below `target`."""
    for path, content in state.items():
        place = target / os.path.relpath(path, root)
        if content is None:
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(content)


ERRORS: Final = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)
