"""How contenders are compared: they take turns in short rounds, at rest and beside busy processes.

A shared machine is slow for seconds at a time. So what is compared is the median, over the rounds, of the ratio within
one round: a slow second affects both sides.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from tempfile import mkdtemp
from typing import Final, Protocol, TypeVar

from .neighbours import busy_neighbours
from .results import AT_REST, BUSY, Comparison, Count, Line, Report, Row
from .sampling import Figures, Limit, Sample, in_sequence


class Closable(Protocol):
    """A resource of a benchmark."""

    def close(self) -> object: ...


Resource = TypeVar("Resource", bound=Closable)
Round = Callable[[Limit], Sample]
"""Makes the calls of one round."""
Conditions = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""By name: what is entered while the rounds under this condition are made."""
Measured = Mapping[str, Mapping[str, list[Sample]]]
"""The rounds by condition and contender."""

ALONE: Final[Conditions] = {AT_REST: nullcontext}
BOTH: Final[Conditions] = {**ALONE, BUSY: busy_neighbours}

SIZES: Final = (200, 4_000, 40_000)
"""Bytes of a message's content: a sentence or two, a page, the result of a tool."""
_ROUND_BYTES: Final = 4_000_000
"""Messages written in a round. Without a limit, large ones would fill memory and measure the disk."""


def repeated(call: Callable[[], object], prepare: Callable[[], object] | None = None) -> Round:
    """Rounds of one call after another. `prepare` is called before each of them and is not timed."""
    return lambda limit: in_sequence(call, limit, prepare)


def size_name(size: int) -> str:
    """200 B, 4 KB."""
    return f"{size} B" if size < 1000 else f"{size // 1000} KB"


class Run:
    """What a benchmark is given: how much to do, a folder, and where to report what it finds."""

    def __init__(self, report: Report, folder: Path, *, quick: bool, say: Callable[[str], None]) -> None:
        self.report = report
        self.say = say
        self.stack = ExitStack()
        self._quick = quick
        self._folder = folder

    def amount(self, full: int, quick: int | None = None) -> int:
        """How much of something: `full`, or a little where the benchmark itself is being tried out."""
        return (max(1, full // 20) if quick is None else quick) if self._quick else full

    def folder(self, name: str = "data") -> Path:
        """A new folder on the disk that is measured."""
        return Path(mkdtemp(prefix=f"{name}-", dir=self._folder))

    def closing(self, resource: Resource) -> Resource:
        """The resource, which is closed at the end of the run."""
        self.stack.callback(resource.close)
        return resource

    def compare(
        self, cases: Mapping[str, Round], *, rounds: int = 9, seconds: float = 0.1, size: int = SIZES[0],
        calls: int | None = None, conditions: Conditions = BOTH,
    ) -> Measured:  # fmt: skip
        """Measure the cases in turns, each once a round. A round ends as `Limit` says; the first one is not counted."""
        if self._quick:
            rounds, seconds = 2, seconds / 5
        limit = Limit(seconds, calls or _ROUND_BYTES // size)
        names = list(cases)
        measured: dict[str, dict[str, list[Sample]]] = {}
        with _frozen():
            for condition, enter in conditions.items():
                samples = measured[condition] = {name: [] for name in names}
                with enter():
                    for number in range(-1, rounds):
                        shift = number % len(names)
                        for name in names[shift:] + names[:shift]:
                            gc.collect()
                            sample = cases[name](limit)
                            if number >= 0:
                                samples[name].append(sample)
        return measured

    def row(
        self, where: str, operation: str, measured: Measured, ours: str, theirs: str, *, at_most: float | None = None,
        why: str = "", against: str | None = None, size: int | None = None, concurrent: bool = False,
    ) -> None:  # fmt: skip
        """Report a comparison of two cases. The target `at_most` is the largest ratio of our cost to theirs."""
        conditions = {name: _compared(found[ours], found[theirs]) for name, found in measured.items()}
        row = Row(where, operation, against or theirs, size, concurrent, at_most, why, conditions)
        self.report.rows.append(row)
        ratios = ", ".join(f"{found.ratio:.2f} {name}" for name, found in conditions.items())
        shown_size = "" if size is None else f", {size_name(size)}"
        self.say(f"{where}: {operation}{shown_size}: cost to that of {row.against}: {ratios}")

    def counted(
        self, what: str, value: float, unit: str, *, at_most: float | None = None, why: str = "", note: str = ""
    ) -> None:
        """Report a count. The target `at_most` is the largest value."""
        self.report.counts.append(Count(what, value, unit, at_most, why, note))
        self.say(f"{what}: {value:g} {unit}")

    def line(self, plot: str, name: str, points: Mapping[float, float]) -> None:
        """Report a line of a plot."""
        self.report.lines.append(Line(plot, name, list(points), list(points.values())))


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep the garbage collector from what exists already: with all libraries loaded, a collection takes 130 ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _compared(ours: list[Sample], theirs: list[Sample]) -> Comparison:
    ratios = [a.cost / b.cost for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Comparison(Figures.of(ours), Figures.of(theirs), median(ratios), (low, high))
