"""Counting what a storage does, so cheaply that it is always done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import count
from time import monotonic

from ..errors import StateError
from ..operations import Commit, Lease, Listing, Operation, Outcome, Query

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

TOTAL: Final = 64
"""Where a histogram has the sum of its values. At n < 64 it has how many values took n bits, that is, were less than
2**n and at least half of that."""

TIMED_ONE_IN: Final = 16
"""Where a storage waits for nothing, a call is so short that two looks at the clock are much: so many are not timed,
but one."""

_PUT_ASIDE: Final = 512
"""So many numbers are added up at once. Appending one to a list needs no lock, and adding many up hardly a step of the
interpreter for each: together a third of what it takes to lock, add and unlock every time."""

KINDS: Final = (Query, Commit, Lease, Listing)


class Tally:
    """The numbers of one storage. Thread-safe by `lock`: hold it to change or read any of them, and `add_up` first.

    `alone` is the exception. An operation that is carried out by itself draws a number there, which needs no lock: a
    lock, or numbers of each thread's own, would cost a call on the memory backend twice as much.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Count from zero: at first, and in the child of a fork."""
        self.since = monotonic()
        self.lock = threading.RLock()  # a signal's handler may make a call while its thread is counting another
        self.alone = {kind: count() for kind in KINDS}
        self._looks = 0  # how often `operations` drew numbers that stand for no operation
        self._grouped = dict.fromkeys(KINDS, 0)
        self.groups = [0] * (TOTAL + 1)  # sizes of groups of at least two
        self.latency = {kind: [0] * (TOTAL + 1) for kind in KINDS}  # nanoseconds
        self._times: dict[type[Operation], list[int]] = {kind: [] for kind in KINDS}  # not in `latency` yet
        self._written: list[int] = []  # not in `bytes_written` yet
        self.errors = Counter[str]()
        self.attempts_repeated = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.cache_evictions = 0
        self.cache_misses = 0
        self.connections_opened = 0
        self.degraded_calls = 0

    def note(self, operations: Sequence[Operation], outcomes: Sequence[Outcome | StateError], nanoseconds: int) -> None:
        """Count operations that were carried out together, in that time."""
        size = len(operations)
        if size == 1:
            kind = type(operations[0])
            next(self.alone[kind])
            self.took(kind, nanoseconds)
            if isinstance(outcomes[0], StateError):
                self.failed(outcomes[0])
            return
        # Counted with what needs no step of the interpreter for each: a Counter takes longer to make than to use here.
        kinds = list(map(type, operations))
        errors = [kind for kind in set(map(type, outcomes)) if issubclass(kind, StateError)]
        with self.lock:
            self.groups[size.bit_length()] += 1
            self.groups[TOTAL] += size
            for kind in set(kinds):
                times = kinds.count(kind)
                self._grouped[kind] += times
                row = self.latency[kind]
                row[nanoseconds.bit_length()] += times
                row[TOTAL] += nanoseconds * times
            for error in errors:
                self.errors[error.__name__] += list(map(type, outcomes)).count(error)

    def took(self, kind: type[Operation], nanoseconds: int) -> None:
        """An operation took so long."""
        times = self._times[kind]
        times.append(nanoseconds)
        if len(times) >= _PUT_ASIDE:
            with self.lock:
                self.add_up()

    def failed(self, error: StateError) -> None:
        """An operation ended so."""
        with self.lock:
            self.errors[type(error).__name__] += 1

    def read(self, size: int) -> None:
        """Bytes were read."""
        with self.lock:
            self.bytes_read += size

    def wrote(self, size: int) -> None:
        """Bytes were written."""
        written = self._written
        written.append(size)
        if len(written) >= _PUT_ASIDE:
            with self.lock:
                self.add_up()

    def add_up(self) -> None:
        """Count what was put aside. Hold the lock."""
        for kind, times in self._times.items():
            row = self.latency[kind]
            taken = _taken(times)
            for bits, often in Counter(map(int.bit_length, taken)).items():
                row[bits] += often
            row[TOTAL] += sum(taken)
        self.bytes_written += sum(_taken(self._written))

    def add(self, **counts: int) -> None:
        """Add to the numbers of these names."""
        with self.lock:
            for name, count_ in counts.items():
                setattr(self, name, getattr(self, name) + count_)

    def operations(self) -> tuple[dict[type[Operation], int], int]:
        """How many there were, by kind; and how many of them were carried out by themselves. Hold the lock."""
        drawn = {kind: next(numbers) - self._looks for kind, numbers in self.alone.items()}
        self._looks += 1
        return {kind: drawn[kind] + self._grouped[kind] for kind in KINDS}, sum(drawn.values())


def _taken(aside: list[int]) -> list[int]:
    """What was in the list. What other threads append meanwhile stays for the next time."""
    taken = aside[:]
    del aside[: len(taken)]
    return taken
