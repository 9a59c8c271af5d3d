"""The command show: print a conversation, and follow it."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click

from ..blocking import SyncConversationContext
from ..keys import check_context_id
from ..operations import Query, Snapshot, Window
from ..storage.base import StateStorage
from . import console
from .lookup import not_found
from .store import FiniteNumber, Place, complete_context_id, json_option, store_options
from .transcript import print_head, print_message

_PAGE: Final = 100  # messages


@click.command()
@click.argument("context_id", metavar="ID", shell_complete=complete_context_id)
@store_options
@click.option(
    "-n", "--last", "limit", type=click.IntRange(0), metavar="NUMBER", help="Only this many messages, the newest."
)
@click.option("-f", "--follow", is_flag=True, help="Keep running, and print messages as they are added.")
@click.option(
    "--interval",
    type=FiniteNumber(0.05, 86400),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="How often --follow checks for new messages.",
)
@json_option
def show(place: Place, context_id: str, limit: int | None, follow: bool, interval: float, as_json: bool) -> None:
    """Show a conversation: messages, variables and metadata.

    With --json, one JSON document, the same for every storage and layout; with --json --follow, one message per line.

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
                raise not_found(storage, place, context_id)
            console.json_document(state.to_dict())
            return
        snapshot = _read(storage, Query(context_id, variables=None, metadata=None))
        if snapshot is None and not follow:
            raise not_found(storage, place, context_id)
        position = 0
        if snapshot is not None:
            if not as_json:
                print_head(context_id, snapshot)
            first = snapshot.start if limit is None else max(snapshot.start, snapshot.end - limit)
            position = _print_messages(storage, context_id, first, snapshot.end, as_json)
        if follow:
            _follow(storage, context_id, position, interval, as_json, known=snapshot is not None)


def _read(storage: StateStorage, query: Query) -> Snapshot | None:
    found: Any = storage.call(query._replace(deadline=time.monotonic() + storage.deadline))
    return found if isinstance(found, Snapshot) else None


def _print_messages(storage: StateStorage, context_id: str, position: int, end: int, as_json: bool) -> int:
    """Print the messages at positions `position` to `end`, and return the position after the last one."""
    while position < end:
        window = Window(limit=_PAGE, first=position, before=end)
        snapshot = _read(storage, Query(context_id, history=window))
        if snapshot is None or not snapshot.messages:
            break
        for offset, text in enumerate(snapshot.messages):
            print_message(text, snapshot.first + offset, as_json=as_json)
        position = snapshot.first + len(snapshot.messages)
    return position


def _follow(
    storage: StateStorage, context_id: str, position: int, interval: float, as_json: bool, *, known: bool
) -> None:
    sys.stdout.flush()
    if not known:
        console.note(f"There is no conversation {context_id!r} yet. Waiting for it.")
    while True:
        time.sleep(interval)
        snapshot = _read(storage, Query(context_id))
        if snapshot is None:
            if known:
                console.note(f"The conversation {context_id!r} was cleared.")
            known, position = False, 0
            continue
        if snapshot.end < position:
            console.note(f"{console.counted(position - snapshot.end, 'message')} removed from the end.")
            position = snapshot.end
        known = True
        if snapshot.end > position:
            position = _print_messages(storage, context_id, position, snapshot.end, as_json)
            sys.stdout.flush()


COMMANDS = (show,)
