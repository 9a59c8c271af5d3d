"""Commands on the conversations of a storage: list, show, clear, cleanup, stats."""

from __future__ import annotations

import heapq
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import click

from ..context import SyncConversationContext
from ..errors import ContextNotFoundError, StateCorruptedError, StateError
from ..keys import check_context_id
from ..operations import Query, Snapshot, Window
from ..state import from_microseconds
from ..storage.base import StateStorage
from ..transfer import pages_of_ids, read_contexts
from . import console, exits
from .console import Column
from .store import Place, complete_context_id, store_options
from .transcript import print_head, print_message

_GROUP: Final = 200
"""How many contexts are asked for at a time."""


def _context_argument(**more: Any) -> Callable[[Any], Any]:
    return click.argument("context_id", metavar="ID", shell_complete=complete_context_id, **more)


_json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")


class Row(NamedTuple):
    """What is known of a conversation without reading what was said in it."""

    context_id: str
    snapshot: Snapshot | StateError

    @property
    def messages(self) -> int:
        return 0 if isinstance(self.snapshot, StateError) else self.snapshot.end - self.snapshot.start


def _rows(storage: StateStorage, user_id: str | None = None, *, everything: bool = False) -> Iterator[Row]:
    """All conversations, in no order; with `everything`, what they hold too."""
    what: dict[str, Any] = {"variables": None, "metadata": None, "history": Window()} if everything else {}
    size = 10 if everything else _GROUP
    for page in pages_of_ids(storage, user_id):
        for position in range(0, len(page), size):
            group = page[position : position + size]
            for context_id, outcome in zip(group, read_contexts(storage, group, **what), strict=True):
                if outcome is not None:  # cleared or expired meanwhile
                    yield Row(context_id, outcome)


# --- list -----------------------------------------------------------------------------------------------------------

_ORDERS: Final[dict[str, Callable[[Row], Any]]] = {
    "updated": lambda row: -_known(row).updated,
    "created": lambda row: -_known(row).created,
    "messages": lambda row: -row.messages,
    "id": lambda row: row.context_id,
}
_UNKNOWN: Final = Snapshot(None, 0, 0, 0, 0, 0, {}, {}, 0, ())


def _known(row: Row) -> Snapshot:
    return _UNKNOWN if isinstance(row.snapshot, StateError) else row.snapshot


@click.command("list")
@store_options
@click.option("--user", "user_id", metavar="USER", help="Only conversations of this owner.")
@click.option(
    "--sort",
    "order",
    type=click.Choice([*_ORDERS, "none"]),
    default="updated",
    show_default=True,
    help="Newest or largest first; none prints them as they come, without waiting for all.",
)
@click.option("-n", "--limit", type=click.IntRange(1), help="Only the first so many.")
@_json_option
def list_(place: Place, user_id: str | None, order: str, limit: int | None, as_json: bool) -> int:
    """List conversations.

    In a pipe, the fields are id, owner, messages, revision, last update and creation (both ISO 8601, UTC), and expiry.
    With --json, one object a line.

    \b
    Examples:
      agentstate list --user alice
      agentstate list --sort messages -n 10
      agentstate list | cut -f1
      agentstate list --json | jq -r 'select(.messages > 100).context_id'
    """
    seen = Counter[str]()
    with place.open() as storage:
        rows = _watched(_rows(storage, user_id), seen)
        if order != "none":
            with console.working("looking"):
                ordered = heapq.nsmallest(limit, rows, _ORDERS[order]) if limit else sorted(rows, key=_ORDERS[order])
            rows = iter(ordered)
        elif limit:
            rows = (row for row, _ in zip(rows, range(limit), strict=False))
        if as_json:
            for row in rows:
                console.json_line(_row_as_json(row))
        else:
            _print_table(rows)
    if not seen["all"]:
        of = f" of {user_id!r}" if user_id else ""
        console.note(f"There are no conversations{of} in {place.name}.")
    return exits.CORRUPTED if seen["damaged"] else exits.OK


def _watched(rows: Iterator[Row], seen: Counter[str]) -> Iterator[Row]:
    for row in rows:
        seen["all"] += 1
        if isinstance(row.snapshot, StateCorruptedError):
            seen["damaged"] += 1
        if isinstance(row.snapshot, StateError):
            console.fail(str(row.snapshot))
        yield row


