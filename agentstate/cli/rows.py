"""What is known of conversations without reading what was said in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ..errors import StateError
from ..operations import Snapshot, Window
from ..state import from_microseconds
from ..storage.base import StateStorage, concerns_one_context
from ..transfer import pages_of_ids, read_contexts

_GROUP: Final = 200
_GROUP_OF_WHOLE: Final = 10
"""How many conversations are asked for at a time; the latter where all they hold is read."""


class Row(NamedTuple):
    """What is known of a conversation without reading what was said in it."""

    context_id: str
    snapshot: Snapshot | StateError

    @property
    def messages(self) -> int:
        return 0 if isinstance(self.snapshot, StateError) else self.snapshot.end - self.snapshot.start


def rows_of(storage: StateStorage, user_id: str | None = None, *, everything: bool = False) -> Iterator[Row]:
    """All conversations, in no order; with `everything`, what they hold too. StateError: the store is away."""
    what: dict[str, Any] = {"variables": None, "metadata": None, "history": Window()} if everything else {}
    size = _GROUP_OF_WHOLE if everything else _GROUP
    for page in pages_of_ids(storage, user_id):
        for position in range(0, len(page), size):
            group = page[position : position + size]
            for context_id, outcome in zip(group, read_contexts(storage, group, **what), strict=True):
                if isinstance(outcome, StateError) and not concerns_one_context(outcome):
                    raise outcome
                if outcome is not None:  # cleared or expired meanwhile
                    yield Row(context_id, outcome)


def row_as_json(row: Row) -> dict[str, Any]:
    """A conversation as an object of JSON."""
    found = row.snapshot
    if isinstance(found, StateError):
        return {"context_id": row.context_id, "error": str(found)}
    return {
        "context_id": row.context_id,
        "user_id": found.user_id,
        "created_at": iso(found.created),
        "updated_at": iso(found.updated),
        "expires_at": None if found.expires is None else iso(found.expires),
        "messages": row.messages,
        "history_start": found.start,
        "revision": found.revision,
    }


def iso(microseconds: int) -> str:
    """A time as ISO 8601 text."""
    return from_microseconds(microseconds).isoformat()
