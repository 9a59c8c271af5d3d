"""How commands show things: on a terminal, in a pipe, or as JSON.

On a terminal tables and colours are drawn by rich. In a pipe a table is lines of fields with tabs between them and
nothing around, for `cut`, `grep` and `while read`. Whatever was stored is shown harmlessly: control characters, which
could move the cursor or forge output, appear as escapes. What the terminal's encoding cannot show appears as an escape
too, and JSON stays valid.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TextIO

from ..urls import redact_url
from .exits import USAGE

if TYPE_CHECKING:
    import click
    from rich.console import Console

# C0 but newline and tab, DEL, C1, the marks that reverse the direction of text, separators, lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\n\t]")

_PAGE: Final = 500  # rows of a table that are drawn together

_UNITS: Final = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def prepare_streams() -> None:
    """Let no character be an error, whatever the terminal's encoding, and have streams even where they are closed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def on_terminal() -> bool:
    """Whether a person sees the output."""
    return sys.stdout.isatty()


def can_ask() -> bool:
    """Whether there is somebody to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def help_if_alone(context: click.Context) -> None:
    """Print the help of a group that was called without a command, and fail for it."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        context.exit(USAGE)


# --- text -----------------------------------------------------------------------------------------------------------


def harmless(text: str) -> str:
    """`text` with control characters as escapes; newlines and tabs stay."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """`text` in one line, with everything that is not plain text as escapes."""
    return _BREAKS.sub(_escape, harmless(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that the output can carry."""
    ascii_only = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=str)


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(count: int, word: str) -> str:
    """So many of something."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """A length of time for people, in its largest unit."""
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def ago(microseconds: int, now: float | None = None) -> str:
    """How long ago a time was."""
    seconds = (time.time() if now is None else now) - microseconds / 1_000_000
    return f"{duration_text(seconds)} ago" if seconds >= 0 else f"in {duration_text(-seconds)}"


def clock_text(time_text: str) -> str:
    """A stored ISO time as `2026-01-31 12:00:00`, in UTC; what is none, as it is."""
    try:
        moment = datetime.fromisoformat(time_text)
    except (TypeError, ValueError):
        return harmless(str(time_text))
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M:%S}"


# --- output ---------------------------------------------------------------------------------------------------------

_consoles: dict[str, Console] = {}


def console(name: str = "stdout") -> Console:
    """rich's console on `stdout` or `stderr`."""
    from rich.console import Console

    stream = getattr(sys, name)
    if name not in _consoles or _consoles[name].file is not stream:
        _consoles[name] = Console(file=stream, highlight=False, markup=False, emoji=False)
    return _consoles[name]


def line(text: str = "", style: str = "", *, end: str = "\n") -> None:
    """Print a line of text, harmlessly; with a style on a terminal."""
    text = harmless(text)
    if on_terminal():
        console().print(text, style=style or None, end=end, soft_wrap=True)
    else:
        sys.stdout.write(text + end)


def note(text: str) -> None:
    """Tell the person at the terminal something that does not belong into the output."""
    try:
        print(harmless(text), file=sys.stderr, flush=True)
    except OSError:  # the exit code still tells
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Keep the interpreter from failing at its end for what nobody takes of a stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(text: str) -> None:
    """Print one line that says what went wrong."""
    for argument in sys.argv[1:]:  # an error may quote what was typed
        if "://" in argument:
            text = text.replace(argument, redact_url(argument))
    note(f"agentstate: {one_line(text)}")


def json_document(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_text(value, indent=2) + "\n")


def json_line(value: Any) -> None:
    """Print one line of JSON Lines."""
    sys.stdout.write(json_text(value) + "\n")


class Column(NamedTuple):
    """A column of a table. `right`: its text stands on the right, as numbers do."""

    title: str
    right: bool = False
    style: str = ""


def table(columns: Sequence[Column | str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, fields between tabs in a pipe."""
    if not on_terminal():
        for row in rows:
            sys.stdout.write("\t".join(map(one_line, row)) + "\n")
        return
    from rich.cells import cell_len

    named = [Column(column) if isinstance(column, str) else column for column in columns]
    widths = [0] * len(named)
    rest = iter(rows)
    page = _page_of(rest)
    console().print()
    console().print(_drawn(named, page, widths, with_header=True))
    while page:  # the rows may be many, and may be slow to come
        widths = [max(width, *map(cell_len, cells)) for width, *cells in zip(widths, *page, strict=True)]
        if page := _page_of(rest):
            console().print(_drawn(named, page, widths, with_header=False))
    console().print()


def _page_of(rows: Iterator[Sequence[str]]) -> list[list[str]]:
    return [list(map(one_line, row)) for row in islice(rows, _PAGE)]


def _drawn(columns: Sequence[Column], rows: list[list[str]], widths: Sequence[int], *, with_header: bool) -> Any:
    """A page of a table, whose columns are at least as wide as before, if the terminal is wide enough for that."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=with_header, header_style="bold")
    fits = sum(widths) + 3 * len(widths) <= console().width
    for column, width in zip(columns, widths, strict=True):
        drawn.add_column(
            column.title, justify="right" if column.right else "left", style=column.style, overflow="fold",
            min_width=max(width, len(column.title)) if fits else None,
        )  # fmt: skip
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and what they stand for, one a line."""
    if not on_terminal():
        for name, value in pairs:
            sys.stdout.write(f"{name}\t{one_line(value)}\n")
        return
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        console().print(_styled(f"{name:<{width}}  ", "dim"), _styled(one_line(value)), sep="", soft_wrap=True)


def _styled(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style=style)


def bars(title: str, counts: Sequence[tuple[str, int]]) -> None:
    """Print counts as bars."""
    if not on_terminal():
        for label, count in counts:
            sys.stdout.write(f"{title}\t{label}\t{count}\n")
        return
    from rich.bar import Bar
    from rich.table import Table

    largest = max((count for _, count in counts), default=0) or 1
    drawn = Table.grid(padding=(0, 2))
    for _ in range(2):
        drawn.add_column(justify="right")
    drawn.add_column(width=40)
    ascii_only = console().options.ascii_only
    for label, count in counts:
        bar: Any = "#" * round(40 * count / largest) if ascii_only else Bar(largest, 0, count, color="cyan")
        drawn.add_row(_styled(label, "dim"), f"{count:,}", bar)
    console().print(_styled(title, "bold"))
    console().print(drawn)
    console().print()


# --- while something takes long -------------------------------------------------------------------------------------


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar with rate and remaining time while the block runs, on stderr if that is a terminal.

    What it gives is to be called for each thing that is done.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="dim")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console("stderr"), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr, if that is a terminal, what is going on while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    with console("stderr").status(what, spinner="line"):
        yield