def _print_table(rows: Iterator[Row]) -> None:
    columns = (
        Column("conversation", style="bold"),
        Column("owner"),
        Column("messages", right=True),
        Column("revision", right=True),
        Column("updated", right=True),
        Column("created", right=True),
        Column("expires", right=True),
    )
    console.table(columns, (_cells(row) for row in rows))


def _cells(row: Row) -> tuple[str, ...]:
    found = row.snapshot
    if isinstance(found, StateError):
        return (row.context_id, "", "", "", "cannot be read", "", "")
    people = console.on_terminal()
    times = (found.updated, found.created, found.expires)
    shown = ("" if at is None else console.ago(at) if people else _iso(at) for at in times)
    number = "{:,}" if people else "{}"
    return (
        row.context_id,
        found.user_id or "",
        number.format(row.messages),
        number.format(found.revision),
        *shown,
    )


def _row_as_json(row: Row) -> dict[str, Any]:
    found = row.snapshot
    if isinstance(found, StateError):
        return {"context_id": row.context_id, "error": str(found)}
    return {
        "context_id": row.context_id,
        "user_id": found.user_id,
        "created_at": _iso(found.created),
        "updated_at": _iso(found.updated),
        "expires_at": None if found.expires is None else _iso(found.expires),
        "messages": row.messages,
        "history_start": found.start,
        "revision": found.revision,
    }


def _iso(microseconds: int) -> str:
    return from_microseconds(microseconds).isoformat()


# --- show -----------------------------------------------------------------------------------------------------------


@click.command()
@_context_argument()
@store_options
@click.option("-n", "--last", "limit", type=click.IntRange(0), help="Only the last so many messages.")
@click.option("-f", "--follow", is_flag=True, help="Go on, and print messages as they are added.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="How often --follow looks.",
)
@_json_option
def show(place: Place, context_id: str, limit: int | None, follow: bool, interval: float, as_json: bool) -> None:
    """Show a conversation: what was said, its variables and its metadata.

    With --json, one document whatever the storage and its layout; with --json --follow, one message a line.

    \b
    Examples:
      agentstate show alice
      agentstate show alice --last 10 --follow
      agentstate show alice --json | jq '.history[-3:]'
    """
    check_context_id(context_id)
    with place.open() as storage:
        context = SyncConversationContext(storage)
        if as_json and not follow:
            state = context.get_state(context_id, history_limit=limit)
            if state is None:
                raise _not_found(context_id, place)
            console.json_document(state.to_dict())
            return
        snapshot = _head(storage, context_id)
        if snapshot is None and not follow:
            raise _not_found(context_id, place)
        if snapshot is not None and not as_json:
            print_head(context_id, snapshot)
        start = 0 if snapshot is None else snapshot.start
        position = start if limit is None or snapshot is None else max(start, snapshot.end - limit)
        position = _print_messages(storage, context_id, position, as_json)
        if follow:
            _follow(storage, context_id, position, interval, as_json, known=snapshot is not None)


def _head(storage: StateStorage, context_id: str) -> Snapshot | None:
    deadline = time.monotonic() + storage.deadline
    found: Any = storage.call(Query(context_id, variables=None, metadata=None, deadline=deadline))
    return found if isinstance(found, Snapshot) else None


def _print_messages(storage: StateStorage, context_id: str, position: int, as_json: bool) -> int:
    """Print the messages from a position on, and return the one after the last."""
    while True:
        snapshot = _page(storage, context_id, position)
        if snapshot is None or not snapshot.messages:
            return position
        for offset, text in enumerate(snapshot.messages):
            print_message(text, snapshot.first + offset, as_json=as_json)
        position = snapshot.first + len(snapshot.messages)


def _page(storage: StateStorage, context_id: str, position: int) -> Snapshot | None:
    window = Window(limit=100, first=position)
    found: Any = storage.call(Query(context_id, history=window, deadline=time.monotonic() + storage.deadline))
    return found if isinstance(found, Snapshot) else None


def _follow(
    storage: StateStorage, context_id: str, position: int, interval: float, as_json: bool, *, known: bool
) -> None:
    sys.stdout.flush()
    if not known:
        console.note(f"There is no conversation {context_id!r} yet; waiting for it.")
    while True:
        time.sleep(interval)
        snapshot = _page(storage, context_id, position)
        if snapshot is None:
            if known:
                console.note(f"The conversation {context_id!r} was cleared.")
            known, position = False, 0
            continue
        if snapshot.end < position:
            console.note(f"{position - snapshot.end} messages were taken back.")
            position = snapshot.end
        known = True
        if snapshot.messages:
            position = _print_messages(storage, context_id, position, as_json)
            sys.stdout.flush()


