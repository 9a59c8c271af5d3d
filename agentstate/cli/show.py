"""The command show: a conversation as one reads it, and as it goes on."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ..context import SyncConversationContext
from ..errors import ContextNotFoundError
from ..keys import check_context_id
from ..operations import Query, Snapshot, Window
from ..storage.base import StateStorage
from . import console
from .store import FiniteNumber, Place, complete_context_id, json_option, store_options
from .transcript import print_head, print_message


@click.command()
@click.argument("context_id", metavar="ID", shell_complete=complete_context_id)
@store_options
@click.option("-n", "--last", "limit", type=click.IntRange(0), help="Only the last so many messages.")
@click.option("-f", "--follow", is_flag=True, help="Go on, and print messages as they are added.")
@click.option(
    "--interval",
    type=FiniteNumber(0.05, 86400),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="How often --follow looks.",
)
@json_option
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


COMMANDS = (show,)
