"""Counts what a storage does, cheaply enough to be always on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import count
from time import monotonic
from typing import Final

from ..errors import StateError
from ..operations import Commit, Lease, Listing, Operation, Outcome, Query

TOTAL: Final = 64
"""The index of the sum of a histogram's values. Index n < 64 counts the values of n bits: less than 2**n, and at least
half of that."""

TIMED_ONE_IN: Final = 16
"""On a storage that does not block, a call is so short that reading the clock twice is expensive: one call in so many
is timed."""

_BUFFERED: Final = 512
"""Numbers are buffered, and this many added up at once. Appending to a list needs no lock, and adding many up is done
in C: a third of the cost of locking, adding and unlocking each time."""

KINDS: Final = (Query, Commit, Lease, Listing)


class Tally:
    """The counters of one storage. Hold `lock` to change or read them, and call `add_up` before reading.

    The exception is `alone`: an operation that is executed by itself draws a number there, which needs no lock. A lock,
    or counters for each thread, would double the cost of counting a call on the memory backend.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Reset all counters: at first, and in the child of a fork."""
        self.since = monotonic()
        self.lock = threading.RLock()  # reentrant: a signal handler may make a call while its thread counts another
        self.alone = {kind: count() for kind in KINDS}
        self._looks = 0  # numbers that `operations` drew to read the counters
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
        """Count a group of operations that took that time together."""
        size = len(operations)
        if size == 1:
            kind = type(operations[0])
            next(self.alone[kind])
            self.took(kind, nanoseconds)
            if isinstance(outcomes[0], StateError):
                self.failed(outcomes[0])
            return
        # Counted by methods in C. Making a Counter would take longer.
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
        """Record the duration of an operation."""
        times = self._times[kind]
        times.append(nanoseconds)
        if len(times) >= _BUFFERED:
            with self.lock:
                self.add_up()

    def failed(self, error: StateError) -> None:
        """Record the error of an operation."""
        with self.lock:
            self.errors[type(error).__name__] += 1

    def read(self, size: int) -> None:
        """Count bytes read."""
        with self.lock:
            self.bytes_read += size

    def wrote(self, size: int) -> None:
        """Count bytes written."""
        written = self._written
        written.append(size)
        if len(written) >= _BUFFERED:
            with self.lock:
                self.add_up()

    def add_up(self) -> None:
        """Add the buffered numbers up. Hold the lock."""
        for kind, times in self._times.items():
            row = self.latency[kind]
            taken = _taken(times)
            for bits, often in Counter(map(int.bit_length, taken)).items():
                row[bits] += often
            row[TOTAL] += sum(taken)
        self.bytes_written += sum(_taken(self._written))

    def add(self, **counts: int) -> None:
        """Add to the counters of these names."""
        with self.lock:
            for name, count_ in counts.items():
                setattr(self, name, getattr(self, name) + count_)

    def operations(self) -> tuple[dict[type[Operation], int], int]:
        """The number of operations by kind, and how many of them were executed by themselves. Hold the lock."""
        drawn = {kind: next(numbers) - self._looks for kind, numbers in self.alone.items()}
        self._looks += 1
        return {kind: drawn[kind] + self._grouped[kind] for kind in KINDS}, sum(drawn.values())


def _taken(buffer: list[int]) -> list[int]:
    """Take the numbers out of a buffer. Those appended meanwhile by other threads stay in it."""
    taken = buffer[:]
    del buffer[: len(taken)]
    return taken
