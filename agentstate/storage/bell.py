"""Wakes a thread that waits for answers: by the answers, or by another thread that rings."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterable
from contextlib import suppress

CAN_RING = hasattr(select, "poll")  # Windows has none

_ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd takes; to a pipe it is as good as anything


class Bell:
    """One thread waits, any thread rings. To be closed, since it has descriptors of its own."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._hears = self._rings = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._hears, self._rings = os.pipe()
            os.set_blocking(self._hears, False)
            os.set_blocking(self._rings, False)

    def ring(self) -> None:
        """Let the thread that waits go on, or the next one that will."""
        with suppress(BlockingIOError):  # it was rung so often that one time more makes no difference
            os.write(self._rings, _ONE)

    def wait(self, descriptors: Iterable[int], seconds: float) -> set[int]:
        """Wait until one of them is readable (or broken), or somebody rings. Returns those that are."""
        poll = select.poll()
        poll.register(self._hears, select.POLLIN)
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, seconds * 1000))}
        if self._hears in ready:
            ready.discard(self._hears)
            os.read(self._hears, 1024)
        return ready

    def close(self) -> None:
        for descriptor in {self._hears, self._rings}:
            os.close(descriptor)
