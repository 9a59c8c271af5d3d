"""The results of a run: the four figures, and notes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Final

_NOTES: Final = 20


def moment() -> float:
    """A clock, in seconds, that does not count the time in which this thread waits for a processor.

    To measure how long a call takes: on a loaded machine, that time says nothing about the library.
    """
    now = time.monotonic()
    try:
        with open("/proc/thread-self/schedstat", "rb", buffering=0) as file:
            return now - int(file.read().split()[1]) / 1e9
    except OSError:  # not Linux
        return now


@dataclass
class Figures:
    """What a run counted. L, D, S and H must be zero."""

    name: str
    seed: int
    faults: int = 0
    calls: int = 0
    unknown: int = 0
    """Calls that ended with StateOutcomeUnknownError: allowed, and worth knowing."""
    lost: int = 0
    doubled: int = 0
    silent: int = 0
    hanging: int = 0
    slowest: float = 0.0
    """How many seconds the slowest call took longer than its deadline (0 or less: none did)."""
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.silent or self.hanging)

    def lose(self, what: str) -> None:
        self.lost += 1
        self._note("L", what)

    def double(self, what: str) -> None:
        self.doubled += 1
        self._note("D", what)

    def fail_silently(self, what: str) -> None:
        self.silent += 1
        self._note("S", what)

    def hang(self, what: str) -> None:
        self.hanging += 1
        self._note("H", what)

    def took(self, seconds: float, deadline: float, what: str) -> None:
        """A call is over: count it, and whether it hung."""
        self.calls += 1
        self.slowest = max(self.slowest, seconds - deadline)
        if seconds > deadline + 1.0:
            self.hang(f"{what} took {seconds:.2f} s with a deadline of {deadline:g} s")

    def _note(self, figure: str, what: str) -> None:
        if len(self.notes) < _NOTES:
            self.notes.append(f"{figure}: {what}")

    def __iadd__(self, other: Figures) -> Figures:
        """Add what another run saw."""
        for name in ("faults", "calls", "unknown", "lost", "doubled", "silent", "hanging"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest = max(self.slowest, other.slowest)
        self.notes = [*self.notes, *other.notes][:_NOTES]
        return self

    def __str__(self) -> str:
        text = (
            f"{self.name:<24} seed {self.seed}  L={self.lost} D={self.doubled} S={self.silent} H={self.hanging}  "
            f"{self.faults:,} faults, {self.calls:,} calls, {self.unknown:,} outcomes unknown"
        )
        return "\n".join([text, *(f"    {note}" for note in self.notes)])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Figures:
        return cls(**json.loads(text))
