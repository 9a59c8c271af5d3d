"""Owners: who may access a context, checked in the same atomic step as the operation."""

# ruff: noqa: PT012 - what is refused is the end of a with block, and the block is needed for that

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..errors import StateAccessError, StateConfigError
from ..operations import Commit, Increment, Lease
from .harness import Connect, Context, Harness, contents, fill

CALLS: dict[str, Callable[[Context], Any]] = {
    "get_or_create": lambda context: context.get_or_create("a"),
    "get_state": lambda context: context.get_state("a"),
    "exists": lambda context: context.exists("a"),
    "update_state": lambda context: context.update_state("a", variables={}),
    "clear_context": lambda context: context.clear_context("a"),
    "fork_context": lambda context: context.fork_context("a", "b"),
    "add_to_history": lambda context: context.add_to_history("a", "user", "x"),
    "extend_history": lambda context: context.extend_history("a", [{"role": "user", "content": "x"}]),
    "get_history": lambda context: context.get_history("a"),
    "iter_history": lambda context: list(context.iter_history("a")),
    "count_history": lambda context: context.count_history("a"),
    "trim_history": lambda context: context.trim_history("a", 0),
    "pop_history": lambda context: context.pop_history("a"),
    "clear_history": lambda context: context.clear_history("a"),
    "get_variable": lambda context: context.get_variable("a", "x"),
    "get_variables": lambda context: context.get_variables("a"),
    "set_variable": lambda context: context.set_variable("a", "x", 1),
    "set_variables": lambda context: context.set_variables("a", {"x": 1}),
    "delete_variable": lambda context: context.delete_variable("a", "x"),
    "increment_variable": lambda context: context.increment_variable("a", "n"),
    "increment_variable by a float": lambda context: context.increment_variable("a", "n", 0.5),
    "update_variable": lambda context: context.update_variable("a", "x", lambda _: 1),
    "get_metadata": lambda context: context.get_metadata("a", "x"),
    "get_all_metadata": lambda context: context.get_all_metadata("a"),
    "set_metadata": lambda context: context.set_metadata("a", "x", 1),
    "delete_metadata": lambda context: context.delete_metadata("a", "x"),
}


