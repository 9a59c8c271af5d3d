"""Listing, cleanup, expiry, closing, and what a second storage on the same store sees."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ..errors import StateConfigError, StateUnavailableError
from ..operations import Append, Commit, Create, Delete, Listing, Page, Put, Query, Restore, Snapshot, Space
from .harness import Connect, Context, Harness, contents, eventually, fill


def aged(context: Context, context_id: str, hours: float, user_id: str | None = None) -> None:
    """Create a context that was last written so many seconds ago."""
    then = (time.time_ns() // 1000) - int(hours * 3600 * 1_000_000)
    restore = Restore(user_id, created=then, updated=then, revision=3)
    text = b'{"role":"user","content":"old","timestamp":"","metadata":{}}'
    context.storage.call(Commit(context_id, (restore, Append((text,))), f"aged-{context_id}", absent=True))


def short_lived(context: Context, context_id: str) -> None:
    """Create a context that expires soon, independently of the storage's ttl."""
    context.get_or_create("clock")
    now = context.storage.call(Query("clock"))
    assert isinstance(now, Snapshot)
    restore = Restore("alice", start=5, expires=now.updated + 300_000)
    text = b'{"role":"user","content":"old","timestamp":"","metadata":{}}'
    changes = (restore, Append((text,)), Put(Space.VARIABLES, (("x", b"1"),)))
    context.storage.call(Commit(context_id, changes, "short", absent=True))
    context.clear_context("clock")


