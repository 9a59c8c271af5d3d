"""Documents as AgentUp writes them: reading them, writing them, living beside AgentUp, and refusing everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from documenttools import SECOND, Documents, contents

from agentstate.context import SyncConversationContext
from agentstate.errors import (
    StateConflictError,
)
from agentstate.operations import (
    REMEMBER_CLEARED,
    Commit,
    Create,
    Delete,
    Lease,
)
from agentstate.storage.document import DocumentUpdate


@pytest.fixture
def storage() -> Documents:
    return Documents()


@pytest.fixture
def context(storage: Documents) -> SyncConversationContext:
    return SyncConversationContext(storage)


class AgentUp:
    """What AgentUp does to the documents: reads one, changes it, and writes all of it back."""

    def __init__(self, storage: Documents, *, indent: int | None = None, naive: bool = False) -> None:
        self.storage = storage
        self.indent = indent
        self.naive = naive

    def save(self, context_id: str, change: Callable[[dict[str, Any]], Any]) -> None:
        self.storage.now += SECOND
        now = datetime.fromtimestamp(self.storage.now / SECOND, UTC)
        stamp = (now.replace(tzinfo=None) if self.naive else now).isoformat()
        if context_id in self.storage.stored:
            state = json.loads(self.storage.stored[context_id])
        else:
            state = {"context_id": context_id, "user_id": None, "created_at": stamp, "updated_at": stamp}
            state |= {"metadata": {}, "variables": {}, "history": []}
        change(state)
        state["updated_at"] = stamp
        self.storage.stored[context_id] = json.dumps(state, indent=self.indent).encode()

    def add(self, context_id: str, content: Any) -> None:
        def change(state: dict[str, Any]) -> None:
            message = {"role": "user", "content": content, "timestamp": state["created_at"], "metadata": {}}
            state["history"] = [*state["history"], message][-100:]

        self.save(context_id, change)

    def set(self, context_id: str, key: str, value: Any) -> None:
        self.save(context_id, lambda state: state["variables"].__setitem__(key, value))


# --- the shape ------------------------------------------------------------------------------------------------------


def test_a_document_has_agentups_fields(storage: Documents, context: SyncConversationContext) -> None:
    context.get_or_create("a", "alice")
    context.set_variables("a", {"x": [1, {}], "n": 2**70})
    context.set_metadata("a", "m", 1.5)
    context.add_to_history("a", "user", "Grüße 🙂", {"k": 1})
    document = storage.document()
    assert list(document) == ["context_id", "user_id", "created_at", "updated_at", "metadata", "variables", "history"]
    assert (document["context_id"], document["user_id"]) == ("a", "alice")
    assert datetime.fromisoformat(document["created_at"]) == datetime.fromtimestamp(1_750_000_000, UTC)
    assert document["created_at"].endswith("+00:00")  # AgentUp compares with aware times
    assert document["variables"] == {"x": [1, {}], "n": 2**70}
    assert set(document["metadata"]) == {"agentstate", "m"}
    assert [message["content"] for message in document["history"]] == ["Grüße 🙂"]
    assert "Grüße 🙂".encode() in storage.stored["a"]


def test_our_bookkeeping_does_not_show(context: SyncConversationContext) -> None:
    context.set_metadata("a", "m", 1)
    assert context.get_all_metadata("a") == {"m": 1}
    assert context.get_metadata("a", "agentstate") is None
    assert context.delete_metadata("a", "agentstate") is False
    context.update_state("a", metadata={"k": 2})
    state = context.get_state("a")
    assert state is not None
    assert (state.metadata, state.revision) == ({"k": 2}, 3)


def test_the_user_may_have_a_key_of_the_same_name(storage: Documents, context: SyncConversationContext) -> None:
    value = {"document_version": 1, "mine": [1]}
    context.set_metadata("a", "agentstate", value)
    context.set_metadata("a", "m", 1)
    assert context.get_all_metadata("a") == {"agentstate": value, "m": 1}
    AgentUp(storage).add("a", "hi")
    context.set_variable("a", "x", 1)
    assert context.get_all_metadata("a") == {"agentstate": value, "m": 1}
    assert context.delete_metadata("a", "agentstate") is True
    assert context.get_all_metadata("a") == {"m": 1}


def test_metadata_of_agentup_with_our_name_is_the_users(storage: Documents, context: SyncConversationContext) -> None:
    for value in ("text", {"k": 1}, None, []):
        name = f"context {value}"
        AgentUp(storage).save(name, lambda state, value=value: state["metadata"].update(agentstate=value))
        assert context.get_all_metadata(name) == {"agentstate": value}
        context.add_to_history(name, "user", "hi")
        assert context.get_all_metadata(name) == {"agentstate": value}


def test_a_write_that_changes_nothing_writes_nothing(storage: Documents, context: SyncConversationContext) -> None:
    context.set_variable("a", "x", 1, commit_id="one")
    assert storage.writes == 1
    context.get_or_create("a")
    context.set_variable("a", "x", 1, commit_id="one")
    context.clear_context("absent")
    context.pop_history("absent")
    storage.call(Commit("a", (Delete(),), "c", idle_for=60.0))
    with pytest.raises(StateConflictError):
        storage.call(Commit("a", (Create(),), "c", absent=True))
    storage.call(Lease("a", "renew", "nobody's", 30.0))
    storage.call(Lease("a", "release", "nobody's", 30.0))
    assert storage.writes == 1
    assert list(storage.stored) == ["a"]


# --- beside AgentUp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("naive", [False, True])
def test_what_agentup_wrote_is_read_as_it_is(
    storage: Documents, context: SyncConversationContext, indent: int | None, naive: bool
) -> None:
    agentup = AgentUp(storage, indent=indent, naive=naive)
    variables = {"x": [0.1, 1e22, -0.0, 2**70, {"": []}], "text": "Grüße\n🙂\0", "none": None}
    agentup.save("a", lambda state: state.update(variables=variables, user_id="alice", metadata={"m": {}}))
    for number in range(3):
        agentup.add("a", number)
    state = context.get_state("a")
    assert state is not None
    assert repr(state.variables) == repr(variables)
    assert (state.user_id, state.metadata, state.history_start, state.revision) == ("alice", {"m": {}}, 0, 1)
    assert [message["content"] for message in state.history] == [0, 1, 2]
    assert state.updated_at - state.created_at == timedelta(seconds=3)
    assert list(context.list_contexts("alice")) == ["a"]
    storage.now += SECOND
    context.add_to_history("a", "assistant", "new")
    after = context.get_state("a")
    assert after is not None
    assert repr(after.variables) == repr(variables)
    assert (after.user_id, after.created_at, after.revision) == ("alice", state.created_at, 2)
    assert contents(context) == [0, 1, 2, "new"]


def test_missing_fields_are_empty_as_they_are_for_agentup(storage: Documents, context: SyncConversationContext) -> None:
    storage.stored["a"] = b'{"context_id": "a", "created_at": "2025-01-01T00:00:00", "updated_at": "2025-01-01"}'
    state = context.get_state("a")
    assert state is not None
    assert (state.user_id, state.variables, state.metadata, state.history) == (None, {}, {}, [])


def test_agentup_and_we_take_turns(storage: Documents, context: SyncConversationContext) -> None:
    agentup = AgentUp(storage, indent=2)
    agentup.add("a", 0)
    context.add_to_history("a", "user", 1, commit_id="one")
    agentup.add("a", 2)
    agentup.set("a", "x", "agentup's")
    before = context.get_state("a")
    context.add_to_history("a", "user", 1, commit_id="one")  # remembered, though AgentUp wrote in between
    assert context.get_state("a") == before
    context.set_variable("a", "y", "ours")
    agentup.add("a", 3)
    context.add_to_history("a", "user", 4)
    assert contents(context) == [0, 1, 2, 3, 4]
    assert context.get_variables("a") == {"x": "agentup's", "y": "ours"}
    assert [m["content"] for m in context.get_history("a", before=3)] == [0, 1, 2]


def test_what_agentup_writes_raises_the_revision(storage: Documents, context: SyncConversationContext) -> None:
    context.set_variable("a", "x", 1)
    AgentUp(storage).set("a", "x", 2)
    state = context.get_state("a")
    assert state is not None
    assert state.revision == 2
    context.set_variable("a", "x", 3)
    state = context.get_state("a")
    assert state is not None
    assert state.revision == 3


def test_positions_stay_when_agentup_trims_to_its_hundred(storage: Documents, context: SyncConversationContext) -> None:
    context.extend_history("a", [{"role": "user", "content": n} for n in range(98)])
    context.trim_history("a", keep=95)
    agentup = AgentUp(storage)
    for number in range(98, 110):
        agentup.add("a", number)
    state = context.get_state("a")
    assert state is not None
    assert contents(context) == list(range(10, 110))
    assert state.history_start == 10
    assert [m["content"] for m in context.get_history("a", limit=2, before=50)] == [48, 49]
    context.add_to_history("a", "user", 110)
    assert [m["content"] for m in context.get_history("a", limit=1, before=111)] == [110]
    for number in range(111, 311):  # nothing is left of what we knew
        agentup.add("a", number)
    state = context.get_state("a")
    assert state is not None
    assert state.history_start == 111  # at least: nobody can know what was dropped unseen
    assert contents(context) == list(range(211, 311))


def test_a_history_that_was_emptied_goes_on_from_its_positions(
    storage: Documents, context: SyncConversationContext
) -> None:
    context.extend_history("a", [{"role": "user", "content": n} for n in range(3)])
    AgentUp(storage).save("a", lambda state: state.update(history=[]))
    state = context.get_state("a")
    assert state is not None
    assert state.history_start == 3
    context.clear_history("a")
    AgentUp(storage).add("a", "next")
    assert [m["content"] for m in context.get_history("a", before=4)] == ["next"]


def test_agentup_may_fill_a_cleared_context_again(storage: Documents, context: SyncConversationContext) -> None:
    context.set_variable("a", "x", 1, commit_id="one")
    context.clear_context("a", commit_id="clear")
    assert context.get_state("a") is None
    assert storage.document()["history"] == []  # for AgentUp it is an empty conversation
    AgentUp(storage).add("a", "hi")
    assert contents(context) == ["hi"]
    assert list(context.list_contexts()) == ["a"]
    assert context.clear_context("a", commit_id="clear") is True  # still the answer to the first one
    assert contents(context) == ["hi"]


def test_a_write_of_agentup_makes_a_context_live_longer() -> None:
    storage = Documents(ttl=10)
    context = SyncConversationContext(storage)
    context.set_variable("a", "x", 1)
    storage.now += 8 * SECOND
    AgentUp(storage).set("a", "x", 2)
    storage.now += 8 * SECOND
    assert context.get_variables("a") == {"x": 2}
    storage.now += 2 * SECOND
    assert context.get_state("a") is None


def test_a_lone_surrogate_of_agentup_survives(storage: Documents, context: SyncConversationContext) -> None:
    agentup = AgentUp(storage)
    agentup.add("a", "cut \ud83d")
    agentup.set("a", "x", ["\udc00"])
    context.add_to_history("a", "user", "🙂")
    assert contents(context) == ["cut \ud83d", "🙂"]
    assert context.get_variable("a", "x") == ["\udc00"]
    assert storage.document()["history"][0]["content"] == "cut \ud83d"


def test_fields_that_nobody_knows_are_kept(storage: Documents, context: SyncConversationContext) -> None:
    AgentUp(storage).save("a", lambda state: state.update(tenant={"id": 5}, history_start=3))
    context.set_variable("a", "x", 1)
    context.add_to_history("a", "user", "hi")
    assert storage.document()["tenant"] == {"id": 5}
    assert storage.document()["history_start"] == 3
    context.clear_context("a")
    assert "tenant" not in storage.document()


# --- what is left of an absent context ------------------------------------------------------------------------------


def test_a_lease_on_an_absent_context_is_an_empty_document(
    storage: Documents, context: SyncConversationContext
) -> None:
    assert storage.call(Lease("a", "take", "token", 30.0)) is True
    document = storage.document()
    assert (document["user_id"], document["variables"], document["history"]) == (None, {}, [])
    assert context.get_state("a") is None
    assert list(context.list_contexts()) == []
    assert context.cleanup_old_contexts(0) == 0
    assert storage.call(Lease("a", "take", "other", 30.0)) is False
    assert storage.call(Lease("a", "release", "token", 30.0)) is True
    assert storage.stored == {}  # nothing is left to be known


def test_an_expired_lease_is_removed_by_cleanup(storage: Documents, context: SyncConversationContext) -> None:
    storage.call(Lease("a", "take", "token", 30.0))
    storage.now += 30 * SECOND
    assert context.cleanup_old_contexts(24) == 0
    assert storage.stored == {}


def test_what_a_cleared_context_remembers_is_removed_when_its_time_has_come(
    storage: Documents, context: SyncConversationContext
) -> None:
    context.set_variable("a", "x", "secret", commit_id="one")
    context.clear_context("a")
    assert b"secret" not in storage.stored["a"]
    storage.now += int(REMEMBER_CLEARED * SECOND) - 1
    assert context.cleanup_old_contexts(0) == 0
    context.set_variable("a", "x", 2, commit_id="one")
    assert context.get_state("a") is None
    storage.now += 1
    assert context.cleanup_old_contexts(0) == 0
    assert storage.stored == {}


def test_an_expired_context_is_removed_by_cleanup_without_being_counted() -> None:
    storage = Documents(ttl=5)
    context = SyncConversationContext(storage)
    context.set_variable("a", "x", 1)
    context.set_variable("b", "x", 1)
    storage.call(Lease("b", "take", "token", 30.0))
    storage.now += 5 * SECOND
    assert context.get_state("a") is None
    assert list(context.list_contexts()) == []
    assert context.cleanup_old_contexts(24) == 0
    assert sorted(storage.stored) == ["a", "b"]  # with their commit ids
    assert storage.call(Lease("b", "renew", "token", 30.0)) is True
    storage.now += 600 * SECOND
    context.cleanup_old_contexts(24)
    assert storage.stored == {}


def test_an_expired_context_leaves_commit_ids_and_nothing_else_for_their_time() -> None:
    storage = Documents(ttl=1)
    context = SyncConversationContext(storage)
    context.increment_variable("a", "n", 41, commit_id="one")
    context.add_to_history("a", "user", "something private", commit_id="two")
    storage.now += 2 * SECOND
    assert context.cleanup_old_contexts(24) == 0
    assert b"private" not in storage.stored["a"]
    assert b"41" not in storage.stored["a"]
    context.add_to_history("a", "user", "something private", commit_id="two")  # a retry: it was done
    with pytest.raises(StateConflictError, match="already applied"):
        context.increment_variable("a", "n", 41, commit_id="one")
    assert context.get_state("a") is None
    storage.now += 600 * SECOND
    context.cleanup_old_contexts(24)
    assert storage.stored == {}


def test_remove_at_is_when_a_document_means_nothing_any_more() -> None:
    storage = Documents(ttl=10)
    now = storage.now

    def remove_at(*writes: Commit | Lease) -> int | None:
        update = DocumentUpdate(storage, "a", writes)
        assert update(None) is not None
        return None if update.remove_at is None else (update.remove_at - now) // SECOND

    create = Commit("a", (Create(),), "c1")
    clear = Commit("a", (Delete(),), "c2")
    assert remove_at(create) == REMEMBER_CLEARED
    assert remove_at(create, Lease("a", "take", "t", 1000.0)) == 1000
    assert remove_at(create, Lease("a", "take", "t", 3.0)) == REMEMBER_CLEARED
    assert remove_at(Lease("a", "take", "t", 3.0)) == 3
    assert remove_at(create, clear) == REMEMBER_CLEARED
    assert remove_at(create, clear, Lease("a", "take", "t", 3.0)) == REMEMBER_CLEARED
    storage.ttl = 2000
    assert remove_at(create) == 2000
    storage.ttl = None
    assert remove_at(create, Lease("a", "take", "t", 3.0)) is None


def test_commit_ids_are_carried_into_the_next_life(storage: Documents, context: SyncConversationContext) -> None:
    context.increment_variable("a", "n", commit_id="one")
    context.set_variable("a", "n", 5, commit_id="two")
    context.clear_context("a")
    context.set_variable("a", "x", 1)
    storage.now += 2 * int(REMEMBER_CLEARED * SECOND)
    context.set_variable("a", "n", 5, commit_id="two")
    with pytest.raises(StateConflictError, match="already applied"):  # its answer went with what was cleared
        context.increment_variable("a", "n", commit_id="one")
    assert context.get_variables("a") == {"x": 1}
