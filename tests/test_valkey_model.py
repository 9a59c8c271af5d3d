"""The Valkey backend and the memory backend, driven by the same random operations, answer the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from servers import ValkeyCluster, ValkeySentinel, ValkeyServer
from valkey_formats import make_former

from agentstate.errors import StateError
from agentstate.operations import (
    Append,
    Change,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Lease,
    Listing,
    Operation,
    Outcome,
    Own,
    Pop,
    Put,
    Query,
    Restore,
    Snapshot,
    Space,
    Trim,
    Window,
)
from agentstate.storage.base import StateStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.storage.valkey import ValkeyStorage

Meanwhile = Callable[[random.Random], None]
IDS = ("plain", "bra{ces}", "*")
KEYS = ("a", "b", "", "v:a", "é")
USERS = (None, "u1", "u2")
VALUES = (
    b"1", b'"x"', b"[]", b"{}", b"-5", b"1.5", b"99999999999999999999999", b"true", b"null", b"1000.0", b"0",
    b"12345678901234567890123456789",
)  # fmt: skip
FUTURE = 2_000_000_000_000_000


class Operations:
    """A source of operations that often concern what others left behind."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.ids = IDS
        self.messages = 0
        self.commits: list[str] = []

    def one(self) -> Operation:
        kind = self.chance.random()
        context_id = self.chance.choice(self.ids)
        if kind < 0.6:
            return self.commit(context_id)
        if kind < 0.9:
            return Query(
                context_id,
                self.chance.choice([None, (), ("a",), ("a", "b", "zz")]),
                self.chance.choice([None, (), ("a",), ("a", "b")]),
                self.window(),
                user=self.chance.choice([None, None, None, "u1"]),
            )
        return Lease(
            context_id,
            self.chance.choice(["take", "renew", "release"]),  # type: ignore[arg-type]
            self.chance.choice(["t1", "t2"]),
            1000.0,
            user=self.chance.choice([None, None, "u1"]),
        )

    def window(self) -> Window | None:
        position, limit = self.chance.randrange(30), self.chance.randrange(4)
        return self.chance.choice(
            [
                None,
                Window(),
                Window(limit=limit),
                Window(limit=3, before=position),
                Window(limit=self.chance.choice([None, 2]), first=position),
                Window(limit=self.chance.choice([None, 3]), before=self.chance.randrange(20), first=position),
            ]
        )

    def commit(self, context_id: str) -> Commit:
        chance = self.chance
        if self.commits and chance.random() < 0.1:
            commit_id = chance.choice(self.commits[-40:])
        else:
            commit_id = f"c{len(self.commits)}"
            self.commits.append(commit_id)
        changes = tuple(self.change() for _ in range(chance.choice([1, 1, 1, 2, 3, 5])))
        options: dict[str, Any] = {}
        if chance.random() < 0.06:
            times = (chance.choice([None, 123456]), chance.choice([None, 1234567]))
            past = Restore(
                chance.choice(USERS),
                chance.randrange(5),
                *times,
                chance.choice([None, 63]),
                chance.choice([None, FUTURE]),
            )
            changes = (past, *(change for change in changes if type(change) is not Delete))
            options["absent"] = chance.random() < 0.5
        for name, likely, values in (
            ("user", 0.1, USERS),
            ("fence", 0.1, ("t1", "t2")),
            ("absent", 0.03, (True,)),
            ("idle_for", 0.05, (0.0, 100.0)),
            ("answer", 0.1, (b"77",)),
        ):
            if chance.random() < likely:
                options[name] = chance.choice(values)
        if chance.random() < 0.1:
            options["expect"] = (chance.choice(KEYS), chance.choice((*VALUES, *[None] * 6)))
        return Commit(context_id, changes, commit_id, **options)

    def frequent(self) -> Commit:
        """A commit as most are."""
        chance = self.chance
        self.commits.append(f"c{len(self.commits)}")

        def written() -> Change:
            if chance.random() < 0.6:
                return Append(tuple(self.message() for _ in range(chance.choice([1, 1, 1, 2, 60]))))
            count = chance.choice([1, 1, 2])
            space = chance.choice([Space.VARIABLES, Space.METADATA])
            return Put(space, tuple((chance.choice(KEYS), chance.choice(VALUES)) for _ in range(count)))

        changes = chance.choice(
            [
                (written(),),
                (written(), written()),
                (written(), written(), written()),
                (Append((self.message(),)), Trim(chance.choice([1, 3]))),
                (Increment(chance.choice(KEYS), chance.choice([b"1", b"-7", b"99999999999999"])),),
                (Drop(chance.choice([Space.VARIABLES, Space.METADATA]), chance.choice(KEYS)),),
                (Create(chance.choice(USERS)),),
                (Put(Space.VARIABLES, (("a", chance.choice([b"1", b"true", b'"%b"' % (b"x" * 4096)])),)),),
            ]
        )
        options: dict[str, Any] = {}
        if type(changes[0]) is Put and changes[0].items and chance.random() < 0.6:
            options["expect"] = ("a", chance.choice([b"1", b"true", None]))
            options["answer"] = changes[0].items[0][1]
        return Commit(chance.choice(self.ids), changes, self.commits[-1], fresh=chance.random() < 0.8, **options)

    def change(self) -> Change:
        chance = self.chance
        space = chance.choice([Space.VARIABLES, Space.METADATA])
        items = tuple((chance.choice(KEYS), chance.choice(VALUES)) for _ in range(chance.choice([0, 1, 1, 3])))
        texts = tuple(self.message() for _ in range(chance.choice([1, 1, 2, 5])))
        kinds: list[Change] = [
            Create(chance.choice(USERS)),
            Own(chance.choice(USERS)),
            Append(texts),
            Put(space, items, chance.random() < 0.3),
            Drop(space, chance.choice(KEYS)),
            Increment(chance.choice(KEYS), chance.choice([b"1", b"-7", b"2.5", b"99999999999999999999"])),
            Trim(chance.choice([0, 1, 3, 10])),
            Pop(chance.choice([0, 1, 2, 7])),
            Delete(),
        ]
        return chance.choices(kinds, [1, 1, 6, 5, 2, 4, 2, 3, 0.7])[0]

    def message(self) -> bytes:
        self.messages += 1
        return b'{"m":%d}' % self.messages


