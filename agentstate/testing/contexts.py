"""Contexts as a whole: creating, reading, replacing, clearing, copying."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ..errors import ContextNotFoundError, StateConflictError
from ..operations import NEVER, Append, Commit, Query, Restore, Snapshot, Window
from ..state import ConversationState
from .harness import Connect, Context, Harness, contents, fill


class ContextTests(Harness):
    def test_get_or_create_makes_an_empty_context(self, context: Context) -> None:
        before = datetime.now(UTC)
        state = context.get_or_create("a")
        assert isinstance(state, ConversationState)
        assert (state.context_id, state.user_id) == ("a", None)
        assert (state.variables, state.metadata, state.history, state.history_start) == ({}, {}, [], 0)
        assert state.revision == 1
        assert state.created_at == state.updated_at
        assert state.created_at.tzinfo is not None
        # The store may have a clock of its own.
        assert abs(state.created_at - before) < timedelta(minutes=5)
        assert context.exists("a")

    def test_get_or_create_of_an_existing_context_changes_nothing(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        context.add_to_history("a", "user", "hi")
        before = context.get_state("a")
        assert context.get_or_create("a") == before
        assert context.get_state("a") == before

    def test_an_absent_context_reads_as_nothing_and_reading_creates_none(self, context: Context) -> None:
        assert context.get_state("a") is None
        assert context.exists("a") is False
        assert context.get_history("a") == []
        assert context.get_history("a", limit=3) == []
        assert context.count_history("a") == 0
        assert list(context.iter_history("a")) == []
        assert context.get_variable("a", "x") is None
        assert context.get_variable("a", "x", "none") == "none"
        assert context.get_variables("a") == {}
        assert context.get_metadata("a", "x") is None
        assert context.get_metadata("a", "x", 5) == 5
        assert context.get_all_metadata("a") == {}
        assert context.exists("a") is False
        assert list(context.list_contexts()) == []

    def test_removing_from_an_absent_context_creates_none(self, context: Context) -> None:
        assert context.delete_variable("a", "x") is False
        assert context.delete_metadata("a", "x") is False
        assert context.pop_history("a") == []
        context.trim_history("a", keep=1)
        context.clear_history("a")
        assert context.clear_context("a") is False
        context.extend_history("a", [])
        context.set_variables("a", {})
        assert context.exists("a") is False

    @pytest.mark.parametrize(
        "write",
        [
            lambda context: context.add_to_history("a", "user", "hi"),
            lambda context: context.extend_history("a", [{"role": "user", "content": "hi"}]),
            lambda context: context.set_variable("a", "x", 1),
            lambda context: context.set_variables("a", {"x": 1}),
            lambda context: context.set_metadata("a", "x", 1),
            lambda context: context.increment_variable("a", "x"),
            lambda context: context.update_variable("a", "x", lambda _: 1),
            lambda context: context.update_state("a", variables={}),
        ],
    )
    def test_a_write_creates_the_context(self, context: Context, write: Any) -> None:
        write(context)
        assert context.exists("a")
        assert list(context.list_contexts()) == ["a"]

    def test_writes_return_none_unless_they_have_an_answer(self, context: Context) -> None:
        # Untyped on purpose: type checkers would refuse it.
        calls: Any = context
        assert calls.add_to_history("a", "user", "hi") is None
        assert calls.extend_history("a", [{"role": "user", "content": "hi"}]) is None
        assert calls.set_variable("a", "x", 1) is None
        assert calls.set_variables("a", {"x": 1}) is None
        assert calls.set_metadata("a", "x", 1) is None
        assert calls.update_state("a", variables={}) is None
        assert calls.trim_history("a", 1) is None
        assert calls.clear_history("a") is None
        assert calls.fork_context("a", "b") is None

    def test_every_commit_raises_the_revision_and_updated_at(self, context: Context) -> None:
        state = context.get_or_create("a")
        writes = (
            lambda: context.add_to_history("a", "user", "hi"),
            lambda: context.set_variable("a", "x", 1),
            lambda: context.set_metadata("a", "x", 1),
            lambda: context.increment_variable("a", "n"),
            lambda: context.delete_variable("a", "never there"),
            lambda: context.trim_history("a", keep=5),
            lambda: context.pop_history("a", 0),
            lambda: context.update_state("a", user_id="alice"),
        )
        for write in writes:
            write()
            after = context.get_state("a")
            assert after is not None
            assert after.revision == state.revision + 1
            assert after.updated_at >= state.updated_at
            assert after.created_at == state.created_at
            state = after

    def test_get_state_reads_everything_at_once(self, context: Context) -> None:
        context.get_or_create("a", "alice")
        context.set_variables("a", {"x": 1, "y": [2]})
        context.set_metadata("a", "m", {"k": None})
        fill(context, "a", 5)
        state = context.get_state("a")
        assert state is not None
        assert (state.user_id, state.variables, state.metadata) == ("alice", {"x": 1, "y": [2]}, {"m": {"k": None}})
        assert [message["content"] for message in state.history] == [0, 1, 2, 3, 4]

    def test_get_state_limits_the_history(self, context: Context) -> None:
        fill(context, "a", 5)
        state = context.get_state("a", history_limit=2)
        assert state is not None
        assert [message["content"] for message in state.history] == [3, 4]
        assert state.history_start == 0
        state = context.get_state("a", history_limit=0)
        assert state is not None
        assert state.history == []
        with pytest.raises(ValueError):
            context.get_state("a", history_limit=-1)

    def test_update_state_replaces_whole_fields(self, context: Context) -> None:
        context.set_variables("a", {"x": 1, "y": 2})
        context.set_metadata("a", "m", 1)
        fill(context, "a", 3)
        context.update_state("a", variables={"z": 3}, user_id="alice")
        state = context.get_state("a")
        assert state is not None
        assert (state.variables, state.metadata, state.user_id) == ({"z": 3}, {"m": 1}, "alice")
        assert len(state.history) == 3
        context.update_state("a", metadata={}, history=[{"role": "user", "content": "new"}], user_id=None)
        state = context.get_state("a")
        assert state is not None
        assert (state.variables, state.metadata, state.user_id) == ({"z": 3}, {}, None)
        assert [message["content"] for message in state.history] == ["new"]
        assert state.history_start == 3

    def test_update_state_refuses_an_unknown_field_and_changes_nothing(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        before = context.get_state("a")
        with pytest.raises(TypeError, match="varibles"):
            context.update_state("a", variables={"x": 2}, varibles={})
        assert context.get_state("a") == before

    def test_clear_context_removes_everything(self, context: Context) -> None:
        context.get_or_create("a", "alice")
        context.set_variable("a", "x", 1)
        context.set_metadata("a", "m", 1)
        fill(context, "a", 3)
        fill(context, "b", 1)
        assert context.clear_context("a") is True
        assert context.clear_context("a") is False
        assert context.get_state("a") is None
        assert list(context.list_contexts()) == ["b"]
        assert contents(context, "b") == [0]

    def test_a_cleared_context_starts_anew(self, context: Context) -> None:
        context.get_or_create("a", "alice")
        context.set_variable("a", "x", 1)
        fill(context, "a", 3)
        context.trim_history("a", keep=1)
        context.clear_context("a")
        context.add_to_history("a", "user", "again")
        state = context.get_state("a")
        assert state is not None
        assert (state.user_id, state.variables, state.history_start, state.revision) == (None, {}, 0, 1)
        assert contents(context, "a") == ["again"]

    def test_fork_copies_everything(self, context: Context) -> None:
        context.get_or_create("a", "alice")
        context.set_variable("a", "x", [1])
        context.set_metadata("a", "m", 2**70)
        fill(context, "a", 6)
        context.trim_history("a", keep=4)
        context.fork_context("a", "b")
        source, target = context.get_state("a"), context.get_state("b")
        assert source is not None
        assert target is not None
        assert target.user_id == "alice"
        assert (target.variables, target.metadata) == (source.variables, source.metadata)
        assert (target.history, target.history_start) == (source.history, 2)
        assert target.revision == 1

    def test_a_fork_and_its_source_go_their_own_ways(self, context: Context) -> None:
        fill(context, "a", 2)
        context.fork_context("a", "b")
        context.add_to_history("a", "user", "in a")
        context.set_variable("b", "x", 1)
        assert contents(context, "a") == [0, 1, "in a"]
        assert contents(context, "b") == [0, 1]
        assert context.get_variables("a") == {}

    def test_fork_keeps_the_messages_before_a_position(self, context: Context) -> None:
        fill(context, "a", 6)
        context.trim_history("a", keep=4)
        context.fork_context("a", "b", upto=4)
        assert contents(context, "b") == [2, 3]
        assert [m["content"] for m in context.get_history("b", before=3)] == [2]
        context.add_to_history("b", "user", "next")
        assert [m["content"] for m in context.get_history("b", limit=1, before=5)] == ["next"]
        context.fork_context("a", "none", upto=0)
        assert contents(context, "none") == []
        assert context.exists("none")

    def test_fork_refuses_an_existing_target(self, context: Context) -> None:
        fill(context, "a", 2)
        fill(context, "b", 1)
        with pytest.raises(StateConflictError) as caught:
            context.fork_context("a", "b")
        assert caught.value.context_id == "b"
        assert contents(context, "b") == [0]
        with pytest.raises(StateConflictError):
            context.fork_context("a", "a")

    def test_fork_refuses_an_absent_source(self, context: Context) -> None:
        with pytest.raises(ContextNotFoundError) as caught:
            context.fork_context("a", "b")
        assert caught.value.context_id == "a"
        assert not context.exists("b")

    def test_a_fork_into_a_cleared_context_is_allowed(self, context: Context) -> None:
        fill(context, "a", 2)
        fill(context, "b", 5)
        context.clear_context("b")
        context.fork_context("a", "b")
        assert contents(context, "b") == [0, 1]

    def test_a_conversation_is_restored_with_its_past(self, connect: Connect) -> None:
        context = connect()
        created, updated = 1_700_000_000_000_001, 1_700_000_100_000_002
        message = b'{"role":"user","content":"old","timestamp":"2023-11-14T22:13:20+00:00","metadata":{}}'
        restore = Restore("alice", start=41, created=created, updated=updated, revision=7)
        context.storage.call(Commit("a", (restore, Append((message,))), "import-1", absent=True))
        snapshot = context.storage.call(Query("a", history=Window(), deadline=NEVER))
        assert isinstance(snapshot, Snapshot)
        assert snapshot[:6] == ("alice", created, updated, 7, 41, 42)
        assert (snapshot.first, list(snapshot.messages)) == (41, [message])
        context.add_to_history("a", "user", "new")
        state = context.get_state("a")
        assert state is not None
        assert (state.revision, state.history_start) == (8, 41)
        assert state.created_at == datetime(2023, 11, 14, 22, 13, 20, 1, tzinfo=UTC)
        with pytest.raises(StateConflictError):
            context.storage.call(Commit("a", (restore,), "import-2", absent=True))

    def test_a_long_conversation_is_restored_in_several_commits(self, context: Context) -> None:
        expires = time.time_ns() // 1000 + 3_600_000_000
        restore = Restore("alice", start=10, created=1_000, updated=2_000, revision=7, expires=expires)
        texts = [b'{"role":"user","content":%d,"timestamp":"","metadata":{}}' % number for number in range(6)]
        call = context.storage.call
        call(Commit("a", (restore, Append(tuple(texts[:3]))), "import-1", absent=True))
        call(Commit("a", (restore, Append(tuple(texts[3:]))), "import-2"))
        snapshot = call(Query("a", history=Window()))
        assert isinstance(snapshot, Snapshot)
        assert (snapshot.user_id, snapshot.created, snapshot.updated) == ("alice", 1_000, 2_000)
        assert (snapshot.start, snapshot.end, list(snapshot.messages)) == (10, 16, texts)
        assert snapshot.expires is not None
        assert abs(snapshot.expires - expires) < 2_000  # a store may count in milliseconds
        context.set_variable("a", "x", 1)
        snapshot = call(Query("a"))
        assert isinstance(snapshot, Snapshot)
        assert snapshot.expires is None  # from now on the ttl of the storage applies
