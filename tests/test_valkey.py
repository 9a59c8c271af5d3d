"""The Valkey backend: what lies under its keys, and what it does about everything else that may lie there."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Any

import pytest
import valkey
from servers import ValkeyServer
from tls import TlsProxy
from valkey_formats import make_former

from agentstate import SyncConversationContext
from agentstate.errors import (
    StateAccessError,
    StateConfigError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.operations import (
    CHANGED,
    REMEMBER_CLEARED,
    REMEMBERED_COMMITS,
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
    Page,
    Pop,
    Put,
    Query,
    Snapshot,
    Space,
    Trim,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

Open = Callable[..., ValkeyStorage]
EVERYTHING: dict[str, Any] = {"variables": None, "metadata": None, "history": Window()}
HI, HO = b'{"content":"hi"}', b'{"content":"ho"}'


@pytest.fixture
def open_storage(valkey_server: ValkeyServer, key_prefix: str) -> Iterator[Open]:
    """Opens storages on each version of the server, under a prefix of this test."""
    with ExitStack() as stack:

        def open_one(url: str = valkey_server.url, **options: Any) -> ValkeyStorage:
            storage = ValkeyStorage(url, **{"key_prefix": key_prefix, **options})
            stack.callback(storage.close)
            return storage

        yield open_one


@pytest.fixture
def storage(open_storage: Open) -> ValkeyStorage:
    return open_storage()


@pytest.fixture
def client(valkey_server: ValkeyServer) -> Iterator[valkey.Valkey]:
    with valkey_server.client() as client:
        yield client


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


class TestKeys:
    def test_a_context_is_a_hash_a_list_and_its_remembered_commits(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a{b}", Append((HI,)), put("x", b"1"), put("y", b"[]", Space.METADATA), commit_id="one")
        key = f"{key_prefix}a%7Bb%7D"
        fields: Any = client.hgetall(key)
        assert {name: fields[name] for name in (b"id", b"user", b"rev", b"start", b"end", b"exp")} == {
            b"id": b"a{b}", b"user": b"", b"rev": b"1", b"start": b"0", b"end": b"1", b"exp": b"",
        }  # fmt: skip
        assert (fields[b"v:x"], fields[b"m:y"]) == (b"1", b"[]")
        assert client.lrange(f"{key_prefix}{{{key}}}:history", 0, -1) == [HI]
        assert client.lrange(f"{key_prefix}{{{key}}}:commits", 0, -1) == [b"one"]
        assert len(client.keys(f"*{key_prefix}*")) == 3

    def test_the_keys_of_a_prefix_with_a_hash_tag_share_its_slot(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(key_prefix=f"{{{key_prefix}}}state:")
        commit(storage, "a", Append((HI,)))
        storage.call(Lease("a", "take", "token", 5.0))
        assert {key.partition(b"}")[0] for key in client.keys(f"*{key_prefix}*")} == {b"{" + key_prefix.encode()}
        assert ids(storage) == ["a"]

    def test_a_context_of_a_longer_prefix_is_neither_listed_nor_touched(
        self, open_storage: Open, key_prefix: str
    ) -> None:
        short, long = open_storage(), open_storage(key_prefix=f"{key_prefix}x:")
        commit(long, "a", put("x", b"1"))
        commit(short, "b", put("x", b"1"))
        assert ids(short) == ["b"]
        for operation in (
            Query("x:a"),
            Query("x:a", history=Window(before=1)),
            Commit("x:a", (Delete(),), "c"),
            Commit("x:a", (Append((HI,)),), "d"),
        ):
            with pytest.raises(StateConflictError, match="another key_prefix"):
                short.call(operation)
        assert existing(long, "a").variables == {"x": b"1"}

    def test_glob_characters_in_a_prefix_mean_themselves(self, open_storage: Open, key_prefix: str) -> None:
        odd = [open_storage(key_prefix=f"{key_prefix}{part}") for part in ("[ab]*:", "a:", "?:", "\\:")]
        for number, storage in enumerate(odd):
            commit(storage, f"id{number}", put("x", b"1"))
        assert [ids(storage) for storage in odd] == [["id0"], ["id1"], ["id2"], ["id3"]]

    def test_a_key_of_another_type_is_a_conflict_and_stays(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        client.rpush(f"{key_prefix}list", "mine")
        client.set(f"{key_prefix}{{{key_prefix}history}}:history", "mine")
        client.set(f"{key_prefix}{{{key_prefix}commits}}:commits", "mine")
        for context_id in ("list", "history", "commits"):
            for changes in ((Append((HI,)),), (put("x", b"1"), Append((HI, HO))), (Append((HI,)), Delete())):
                with pytest.raises(StateConflictError, match="not touched"):
                    commit(storage, context_id, *changes)
        with pytest.raises(StateConflictError, match="holds a list"):
            state(storage, "list")
        assert client.lrange(f"{key_prefix}list", 0, -1) == [b"mine"]
        assert client.get(f"{key_prefix}{{{key_prefix}history}}:history") == b"mine"
        assert client.get(f"{key_prefix}{{{key_prefix}commits}}:commits") == b"mine"
        assert ids(storage) == []

    def test_a_list_that_is_replaced_under_a_context_is_a_conflict(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a", Append((HI,)))
        client.set(f"{key_prefix}{{{key_prefix}a}}:history", "mine")
        with pytest.raises(StateConflictError, match="holds a string"):
            commit(storage, "a", Append((HO,)), commit_id="twice")
        with pytest.raises(StateConflictError):
            commit(storage, "a", Append((HO,)), commit_id="twice")  # it is not remembered as applied
        with pytest.raises(StateConflictError):
            state(storage, "a")

    @pytest.mark.parametrize("made", [(Append((HI, HI)),), (put("x", b"1"),)])
    def test_a_context_without_its_hash_is_not_taken_for_an_absent_one(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, made: tuple[Change, ...]
    ) -> None:
        """The server evicted the hash alone, or somebody deleted it."""
        commit(storage, "a", *made)
        client.delete(f"{key_prefix}a")
        for query in (
            Query("a"), Query("a", None), Query("a", history=Window()), Query("a", history=Window(limit=0)),
            Query("a", history=Window(before=1)),
        ):  # fmt: skip
            with pytest.raises(StateCorruptedError):
                storage.call(query)
        for change in (Append((HO,)), put("y", b"2"), Create(), Drop(Space.VARIABLES, "x"), Pop(1)):
            with pytest.raises(StateCorruptedError):
                commit(storage, "a", change)
        assert client.llen(f"{key_prefix}{{{key_prefix}a}}:history") == (2 if type(made[0]) is Append else 0)
        assert commit(storage, "a", Delete()) == b"true"
        assert state(storage, "a") is None
        commit(storage, "a", Append((HO,)))
        assert existing(storage, "a").messages == [HO]

    def test_messages_that_somebody_removed_are_noticed(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a", Append((HI, HI, HI)))
        client.lpop(f"{key_prefix}{{{key_prefix}a}}:history")
        for window in (Window(), Window(limit=3), Window(before=2), Window(first=0)):
            with pytest.raises(StateCorruptedError):
                storage.call(Query("a", history=window))
        for change in (Append((HO,)), Pop(2), Trim(1)):
            with pytest.raises(StateCorruptedError):
                commit(storage, "a", change, commit_id="same")
        assert client.llen(f"{key_prefix}{{{key_prefix}a}}:history") == 2
        commit(storage, "a", Delete(), commit_id="same")

    def test_a_message_that_somebody_added_is_noticed(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a", Append((HI, HI, HI)))
        client.rpush(f"{key_prefix}{{{key_prefix}a}}:history", HO)
        with pytest.raises(StateCorruptedError):
            existing(storage, "a")
        for changes in ((Append((HO,)),), (Pop(1),), (Pop(3),), (Append((HO,)), Pop(2)), (Trim(1),)):
            with pytest.raises(StateCorruptedError):
                commit(storage, "a", *changes)
        assert client.llen(f"{key_prefix}{{{key_prefix}a}}:history") == 4

    def test_a_hash_that_lacks_fields_is_corrupted_and_harms_no_other(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        client.hset(f"{key_prefix}bad", "id", "bad")
        outcomes = perform(
            storage,
            Commit("good", (Append((HI,)),), "g1"),
            Commit("bad", (Append((HI,)),), "b1"),
            Query("bad", **EVERYTHING),
            Commit("good2", (Append((HI,)),), "g2"),
        )
        assert (outcomes[0], outcomes[3]) == (b"", b"")
        assert isinstance(outcomes[1], StateError)
        assert isinstance(outcomes[2], StateError)
        with pytest.raises(StateCorruptedError):
            state(storage, "bad")
        assert client.hgetall(f"{key_prefix}bad") == {b"id": b"bad"}


def keys_of(client: valkey.Valkey, key_prefix: str) -> set[str]:
    return {key.decode() for key in client.scan_iter(f"*{key_prefix}*")}


@pytest.mark.parametrize("tag", ["", "{tag}:"])
class TestFormatOne:
    """What was written before all keys began with the prefix."""

    @pytest.fixture
    def key_prefix(self, key_prefix: str, tag: str) -> str:
        return tag + key_prefix

    @pytest.fixture
    def storage(self, open_storage: Open, client: valkey.Valkey, key_prefix: str) -> ValkeyStorage:
        storage = open_storage(key_prefix=key_prefix)
        commit(storage, "a", Append((HI, HO)), put("x", b"1"), put("y", b"2", Space.METADATA), commit_id="one")
        commit(storage, "a", Increment("n", b"1"), commit_id="two")
        before = state(storage, "a")
        make_former(client, key_prefix)
        assert not any("{" + key_prefix in key for key in keys_of(client, key_prefix) if key.startswith(key_prefix))
        assert state(storage, "a") == before
        return storage

    def test_it_is_read_in_every_way(self, storage: ValkeyStorage) -> None:
        for window, messages in (
            (Window(), [HI, HO]), (Window(limit=1), [HO]), (Window(limit=0), []), (Window(before=1), [HI]),
            (Window(first=1), [HO]),
        ):  # fmt: skip
            for names in (("x",), None):
                snapshot: Any = storage.call(Query("a", names, (), window))
                assert (snapshot.messages, snapshot.variables["x"], snapshot.end) == (messages, b"1", 2)
        counted: Any = storage.call(Query("a"))
        assert (counted.start, counted.end) == (0, 2)
        assert ids(storage) == ["a"]

    @pytest.mark.parametrize(
        ("change", "answer", "messages"),
        [
            (Append((HI,)), b"", [HI, HO, HI]),
            (put("x", b"2"), b"", [HI, HO]),
            (Pop(1), b"[%b]" % HO, [HI]),
            (Trim(1), b"", [HO]),
            (Increment("n", b"1"), b"2", [HI, HO]),
            (Drop(Space.VARIABLES, "x"), b"true", [HI, HO]),
        ],
    )
    def test_the_first_commit_carries_it_over(
        self,
        storage: ValkeyStorage,
        client: valkey.Valkey,
        key_prefix: str,
        change: Change,
        answer: bytes,
        messages: list[bytes],
    ) -> None:
        assert commit(storage, "a", Increment("n", b"1"), commit_id="two") == b"1"  # remembered: not applied again
        assert commit(storage, "a", change) == answer
        assert existing(storage, "a").messages == messages
        assert existing(storage, "a").revision == 3
        state_key = f"{key_prefix}a"
        assert keys_of(client, key_prefix) == {
            state_key, f"{key_prefix}{{{state_key}}}:history", f"{key_prefix}{{{state_key}}}:commits"
        }  # fmt: skip
        assert client.hget(state_key, "format") == b"2"
        assert commit(storage, "a", Increment("n", b"1"), commit_id="two") == b"1"
        assert existing(storage, "a").revision == 3

    def test_clearing_it_leaves_only_its_commits(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        assert commit(storage, "a", Delete(), commit_id="three") == b"true"
        assert keys_of(client, key_prefix) == {f"{key_prefix}{{{key_prefix}a}}:commits"}
        assert state(storage, "a") is None
        assert commit(storage, "a", Delete(), commit_id="three") == b"true"

    def test_the_commits_of_a_cleared_context_are_carried_over_too(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a", Delete(), commit_id="three")
        make_former(client, key_prefix)
        assert commit(storage, "a", Append((HI,)), commit_id="one") == b""
        assert state(storage, "a") is None
        commit(storage, "a", Append((HI,)), commit_id="four")
        with pytest.raises(StateConflictError, match="already applied"):
            commit(storage, "a", Increment("n", b"1"), commit_id="two")
        assert existing(storage, "a").messages == [HI]
        assert not [
            item for item in client.lrange(f"{key_prefix}{{{key_prefix}a}}:commits", 0, -1) if item[-2:] == b"\n1"
        ]

    def test_a_turn_of_a_process_of_the_version_before_excludes_others(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        assert storage.call(Lease("a", "take", "theirs", 5.0)) is True
        make_former(client, key_prefix)
        assert storage.call(Lease("a", "take", "ours", 5.0)) is False

    def test_a_document_over_it_is_a_conflict(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        client.delete(f"{key_prefix}a")
        client.set(f"{key_prefix}a", "{}")
        with pytest.raises(StateConflictError, match="neither is touched"):
            state(storage, "a")
        with pytest.raises(StateConflictError, match="neither is touched"):
            commit(storage, "a", Append((HI,)))


def test_a_newer_format_is_refused_and_stays(storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str) -> None:
    commit(storage, "a", Append((HI,)))
    client.hset(f"{key_prefix}a", "format", "3")
    before = client.hgetall(f"{key_prefix}a")
    for query in (Query("a"), Query("a", None, None, Window()), Query("a", history=Window(before=1))):
        with pytest.raises(StateConflictError, match="newer version"):
            storage.call(query)
    for change in (Append((HI,)), put("x", b"1"), Delete()):
        with pytest.raises(StateConflictError, match="newer version"):
            commit(storage, "a", change)
    assert client.hgetall(f"{key_prefix}a") == before


def test_a_user_who_may_access_only_keys_with_the_prefix_can_do_everything(start_valkey: Any, key_prefix: str) -> None:
    server = start_valkey()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "agent", "on", ">secret", f"~{key_prefix}*", "+@all")
    url = f"valkey://agent:secret@127.0.0.1:{server.port}"
    with closing(ValkeyStorage(url, key_prefix=key_prefix)) as storage:
        commit(storage, "a", Append((HI,)), put("x", b"1"), commit_id="one")
        commit(storage, "a", Append((HO,)), commit_id="two")
        assert storage.call(Lease("a", "take", "token", 5.0)) is True
        commit(storage, "a", Pop(1), fence="token")
        assert storage.call(Lease("a", "release", "token", 5.0)) is True
        assert existing(storage, "a").messages == [HI]
        assert ids(storage) == ["a"]
        assert commit(storage, "a", Delete()) == b"true"
        assert state(storage, "a") is None


class TestTimeToLive:
    def test_all_keys_of_a_context_expire_at_one_moment_that_moves_with_writes_only(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(ttl=5000)
        commit(storage, "a", Append((HI,)))
        keys = [f"{key_prefix}a", f"{key_prefix}{{{key_prefix}a}}:history", f"{key_prefix}{{{key_prefix}a}}:commits"]
        first = {client.pexpiretime(key) for key in keys}
        assert len(first) == 1
        assert 4_990_000 < first.pop() - time.time() * 1000 <= 5_001_000
        before = client.pexpiretime(keys[0])
        time.sleep(0.01)
        state(storage, "a")
        storage.call(Lease("a", "take", "token", 5.0))
        assert client.pexpiretime(keys[0]) == before
        commit(storage, "a", put("x", b"1"))
        after = {client.pexpiretime(key) for key in keys}
        assert len(after) == 1
        assert after.pop() > before

    def test_the_commits_of_an_expired_context_are_remembered_for_a_while(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(ttl=0.05)
        commit(storage, "a", Append((HI,)), commit_id="one")
        time.sleep(0.1)
        assert state(storage, "a") is None
        assert ids(storage) == []
        assert client.pttl(f"{key_prefix}{{{key_prefix}a}}:commits") > (REMEMBER_CLEARED - 10) * 1000
        assert commit(storage, "a", Append((HI,)), commit_id="one") == b""
        assert state(storage, "a") is None

    def test_a_storage_without_ttl_lets_a_context_live_for_ever(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(open_storage(ttl=1000), "a", Append((HI,)))
        assert existing(open_storage(), "a").expires is not None
        commit(open_storage(), "a", Append((HI,)))
        assert [client.pttl(key) for key in client.keys(f"*{key_prefix}*")] == [-1, -1, -1]
        assert existing(open_storage(), "a").expires is None

    def test_a_cleared_context_leaves_only_its_commits_behind_and_these_expire(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(storage, "a", Append((HI,)), put("x", b"1"), commit_id="one")
        assert commit(storage, "a", Delete(), commit_id="two") == b"true"
        assert client.keys(f"*{key_prefix}*") == [f"{key_prefix}{{{key_prefix}a}}:commits".encode()]
        assert 0 < client.pttl(f"{key_prefix}{{{key_prefix}a}}:commits") <= REMEMBER_CLEARED * 1000
        assert commit(storage, "a", Delete(), commit_id="two") == b"true"
        commit(storage, "a", Append((HI,)), commit_id="one")
        assert state(storage, "a") is None
        commit(storage, "a", Append((HO,)), commit_id="three")
        assert client.pttl(f"{key_prefix}{{{key_prefix}a}}:commits") == -1
        assert commit(storage, "a", Delete(), commit_id="two") == b"true"
        assert existing(storage, "a").messages == [HO]


def make_older(client: valkey.Valkey, key: str) -> None:
    """Let all remembered commits of a context be twice as old as any copy of them could be."""
    elements: Any = client.lrange(key, 0, -1)
    for place, element in enumerate(elements):
        if element[:1] in b"\n\t":
            kind, time, rest = element[:1], element[1:17], element[17:]
            client.lset(key, place, b"%b%016d%b" % (kind, int(time) - 22_000_000, rest))


class TestCommits:
    def test_the_last_commits_are_remembered_and_the_list_stays_small(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        key = f"{key_prefix}{{{key_prefix}a}}:commits"
        for number in range(400):
            commit(storage, "a", Increment("n", b"1"), commit_id=f"n{number}")
            if number % 50 == 0:
                make_older(client, key)
        assert client.llen(key) <= 6 * REMEMBERED_COMMITS
        for number in range(400 - REMEMBERED_COMMITS, 400):
            assert commit(storage, "a", Increment("n", b"1"), commit_id=f"n{number}") == b"%d" % (number + 1)
        assert existing(storage, "a").variables == {"n": b"400"}

    def test_commits_of_a_context_that_is_cleared_again_and_again_do_not_pile_up(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        key = f"{key_prefix}{{{key_prefix}a}}:commits"
        for _ in range(200):
            commit(storage, "a", Append((HI,)))
            commit(storage, "a", Delete())
            make_older(client, key)
        assert client.llen(key) <= 4 * REMEMBERED_COMMITS + 4

    def test_commits_without_an_answer_do_not_pile_up_and_a_copy_of_a_recent_one_is_known(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str
    ) -> None:
        key = f"{key_prefix}{{{key_prefix}a}}:commits"
        for number in range(1000):
            storage.call(Commit("a", (Append((HI,)),), f"n{number}", fresh=True))
            if number % 50 == 0:
                make_older(client, key)
        assert client.llen(key) <= 6 * REMEMBERED_COMMITS
        for number in range(1000 - REMEMBERED_COMMITS, 1000):
            commit(storage, "a", Append((HI,)), commit_id=f"n{number}")
        assert existing(storage, "a").end == 1000

    def test_an_answer_is_remembered_and_a_large_one_is_not(self, storage: ValkeyStorage) -> None:
        commit(storage, "a", Append((b'"' + b"x" * 5000 + b'"', HI)))
        assert commit(storage, "a", Pop(1), commit_id="small") == b"[" + HI + b"]"
        assert commit(storage, "a", Pop(1), commit_id="small") == b"[" + HI + b"]"
        assert len(commit(storage, "a", Pop(1), commit_id="large")) > 5000
        with pytest.raises(StateConflictError, match="already applied"):
            commit(storage, "a", Pop(1), commit_id="large")

    def test_times_of_commits_are_strictly_increasing(self, storage: ValkeyStorage) -> None:
        operations: list[Operation] = []
        for number in range(50):
            operations += [Commit("a", (Increment("n", b"1"),), f"t{number}"), Query("a", variables=("n",))]
        snapshots: Any = perform(storage, *operations)[1::2]
        assert [snapshot.variables["n"] for snapshot in snapshots] == [b"%d" % n for n in range(1, 51)]
        assert all(later.updated > earlier.updated for earlier, later in pairwise(snapshots))

    @pytest.mark.parametrize(
        ("stored", "by", "total"),
        [
            (None, b"5", b"5"),
            (b"9007199254740993", b"1", b"9007199254740994"),
            (b"-9223372036854775808", b"-1", b"-9223372036854775809"),
            (b"999999999999", b"1", b"1000000000000"),
            (b"-1000000000000", b"1", b"-999999999999"),
            (b"999999999999999999999999", b"1", b"1000000000000000000000000"),
            (b"9999999999999999999999999", b"1", b"10000000000000000000000000"),
            (b"1000000000000", b"-1000000000000", b"0"),
            (b"0.5", b"1", b"1.5"),
            (b"1", b"0.5", b"1.5"),
            (b"-5", b"3", b"-2"),
        ],
    )
    def test_sums_are_pythons(self, storage: ValkeyStorage, stored: bytes | None, by: bytes, total: bytes) -> None:
        if stored is not None:
            commit(storage, "a", put("n", stored))
        assert commit(storage, "a", Append((HI,)), Increment("n", by), commit_id="sum") == total
        assert commit(storage, "a", Append((HI,)), Increment("n", by), commit_id="sum") == total
        assert existing(storage, "a").variables == {"n": total}
        assert existing(storage, "a").messages == [HI]

    def test_several_uneven_increments_of_one_batch_are_all_made(self, storage: ValkeyStorage) -> None:
        big = b"9" * 30
        answer = commit(
            storage, "a", put("n", b"0.25"), Increment("n", b"1"), Increment("m", big), Increment("n", b"0.5")
        )
        assert answer == b"1.75"
        assert existing(storage, "a").variables == {"n": b"1.75", "m": big}

    @pytest.mark.parametrize("value", [b'"1"', b"null", b"true", b"[1]", b"{}"])
    def test_what_is_no_number_is_not_incremented(self, storage: ValkeyStorage, value: bytes) -> None:
        commit(storage, "a", put("n", value))
        with pytest.raises(StateConflictError, match="number"):
            commit(storage, "a", Append((HI,)), Increment("n", b"1"))
        assert existing(storage, "a").messages == []

    def test_operations_wait_for_those_of_their_context_that_take_two_trips(self, storage: ValkeyStorage) -> None:
        commit(storage, "a", put("n", b"0.5"))
        outcomes = perform(
            storage,
            Commit("a", (Increment("n", b"1"),), "i1"),
            Query("a", variables=("n",)),
            Commit("b", (Append((HI,)),), "i2"),
            Commit("a", (Increment("n", b"1"),), "i3"),
        )
        assert isinstance(outcomes[1], Snapshot)
        assert (outcomes[0], outcomes[1].variables, outcomes[3]) == (b"1.5", {"n": b"1.5"}, b"2.5")

    def test_empty_values_and_odd_names_are_kept(self, storage: ValkeyStorage) -> None:
        names = {"": b"[]", "v:x": b"{}", "\n": b'""', "é\u2028": b"0", "id": b"1", "a" * 3000: b"null"}
        commit(storage, "a", Put(Space.VARIABLES, tuple(names.items())), Put(Space.METADATA, tuple(names.items())))
        snapshot = existing(storage, "a")
        assert (snapshot.variables, snapshot.metadata) == (names, names)
        read: Any = storage.call(Query("a", tuple(names), ("", "v:x", "absent")))
        assert (read.variables, read.metadata) == (names, {"": b"[]", "v:x": b"{}"})
        for name in names:
            assert commit(storage, "a", Drop(Space.VARIABLES, name)) == b"true"
        assert existing(storage, "a").variables == {}

    def test_many_fields_and_messages_pass_through_at_once(self, storage: ValkeyStorage) -> None:
        items = tuple((f"k{number}", b"%d" % number) for number in range(9000))
        messages = tuple(b"%d" % number for number in range(20_000))
        commit(storage, "a", Put(Space.VARIABLES, items), Append(messages))
        assert existing(storage, "a").variables == dict(items)
        assert existing(storage, "a").messages == list(messages)
        read: Any = storage.call(Query("a", tuple(f"k{number}" for number in range(5000))))
        assert len(read.variables) == 5000
        commit(storage, "a", Put(Space.VARIABLES, (("only", b"1"),), True), Append(messages), Trim(3))
        assert existing(storage, "a").variables == {"only": b"1"}
        assert existing(storage, "a").messages == list(messages[-3:])
        assert existing(storage, "a").start == 39_997

    def test_a_value_of_sixteen_mebibytes_passes_through(self, storage: ValkeyStorage) -> None:
        large = b'"' + b"x" * (16 * 1024 * 1024 - 2) + b'"'
        commit(storage, "a", Append((large,)), put("x", large))
        assert existing(storage, "a").messages == [large]
        assert existing(storage, "a").variables == {"x": large}


class TestDocumentsOfAgentUp:
    @pytest.fixture
    def document(self, client: valkey.Valkey, key_prefix: str) -> bytes:
        text = json.dumps(
            {
                "context_id": "a",
                "user_id": None,
                "created_at": "2025-01-01T00:00:00",
                "updated_at": "2025-01-02T00:00:00",
                "metadata": {"theme": "dark"},
                "variables": {"n": 1, "empty": [], "pairs": {}},
                "history": [{"role": "user", "content": "hi", "timestamp": "2025-01-01T00:00:00", "metadata": {}}],
            }
        ).encode()
        client.setex(f"{key_prefix}a", 1000, text)
        return text

    def test_one_is_read_as_it_is(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        snapshot = existing(storage, "a")
        assert snapshot.variables == {"n": b"1", "empty": b"[]", "pairs": b"{}"}
        assert snapshot.metadata == {"theme": b'"dark"'}
        assert len(snapshot.messages) == 1
        assert snapshot.updated == 1735776000 * 1_000_000
        with pytest.raises(StateAccessError):
            storage.call(Query("a", user="alice"))
        assert ids(storage) == ["a"]
        assert ids(storage, user="alice") == []
        assert ids(storage, idle_for=3600.0) == ["a"]
        assert client.get(f"{key_prefix}a") == document

    def test_the_first_change_converts_it_and_keeps_its_time_to_live(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        assert commit(storage, "a", Increment("n", b"1"), Append((HI,)), commit_id="one") == b"2"
        assert client.type(f"{key_prefix}a") == b"hash"
        assert {
            990 < client.ttl(key) <= 1000 for key in (f"{key_prefix}a", f"{key_prefix}{{{key_prefix}a}}:history")
        } == {True}
        assert commit(storage, "a", Increment("n", b"1"), Append((HI,)), commit_id="one") == b"2"
        snapshot = existing(storage, "a")
        assert (snapshot.variables["n"], snapshot.revision, snapshot.end) == (b"2", 2, 2)

    def test_what_is_refused_or_changes_nothing_does_not_convert(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        with pytest.raises(StateConflictError):
            commit(storage, "a", Append((HI,)), absent=True)
        with pytest.raises(StateAccessError):
            commit(storage, "a", Append((HI,)), user="alice")
        with pytest.raises(StateConflictError, match="lease"):
            commit(storage, "a", Append((HI,)), fence="token")
        assert commit(storage, "a", put("n", b"2"), expect=("n", b"7")) == CHANGED
        assert commit(storage, "a", Create()) == b""
        with pytest.raises(StateAccessError):
            storage.call(Lease("a", "take", "token", 5.0, user="alice"))
        assert storage.call(Lease("a", "take", "token", 5.0))
        assert client.get(f"{key_prefix}a") == document
        commit(storage, "a", Append((HI,)), fence="token")
        assert existing(storage, "a").end == 2

    def test_it_can_be_claimed_deleted_and_given_a_ttl(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        storage = open_storage(ttl=5000)
        commit(storage, "a", Create("alice"))
        assert existing(storage, "a").user_id == "alice"
        assert client.ttl(f"{key_prefix}a") > 4000
        client.delete(
            f"{key_prefix}a", f"{key_prefix}{{{key_prefix}a}}:history", f"{key_prefix}{{{key_prefix}a}}:commits"
        )
        client.set(f"{key_prefix}a", document)
        assert commit(storage, "a", Delete(), commit_id="gone") == b"true"
        assert client.keys(f"*{key_prefix}*") == [f"{key_prefix}{{{key_prefix}a}}:commits".encode()]
        assert commit(storage, "a", Delete(), commit_id="gone") == b"true"

    def test_one_that_appears_over_a_converted_context_is_a_conflict(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        commit(storage, "a", put("x", b"1"), Trim(0))
        client.set(f"{key_prefix}a", document)
        for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Commit("a", (Delete(),), "d")):
            with pytest.raises(StateConflictError, match="AgentUp"):
                storage.call(operation)
        assert client.get(f"{key_prefix}a") == document

    def test_its_owner_alone_can_have_a_turn(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        owned = json.dumps({**json.loads(document), "user_id": "alice"})
        client.set(f"{key_prefix}a", owned)
        with pytest.raises(StateAccessError):
            storage.call(Lease("a", "take", "token", 5.0, user="bob"))
        assert storage.call(Lease("a", "take", "token", 5.0, user="alice"))
        assert client.get(f"{key_prefix}a") == owned.encode()

    def test_after_clearing_a_new_document_is_welcome(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        commit(storage, "a", Delete())
        client.set(f"{key_prefix}a", document)
        assert existing(storage, "a").end == 1
        commit(storage, "a", Append((HI,)))  # converts it
        commit(storage, "a", Delete())
        client.set(f"{key_prefix}a", document)
        assert existing(storage, "a").end == 1

    @pytest.mark.parametrize("text", [b"", b"garbage", b"[]", b'{"context_id":"a"}', b"\xff\xfe", b'{"context_id":"a'])
    def test_a_text_that_is_no_document_is_left_alone(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, text: bytes
    ) -> None:
        client.set(f"{key_prefix}a", text)
        for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Commit("a", (Delete(),), "d")):
            with pytest.raises(StateCorruptedError):
                storage.call(operation)
        assert client.get(f"{key_prefix}a") == text
        assert ids(storage) == ["a"]
        assert ids(storage, idle_for=1.0) == []

    def test_the_document_of_a_longer_prefix_is_not_listed(
        self, storage: ValkeyStorage, client: valkey.Valkey, key_prefix: str, document: bytes
    ) -> None:
        client.set(f"{key_prefix}x:a", document)
        assert ids(storage) == ["a"]
        with pytest.raises(StateConflictError):
            state(storage, "x:a")

    def test_racing_conversions_lose_nothing(self, open_storage: Open, document: bytes) -> None:
        def work(number: int) -> None:
            commit(storages[number], "a", Increment("n", b"1"), Append((HI,)))

        storages = [open_storage() for _ in range(8)]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        snapshot = existing(storages[0], "a")
        assert (snapshot.variables["n"], snapshot.end, snapshot.revision) == (b"9", 9, 9)


class TestDocumentLayout:
    def test_what_is_stored_is_a_document_for_agentup(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(layout="document", ttl=1000)
        commit(storage, "a", put("x", b"[1,{}]"), Append((HI,)))
        document = json.loads(client.get(f"{key_prefix}a"))  # type: ignore[arg-type]
        assert (document["context_id"], document["variables"], document["history"]) == (
            "a", {"x": [1, {}]}, [{"content": "hi"}],
        )  # fmt: skip
        assert 990 < client.ttl(f"{key_prefix}a") <= 1000
        document["variables"]["y"] = 2  # AgentUp reads, changes and writes all of it
        client.setex(f"{key_prefix}a", 1000, json.dumps(document))
        assert existing(storage, "a").variables == {"x": b"[1,{}]", "y": b"2"}
        assert ids(storage) == ["a"]

    def test_contexts_of_the_log_layout_are_not_touched(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        commit(open_storage(), "a", Append((HI,)))
        storage = open_storage(layout="document")
        for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Commit("a", (Delete(),), "d")):
            with pytest.raises(StateConflictError):
                storage.call(operation)
        assert client.llen(f"{key_prefix}{{{key_prefix}a}}:history") == 1

    def test_what_is_no_document_of_its_key_is_not_listed(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(layout="document")
        commit(storage, "a", Append((HI,)))
        commit(open_storage(layout="document", key_prefix=f"{key_prefix}x:"), "b", Append((HI,)))
        client.lpush(f"{key_prefix}list", "x")
        client.set(f"{key_prefix}damaged", "{")
        assert sorted(ids(storage)) == ["a", "damaged"]

    def test_a_document_of_this_layout_converts_with_its_remembered_commits(self, open_storage: Open) -> None:
        commit(open_storage(layout="document"), "a", Increment("n", b"3"), commit_id="one")
        storage = open_storage()
        assert commit(storage, "a", Increment("n", b"3"), commit_id="one") == b"3"
        commit(storage, "a", Append((HI,)))
        assert commit(storage, "a", Increment("n", b"3"), commit_id="one") == b"3"
        assert existing(storage, "a").variables == {"n": b"3"}

    def test_eight_writers_lose_nothing(self, open_storage: Open) -> None:
        def work(number: int) -> None:
            storage = open_storage(layout="document")
            for _ in range(10):
                commit(storage, "a", Increment("n", b"1"))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert existing(open_storage(layout="document"), "a").variables == {"n": b"80"}


class TestTrips:
    """Every documented operation is one command (or transaction) for the server, counted there."""

    @pytest.mark.parametrize(
        ("operations", "calls"),
        [
            ((Commit("a", (Append((HI,)),), "t1"),), {"evalsha": 1}),
            ((Commit("new", (Append((HI,)),), "t2"),), {"evalsha": 1}),
            ((Commit("a", (Increment("n", b"1"), put("x", b"1"), Pop(1)), "t3"),), {"evalsha": 1}),
            ((Commit("a", (Delete(),), "t4"),), {"evalsha": 1}),
            ((Commit("a", (Create("u"),), "t5"), Query("a", **EVERYTHING)), {"evalsha": 1}),
            ((Query("a", variables=("x",)),), {"hmget": 1, "exists": 1}),
            ((Query("a", variables=None),), {"hgetall": 1, "exists": 1}),
            ((Query("a", history=Window(limit=5)),), {"multi": 1, "hmget": 1, "exists": 1, "lrange": 1, "exec": 1}),
            ((Query("a", history=Window(limit=5, before=3)),), {"evalsha": 1}),
            ((Lease("a", "take", "token", 1.0),), {"evalsha": 1}),
            (tuple(Commit(f"many{n}", (Append((HI,)),), f"t{n}") for n in range(64)), {"evalsha": 1}),
        ],
    )
    def test_operations_that_travel_together_are_one_call(
        self, start_valkey: Any, operations: tuple[Operation, ...], calls: dict[str, int]
    ) -> None:
        server = start_valkey()
        with closing(ValkeyStorage(server.url)) as storage, server.client() as client:
            commit(storage, "a", Append((HI,)))
            client.config_resetstat()
            before = client.info("stats")["total_reads_processed"]
            perform(storage, *operations)
            reads = client.info("stats")["total_reads_processed"] - before
            stats: Any = client.info("commandstats")
        inside = {"evalsha"} & set(calls)
        counted = {
            name.removeprefix("cmdstat_"): row["calls"]
            for name, row in stats.items()
            if not name.startswith(("cmdstat_config", "cmdstat_info")) and (not inside or name == "cmdstat_evalsha")
        }
        assert counted == calls
        assert reads == 2  # what was measured, and the second INFO

    def test_get_or_create_is_a_read_for_a_context_that_was_there_before(
        self, open_storage: Open, client: valkey.Valkey
    ) -> None:
        context = SyncConversationContext(open_storage())

        def scripts_of(call: Callable[[], object]) -> int:
            """How many scripts the call has the server run."""
            client.config_resetstat()
            call()
            stats: Any = client.info("commandstats")
            return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])

        assert context.exists("a") is False  # connects
        assert scripts_of(lambda: context.get_or_create("a")) == 1
        assert scripts_of(lambda: context.get_or_create("a")) == 0
        assert scripts_of(lambda: context.get_or_create("a", user_id="alice")) == 1, "it is claimed"
        assert scripts_of(lambda: context.get_or_create("a", user_id="alice")) == 0
        assert scripts_of(lambda: context.get_or_create("a")) == 0
        with pytest.raises(StateAccessError):
            context.get_or_create("a", user_id="bob")
        SyncConversationContext(open_storage()).clear_context("a")
        created = context.get_or_create("a", user_id="bob")
        assert (created.user_id, created.revision) == ("bob", 1)
        before = context.get_or_create("a").revision
        for number in range(5000):
            context.storage.expects(f"other {number}")
        assert context.get_or_create("a").revision == before, "forgotten or not"


class TestConnections:
    def test_nothing_of_the_client_is_imported_before_it_is_needed(self) -> None:
        code = (
            "import sys; from agentstate.storage.valkey import ValkeyStorage; ValkeyStorage('valkey://localhost:1');"
            "print([name for name in ('valkey', 'asyncio', 'ssl') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_a_unix_socket_serves_as_well(self, open_storage: Open, valkey_server: ValkeyServer) -> None:
        storage = open_storage(valkey_server.unix_url)
        commit(storage, "a", Append((HI,)))
        assert existing(storage, "a").messages == [HI]

    def test_tls_is_checked_with_its_host_name(self, open_storage: Open, valkey_tls: TlsProxy) -> None:
        url = f"valkeys://127.0.0.1:{valkey_tls.port}"
        storage = open_storage(url, ssl_ca_certs=str(valkey_tls.ca_file))
        commit(storage, "a", Append((b'"' + b"x" * 300_000 + b'"',)))
        assert len(existing(storage, "a").messages[0]) == 300_002
        with pytest.raises(StateConfigError, match="certificate"):
            open_storage(url, deadline=1.5).call(Query("a"))

    def test_a_password_lets_in_and_is_never_shown(self, valkey_password: ValkeyServer, key_prefix: str) -> None:
        secret = valkey_password.password
        assert secret is not None
        address = f"127.0.0.1:{valkey_password.port}"
        with closing(ValkeyStorage(valkey_password.url, key_prefix=key_prefix)) as storage:
            commit(storage, "a", Append((HI,)))
            assert secret not in repr(storage)
            assert valkey_password.credentials not in repr(storage)
        options = {"key_prefix": key_prefix, "password": secret, "username": "default"}
        with closing(ValkeyStorage(f"valkey://{address}", **options)) as storage:
            assert existing(storage, "a").end == 1
        without = ValkeyStorage(f"valkey://{address}", key_prefix=key_prefix)
        with closing(without), pytest.raises(StateConfigError, match="password="):
            state(without, "a")
        with closing(ValkeyStorage(f"valkey://:wrong-{'x'}@{address}", key_prefix=key_prefix)) as storage:
            with pytest.raises(StateConfigError) as caught:
                state(storage, "a")
            assert "wrong-x" not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_connections_go_by_the_name_they_are_given(self, open_storage: Open, client: valkey.Valkey) -> None:
        commit(open_storage(client_name="sentry-7"), "a", Append((HI,)))
        assert "sentry-7" in {each["name"] for each in client.client_list()}

    def test_any_number_of_contexts_can_be_named(self, open_storage: Open) -> None:
        calls: Any = open_storage()._layout._calls  # type: ignore[union-attr]
        first = calls.names("c0")
        for number in range(5000):
            calls.names(f"c{number}")
        assert len(calls._names) <= 4096
        assert calls.names("c0") == first

    def test_a_listing_goes_to_an_end_where_its_server_is_gone(self, storage: ValkeyStorage) -> None:
        commit(storage, "a", Append((HI,)))
        assert storage.call(Listing("9000::0:0")) == Page((), None)  # of a cluster whose last primaries left it

    def test_another_database_is_another_store(self, open_storage: Open) -> None:
        one, two = open_storage(), open_storage(db=1)
        commit(one, "a", Append((HI,)))
        assert state(two, "a") is None
        with pytest.raises(StateError):
            open_storage(db=99).call(Query("a"))

    def test_nobody_there_is_unavailable_within_the_deadline(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            with closing(ValkeyStorage(f"valkey://127.0.0.1:{free.getsockname()[1]}", deadline=0.3)) as storage:
                started = time.monotonic()
                for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Listing()):
                    with pytest.raises(StateUnavailableError, match="nothing was changed") as caught:
                        storage.call(operation)
                    assert type(caught.value) is StateUnavailableError
                assert time.monotonic() - started < 12

    def test_a_deadline_that_has_passed_is_not_attempted(self, storage: ValkeyStorage) -> None:
        past = time.monotonic() - 1
        late = Commit("a", (Append((HI,)),), "c", deadline=past)
        for operation in (Query("a", deadline=past), late, Listing(deadline=past)):
            with pytest.raises(StateTimeoutError):
                storage.call(operation)
        assert state(storage, "a") is None

    def test_more_threads_than_connections_take_turns(self, open_storage: Open, client: valkey.Valkey) -> None:
        storage = open_storage(max_connections=2)
        state(storage, "a")
        before = client.info("stats")["total_connections_received"]

        def work() -> None:
            for _ in range(25):
                commit(storage, "a", Increment("n", b"1"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert existing(storage, "a").variables == {"n": b"200"}
        assert client.info("stats")["total_connections_received"] - before <= 1

    def test_a_closed_storage_says_so(self, storage: ValkeyStorage) -> None:
        state(storage, "a")
        storage.close()
        storage.close()
        for operation in (Query("a"), Listing()):
            with pytest.raises(StateUnavailableError, match="closed"):
                storage.call(operation)


class TestServerSettings:
    def test_a_server_that_may_lose_data_is_warned_of_once_or_refused(
        self, start_valkey: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = start_valkey("appendonly no", "maxmemory-policy allkeys-lru", "maxmemory 50mb")
        caplog.set_level(logging.WARNING, "agentstate.storage.valkey")
        with closing(ValkeyStorage(server.url)) as storage:
            for _ in range(3):
                state(storage, "a")
        assert len(caplog.records) == 2
        assert "allkeys-lru" in caplog.text
        assert "appendonly" in caplog.text
        with closing(ValkeyStorage(server.url, strict=True)) as storage:
            for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Listing()):
                with pytest.raises(StateConfigError, match="strict"):
                    storage.call(operation)

    def test_a_good_server_is_not_warned_of(self, start_valkey: Any, caplog: pytest.LogCaptureFixture) -> None:
        server = start_valkey("maxmemory-policy volatile-lru")
        with closing(ValkeyStorage(server.url, strict=True)) as storage:
            state(storage, "a")
        assert not caplog.records
        expiring = ValkeyStorage(server.url, strict=True, ttl=5)
        with closing(expiring), pytest.raises(StateConfigError, match="volatile"):
            state(expiring, "a")

    @pytest.mark.parametrize(("layout", "command"), [("log", "hmget"), ("document", "get")])
    def test_a_listing_that_is_refused_is_told(self, start_valkey: Any, layout: str, command: str) -> None:
        server = start_valkey()
        with closing(ValkeyStorage(server.url, layout=layout)) as storage:
            commit(storage, "a", Append((HI,)))
            assert ids(storage) == ["a"]
        with server.client() as client:
            client.execute_command(f"ACL SETUSER alice on >pw ~* +@all -{command}")
        limited = ValkeyStorage(f"valkey://alice:pw@127.0.0.1:{server.port}", layout=layout)
        with closing(limited), pytest.raises(StateUnavailableError, match="permission"):
            ids(limited)

    def test_a_user_with_few_permissions_can_use_it_and_one_with_fewer_is_told(self, start_valkey: Any) -> None:
        server = start_valkey()
        with server.client() as client:
            client.execute_command(
                "ACL SETUSER alice on >pw ~agentup:* ~{agentup:* +@read +@write +@scripting +@transaction"
            )
            client.execute_command("ACL SETUSER bob on >pw ~agentup:* ~{agentup:* +@read +time +info")
        address = f"127.0.0.1:{server.port}"
        alice, bob = (ValkeyStorage(f"valkey://{user}:pw@{address}") for user in ("alice", "bob"))
        with closing(alice), pytest.raises(StateUnavailableError, match="permission"):
            commit(alice, "a", Append((HI,)))
        with server.client() as client:
            client.execute_command("ACL SETUSER alice +time")
        with closing(ValkeyStorage(f"valkey://alice:pw@{address}")) as storage:
            commit(storage, "a", Append((HI,)))
            assert existing(storage, "a").messages == [HI]
            assert ids(storage) == ["a"]
        with closing(bob), pytest.raises(StateUnavailableError, match="permission"):
            commit(bob, "a", Append((HI,)))