def perform(storage: StateStorage, operations: list[Operation]) -> list[Any]:
    outcomes: dict[int, Outcome | StateError] = {}

    def settle(index: int, outcome: Outcome | StateError) -> None:
        assert index not in outcomes
        outcomes[index] = outcome

    storage.execute(operations, settle)
    return [comparable(outcomes[index]) for index in range(len(operations))]


def comparable(outcome: Outcome | StateError) -> Any:
    """Without what clocks say."""
    if isinstance(outcome, StateError):
        return type(outcome), outcome.context_id
    if isinstance(outcome, Snapshot):
        return outcome._replace(
            created=outcome.created if outcome.created < 10**9 else 0,
            updated=outcome.updated if outcome.updated < 10**9 else 0,
            expires=outcome.expires if outcome.expires in (None, FUTURE) else -1,
            messages=list(outcome.messages),
        )
    return outcome


def listed(storage: StateStorage) -> set[str]:
    found: set[str] = set()
    cursor: str | None = ""
    while cursor is not None:
        page: Any = storage.call(Listing(cursor, size=2))
        found.update(page.context_ids)
        cursor = page.cursor
    return found


def compare(url: str, key_prefix: str, rounds: int, meanwhile: Meanwhile | None = None, **options: Any) -> None:
    seed = random.randrange(1 << 30)
    operations = Operations(random.Random(seed))
    ttl = operations.chance.choice([None, 1000])
    with closing(ValkeyStorage(url, key_prefix=key_prefix, ttl=ttl, **options)) as storage:
        model = InMemoryStorage(ttl=ttl)
        for _ in range(rounds):
            if meanwhile is not None:
                meanwhile(operations.chance)
            some = [
                operations.frequent() if operations.chance.random() < 0.3 else operations.one()
                for _ in range(operations.chance.choice([1, 1, 2, 5, 20]))
            ]
            for operation, found, expected in zip(some, perform(storage, some), perform(model, some), strict=True):
                assert found == expected, f"seed {seed}: {operation}"
        assert listed(storage) == listed(model), f"seed {seed}"


@pytest.mark.parametrize("layout", ["log", "document"])
def test_they_agree(valkey_server: ValkeyServer, key_prefix: str, layout: str) -> None:
    compare(valkey_server.url, key_prefix, 250, layout=layout)


@pytest.mark.parametrize("tag", ["", "{tag}"])
def test_they_agree_about_contexts_of_the_format_before(valkey_server: ValkeyServer, key_prefix: str, tag: str) -> None:
    """Also where only some of the keys of a context have been carried over."""
    key_prefix = tag + key_prefix
    with valkey_server.client() as client:

        def step_back(chance: random.Random) -> None:
            if chance.random() < 0.2:
                some = chance.choice([0.0, 0.5, 1.0])
                make_former(client, key_prefix, lambda kind: kind != "lease" and chance.random() < some)

        compare(valkey_server.url, key_prefix, 250, meanwhile=step_back)


@pytest.mark.parametrize("layout", ["log", "document"])
def test_they_agree_on_a_cluster(valkey_cluster: ValkeyCluster, key_prefix: str, layout: str) -> None:
    compare(valkey_cluster.url, key_prefix, 80, layout=layout)


def test_they_agree_behind_a_sentinel(valkey_sentinel: ValkeySentinel, key_prefix: str) -> None:
    compare(valkey_sentinel.url, key_prefix, 80, min_replicas=1)
