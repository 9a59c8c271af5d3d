"""Short ways to use a storage, for the tests of the Valkey backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentstate.errors import (
    StateError,
)
from agentstate.operations import (
    Change,
    Commit,
    Listing,
    Operation,
    Outcome,
    Put,
    Query,
    Snapshot,
    Space,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

Open = Callable[..., ValkeyStorage]
EVERYTHING: dict[str, Any] = {"variables": None, "metadata": None, "history": Window()}
HI, HO = b'{"content":"hi"}', b'{"content":"ho"}'


_number = iter(range(1, 1 << 60))


def commit(storage: ValkeyStorage, context_id: str, *changes: Change, **options: Any) -> bytes:
    options.setdefault("commit_id", f"test-{next(_number)}")
    answer = storage.call(Commit(context_id, changes, **options))
    assert isinstance(answer, bytes)
    return answer


def put(key: str, value: bytes, space: Space = Space.VARIABLES) -> Put:
    return Put(space, ((key, value),))


def state(storage: ValkeyStorage, context_id: str) -> Snapshot | None:
    snapshot = storage.call(Query(context_id, **EVERYTHING))
    assert snapshot is None or isinstance(snapshot, Snapshot)
    return snapshot


def existing(storage: ValkeyStorage, context_id: str) -> Snapshot:
    snapshot = state(storage, context_id)
    assert snapshot is not None
    return snapshot


def perform(storage: ValkeyStorage, *operations: Operation) -> list[Outcome | StateError]:
    outcomes: dict[int, Outcome | StateError] = {}

    def settle(index: int, outcome: Outcome | StateError) -> None:
        assert index not in outcomes
        outcomes[index] = outcome

    storage.execute(operations, settle)
    return [outcomes[index] for index in range(len(operations))]


def ids(storage: ValkeyStorage, **what: Any) -> list[str]:
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page: Any = storage.call(Listing(cursor, **what))
        found += page.context_ids
        cursor = page.cursor
    return found