def _not_found(context_id: str, place: Place) -> ContextNotFoundError:
    return ContextNotFoundError(f"there is no conversation {context_id!r} in {place.name}", context_id=context_id)


# --- clear and cleanup ----------------------------------------------------------------------------------------------


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_context_id)
@store_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_json_option
def clear(place: Place, ids: tuple[str, ...], yes: bool, as_json: bool) -> int:
    """Delete conversations with all they hold.

    Asks first; a script says --yes. The exit code is 4 if one of them was not there.

    \b
    Examples:
      agentstate clear alice
      agentstate clear --yes alice bob
    """
    names = [check_context_id(context_id) for context_id in dict.fromkeys(ids)]
    with place.open() as storage:
        context = SyncConversationContext(storage)
        if not yes:
            _ask_before_clearing(storage, names, place)
        gone = {context_id: context.clear_context(context_id) for context_id in names}
    for context_id, existed in gone.items():
        if as_json:
            console.json_line({"context_id": context_id, "cleared": existed})
        elif existed:
            console.note(f"Cleared {context_id!r}.")
        else:
            console.fail(f"there is no conversation {context_id!r} in {place.name}")
    return exits.OK if all(gone.values()) else exits.NOT_FOUND


def _ask_before_clearing(storage: StateStorage, names: list[str], place: Place) -> None:
    if not console.can_ask():
        raise click.UsageError("nobody is there to be asked: say --yes")
    found = read_contexts(storage, names)
    messages = sum(each.end - each.start for each in found if isinstance(each, Snapshot))
    what = repr(names[0]) if len(names) == 1 else f"{len(names)} conversations"
    click.confirm(f"Delete {what} ({messages:,} messages) from {place.name}?", abort=True, err=True)


@click.command()
@store_options
@click.option(
    "--max-age-hours",
    type=click.FloatRange(0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Delete what was last written longer ago than this.",
)
@click.option("--user", "user_id", metavar="USER", help="Only conversations of this owner.")
@click.option("--dry-run", is_flag=True, help="Only say which would be deleted.")
@_json_option
def cleanup(place: Place, max_age_hours: float, user_id: str | None, dry_run: bool, as_json: bool) -> None:
    """Delete conversations that nobody has written to for long.

    Each is deleted only if it is still that old at that moment, so this can run beside the agents, from cron for
    example.

    \b
    Examples:
      agentstate cleanup --max-age-hours 720
      agentstate cleanup --dry-run --json
    """
    with place.open() as storage:
        if dry_run:
            _list_idle(storage, max_age_hours, user_id, as_json)
            return
        with console.working("cleaning up"):
            deleted = SyncConversationContext(storage, user_id=user_id).cleanup_old_contexts(max_age_hours)
    if as_json:
        console.json_line({"deleted": deleted})
    else:
        console.note(f"Deleted {console.counted(deleted, 'conversation')} from {place.name}.")


def _list_idle(storage: StateStorage, max_age_hours: float, user_id: str | None, as_json: bool) -> None:
    count = 0
    oldest = time.time() * 1_000_000 - max_age_hours * 3600e6
    for row in _rows(storage, user_id):
        if isinstance(row.snapshot, Snapshot) and row.snapshot.updated <= oldest:
            count += 1
            if as_json:
                console.json_line(_row_as_json(row))
            else:
                console.line(console.one_line(row.context_id))
    if not as_json:
        console.note(f"{console.counted(count, 'conversation')} would be deleted.")


# --- stats ----------------------------------------------------------------------------------------------------------

_AGES: Final = (("last hour", 1.0), ("last day", 24.0), ("last week", 168.0), ("last 30 days", 720.0))
_LENGTHS: Final = (10, 100, 1_000, 10_000, 100_000)


class _Statistics:
    """Figures over all conversations, gathered one by one."""

    def __init__(self) -> None:
        self.now = time.time()
        self.contexts = self.unreadable = self.messages = self.owned = self.expiring = self.size = 0
        self.owners: set[str] = set()
        self.ages = Counter[str]()
        self.lengths = Counter[int]()
        self.largest: list[tuple[int, str]] = []
        self.oldest: int | None = None
        self.newest: int | None = None

    def add(self, row: Row) -> None:
        found = row.snapshot
        if isinstance(found, StateError):
            self.unreadable += 1
            return
        self.contexts += 1
        self.messages += row.messages
        self.owned += found.user_id is not None
        if found.user_id is not None and len(self.owners) < 100_000:
            self.owners.add(found.user_id)
        self.expiring += found.expires is not None
        hours = (self.now - found.updated / 1_000_000) / 3600
        self.ages[next((label for label, limit in _AGES if hours <= limit), "older")] += 1
        self.lengths[next((limit for limit in _LENGTHS if row.messages <= limit), 0)] += 1
        self.oldest = min(found.updated, found.updated if self.oldest is None else self.oldest)
        self.newest = max(found.updated, found.updated if self.newest is None else self.newest)
        for values in (found.variables.values(), found.metadata.values(), found.messages):
            self.size += sum(map(len, values))
        heapq.heappush(self.largest, (row.messages, row.context_id))
        if len(self.largest) > 5:
            heapq.heappop(self.largest)

    def as_json(self, sizes: bool) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "contexts": self.contexts,
            "unreadable": self.unreadable,
            "messages": self.messages,
            "owners": len(self.owners),
            "owned": self.owned,
            "expiring": self.expiring,
            "oldest_update": None if self.oldest is None else _iso(self.oldest),
            "newest_update": None if self.newest is None else _iso(self.newest),
            "by_age": dict(self.age_bars()),
            "by_messages": dict(self.length_bars()),
            "longest": [{"context_id": name, "messages": count} for count, name in sorted(self.largest, reverse=True)],
        }
        if sizes:
            figures["bytes"] = self.size
        return figures

    def age_bars(self) -> list[tuple[str, int]]:
        return [(label, self.ages[label]) for label in [*(label for label, _ in _AGES), "older"]]

    def length_bars(self) -> list[tuple[str, int]]:
        labels = [(f"up to {limit:,}", self.lengths[limit]) for limit in _LENGTHS]
        return [*labels, (f"over {_LENGTHS[-1]:,}", self.lengths[0])]


