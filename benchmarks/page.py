"""The tables of a run, and the pages of docs/ that show them.

`docs/performance.md` is written by hand but for the blocks between `<!-- results: NAME -->` and `<!-- end -->`, one for
each entry of `BLOCKS`. `docs/performance-figures.md` is written here as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from .measure import SIZES, size_name
from .results import AT_REST, BUSY, Comparison, Count, Results, Row
from .sampling import Figures

_BLOCK: Final = re.compile(r"(<!-- results: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SIZED: Final = ("append", "read of the last 10")
"""The operations that are measured with messages of several sizes."""
_LIBRARIES: Final = "libraries"
_GROWTH: Final = "growth"
"""The benchmarks whose rows have tables of their own."""


def publish(results: Results, docs: Path) -> None:
    """Write the pages."""
    page = docs / "performance.md"
    text = _BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](results)}\n\n{match[3]}", page.read_text())
    page.write_text(text)
    (docs / "performance-figures.md").write_text(all_figures(results))


def all_figures(results: Results) -> str:
    """A page with everything that was measured."""
    parts = [
        "# All figures of the benchmarks",
        "This page is written by `python -m benchmarks --publish`. [Performance](performance.md) says how to read it.",
        made_on(results),
    ]
    for report in results.reports:
        parts += [f"## {report.name}", report.about]
        if report.rows:
            lines = (line for row in report.rows for line in _row_lines(row))
            parts.append(_table("operation|against|condition|ours|theirs|ours to theirs (quartiles)|target|met", lines))
        if report.counts:
            parts.append(_table("counted|value|target|met", map(_count_line, report.counts)))
        parts += [f"{name[0].upper()}{name[1:]}: {fact}." for name, fact in report.facts.items()]
    return "\n\n".join(parts) + "\n"


def made_on(results: Results) -> str:
    """Where and when the figures were measured."""
    machine = results.machine
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    minutes = round(sum(report.seconds for report in results.reports) / 60)
    quick = " **A quick run: the figures mean nothing.**" if results.quick else ""
    return (
        f"Measured on {machine['date']} in {minutes} minutes, with Python {machine['python']} on {machine['system']}, "
        f"{machine['processor']} (load average before: {machine['load']}); {packages}.{quick}"
    )


def _costs(results: Results) -> str:
    """Our medians by backend, operation and size."""
    costs: dict[tuple[str, str], dict[tuple[str, int], Figures]] = {}
    for report in results.reports:
        for row in report.rows:
            if report.name != _LIBRARIES and row.size is not None and row.operation in _SIZED:
                for condition in (AT_REST, BUSY):
                    cells = costs.setdefault((row.where, condition), {})
                    cells.setdefault((row.operation, row.size), row.conditions[condition].ours)
    columns = [(operation, size) for operation in _SIZED for size in SIZES]
    lines = (
        [where, condition, *(_duration(cells[column].median) if column in cells else "" for column in columns)]
        for (where, condition), cells in costs.items()
    )
    return _table(f"backend||{_column_heads(columns)}", lines)


def _column_heads(columns: Iterable[tuple[str, int]]) -> str:
    return "|".join(f"{operation}, {size_name(size)}" for operation, size in columns)


def _growth(results: Results) -> str:
    """Operations on long conversations against short ones: a line for each operation, a column for each backend."""
    rows = [row for report in results.reports if report.name == _GROWTH for row in report.rows]
    columns = list(dict.fromkeys(row.where for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        at_rest, busy = (in_words(row.conditions[name].ratio) for name in (AT_REST, BUSY))
        cells.setdefault(row.operation, {})[row.where] = f"{at_rest}; {busy}"
    lines = ([operation, *(found.get(column, "") for column in columns)] for operation, found in cells.items())
    return _table("|".join(["operation", *columns]), lines)


def _targets(results: Results) -> str:
    """The rows that have a target, without those of `growth`."""
    return _table(
        "operation|against|ours, at rest|theirs, at rest|at rest|busy|target|met",
        (
            [
                _work(row), row.against, _figures(row.conditions[AT_REST].ours, row),
                _figures(row.conditions[AT_REST].theirs, row), in_words(row.conditions[AT_REST].ratio),
                in_words(row.conditions[BUSY].ratio), _target(row.at_most), _met(row),
            ]
            for report in results.reports
            for row in report.rows
            if row.at_most is not None and report.name != _GROWTH
        ),
    )  # fmt: skip


def _missed(results: Results) -> str:
    """Where a target is missed, and why."""
    rows = [row for report in results.reports for row in report.rows if row.missed()]
    counts = [count for report in results.reports for count in report.counts if count.missed()]
    lines = [
        *(
            [
                _work(row), row.against,
                ", ".join(f"{in_words(row.conditions[name].ratio)} {name}" for name in row.missed()),
                _target(row.at_most), row.why or "unexplained",
            ]
            for row in rows
        ),
        *([count.what, "", _value(count), _largest(count), count.why or "unexplained"] for count in counts),
    ]  # fmt: skip
    return _table("operation|against|measured|target|why", lines) if lines else "No target is missed."


def _libraries(results: Results) -> str:
    """What other libraries take for the same, and how ours compares."""
    rows = [row for report in results.reports if report.name == _LIBRARIES for row in report.rows]
    cells: dict[tuple[str, str, str], dict[tuple[str, int | None], str]] = {}
    for row in rows:
        for condition, found in row.conditions.items():
            shown = f"{_duration(found.theirs.median)}; ours {in_words(found.ratio)}"
            cells.setdefault((row.where, row.against, condition), {})[row.operation, row.size] = shown
    columns = [(operation, size) for operation in _SIZED for size in SIZES]
    lines = ([*key, *(found.get(column, "") for column in columns)] for key, found in cells.items())
    return _table(f"medium|library||{_column_heads(columns)}", lines)


def _counts(results: Results) -> str:
    """What is counted: bytes, memory, times that are measured once."""
    counts = (count for report in results.reports for count in report.counts if count.unit not in ("trips", "calls"))
    return _table("counted|value|target|met", map(_count_line, counts))


BLOCKS: Final[dict[str, Callable[[Results], str]]] = {
    "machine": made_on,
    "costs": _costs,
    "growth": _growth,
    "targets": _targets,
    "missed": _missed,
    "libraries": _libraries,
    "counts": _counts,
}
"""What stands in the blocks of docs/performance.md."""


def in_words(ratio: float) -> str:
    """A ratio of our cost to theirs: 0.5 is 2 × faster, 2 is 2 × slower."""
    if 0.995 <= ratio <= 1.005:
        return "as fast"
    return f"{_number(1 / ratio)} × faster" if ratio < 1 else f"{_number(ratio)} × slower"


def _target(at_most: float | None) -> str:
    if at_most is None:
        return ""
    if at_most == 1:
        return "not slower"
    return f"at least {in_words(at_most)}" if at_most < 1 else f"at most {in_words(at_most)}"


def _met(row: Row) -> str:
    missed = row.missed()
    return "**no**" if AT_REST in missed else "**not when busy**" if missed else "yes"


def _work(row: Row) -> str:
    size = "" if row.size is None else f", {size_name(row.size)}"
    return f"{row.where}: {row.operation}{size}"


def _row_lines(row: Row) -> Iterator[list[str]]:
    for condition, found in row.conditions.items():
        judged = row.at_most is not None and condition in (AT_REST, BUSY)
        yield [
            _work(row), row.against, condition, _figures(found.ours, row), _figures(found.theirs, row), _ratio(found),
            _target(row.at_most) if judged else "",
            "" if not judged else "**no**" if condition in row.missed() else "yes",
        ]  # fmt: skip


def _ratio(found: Comparison) -> str:
    """The ratio and its quartiles."""
    low, high = found.quartiles
    if low < 1 < high:
        return f"{in_words(found.ratio)} ({in_words(low)} to {in_words(high)})"
    if high < 1:
        low, high = 1 / high, 1 / low
    return f"{in_words(found.ratio)} ({_number(low)} to {_number(high)})"


def _count_line(count: Count) -> list[str]:
    met = "" if count.at_most is None else "**no**" if count.missed() else "yes"
    return [count.what, _value(count), _largest(count), met]


def _largest(count: Count) -> str:
    return "" if count.at_most is None else f"at most {_number(count.at_most)} {count.unit}"


def _value(count: Count) -> str:
    return f"{_number(count.value)} {count.unit}" + (f" ({count.note})" if count.note else "")


def _figures(figures: Figures, row: Row) -> str:
    """Median, 99th percentile and maximum; calls a second where calls overlap."""
    times = " / ".join(map(_duration, (figures.median, figures.p99, figures.maximum)))
    return f"{figures.throughput:,.0f}/s; {times}" if row.concurrent else times


def _duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{_number(seconds / unit)} {name}"
    return f"{_number(seconds * 1e6)} µs"


def _number(value: float) -> str:
    """Three digits, or all of a whole number."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(head: str, lines: Iterable[list[str]]) -> str:
    """Markdown. Columns whose head is given are separated by `|`."""
    heads = head.split("|")
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
