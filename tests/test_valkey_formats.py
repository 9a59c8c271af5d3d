"""What was stored in Valkey otherwise: by earlier versions, by AgentUp, and in the document layout."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import valkey
from valkey_formats import make_former
from valkey_support import (
    HI,
    HO,
    Open,
    commit,
    existing,
    ids,
    put,
    state,
)  # fmt: skip

from agentstate.errors import (
    StateAccessError,
    StateConflictError,
    StateCorruptedError,
)
from agentstate.operations import (
    CHANGED,
    Append,
    Change,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Lease,
    Pop,
    Query,
    Space,
    Trim,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

pytest_plugins = "valkey_fixtures"


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
