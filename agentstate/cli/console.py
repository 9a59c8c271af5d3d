"""Output of the commands: tables and colours on a terminal, tab-separated fields in a pipe, or JSON.

A table in a pipe is one line per row, without header or borders, for `cut`, `grep` and `while read`. Stored text is
never printed raw: characters that could move the cursor, reorder text or hide it are printed as escapes, and so are
those that the encoding of the terminal lacks. JSON stays valid.
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
from .exits import PROBLEM, USAGE

if TYPE_CHECKING:
    import click
    from rich.console import Console

# C0 except newline and tab, DEL, C1; line and paragraph separators; lone surrogates; interlinear annotations
_CONTROLS: Final = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufff9-\ufffb"
# Unicode's Default_Ignorable_Code_Point: zero-width and bidirectional characters, fillers, variation selectors, tags
_INVISIBLE: Final = (
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_UNPRINTABLE = re.compile(f"[{_CONTROLS}{_INVISIBLE}]")
# Emoji and several scripts need joiners and variation selectors: texts keep one after a visible non-ASCII character.
_UNPRINTABLE_IN_TEXT = re.compile(
    f"(?<=[^\x00-\x7f{_CONTROLS}{_INVISIBLE}])(\ufe0f?\u200d|[\u200c\ufe0e\ufe0f])|[{_CONTROLS}{_INVISIBLE}]"
)
_BREAKS = re.compile("[\n\t]")
_URL_LIKE = re.compile(r"(valkey|redis|unix)[a-z+]*:", re.IGNORECASE)

_PAGE: Final = 500  # rows of a table that are drawn together

_UNITS: Final = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def prepare_streams() -> None:
    """Make streams that no character can fail on, whatever their encoding, also where the process has none."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def on_terminal() -> bool:
    """Whether the output goes to a terminal."""
    return sys.stdout.isatty()


def can_ask() -> bool:
    """Whether questions can be asked on the terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str) -> None:
    """Ask on the terminal. Any answer but yes ends the command."""
    import click

    if not click.confirm(one_line(question), err=True):
        note("Nothing was changed.")
        raise click.exceptions.Exit(PROBLEM)


def help_if_alone(context: click.Context) -> None:
    """Where a group was called without a command: print its help to stderr and exit with a usage error."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        context.exit(USAGE)


# --- text -----------------------------------------------------------------------------------------------------------


def harmless(text: str) -> str:
    """`text` with control and invisible characters as escapes; newlines and tabs are kept."""
    return _UNPRINTABLE_IN_TEXT.sub(lambda match: match[1] or _escape(match), text)


