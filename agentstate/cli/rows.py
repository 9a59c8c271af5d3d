"""Conversations without their messages: owner, times, counts and revision."""

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
"""How many conversations are read together; the latter with their values and messages."""


class Row(NamedTuple):
    """A conversation as a listing shows it, or why it cannot be read."""

    context_id: str
    snapshot: Snapshot | StateError

    @property
    def messages(self) -> int:
        return 0 if isinstance(self.snapshot, StateError) else self.snapshot.end - self.snapshot.start


def rows_of(storage: StateStorage, user_id: str | None = None, *, everything: bool = False) -> Iterator[Row]:
    """All conversations, in no order; `everything` reads values and messages too. Raises StateError for the store."""
    what: dict[str, Any] = {"variables": None, "metadata": None, "history": Window()} if everything else {}
    size = _GROUP_OF_WHOLE if everything else _GROUP
    for page in pages_of_ids(storage, user_id):
        for position in range(0, len(page), size):
            group = page[position : position + size]
            for context_id, outcome in zip(group, read_contexts(storage, group, **what), strict=True):
                if isinstance(outcome, StateError) and not concerns_one_context(outcome):
                    raise outcome
                if outcome is not None:  # not cleared or expired since it was listed
                    yield Row(context_id, outcome)


def row_as_json(row: Row) -> dict[str, Any]:
    """A row as a JSON object."""
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