@click.command()
@store_options
@click.option("--sizes", is_flag=True, help="Add up the bytes of everything stored; reads all of it.")
@_json_option
def stats(place: Place, sizes: bool, as_json: bool) -> int:
    """Count conversations and messages, and show how old and how long they are.

    \b
    Examples:
      agentstate stats
      agentstate stats --sizes --json | jq .bytes
    """
    figures = _Statistics()
    with place.open() as storage, console.progress("reading") as advance:
        for row in _rows(storage, everything=sizes):
            figures.add(row)
            advance()
    if as_json:
        console.json_document({"storage": place.backend, "where": place.name, **figures.as_json(sizes)})
    else:
        _print_statistics(place, figures, sizes)
    return exits.CORRUPTED if figures.unreadable else exits.OK


def _print_statistics(place: Place, figures: _Statistics, sizes: bool) -> None:
    mean = figures.messages / figures.contexts if figures.contexts else 0
    pairs = [
        ("storage", place.backend),
        ("where", place.name),
        ("conversations", f"{figures.contexts:,}"),
        ("messages", f"{figures.messages:,}, {mean:,.1f} in a conversation"),
        ("owners", f"{len(figures.owners):,}, of {figures.owned:,} conversations"),
        ("expiring", f"{figures.expiring:,}"),
    ]
    if figures.newest is not None and figures.oldest is not None:
        pairs.append(("last update", f"{console.ago(figures.newest)}; the oldest {console.ago(figures.oldest)}"))
    if sizes:
        pairs.append(("values", console.size_text(figures.size)))
    if figures.unreadable:
        pairs.append(("unreadable", f"{figures.unreadable:,} (see agentstate verify)"))
    console.facts(pairs)
    if figures.contexts:
        console.line()
        console.bars("last updated", figures.age_bars())
        console.bars("messages in a conversation", figures.length_bars())
        longest = ((name, f"{count:,}") for count, name in sorted(figures.largest, reverse=True))
        console.table((Column("longest conversations", style="bold"), Column("messages", right=True)), longest)


COMMANDS = (list_, show, clear, cleanup, stats)