def one_line(text: str) -> str:
    """`text` in one line, for ids, names and errors: everything that is not visible is an escape."""
    return _BREAKS.sub(_escape, _UNPRINTABLE.sub(_escape, text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that the output can represent, with control and invisible characters as escapes."""
    ascii_only = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return harmless_json(json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=str))


def harmless_json(text: str) -> str:
    """The same JSON document with control and invisible characters as escapes, in which JSON has them in strings only.

    Newlines and tabs between the values are kept.
    """
    return _UNPRINTABLE_IN_TEXT.sub(lambda match: match[1] or json.dumps(match[0])[1:-1], text)


def size_text(size: float) -> str:
    """A number of bytes, rounded, with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(count: int, word: str) -> str:
    """A number and its noun: ``1 message``, ``2 messages``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def ago(microseconds: int, now: float | None = None) -> str:
    """The distance of a time from now: ``5 min ago``, ``in 2 h``."""
    seconds = (time.time() if now is None else now) - microseconds / 1_000_000
    return f"{duration_text(seconds)} ago" if seconds >= 0 else f"in {duration_text(-seconds)}"


def clock_text(time_text: str) -> str:
    """A stored ISO time as `2026-01-31 12:00:00` in UTC; text that is not a time is returned with escapes."""
    try:
        moment = datetime.fromisoformat(time_text)
    except (TypeError, ValueError):
        return harmless(str(time_text))
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%Y-%m-%d %H:%M:%S}"


# --- output ---------------------------------------------------------------------------------------------------------

_consoles: dict[str, Console] = {}


def console(name: str = "stdout") -> Console:
    """The console of rich on `stdout` or `stderr`."""
    from rich.console import Console

    stream = getattr(sys, name)
    if name not in _consoles or _consoles[name].file is not stream:
        _consoles[name] = Console(file=stream, highlight=False, markup=False, emoji=False)
    return _consoles[name]


def line(text: str = "", style: str = "", *, end: str = "\n") -> None:
    """Print text with escapes for what is not visible; on a terminal with a style."""
    text = harmless(text)
    if on_terminal():
        console().print(text, style=style or None, end=end, soft_wrap=True)
    else:
        sys.stdout.write(text + end)


def note(text: str) -> None:
    """Print a message to stderr that is not part of the output."""
    try:
        print(harmless(text), file=sys.stderr, flush=True)
    except OSError:  # the exit code still says how the command ended
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Discard what is left in the buffer of a stream that nobody reads, so that closing it cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(text: str) -> None:
    """Print one line to stderr that says what went wrong."""
    for argument in sys.argv[1:]:  # an error may quote an argument, and a mistyped URL may hold a password
        for given in (argument, argument.partition("=")[2]):
            if _URL_LIKE.match(given):
                text = text.replace(given, redact_url(given))
    note(f"agentstate: {one_line(text)}")


def json_document(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_text(value, indent=2) + "\n")


def json_line(value: Any) -> None:
    """Print one line of JSON Lines."""
    sys.stdout.write(json_text(value) + "\n")


class Column(NamedTuple):
    """A column of a table. `right` aligns its text as numbers are; a narrow terminal does without `optional` ones."""

    title: str
    right: bool = False
    style: str = ""
    optional: bool = False


_GAP: Final = 3  # characters between two columns


def table(columns: Sequence[Column], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, with a tab between fields in a pipe."""
    if not on_terminal():
        for row in rows:
            sys.stdout.write("\t".join(map(one_line, row)) + "\n")
        return
    rest = iter(rows)
    page = _page_of(rest)
    if not page:
        return
    widths = _widths([len(column.title) for column in columns], page)
    shown = _shown_columns(columns, widths)
    with_header = True
    console().print()
    while page:  # drawn page by page: there may be many rows, and they may arrive slowly
        console().print(_drawn([columns[i] for i in shown], page, shown, widths, with_header))
        page, with_header = _page_of(rest), False
        widths = _widths(widths, page)
    console().print()
    if len(shown) < len(columns):
        left_out = ", ".join(column.title for i, column in enumerate(columns) if i not in shown)
        note(f"Not shown, since the terminal is too narrow: {left_out}.")


def _page_of(rows: Iterator[Sequence[str]]) -> list[list[str]]:
    return [list(map(one_line, row)) for row in islice(rows, _PAGE)]


def _widths(least: list[int], rows: list[list[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max(width, *map(cell_len, cells)) for width, *cells in zip(least, *rows, strict=True)] if rows else least


def _shown_columns(columns: Sequence[Column], widths: Sequence[int]) -> list[int]:
    """The indexes of the columns that the terminal has room for: optional ones are left out, the last one first."""
    shown = list(range(len(columns)))
    for index in reversed(range(len(columns))):
        if _width_of(widths, shown) <= console().width:
            break
        if columns[index].optional:
            shown.remove(index)
    return shown


def _width_of(widths: Sequence[int], shown: list[int]) -> int:
    return sum(widths[index] + _GAP for index in shown) - _GAP


def _drawn(
    columns: Sequence[Column], rows: list[list[str]], shown: list[int], widths: Sequence[int], with_header: bool
) -> Any:
    """A page of a table, whose columns are as wide as those of the pages before where the terminal has room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=with_header, header_style="bold")
    fits = _width_of(widths, shown) <= console().width
    for column, index in zip(columns, shown, strict=True):
        drawn.add_column(
            column.title, justify="right" if column.right else "left", style=column.style, overflow="fold",
            min_width=widths[index] if fits else None,
        )  # fmt: skip
    for row in rows:
        drawn.add_row(*(Text(row[index]) for index in shown))
    return drawn


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print pairs of a name and a value, one per line."""
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
    """Print counts as a bar chart."""
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


# --- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def progress(what: str, total: int | None = None, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show a bar with rate and remaining time on stderr while the block runs, if that is a terminal and it is wanted.

    Yields a function to call for each item that is done.
    """
    if not shown or not sys.stderr.isatty():
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
    with Progress(*columns, console=console("stderr"), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show what the command is doing on stderr while the block runs, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with console("stderr").status(what, spinner="line"):
        yield
