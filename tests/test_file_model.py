"""Random operations on files, warm and cold, through two storages, do what they do in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from filetools import together

from agentstate import FileStorage, InMemoryStorage
from agentstate.errors import StateError
from agentstate.operations import (
    Append,
    Change,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Listing,
    Operation,
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
from agentstate.storage import memory
from agentstate.storage.base import StateStorage
from agentstate.storage.file import loggroup, logimage, loglisting, logoperations, logreader

IDS = ("a", "b~", "C ü")
VALUES = (b"1", b'{"x":[1,2.50,"]"]}', '"ü\\""'.encode(), b"null", b"[]", b"-12", b"{}", b'"' + b"x" * 250 + b'"')
SMALL = {
    "_CHECKPOINT_EVERY": 600, "_CHECKPOINT_SHARE": 1, "_RUN_BYTES": 500, "_RECENT_MESSAGES": 4, "_RECENT_BYTES": 400,
    "_GARBAGE_UNHEEDED": 3000, "_RUNS_IN_INDEX": 2, "_HISTORY_BYTES": 300,
}  # fmt: skip


class Operations:
    """Draws operations; the clock is the one that all storages of the test see."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1_700_000_000_000_000
        self.number = 0
        self.past: list[Commit] = []

    def clock(self) -> int:
        return self.now

    def some(self) -> list[Operation]:
        self.now += 1000
        if self.random.random() < 0.03:
            self.now += self.random.choice((10, 60, 700)) * 1_000_000
            self.past.clear()
        return [self._operation() for _ in range(self.random.choice((1, 1, 1, 3, 8)))]

    def _operation(self) -> Operation:
        random = self.random
        context_id = random.choice(IDS)
        user = random.choice((None,) * 9 + ("u",))
        if random.random() < 0.4:
            windows = (
                None, Window(), Window(limit=random.randrange(12)), Window(limit=3, before=random.randrange(200)),
                Window(first=random.randrange(100), limit=5),
            )  # fmt: skip
            return Query(context_id, random.choice((None, (), ("k",))), None, random.choice(windows), user)
        if self.past and random.random() < 0.05:
            return random.choice(self.past)
        self.number += 1
        changes = tuple(self._change() for _ in range(random.choice((1, 1, 1, 2, 4))))
        restores = random.random() < 0.03
        if restores:
            changes = (Restore("r", random.randrange(5) * 100, 5, None, random.choice((None, 77))), *changes)
        commit = Commit(
            context_id,
            changes,
            f"id-{self.number}" if random.random() < 0.9 else f'odd "id" {self.number}',
            user=user,
            absent=restores,
            idle_for=random.choice((None,) * 12 + (20.0,)),
            expect=random.choice((None,) * 9 + (("k", b"1"),)),
        )
        self.past = [*self.past[-40:], commit]
        return commit

    def _change(self) -> Change:
        random = self.random
        draw = random.random()
        space = random.choice(list(Space))
        keys = ("k", "k2", "", 'ü"q')
        if draw < 0.4:
            texts = []
            for _ in range(random.choice((1, 1, 1, 2, 5))):
                self.number += 1
                texts.append(b'{"n":%d,"c":"%b"}' % (self.number, b"y" * random.choice((0, 10, 50, 300))))
            return Append(tuple(texts))
        if draw < 0.55:
            return Put(space, ((random.choice(keys), random.choice(VALUES)),), random.random() < 0.1)
        changes: tuple[Change, ...] = (
            Drop(space, random.choice(keys)), Increment("n", b"2"), Trim(random.choice((0, 1, 3, 10, 30))), Delete(),
            Pop(random.choice((1, 2, 5, 20))),
            Create(random.choice((None, "u"))), Own(random.choice((None, "u"))),
        )  # fmt: skip
        return random.choice(changes)


def outcomes(storage: StateStorage, operations: list[Operation]) -> list[Any]:
    comparable: list[Any] = []
    for outcome in together(storage, *operations):
        if isinstance(outcome, Snapshot):
            outcome = outcome._replace(messages=list(outcome.messages))
        comparable.append(type(outcome) if isinstance(outcome, StateError) else outcome)
    return comparable


@pytest.mark.parametrize("seed", range(4))
def test_files_do_what_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = Random(seed)
    drawn = Operations(random)
    for module in (memory, loggroup, loglisting, logoperations):
        monkeypatch.setattr(module, "now_microseconds", drawn.clock)
    for name, value in SMALL.items():
        monkeypatch.setattr(logimage, name, value)
    monkeypatch.setattr(logreader, "_TAIL", 700)
    ttl = 50.0 if seed % 2 else None
    model = InMemoryStorage(ttl=ttl)

    def files() -> FileStorage:
        return FileStorage(tmp_path, ttl=ttl, fsync="no", cache_bytes=random.choice((1, 20_000, 10**7)))

    storages = [files(), files()]
    for _ in range(1200):
        operations = drawn.some()
        which = random.randrange(2)
        assert outcomes(storages[which], operations) == outcomes(model, operations)
        if random.random() < 0.05:
            storages[which].close()
            storages[which] = files()
        if random.random() < 0.02:
            expected, found = (storage.call(Listing()) for storage in (model, storages[which]))
            assert sorted(found.context_ids) == sorted(expected.context_ids)  # type: ignore[union-attr]
            assert list(storages[which].verify()) == []
    for storage in storages:
        storage.close()
    shutil.rmtree(tmp_path)
