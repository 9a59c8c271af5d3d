"""The leases of turns: which turn may commit to a conversation, and until when.

A lease is one small file, read and written by whoever holds the context's lock. It is never flushed: time is counted
from boot (setting the clock moves nothing), so a reboot ends every lease anyway. A file that a killed process left
half-written is the lease of that process, and ends with it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from ...operations import Lease
from .filesystem import READ, UPDATE, open_for
from .folder import Folder
from .locks import FileLock

_LARGEST = 4096


class Leases:
    """The leases in one folder. Raises OSError; hold the context's lock."""

    def __init__(self, path: str, folder: Folder) -> None:
        self.path = path
        self._folder = folder
        self._fs = folder.fs

    def carry_out(self, stem: str, lease: Lease) -> bool:
        """Take, renew or release a lease. True if `lease.token` holds it now (held it, on release)."""
        holder = self.holder(stem)
        if holder != lease.token and not (holder is None and lease.action == "take"):
            return False
        if lease.action == "release":
            self._remove(stem)
        else:
            self._write(stem, lease)
        return True

    def holder(self, stem: str) -> str | None:
        """The token that holds the lease now; None if it is free."""
        try:
            fd = self._fs.open(self._path(stem), READ)
        except FileNotFoundError:
            return None
        try:
            said = json.loads(self._fs.read_at(fd, _LARGEST, 0))
            remaining = said["until"] - _now()
            # More time left than it was taken for: the clock restarted, on a system without boot ids.
            valid = said["boot"] == _boot() and 0 < remaining <= said["seconds"] * 1e9
            return str(said["token"]) if valid else None
        except (ValueError, KeyError, TypeError):
            return None
        finally:
            self._fs.close(fd)

    def _write(self, stem: str, lease: Lease) -> None:
        said: dict[str, Any] = {
            "token": lease.token,
            "until": _now() + int(lease.seconds * 1e9),
            "seconds": lease.seconds,
            "boot": _boot(),
        }
        fd = open_for(self._folder.owner, self._fs.open, self._path(stem), UPDATE | os.O_TRUNC)
        try:
            self._fs.write(fd, json.dumps(said).encode() + b"\n")
        finally:
            self._fs.close(fd)

    def _remove(self, stem: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.unlink(self._path(stem))

    def remove_ended(self, lock_for: Callable[[str], FileLock]) -> None:
        """Remove the files of leases that ended with their holders. `lock_for` gives a context's lock by its stem."""
        for name in list(self._fs.names(self.path)):
            if not (lock := lock_for(name)).try_acquire():
                continue
            try:
                if self.holder(name) is None:
                    self._remove(name)
            finally:
                lock.release()

    def _path(self, stem: str) -> str:
        return os.path.join(self.path, stem)


def _now() -> int:
    """Nanoseconds since boot, including suspend where the system counts it."""
    return time.clock_gettime_ns(_CLOCK) if _CLOCK is not None else time.monotonic_ns()


_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


@cache
def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