class OwnerTests(Harness):
    def test_a_context_is_created_for_its_user(self, context: Context) -> None:
        assert context.get_or_create("a", "alice").user_id == "alice"
        assert context.get_or_create("a", "alice").user_id == "alice"
        assert context.get_or_create("a").user_id == "alice"

    def test_an_ownerless_context_is_claimed(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        before = context.get_state("a")
        state = context.get_or_create("a", "alice")
        assert before is not None
        assert (before.user_id, state.user_id, state.variables) == (None, "alice", {"x": 1})
        assert state.revision == before.revision + 1

    def test_a_context_of_another_user_is_refused(self, context: Context) -> None:
        context.get_or_create("a", "alice")
        before = context.get_state("a")
        with pytest.raises(StateAccessError) as caught:
            context.get_or_create("a", "bob")
        assert isinstance(caught.value, PermissionError)
        assert caught.value.context_id == "a"
        assert context.get_state("a") == before

    @pytest.mark.parametrize("user", ["", 5, b"alice", "\ud800", "a\0b"])
    def test_a_user_is_text_and_not_empty(self, connect: Connect, context: Context, user: Any) -> None:
        with pytest.raises(StateConfigError):
            context.get_or_create("a", user)
        with pytest.raises(StateConfigError):
            connect(context.storage, user_id=user)
        with pytest.raises(StateConfigError):
            context.update_state("a", user_id=user)
        assert not context.exists("a")

    def test_a_bound_context_owns_what_it_creates(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        alice.add_to_history("a", "user", "hi")
        alice.get_or_create("b")
        alice.increment_variable("c", "n", 0.5)
        alice.update_variable("d", "x", lambda _: 1)
        with alice.turn("e") as turn:
            turn.set_variable("x", 1)
        for name in "abcde":
            state = context.get_state(name)
            assert state is not None
            assert state.user_id == "alice"
        assert alice.get_or_create("a", "alice").user_id == "alice"

    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("owner", ["bob", None])
    def test_a_bound_context_is_kept_from_what_is_not_its_users(
        self, connect: Connect, context: Context, name: str, owner: str | None
    ) -> None:
        context.get_or_create("a", owner)
        context.set_variables("a", {"x": "secret", "n": 1})
        context.set_metadata("a", "x", "secret")
        fill(context, "a", 2)
        before = context.get_state("a")
        alice = connect(context.storage, user_id="alice")
        with pytest.raises(StateAccessError) as caught:
            CALLS[name](alice)
        assert "secret" not in str(caught.value)
        assert caught.value.context_id == "a"
        assert context.get_state("a") == before
        assert not context.exists("b")

    def test_a_bound_context_is_kept_from_batches_and_turns_too(self, connect: Connect, context: Context) -> None:
        context.get_or_create("a", "bob")
        before = context.get_state("a")
        alice = connect(context.storage, user_id="alice")
        with pytest.raises(StateAccessError), alice.batch("a") as batch:
            batch.set_variable("x", 1)
        with pytest.raises(StateAccessError), alice.turn("a"):
            pytest.fail("this conversation belongs to another")
        with pytest.raises(StateAccessError), alice.batch("a") as batch:
            batch.clear_context()
            batch.set_variable("x", 1)
        assert context.get_state("a") == before
        with context.turn("a", timeout=0):  # the refused turn holds nothing
            pass

    def test_a_bound_context_sees_absent_ones_as_absent(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        assert alice.get_state("a") is None
        assert alice.get_history("a") == []
        assert alice.clear_context("a") is False
        context.get_or_create("a", "bob")
        context.clear_context("a")
        assert alice.get_state("a") is None
        alice.set_variable("a", "x", 1)  # the id is free again
        assert context.get_or_create("a").user_id == "alice"

    def test_a_bound_context_acts_for_its_user_only(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        with pytest.raises(StateAccessError):
            alice.get_or_create("a", "bob")
        with pytest.raises(StateAccessError):
            alice.update_state("a", user_id="bob")
        with pytest.raises(StateAccessError):
            list(alice.list_contexts("bob"))
        assert not context.exists("a")

    def test_a_bound_context_may_give_a_context_up(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        alice.set_variable("a", "x", 1)
        alice.update_state("a", user_id=None)
        with pytest.raises(StateAccessError):
            alice.get_variables("a")
        assert context.get_or_create("a", "bob").variables == {"x": 1}

    def test_a_bound_context_owns_what_it_creates_whatever_the_owner_is_set_to(
        self, connect: Connect, context: Context
    ) -> None:
        alice = connect(context.storage, user_id="alice")
        alice.update_state("a", user_id=None)
        alice.update_state("b", user_id=None, variables={"x": 1})
        with alice.batch("c") as batch:
            batch.clear_context()
            batch.update_state(user_id=None)
        for name in "abc":
            assert context.get_or_create(name).user_id == "alice"

    @pytest.mark.parametrize("cleared", [False, True])
    def test_a_commit_id_is_of_its_user(self, connect: Connect, context: Context, cleared: bool) -> None:
        alice, bob = connect(context.storage, user_id="alice"), connect(context.storage, user_id="bob")
        alice.add_to_history("a", "user", "secret")
        alice.set_variable("a", "n", 41)
        assert contents(alice, "a") == ["secret"]
        assert [message["content"] for message in alice.pop_history("a", commit_id="req-1")] == ["secret"]
        assert alice.increment_variable("a", "n", commit_id="req-2") == 42
        calls: list[Callable[[Context], Any]] = [
            lambda one: one.pop_history("a", commit_id="req-1"),
            lambda one: one.increment_variable("a", "n", commit_id="req-2"),
            lambda one: one.update_variable("a", "n", lambda n: n + 1, 0, commit_id="req-2"),
            lambda one: one.clear_context("a", commit_id="req-3"),
        ]
        if cleared:
            alice.clear_context("a")
            bob.set_variable("a", "n", 0)  # the id is his now
            assert [call(bob) for call in calls] == [[], 1, 1, True]
            assert [call(context) for call in calls[:2]] == [[], 1]
        else:
            for call in calls:
                with pytest.raises(StateAccessError) as caught:
                    call(bob)
                assert "secret" not in str(caught.value)
            assert [call(alice) for call in calls[1:3]] == [42, 42]

    def test_listing_and_cleanup_keep_to_the_user(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        for name, owner in (("a1", "alice"), ("a2", "alice"), ("b1", "bob"), ("none", None)):
            context.get_or_create(name, owner)
        assert sorted(context.list_contexts()) == ["a1", "a2", "b1", "none"]
        assert sorted(context.list_contexts(user_id="alice")) == ["a1", "a2"]
        assert sorted(context.list_contexts("bob")) == ["b1"]
        assert list(context.list_contexts("carol")) == []
        assert sorted(alice.list_contexts()) == ["a1", "a2"]
        assert sorted(alice.list_contexts("alice")) == ["a1", "a2"]
        assert alice.cleanup_old_contexts(0) == 2
        assert sorted(context.list_contexts()) == ["b1", "none"]

    def test_a_fork_of_a_bound_context_is_its_users(self, connect: Connect, context: Context) -> None:
        alice = connect(context.storage, user_id="alice")
        fill(alice, "a", 2)
        alice.fork_context("a", "b")
        assert contents(alice, "b") == [0, 1]
        assert context.get_or_create("b").user_id == "alice"
        context.get_or_create("taken", "bob")
        with pytest.raises(StateAccessError):
            alice.fork_context("a", "taken")

    def test_the_owner_is_checked_in_the_operation_itself(self, context: Context) -> None:
        context.get_or_create("a", "bob")
        with pytest.raises(StateAccessError):
            context.storage.call(Commit("a", (Increment("n", b"1"),), "c1", user="alice"))
        with pytest.raises(StateAccessError):
            context.storage.call(Lease("a", "take", "token", 30.0, user="alice"))
        assert context.storage.call(Lease("a", "take", "token", 30.0, user="bob")) is True
