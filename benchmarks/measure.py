"""How everything here is measured: in rounds, each contender once a round, side by side.

A machine that others use too is slow for seconds at a time. So contenders take turns in short rounds, in changing
order, and what is compared is the median over the rounds of the ratio within one round: a slow second hits both sides.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from tempfile import mkdtemp
from typing import Any, Final, Literal

Round = Callable[[], float]
"""Does one round of work, and says what it cost: seconds per operation (or whatever the row's unit is)."""

CONTENT: Final = "Remember that I like tea, and that I never drink it after four o'clock. " * 3
MESSAGE_BYTES: Final = 200
TEXT: Final = CONTENT[:MESSAGE_BYTES]
"""The content of every message."""


@dataclass
class Row:
    """One comparison. `ratio` is ours to theirs for costs, and theirs to ours where more is better."""

    work: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    """Quartiles of the ratio over the rounds."""
    bound: Literal["at most", "at least", ""] = ""
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.bound == "at most" else self.ratio >= self.target


@dataclass
class Series:
    """A line of a plot."""

    plot: str
    line: str
    x: list[float]
    y: list[float]


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    about: str
    rows: list[Row] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        data = asdict(self)
        for shown, row in zip(data["rows"], self.rows, strict=True):
            shown["met"] = row.met
        return data


class Run:
    """What a benchmark is given: sizes, a folder, servers, and where to put what it finds."""

    def __init__(self, report: Report, folder: Path, *, quick: bool, say: Callable[[str], None]) -> None:
        self.report = report
        self.quick = quick
        self.say = say
        self.stack = ExitStack()
        self._folder = folder

    def size(self, full: int, quick: int | None = None) -> int:
        """How much of something: all of it, or a little where only the benchmark itself is being tried out."""
        return (max(1, full // 20) if quick is None else quick) if self.quick else full

    def folder(self, name: str = "data") -> Path:
        """A new folder on the disk that is measured."""
        return Path(mkdtemp(prefix=f"{name}-", dir=self._folder))

    def compare(self, cases: Mapping[str, Round], rounds: int = 9, *, warm_up: int = 1) -> Samples:
        """The cases, each once a round."""
        names = list(cases)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-warm_up, self.size(rounds, 2)):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                gc.collect()
                value = cases[name]()
                if number >= 0:
                    samples[name].append(value)
        return Samples(samples)

    def row(
        self,
        work: str,
        samples: Samples,
        ours: str,
        theirs: str,
        *,
        unit: str = "µs",
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
        against: str | None = None,
    ) -> Row:
        """Note a comparison of two cases. `at_least` asks how many times cheaper ours is."""
        ratios = samples.ratios(theirs, ours) if at_least is not None else samples.ratios(ours, theirs)
        row = Row(
            work,
            against or theirs,
            samples.median(ours),
            samples.median(theirs),
            unit,
            median(ratios),
            _quartiles(ratios),
            "at most" if at_most is not None else "at least" if at_least is not None else "",
            at_most if at_most is not None else at_least,
            note,
        )
        self.report.rows.append(row)
        self.say(f"{work}: {row.ratio:.2f} × {row.against}")
        return row

    def figure(
        self, work: str, ours: float, against: str, theirs: float, unit: str, *, at_most: float | None = None,
        ratio: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Note a comparison of two figures that are counted rather than timed."""
        value = (ours / theirs if theirs else 0.0) if ratio is None else ratio
        bound: Literal["at most", ""] = "at most" if at_most is not None else ""
        self.report.rows.append(Row(work, against, ours, theirs, unit, value, (value, value), bound, at_most, note))
        self.say(f"{work}: {ours:g} {unit}")

    def line(self, plot: str, line: str, x: Sequence[float], y: Sequence[float]) -> None:
        """Note a line of a plot."""
        self.report.series.append(Series(plot, line, list(x), list(y)))


@dataclass
class Samples:
    """What each case cost in each round."""

    of: dict[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.of[name])

    def ratios(self, above: str, below: str) -> list[float]:
        """Of two cases, round by round."""
        return [a / b for a, b in zip(self.of[above], self.of[below], strict=True)]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def repeated(work: Callable[[], object], count: int) -> Round:
    """A round of `count` calls; microseconds a call."""

    def once() -> float:
        began = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - began) / count * 1e6

    return once


def numbered(work: Callable[[int], object], count: int, prepare: Callable[[int], object] | None = None) -> Round:
    """A round of `count` calls with the numbers 0 to `count`, after `prepare` was called with each; microseconds."""

    def once() -> float:
        if prepare is not None:
            for number in range(count):
                prepare(number)
        began = time.perf_counter()
        for number in range(count):
            work(number)
        return (time.perf_counter() - began) / count * 1e6

    return once


@contextmanager
def written() -> Iterator[dict[str, int]]:
    """Counts the bytes that this process gives to write() and its kin, and those that reach the disk (Linux)."""
    counts: dict[str, int] = {}
    before = _io()
    yield counts
    after = _io()
    counts.update({name: after[name] - before[name] for name in ("wchar", "write_bytes")})


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().split("\n")
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines if line)}


Benchmark = Callable[[Run], None]
ALL: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Make a function one of the benchmarks, by this name. Its docstring says what it measures."""

    def register(function: Benchmark) -> Benchmark:
        ALL[name] = function
        return function

    return register