class LifetimeTests(Harness):
    def test_list_contexts_lists_what_exists(self, context: Context) -> None:
        assert list(context.list_contexts()) == []
        for number in range(25):
            context.set_variable(f"context-{number}", "x", 1)
        context.clear_context("context-3")
        expected = sorted(f"context-{number}" for number in range(25) if number != 3)
        assert sorted(context.list_contexts()) == expected

    def test_a_listing_is_paged_by_its_cursor(self, context: Context) -> None:
        for number in range(25):
            context.set_variable(f"context-{number}", "x", 1)
        seen: set[str] = set()
        cursor: str | None = ""
        while cursor is not None:
            page = context.storage.call(Listing(cursor, size=4))
            assert isinstance(page, Page)
            seen.update(page.context_ids)
            cursor = page.cursor
        assert seen == {f"context-{number}" for number in range(25)}

    def test_what_exists_all_along_is_listed_while_others_come_and_go(self, context: Context) -> None:
        for number in range(20):
            context.set_variable(f"stays-{number}", "x", 1)
            context.set_variable(f"goes-{number}", "x", 1)
        seen: set[str] = set()
        cursor: str | None = ""
        number = 0
        while cursor is not None:
            page = context.storage.call(Listing(cursor, size=3))
            assert isinstance(page, Page)
            seen.update(page.context_ids)
            cursor = page.cursor
            context.clear_context(f"goes-{number % 20}")
            context.set_variable(f"comes-{number}", "x", 1)
            number += 1
        assert {f"stays-{number}" for number in range(20)} <= seen

    def test_cleanup_deletes_what_is_old_and_counts_it(self, context: Context) -> None:
        aged(context, "old", hours=25)
        aged(context, "older", hours=1000)
        aged(context, "younger", hours=23)
        context.set_variable("new", "x", 1)
        assert context.cleanup_old_contexts() == 2
        assert sorted(context.list_contexts()) == ["new", "younger"]
        assert context.cleanup_old_contexts(max_age_hours=24) == 0
        assert context.cleanup_old_contexts(0.5) == 1
        assert context.cleanup_old_contexts(0) == 1
        assert list(context.list_contexts()) == []

    def test_a_write_makes_an_old_context_young(self, context: Context) -> None:
        aged(context, "old", hours=25)
        context.set_variable("old", "x", 1)
        assert context.cleanup_old_contexts() == 0
        assert contents(context, "old") == ["old"]

    def test_reading_does_not_make_an_old_context_young(self, context: Context) -> None:
        aged(context, "old", hours=25)
        context.get_or_create("old")
        context.get_history("old")
        assert context.cleanup_old_contexts() == 1

    def test_a_commit_for_idle_contexts_leaves_the_others_alone(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        before = context.get_state("a")
        assert context.storage.call(Commit("a", (Delete(),), "c1", idle_for=60.0)) == b"false"
        assert context.get_state("a") == before
        assert context.storage.call(Commit("absent", (Delete(),), "c1", idle_for=0.0)) == b"false"
        aged(context, "old", hours=1)
        assert context.storage.call(Commit("old", (Delete(),), "c1", idle_for=60.0)) == b"true"
        assert not context.exists("old")

    @pytest.mark.parametrize("hours", [-1, float("nan"), "24", None, True])
    def test_an_age_is_a_number_of_hours(self, context: Context, hours: Any) -> None:
        context.set_variable("a", "x", 1)
        with pytest.raises((ValueError, TypeError)):
            context.cleanup_old_contexts(hours)
        assert context.exists("a")

    def test_a_context_expires_after_its_ttl(self, connect: Connect) -> None:
        context = connect(ttl=0.4)
        context.set_variable("a", "x", 1)
        assert context.storage.ttl == 0.4
        assert eventually(lambda: not context.exists("a"))
        assert list(context.list_contexts()) == []

    def test_what_has_expired_is_absent(self, connect: Connect) -> None:
        context = connect(ttl=3600)
        short_lived(context, "a")
        assert eventually(lambda: not context.exists("a"))
        assert context.get_state("a") is None
        assert context.get_history("a") == []
        assert context.get_variables("a") == {}
        assert list(context.list_contexts("alice")) == []
        assert "a" not in list(context.list_contexts())
        assert context.clear_context("a") is False
        assert context.pop_history("a") == []
        assert context.delete_variable("a", "x") is False

    def test_an_expired_context_starts_anew(self, connect: Connect) -> None:
        context = connect(ttl=3600)
        short_lived(context, "a")
        assert eventually(lambda: not context.exists("a"))
        context.add_to_history("a", "user", "a new life")
        state = context.get_state("a")
        assert state is not None
        assert (state.user_id, state.variables, state.history_start, state.revision) == (None, {}, 0, 1)
        assert contents(context, "a") == ["a new life"]

    def test_an_expired_context_may_be_forked_into(self, connect: Connect) -> None:
        context = connect(ttl=3600)
        short_lived(context, "a")
        assert eventually(lambda: not context.exists("a"))
        context.add_to_history("source", "user", "copied")
        context.fork_context("source", "a")
        assert contents(context, "a") == ["copied"]

    def test_every_write_makes_a_context_live_longer(self, connect: Connect) -> None:
        context = connect(ttl=2.0)
        for number in range(10):
            context_id = f"c{number}"
            began = before = time.monotonic()
            longest = 0.0
            born = context.get_or_create(context_id)
            while time.monotonic() - began < 2.4:
                time.sleep(0.3)
                context.increment_variable(context_id, "n")
                context.pop_history(context_id)
                now = time.monotonic()
                longest, before = max(longest, now - before), now
            state = context.get_state(context_id)
            if longest < 1.5:
                break  # otherwise the machine was stalled for the lifetime of the context: try again
        assert state is not None
        assert state.created_at == born.created_at
        assert state.revision == 1 + 2 * state.variables["n"]

    def test_reading_does_not_make_a_context_live_longer(self, connect: Connect) -> None:
        context = connect(ttl=0.5)
        context.set_variable("a", "n", 0)

        def gone() -> bool:
            context.get_history("a")
            context.get_variables("a")
            return context.get_state("a") is None

        assert eventually(gone)

    def test_cleanup_removes_what_expired_without_counting_it(self, connect: Connect) -> None:
        context = connect(ttl=0.2)
        fill(context, "a", 1)
        assert eventually(lambda: not context.exists("a"))
        assert context.cleanup_old_contexts(24) == 0
        assert list(context.list_contexts()) == []

    def test_without_ttl_nothing_expires(self, context: Context) -> None:
        assert context.storage.ttl is None
        aged(context, "old", hours=10_000)
        assert contents(context, "old") == ["old"]

    @pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), "3600", True])
    def test_a_ttl_is_a_positive_number_of_seconds(self, ttl: Any) -> None:
        with pytest.raises(StateConfigError, match="ttl"):
            self.make_storage(ttl=ttl)

    @pytest.mark.parametrize("option", ["max_history", "max_value_bytes", "deadline"])
    @pytest.mark.parametrize("value", [0, -1, "5", True])
    def test_options_that_make_no_sense_are_refused(self, option: str, value: Any) -> None:
        with pytest.raises(StateConfigError, match=option):
            self.make_storage(**{option: value})

    @pytest.mark.parametrize("ttl", [1.5, 3600, None])
    def test_a_ttl_may_be_a_fraction_or_none(self, connect: Connect, ttl: float | None) -> None:
        context = connect(ttl=ttl)
        context.set_variable("a", "x", 1)
        snapshot = context.storage.call(Query("a"))
        assert isinstance(snapshot, Snapshot)
        if ttl is None:
            assert snapshot.expires is None
        else:
            assert snapshot.expires is not None
            assert abs(snapshot.expires - snapshot.updated - ttl * 1_000_000) < 2_000

    @pytest.mark.parametrize("much", [1e300, pytest.param(10**400, id="huge")])
    def test_durations_may_be_longer_than_any_clock_counts(self, connect: Connect, much: float) -> None:
        context = connect(ttl=much, deadline=much)
        context.set_variable("a", "x", 1)
        context.set_variable("a", "x", 2)
        with context.turn("a", lease=much, timeout=much) as turn:
            turn.add_to_history("user", "hi")
        assert context.get_variable("a", "x") == 2

    def test_after_close_every_call_is_refused(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        context.close()
        context.close()
        for call in (
            lambda: context.get_state("a"),
            lambda: context.set_variable("a", "x", 2),
            lambda: list(context.list_contexts()),
            lambda: context.turn("a", timeout=0).__enter__(),
        ):
            with pytest.raises(StateUnavailableError):
                call()
        for operation in (Query("a"), Commit("a", (Create(),), "c1"), Listing()):
            with pytest.raises(StateUnavailableError):
                context.storage.call(operation)

    def test_a_context_is_a_context_manager_that_closes_its_storage(self, connect: Connect) -> None:
        context = connect()
        with SyncOrAwaited(context) as entered:
            entered.set_variable("a", "x", 1)
        assert context.storage.closed
        with pytest.raises(StateUnavailableError):
            context.get_state("a")

    def test_what_was_written_is_there_after_closing_and_opening_again(
        self, connect: Connect, context: Context
    ) -> None:
        context.get_or_create("a", "alice")
        with context.batch("a", commit_id="id-1") as batch:
            batch.set_variables({"x": 2**70, "": [{}, []]})
            batch.set_metadata("m", "é")
            batch.extend_history([{"role": "user", "content": n} for n in range(10)])
        context.trim_history("a", keep=8)
        context.add_to_history("gone", "user", "x", commit_id="id-2")
        context.clear_context("gone")
        before = context.get_state("a")
        context.close()
        again = self.another(connect, context)
        assert again.get_state("a") == before
        assert list(again.list_contexts()) == ["a"]
        with again.batch("a", commit_id="id-1") as batch:  # commit ids are remembered across it
            batch.clear_context()
        again.add_to_history("gone", "user", "x", commit_id="id-2")
        assert again.get_state("a") == before
        assert again.get_state("gone") is None

    def test_two_storages_on_one_store_see_each_others_writes(self, connect: Connect, context: Context) -> None:
        other = self.another(connect, context)
        for number in range(5):
            context.add_to_history("a", "user", number)
            assert contents(other, "a") == list(range(number + 1))
            other.set_variable("a", "n", number)
            assert context.get_variable("a", "n") == number
        assert other.get_state("a") == context.get_state("a")
        other.trim_history("a", keep=2)
        assert contents(context, "a") == [3, 4]
        assert context.clear_context("a") is True
        assert other.get_state("a") is None
        other.add_to_history("a", "user", "anew")
        assert contents(context, "a") == ["anew"]

    def test_commit_ids_are_remembered_by_the_store(self, connect: Connect, context: Context) -> None:
        other = self.another(connect, context)
        context.add_to_history("a", "user", "once", commit_id="id-1")
        other.add_to_history("a", "user", "once", commit_id="id-1")
        assert contents(other, "a") == ["once"]
        assert other.clear_context("a", commit_id="id-2") is True
        assert context.clear_context("a", commit_id="id-2") is True

    def test_turns_exclude_each_other_across_storages(self, connect: Connect, context: Context) -> None:
        other = self.another(connect, context)
        with context.turn("a", lease=30) as turn:
            turn.set_variable("x", 1)
            with pytest.raises(TimeoutError), other.turn("a", timeout=0.05):
                pytest.fail("the turn is held through another storage")
        with other.turn("a", timeout=0) as turn:
            turn.increment_variable("x")
        assert context.get_variables("a") == {"x": 2}


class SyncOrAwaited:
    """`with` for both kinds of contexts (the awaitable one has `async with`)."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> Context:
        entered = self.context.__aenter__() if hasattr(self.context, "awaitable") else self.context.__enter__()
        assert entered is not None
        return self.context  # type: ignore[no-any-return]

    def __exit__(self, *exc: object) -> None:
        (self.context.__aexit__ if hasattr(self.context, "awaitable") else self.context.__exit__)(*exc)
