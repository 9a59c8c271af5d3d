"""What this process writes: counted at the file backend, and by the system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentstate.storage.file.filesystem import FileSystem


class CountingFileSystem(FileSystem):
    """Counts the bytes and the calls that write them, and the flushes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.bytes = self.writes = self.flushes = 0

    def write(self, fd: int, data: Any) -> int:
        count = os.write(fd, data)
        self.bytes += count
        self.writes += 1
        return count

    def sync(self, fd: int) -> None:  # type: ignore[override]
        self.flushes += 1
        FileSystem.sync(fd)

    def sync_all(self, fd: int) -> None:
        self.flushes += 1
        super().sync_all(fd)


@contextmanager
def written() -> Iterator[dict[str, int]]:
    """Counts what the process gives to system calls that write (`wchar`), and what reaches the disk (`write_bytes`).

    Linux only. The counts are there when the block has ended.
    """
    counts: dict[str, int] = {}
    before = _io()
    yield counts
    after = _io()
    counts.update({name: after[name] - before[name] for name in ("wchar", "write_bytes")})


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}


def resident_megabytes() -> float:
    """The memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
