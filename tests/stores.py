"""Stores of every kind for tests that copy from one to another, and data to fill them with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agentstate.caller import new_commit_id
from agentstate.context import SyncConversationContext
from agentstate.operations import Append, Change, Commit, Put, Query, Restore, Snapshot, Space, Window
from agentstate.storage.base import StateStorage
from agentstate.storage.file import FileStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.storage.valkey import ValkeyStorage

KINDS = ("memory", "file", "file documents", "valkey", "valkey documents")


class Stores:
    """Makes empty stores of a kind; each has a folder or a key prefix of its own."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self._request = request
        self._folder = folder
        self._stack = ExitStack()
        self._count = 0

    def __call__(self, kind: str, **options: Any) -> StateStorage:
        self._count += 1
        layout = "document" if kind.endswith("documents") else "log"
        storage: StateStorage
        if kind == "memory":
            storage = InMemoryStorage(**options)
        elif kind.startswith("file"):
            storage = FileStorage(self._folder / f"store-{self._count}", layout=layout, **options)
        else:
            url = self._request.getfixturevalue("valkey_9").url
            prefix = self._request.getfixturevalue("key_prefix")
            storage = ValkeyStorage(url, key_prefix=f"{prefix}{self._count}:", layout=layout, **options)
        self._stack.callback(storage.close)
        return storage

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Makes stores: `store("valkey documents", ttl=60)`."""
    stores = Stores(request, tmp_path)
    yield stores
    stores.close()


def whole(storage: StateStorage, context_id: str) -> Snapshot | None:
    """Everything that is stored of a context."""
    found: Any = storage.call(Query(context_id, variables=None, metadata=None, history=Window()))
    assert found is None or isinstance(found, Snapshot)
    return found


def restore(storage: StateStorage, context_id: str, snapshot: Snapshot) -> None:
    """Store a context as in `snapshot`, in one commit."""
    changes: list[Change] = [Restore(snapshot.user_id, snapshot.start, *snapshot[1:4], snapshot.expires)]
    changes += [Put(Space.VARIABLES, tuple(snapshot.variables.items()))] if snapshot.variables else []
    changes += [Put(Space.METADATA, tuple(snapshot.metadata.items()))] if snapshot.metadata else []
    changes += [Append(tuple(snapshot.messages))] if snapshot.messages else []
    storage.call(Commit(context_id, tuple(changes), new_commit_id(), absent=True))


def fill(storage: StateStorage, *, contexts: int = 20, long: int = 1200) -> list[str]:
    """Store conversations of many shapes, as agents write them. Returns their ids."""
    context = SyncConversationContext(storage)
    for number in range(contexts):
        with context.batch(f"context {number}/é{{x}}*") as batch:
            batch.add_to_history("user", f"hello {number} 漢 😀 \x00 \u2028")
            batch.set_variable("value", {"list": [number, 1.5, None, True, {}], "large": 2**70, "": ""})
            batch.set_metadata("agentstate", "a key that is also ours")
    context.get_or_create("owned", "alice")
    context.get_or_create("empty")
    for first in range(0, long, 50):
        messages = [{"role": "user", "content": f"message {first + offset}"} for offset in range(50)]
        context.extend_history("long", messages)
    context.trim_history("long", long - 120)
    context.set_variable("long", "kept", True)
    context.extend_history("one commit", [{"role": "user", "content": number} for number in range(long)])
    return [f"context {number}/é{{x}}*" for number in range(contexts)] + ["owned", "empty", "long", "one commit"]


def many(storage: StateStorage, count: int) -> None:
    """Store `count` small conversations."""
    context = SyncConversationContext(storage)
    for number in range(count):
        with context.batch(f"c{number:06}") as batch:
            batch.set_variable("number", number)
            batch.add_to_history("user", f"message of {number}", timestamp="2026-01-31T12:00:00+00:00")


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Return when the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """The items in an order that depends on the seed only."""
    result = list(items)
    random.Random(seed).shuffle(result)
    return result
