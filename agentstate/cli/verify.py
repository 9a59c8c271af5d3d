"""The command verify: check that everything stored is intact, and repair what is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click

from .. import codec
from ..errors import StateError
from ..keys import check_context_id
from ..operations import Snapshot, Window
from ..storage.base import StateStorage, concerns_one_context
from ..transfer import count_contexts, pages_of_ids, read_contexts
from . import console, exits
from .lookup import not_found
from .store import Place, complete_context_id, json_option, store_options

_PAGE = 500


class Damage(NamedTuple):
    """A damaged conversation. `context_id` is None where the id itself cannot be read."""

    context_id: str | None
    reason: str
    where: str | None = None


@dataclass
class _Seen:
    """What was checked, and which ids do not exist."""

    conversations: int = 0
    messages: int = 0
    absent: list[str] = field(default_factory=list)


@click.command()
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=complete_context_id)
@store_options
@click.option(
    "--repair",
    is_flag=True,
    help="Replace damaged ones by what is intact; the damaged files are kept under other names.",
)
@json_option
def verify(place: Place, ids: tuple[str, ...], repair: bool, as_json: bool) -> int:
    """Read conversations completely and check that they are intact.

    Without an ID, all of them. With --repair, a damaged log is replaced by what is intact in it, and the damaged file
    is kept under another name. The exit code is 6 if something is damaged and was not repaired.

    \b
    Examples:
      agentstate verify
      agentstate verify --repair alice
    """
    names = [check_context_id(context_id) for context_id in dict.fromkeys(ids)]
    seen = _Seen()
    unrepaired = 0
    found: list[dict[str, Any]] = []
    with place.open() as storage:
        for damage in _damaged(storage, names, seen):
            saved = _repaired(storage, damage) if repair else None
            unrepaired += saved is None
            found.append({**damage._asdict(), "repaired": saved})
            if not as_json:
                _print(damage, saved)
        for name in seen.absent if names else ():  # one that was listed before was cleared since
            console.fail(str(not_found(storage, place, name)))
    if as_json:
        console.json_document({"conversations": seen.conversations, "messages": seen.messages, "damaged": found})
    elif seen.conversations or found or not names:
        repaired = f", {len(found) - unrepaired:,} repaired" if len(found) > unrepaired else ""
        state = f"{len(found):,} damaged{repaired}" if found else "all intact"
        counts = (
            f"{console.counted(seen.conversations, 'conversation')} with {console.counted(seen.messages, 'message')}"
        )
        console.line(f"{counts}, {state}.", "red" if unrepaired else "green")
    return exits.CORRUPTED if unrepaired else exits.NOT_FOUND if names and seen.absent else exits.OK


def _print(damage: Damage, saved: str | None) -> None:
    name = damage.context_id if damage.context_id is not None else damage.where
    console.line(f"{console.one_line(str(name))}: {console.one_line(damage.reason)}", "red")
    if saved is not None:
        console.line(f"  repaired: {console.one_line(saved)}", "green")


# --- looking --------------------------------------------------------------------------------------------------------


def _damaged(storage: StateStorage, names: list[str], seen: _Seen) -> Iterator[Damage]:
    """Each damaged conversation once: found by the storage itself, or by reading it."""
    known: set[str | None] = set()
    for damage in _found_by_storage(storage, names):
        known.add(damage.context_id)
        yield damage
    with console.progress("verifying", len(names) or _total(storage)) as advance:
        for page in [names] if names else pages_of_ids(storage):
            for context_id in page:
                reason = _reason(storage, context_id, seen)
                advance()
                if reason is not None and context_id not in known:
                    yield Damage(context_id, reason)


def _total(storage: StateStorage) -> int | None:
    import sys

    return count_contexts(storage) if sys.stderr.isatty() else None


def _found_by_storage(storage: StateStorage, names: list[str]) -> Iterator[Damage]:
    from ..storage.file import FileStorage

    if not isinstance(storage, FileStorage):
        return
    with console.working("checking files"):
        problems = [each for each in storage.verify() if not names or each.context_id in names]
    for each in problems:
        yield Damage(each.context_id, each.reason, each.path)


def _reason(storage: StateStorage, context_id: str, seen: _Seen) -> str | None:
    """Why a conversation is damaged; None if it is intact or does not exist."""
    position: int | None = None
    while True:
        window = Window(limit=_PAGE, first=0 if position is None else position)
        everything = {"variables": None, "metadata": None} if position is None else {}
        found = read_contexts(storage, [context_id], history=window, **everything)[0]
        if isinstance(found, StateError):
            if not concerns_one_context(found):
                raise found
            return str(found)
        if found is None:
            if position is None:
                seen.absent.append(context_id)
            return None
        if position is None:
            seen.conversations += 1
        reason = _invalid(found)
        if reason is not None:
            return reason
        seen.messages += len(found.messages)
        position = found.first + len(found.messages)
        if position >= found.end or not found.messages:
            return None


def _invalid(found: Snapshot) -> str | None:
    for name, values in (("variable", found.variables), ("metadata", found.metadata)):
        for key, text in values.items():
            if _decoded(text) is _BAD:
                return f"the {name} {key!r} is not JSON"
    for number, text in enumerate(found.messages, found.first):
        if not isinstance(_decoded(text), dict):
            return f"message {number:,} is not a JSON object"
    return None


_BAD = object()


def _decoded(text: bytes) -> Any:
    try:
        return codec.decode(text)
    except (ValueError, RecursionError):
        return _BAD


# --- repairing ------------------------------------------------------------------------------------------------------


def _repaired(storage: StateStorage, damage: Damage) -> str | None:
    """A description of what was saved; None where nothing could be."""
    from ..storage.file import FileStorage

    if not isinstance(storage, FileStorage) or damage.context_id is None:
        console.fail(f"{damage.context_id or damage.where}: it cannot be repaired")
        return None
    try:
        saved = storage.repair(damage.context_id)
    except StateError as error:
        console.fail(str(error))
        return None
    lost = f", {console.counted(saved.lost_bytes, 'byte')} lost" if saved.lost_bytes else ""
    kept = f"; the damaged file is kept as {saved.original}" if saved.original else ""
    return f"{console.counted(saved.messages, 'message')}{lost}{kept}"


COMMANDS = (verify,)
