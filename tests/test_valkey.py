"""The Valkey backend: what lies under its keys, and what it does about everything else that may lie there."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import valkey
from valkey_support import (
    EVERYTHING,
    HI,
    HO,
    Open,
    commit,
    existing,
    ids,
    perform,
    put,
    state,
)  # fmt: skip

from agentstate.errors import (
    StateConflictError,
    StateCorruptedError,
    StateError,
)
from agentstate.operations import (
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
    Operation,
    Pop,
    Put,
    Query,
    Snapshot,
    Space,
    Trim,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

pytest_plugins = "valkey_fixtures"


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

    def test_answers_do_not_outlive_an_expired_context(
        self, open_storage: Open, client: valkey.Valkey, key_prefix: str
    ) -> None:
        storage = open_storage(ttl=0.05)
        commit(storage, "a", put("n", b"41"), Increment("n", b"1"), commit_id="sum")
        commit(storage, "a", Drop(Space.VARIABLES, "n"), commit_id="drop")
        time.sleep(0.1)
        for _ in range(2):
            with pytest.raises(StateConflictError, match="already applied"):
                commit(storage, "a", Increment("n", b"1"), commit_id="sum")
            assert commit(storage, "a", Drop(Space.VARIABLES, "n"), commit_id="drop") == b"true"
            commit(open_storage(), "a", Append((HI,)))  # there is one of that id again
        remembered: Any = client.lrange(f"{key_prefix}{{{key_prefix}a}}:commits", 0, -1)
        assert not [item for item in remembered if item.endswith(b"\n42")]

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
