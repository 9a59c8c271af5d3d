"""Commands on the conversations of a storage: list, clear, cleanup."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from ..blocking import SyncConversationContext
from ..errors import StateError
from ..keys import check_context_id
from ..operations import Snapshot
from ..storage.base import StateStorage
from ..transfer import read_contexts
from . import console, exits
from .console import Column
from .lookup import not_found
from .rows import Row, iso, row_as_json, rows_of
from .store import FiniteNumber, Place, complete_context_id, json_option, store_options, user_option

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
@user_option
@click.option(
    "--sort",
    "order",
    type=click.Choice([*_ORDERS, "none"]),
    default="updated",
    show_default=True,
    help="Newest, longest, or by id; none prints conversations as they are read, without waiting for the last one.",
)
@click.option("-n", "--limit", type=click.IntRange(1), metavar="NUMBER", help="Only this many conversations.")
@json_option
def list_(place: Place, user_id: str | None, order: str, limit: int | None, as_json: bool) -> int:
    """List conversations.

    In a pipe, the fields are id, owner, messages, revision, last update and creation (both ISO 8601, UTC), and expiry.
    With --json, one object per line.

    \b
    Examples:
      agentstate list --user alice
      agentstate list --sort messages -n 10
      agentstate list | cut -f1
      agentstate list --json | jq -r 'select(.messages > 100).context_id'
    """
    seen = 0
    errors: list[StateError] = []

    def watched(rows: Iterator[Row]) -> Iterator[Row]:
        nonlocal seen
        for row in rows:
            seen += 1
            if isinstance(row.snapshot, StateError):
                errors.append(row.snapshot)
                console.fail(str(row.snapshot))
            yield row

    with place.open() as storage:
        rows = watched(rows_of(storage, user_id))
        if order != "none":
            with console.working("reading"):
                ordered = heapq.nsmallest(limit, rows, _ORDERS[order]) if limit else sorted(rows, key=_ORDERS[order])
            rows = iter(ordered)
        elif limit:
            rows = (row for row, _ in zip(rows, range(limit), strict=False))
        if as_json:
            for row in rows:
                console.json_line(row_as_json(row))
        else:
            _print_table(rows)
    if not seen:
        of = f" of {user_id!r}" if user_id else ""
        why = "" if place.exists else ": the folder does not exist yet"
        console.note(f"There are no conversations{of} in {place.name}{why}.")
    return exits.code_of_all(errors)


def _print_table(rows: Iterator[Row]) -> None:
    columns = (
        Column("conversation", style="bold"),
        Column("owner", optional=True),
        Column("messages", right=True),
        Column("revision", right=True, optional=True),
        Column("updated", right=True),
        Column("created", right=True, optional=True),
        Column("expires", right=True, optional=True),
    )
    console.table(columns, (_cells(row) for row in rows))


def _cells(row: Row) -> tuple[str, ...]:
    found = row.snapshot
    if isinstance(found, StateError):
        return (row.context_id, "", "", "", "cannot be read", "", "")
    people = console.on_terminal()
    times = (found.updated, found.created, found.expires)
    shown = ("" if at is None else console.ago(at) if people else iso(at) for at in times)
    number = "{:,}" if people else "{}"
    return (
        row.context_id,
        found.user_id or "",
        number.format(row.messages),
        number.format(found.revision),
        *shown,
    )


# --- clear ----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_context_id)
@store_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def clear(place: Place, ids: tuple[str, ...], yes: bool, as_json: bool) -> int:
    """Delete conversations with everything in them.

    Asks first; a script must use --yes. The exit code is 4 if one of them does not exist.

    \b
    Examples:
      agentstate clear alice
      agentstate clear --yes alice bob
    """
    names = [check_context_id(context_id) for context_id in dict.fromkeys(ids)]
    if not yes and not console.can_ask():
        raise click.UsageError("there is no terminal to ask on: use --yes")
    with place.open() as storage:
        if not yes:
            _ask_before_clearing(storage, names, place)
        context = SyncConversationContext(storage)
        missing = False
        for context_id in names:
            existed = context.clear_context(context_id)
            missing = missing or not existed
            if as_json:
                console.json_line({"context_id": context_id, "cleared": existed})
            elif existed:
                console.note(f"Cleared {context_id!r}.")
            else:
                console.fail(str(not_found(storage, place, context_id)))
    return exits.NOT_FOUND if missing else exits.OK


def _ask_before_clearing(storage: StateStorage, names: list[str], place: Place) -> None:
    """Ask about those that exist, if there are any."""
    found = [each for each in read_contexts(storage, names) if each is not None]
    if not found:
        return
    messages = sum(each.end - each.start for each in found if isinstance(each, Snapshot))
    what = repr(names[0]) if len(names) == 1 else console.counted(len(found), "conversation")
    console.confirm(f"Delete {what} ({console.counted(messages, 'message')}) from {place.name}?")


# --- cleanup --------------------------------------------------------------------------------------------------------


@click.command()
@store_options
@click.option(
    "--max-age-hours",
    type=FiniteNumber(0),
    metavar="HOURS",
    help="Delete conversations whose last update is older than this (default: 24).",
)
@user_option
@click.option("--dry-run", is_flag=True, help="Only print which conversations would be deleted.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def cleanup(
    place: Place, max_age_hours: float | None, user_id: str | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete conversations that were not written to recently.

    On a terminal it asks first; a script must use --max-age-hours or --yes. A conversation is deleted only if it is
    still that old at the moment of its deletion, so this can run while agents do, for example from cron.

    \b
    Examples:
      agentstate cleanup --dry-run
      agentstate cleanup --max-age-hours 720
    """
    hours = _DEFAULT_AGE if max_age_hours is None else max_age_hours
    if max_age_hours is None and not (yes or dry_run or console.can_ask()):
        raise click.UsageError("there is no terminal to ask on: use --max-age-hours HOURS, or --yes for 24 hours")
    with place.open() as storage:
        if dry_run:
            _print_idle(storage, hours, user_id, as_json)
            return
        if not yes and console.can_ask():
            with console.working("reading"):
                count = sum(1 for _ in _idle(storage, hours, user_id))
            if count:
                what = console.counted(count, "conversation")
                console.confirm(f"Delete {what} not written to for {hours:g} hours from {place.name}?")
        with console.working("deleting"):
            deleted = SyncConversationContext(storage, user_id=user_id).cleanup_old_contexts(hours)
    if as_json:
        console.json_line({"deleted": deleted})
    else:
        console.note(f"Deleted {console.counted(deleted, 'conversation')} from {place.name}.")


_DEFAULT_AGE: Final = 24.0


def _idle(storage: StateStorage, hours: float, user_id: str | None) -> Iterator[Row]:
    oldest = time.time() * 1_000_000 - hours * 3600e6
    for row in rows_of(storage, user_id):
        if isinstance(row.snapshot, Snapshot) and row.snapshot.updated <= oldest:
            yield row


def _print_idle(storage: StateStorage, hours: float, user_id: str | None, as_json: bool) -> None:
    count = 0
    for row in _idle(storage, hours, user_id):
        count += 1
        if as_json:
            console.json_line(row_as_json(row))
        else:
            console.line(console.one_line(row.context_id))
    if not as_json:
        console.note(f"{console.counted(count, 'conversation')} would be deleted.")


COMMANDS = (list_, clear, cleanup)
