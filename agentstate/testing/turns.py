"""Turns: one at a time, fenced, and released when their holder dies."""

# ruff: noqa: PT012 - what is refused is the end of a with block, and the block is needed for that

from __future__ import annotations

import time
from typing import Any

import pytest

from ..errors import StateConflictError, StateTimeoutError, TurnLostError
from ..operations import Commit, Increment, Lease
from .harness import Connect, Context, Harness, contents, eventually, together


def steal(context: Context, context_id: str, token: str) -> None:
    """Take the lease away from its holder, as if it had expired and another turn had begun."""
    assert context.storage.call(Lease(context_id, "release", token, 0.0)) is True
    assert context.storage.call(Lease(context_id, "take", "thief", 30.0)) is True


class TurnTests(Harness):
    def test_a_turn_is_a_batch(self, context: Context) -> None:
        with context.turn("a") as turn:
            turn.add_to_history("user", "hi")
            turn.set_variable("x", 1)
            assert not context.exists("a")
        assert contents(context, "a") == ["hi"]
        state = context.get_state("a")
        assert state is not None
        assert state.revision == 1

    def test_an_exception_in_a_turn_commits_nothing_and_gives_the_lease_back(self, context: Context) -> None:
        with pytest.raises(KeyError), context.turn("a") as turn:
            turn.set_variable("x", 1)
            raise KeyError("mine")
        assert not context.exists("a")
        with context.turn("a", timeout=0) as turn:
            turn.set_variable("x", 2)
        assert context.get_variables("a") == {"x": 2}

    def test_a_second_turn_waits_for_the_first(self, context: Context) -> None:
        began = time.monotonic()
        assert context.storage.call(Lease("a", "take", "first", 0.4)) is True
        with context.turn("a", timeout=30):
            assert time.monotonic() - began > 0.35
        assert not context.exists("a")

    def test_a_turn_that_cannot_be_had_in_time_is_a_timeout(self, context: Context) -> None:
        assert context.storage.call(Lease("a", "take", "first", 30.0)) is True
        for timeout in (0, 0.1):
            with pytest.raises(StateTimeoutError) as caught, context.turn("a", timeout=timeout):
                pytest.fail("the turn is held by another")
            assert caught.value.context_id == "a"
        with context.turn("b", timeout=0):  # another conversation is free
            pass
        assert context.storage.call(Lease("a", "release", "first", 0.0)) is True
        with context.turn("a", timeout=0):
            pass

    def test_turns_do_not_nest(self, context: Context) -> None:
        with context.turn("a") as turn:
            turn.set_variable("x", 1)
            with pytest.raises(StateConflictError), context.turn("a"):
                pytest.fail("this turn is inside of another")
            with context.turn("b") as other:
                other.set_variable("y", 1)
        assert context.get_variables("a") == {"x": 1}
        assert context.get_variables("b") == {"y": 1}

    def test_writes_through_the_context_commit_at_once_inside_a_turn(self, context: Context) -> None:
        with context.turn("a") as turn:
            context.set_variable("a", "x", 1)
            assert context.get_variables("a") == {"x": 1}
            context.increment_variable("a", "x")
            turn.set_variable("at the end", context.get_variable("a", "x"))
        assert context.get_variables("a") == {"x": 2, "at the end": 2}

    def test_a_stale_turn_commits_nothing(self, context: Context) -> None:
        context.set_variable("a", "x", "before")
        before = context.get_state("a")
        with pytest.raises(TurnLostError) as caught, context.turn("a") as turn:
            turn.set_variable("x", "stale")
            turn.add_to_history("user", "stale")
            steal(context, "a", turn.token)
        assert isinstance(caught.value, StateConflictError)
        assert caught.value.context_id == "a"
        assert context.get_state("a") == before
        # The new holder's lease is not given back by the one who lost it.
        assert context.storage.call(Lease("a", "renew", "thief", 30.0)) is True

    def test_every_write_inside_a_stale_turn_is_refused(self, context: Context) -> None:
        with context.turn("a") as turn:
            context.set_variable("a", "x", "mine")
            context.add_to_history("a", "user", "mine")
            before = context.get_state("a")
            steal(context, "a", turn.token)
            writes: tuple[Any, ...] = (
                lambda: context.set_variable("a", "x", 1),
                lambda: context.set_variables("a", {"x": 1}),
                lambda: context.set_metadata("a", "x", 1),
                lambda: context.add_to_history("a", "user", "hi"),
                lambda: context.extend_history("a", [{"role": "user", "content": "hi"}]),
                lambda: context.increment_variable("a", "n"),
                lambda: context.update_variable("a", "n", lambda _: 1),
                lambda: context.delete_variable("a", "x"),
                lambda: context.delete_metadata("a", "x"),
                lambda: context.pop_history("a"),
                lambda: context.trim_history("a", 0),
                lambda: context.clear_history("a"),
                lambda: context.update_state("a", variables={}),
                lambda: context.clear_context("a"),
                lambda: context.batch("a"),
            )
            for write in writes[:-1]:
                with pytest.raises(TurnLostError):
                    write()
            with pytest.raises(TurnLostError), context.batch("a") as batch:
                batch.set_variable("x", 1)
            assert context.get_state("a") == before
            context.set_variable("b", "x", 1)  # other conversations are not fenced
        assert context.get_state("a") == before

    def test_writes_from_outside_are_not_blocked(self, connect: Connect, context: Context) -> None:
        outside = connect(context.storage)
        with context.turn("a") as turn:
            turn.increment_variable("n")
            outside.increment_variable("a", "n", 10)
            outside.add_to_history("a", "user", "outside")
        assert context.get_variables("a") == {"n": 11}

    def test_after_a_turn_writes_carry_no_fence(self, context: Context) -> None:
        with context.turn("a"):
            pass
        assert context.storage.call(Lease("a", "take", "another", 30.0)) is True
        context.set_variable("a", "x", 1)
        assert context.get_variables("a") == {"x": 1}

    def test_a_lease_is_not_state(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        before = context.get_state("a")
        with context.turn("a"), context.turn("absent"):
            assert context.get_state("a") == before
            assert context.get_state("absent") is None
            assert list(context.list_contexts()) == ["a"]
            assert context.clear_context("absent") is False
        assert context.get_state("a") == before
        assert list(context.list_contexts()) == ["a"]

    def test_a_turn_may_clear_its_context_and_go_on(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        with context.turn("a") as turn:
            assert context.clear_context("a") is True
            context.set_variable("a", "y", 1)
            turn.set_variable("z", 1)
        assert context.get_variables("a") == {"y": 1, "z": 1}

    def test_a_lease_is_taken_renewed_and_given_back_by_its_token(self, context: Context) -> None:
        def lease(action: Any, token: str, seconds: float = 30.0) -> Any:
            return context.storage.call(Lease("a", action, token, seconds))

        assert lease("renew", "one") is False
        assert lease("release", "one") is False
        assert lease("take", "one") is True
        assert lease("take", "one") is True  # again: the answer to a first try may have been lost
        assert lease("take", "two") is False
        assert lease("renew", "two") is False
        assert lease("release", "two") is False
        assert lease("renew", "one") is True
        assert lease("release", "one") is True
        assert lease("release", "one") is False
        assert lease("take", "two") is True
        assert not context.exists("a")

    def test_a_lease_that_expired_is_lost(self, context: Context) -> None:
        call = context.storage.call
        assert call(Lease("a", "take", "dead", 0.2)) is True
        assert eventually(lambda: call(Lease("a", "take", "next", 30.0)) is True)
        assert call(Lease("a", "renew", "dead", 30.0)) is False
        assert call(Lease("a", "release", "dead", 30.0)) is False
        with pytest.raises(TurnLostError):
            call(Commit("a", (Increment("n", b"1"),), "c1", fence="dead"))
        assert not context.exists("a")
        assert call(Commit("a", (Increment("n", b"1"),), "c2", fence="next")) == b"1"

    def test_a_fence_without_any_lease_is_refused(self, context: Context) -> None:
        with pytest.raises(TurnLostError):
            context.storage.call(Commit("a", (Increment("n", b"1"),), "c1", fence="never taken"))
        assert context.storage.call(Lease("a", "take", "expired", 0.05)) is True
        time.sleep(0.1)
        with pytest.raises(TurnLostError):
            context.storage.call(Commit("a", (Increment("n", b"1"),), "c2", fence="expired"))

    def test_a_turn_renews_its_lease_while_it_is_held(self, context: Context) -> None:
        with context.turn("a", lease=2.4) as turn:
            end = time.monotonic() + 2.6
            while time.monotonic() < end:
                assert context.storage.call(Lease("a", "take", "other", 30.0)) is False
                time.sleep(0.05)
            turn.set_variable("x", 1)
        assert context.get_variables("a") == {"x": 1}

    def test_turns_of_one_conversation_exclude_each_other(self, context: Context) -> None:
        def read_then_write(one: Any) -> Any:
            async def task() -> None:
                async with one.turn("a", timeout=60):
                    await one.set_variable("a", "n", await one.get_variable("a", "n", 0) + 1)

            def thread() -> None:
                with one.turn("a", timeout=60):
                    one.set_variable("a", "n", one.get_variable("a", "n", 0) + 1)

            return task() if hasattr(one, "aclose") else thread()

        together(context, *[read_then_write] * 8)
        assert context.get_variables("a") == {"n": 8}

    @pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf")])
    def test_a_lease_is_a_positive_number_of_seconds(self, context: Context, lease: float) -> None:
        with pytest.raises(ValueError):
            context.turn("a", lease=lease).__enter__()
        with pytest.raises(ValueError):
            context.turn("a", timeout=-1).__enter__()
        with pytest.raises(TypeError):
            context.turn("a", lease="30").__enter__()  # type: ignore[arg-type]
