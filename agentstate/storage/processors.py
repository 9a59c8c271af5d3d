"""Keeps worker threads on the processor of the thread that waits for them (Linux).

The interpreter lets one thread run Python at a time. If the other one sits on another processor, each change between
them is an interrupt there, a processor that wakes up, and caches that know nothing of the call: with ten to fifty
calls at a time that took a fifth to a quarter of the time, and left to itself Linux moves a woken thread to an idle
processor.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ANYWHERE = -1


def _nowhere() -> int:
    return ANYWHERE


def find_processor() -> Callable[[], int]:
    """A function that says on which processor it is called: `ANYWHERE` if that cannot be told, or does not matter.

    Call this when a module is imported. Later, another thread may be in the middle of importing what it imports here
    while the process forks, and the child would wait for that thread for ever.
    """
    if sys.platform != "linux" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return _nowhere
    try:
        import ctypes

        # Not CDLL: it would let another thread run before such a short call, and wait for its turn after it.
        getcpu: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu
    except (ImportError, OSError, AttributeError):
        return _nowhere
    return getcpu


class Home:
    """Where a thread is at home: the processor on which it was found several times in a row."""

    _TIMES = 4

    def __init__(self, this_processor: Callable[[], int]) -> None:
        self._this_processor = this_processor
        self._last = ANYWHERE
        self._times = 0  # in a row
        self._home = ANYWHERE

    def processor(self) -> int:
        """For the thread itself: its home; `ANYWHERE` while it moves about, when following it would cost the more."""
        here = self._this_processor()
        if here != self._last:
            self._last, self._times = here, 0
        self._times += 1
        if self._times == self._TIMES:
            self._home = here
        elif self._times == 2 and here != self._home:  # it did not just pass by
            self._home = ANYWHERE
        return self._home


class Seat:
    """Where the thread that made this runs."""

    def __init__(self) -> None:
        self._at: int | None = None  # a new thread begins where the one that started it may run

    def move(self, processor: int) -> None:
        """Run there from now on; `ANYWHERE`: wherever the main thread may."""
        if processor == self._at or sys.platform != "linux":
            return
        self._at = processor
        with suppress(OSError):  # not allowed (any more): then it runs where it may
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()) if processor == ANYWHERE else {processor})
