"""Commits: atomic, and applied once however often they are repeated with the same id."""

# ruff: noqa: PT012 - what is refused is the end of a with block, and the block is needed for that

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from ..codec import decode
from ..errors import (
    ContextNotFoundError,
    StateConflictError,
    StateError,
    StateSerializationError,
    StateTimeoutError,
)
from ..operations import (
    CHANGED,
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
    Pop,
    Put,
    Query,
    Restore,
    Snapshot,
    Space,
    Trim,
    Window,
)
from .harness import Connect, Context, Harness, contents, fill

Call = Callable[[Context, str], Any]

# Calls with a commit id, and their results on a context "a" made by `prepared`.
WRITES: dict[str, tuple[Call, Any]] = {
    "add_to_history": (lambda c, i: c.add_to_history("a", "user", "new", commit_id=i), None),
    "extend_history": (
        lambda c, i: c.extend_history("a", [{"role": "user", "content": "new"}], commit_id=i),
        None,
    ),
    "trim_history": (lambda c, i: c.trim_history("a", keep=2, commit_id=i), None),
    "pop_history": (lambda c, i: [m["content"] for m in c.pop_history("a", 2, commit_id=i)], [3, 4]),
    "clear_history": (lambda c, i: c.clear_history("a", commit_id=i), None),
    "set_variable": (lambda c, i: c.set_variable("a", "x", "new", commit_id=i), None),
    "set_variables": (lambda c, i: c.set_variables("a", {"x": "new"}, commit_id=i), None),
    "delete_variable": (lambda c, i: c.delete_variable("a", "x", commit_id=i), True),
    "delete_variable that is absent": (lambda c, i: c.delete_variable("a", "late", commit_id=i), False),
    "increment_variable": (lambda c, i: c.increment_variable("a", "n", 5, commit_id=i), 6),
    "increment_variable by a float": (lambda c, i: c.increment_variable("a", "n", 0.5, commit_id=i), 1.5),
    "increment_variable by much": (lambda c, i: c.increment_variable("a", "n", 2**70, commit_id=i), 2**70 + 1),
    "update_variable": (lambda c, i: c.update_variable("a", "n", lambda n: n * 10, commit_id=i), 10),
    "set_metadata": (lambda c, i: c.set_metadata("a", "m", "new", commit_id=i), None),
    "delete_metadata": (lambda c, i: c.delete_metadata("a", "m", commit_id=i), True),
    "update_state": (lambda c, i: c.update_state("a", variables={}, history=[], commit_id=i), None),
}


def prepared(context: Context) -> None:
    with context.batch("a") as batch:
        batch.set_variables({"x": "old", "n": 1})
        batch.set_metadata("m", "old")
    fill(context, "a", 5)


class CommitTests(Harness):
    def test_a_batch_commits_as_one(self, context: Context) -> None:
        prepared(context)
        with context.batch("a") as batch:
            batch.add_to_history("user", "hi", {"k": 1})
            batch.extend_history([{"role": "assistant", "content": "there"}])
            batch.set_variable("x", [1])
            batch.set_variables({"y": 2, "z": 3})
            batch.increment_variable("n", 4)
            batch.increment_variable("fresh", 0.5)
            batch.delete_variable("y")
            batch.set_metadata("k", "v")
            batch.delete_metadata("m")
            batch.trim_history(keep=3)
            assert context.get_variable("a", "x") == "old"  # nothing is sent before the end
            assert context.count_history("a") == 5
        state = context.get_state("a")
        assert state is not None
        assert state.revision == 3
        assert state.variables == {"x": [1], "z": 3, "n": 5, "fresh": 0.5}
        assert state.metadata == {"k": "v"}
        assert contents(context, "a") == [4, "hi", "there"]
        assert state.history_start == 4

    def test_an_exception_in_a_batch_commits_nothing(self, context: Context) -> None:
        prepared(context)
        before = context.get_state("a")
        with pytest.raises(KeyError), context.batch("a") as batch:
            batch.set_variable("x", 1)
            batch.clear_context()
            raise KeyError("mine")
        assert context.get_state("a") == before
        with pytest.raises(StateSerializationError), context.batch("a") as batch:
            batch.set_variable("x", 1)
            batch.set_variable("y", {1, 2})
        assert context.get_state("a") == before

    def test_one_refused_change_refuses_the_whole_batch(self, context: Context) -> None:
        prepared(context)
        before = context.get_state("a")
        with pytest.raises(StateConflictError), context.batch("a") as batch:
            batch.add_to_history("user", "lost")
            batch.set_variable("y", 1)
            batch.delete_metadata("m")
            batch.increment_variable("x")  # "old" is no number
            batch.set_variable("z", 1)
        assert context.get_state("a") == before
        assert contents(context, "a") == [0, 1, 2, 3, 4]

    def test_an_empty_batch_is_no_commit(self, context: Context) -> None:
        with context.batch("a"):
            pass
        assert not context.exists("a")
        prepared(context)
        before = context.get_state("a")
        with context.batch("a") as batch:
            batch.set_variables({})
            batch.extend_history([])
        assert context.get_state("a") == before

    def test_changes_of_a_batch_see_those_before_them(self, context: Context) -> None:
        with context.batch("a") as batch:
            batch.set_variable("n", 1)
            batch.increment_variable("n", 2)
            batch.increment_variable("n", 0.5)
            batch.increment_variable("big", 2**63)
            batch.increment_variable("big", 1)
            batch.set_variable("gone", 1)
            batch.delete_variable("gone")
            batch.delete_variable("back")
            batch.set_variable("back", True)
        assert context.get_variables("a") == {"n": 3.5, "big": 2**63 + 1, "back": True}

    def test_a_batch_may_clear_and_begin_anew(self, context: Context) -> None:
        prepared(context)
        with context.batch("a") as batch:
            batch.set_variable("x", "lost")
            batch.clear_context()
            batch.add_to_history("user", "first")
            batch.increment_variable("n", 3)
        state = context.get_state("a")
        assert state is not None
        assert (state.variables, state.metadata, state.history_start, state.revision) == ({"n": 3}, {}, 0, 1)
        assert contents(context, "a") == ["first"]
        with context.batch("a") as batch:
            batch.add_to_history("user", "lost")
            batch.clear_context()
        assert not context.exists("a")

    def test_a_batch_can_replace_fields(self, context: Context) -> None:
        prepared(context)
        with context.batch("a") as batch:
            batch.set_variable("x", "lost")
            batch.update_state(variables={"n": 7}, history=[{"role": "user", "content": "only"}])
            batch.increment_variable("n")
            batch.add_to_history("user", "second")
        assert context.get_variables("a") == {"n": 8}
        assert contents(context, "a") == ["only", "second"]
        with context.batch("a") as batch:
            batch.add_to_history("user", "third")
            batch.clear_history()
            batch.add_to_history("user", "fourth")
        assert contents(context, "a") == ["fourth"]
        state = context.get_state("a")
        assert state is not None
        assert state.history_start == 5 + 2 + 1

    def test_a_batch_is_for_its_with_block_only(self, context: Context) -> None:
        batch = context.batch("a")
        with pytest.raises(StateConflictError):
            batch.set_variable("x", 1)
        with batch:
            batch.set_variable("x", 1)
        with pytest.raises(StateConflictError):
            batch.set_variable("x", 2)
        with batch:
            batch.set_variable("y", 3)
            with pytest.raises(StateConflictError), batch:
                batch.set_variable("y", 4)
        assert context.get_variables("a") == {"x": 1, "y": 3}

    @pytest.mark.parametrize("name", WRITES)
    def test_a_commit_with_a_remembered_id_is_not_applied_again(self, context: Context, name: str) -> None:
        write, answer = WRITES[name]
        prepared(context)
        assert write(context, "id-1") == answer
        with context.batch("a") as batch:  # what comes between must survive
            batch.set_variables({"x": "later", "n": 1000, "late": 1})
            batch.set_metadata("m", "later")
            batch.add_to_history("user", "later")
        between = context.get_state("a")
        for _ in range(2):
            assert write(context, "id-1") == answer
            assert context.get_state("a") == between
        fill(context, "a", 5)
        write(context, "id-2")
        assert context.get_state("a") != between

    def test_get_or_create_with_a_remembered_id_reads(self, context: Context) -> None:
        context.get_or_create("a", "alice", commit_id="id-1")
        context.set_variable("a", "x", 1)
        assert context.get_or_create("a", "alice", commit_id="id-1").variables == {"x": 1}
        context.clear_context("a")
        with pytest.raises(ContextNotFoundError):  # it was created once, and is not created again
            context.get_or_create("a", "alice", commit_id="id-1")

    def test_a_fork_with_a_remembered_id_is_done_already(self, context: Context) -> None:
        fill(context, "a", 2)
        context.fork_context("a", "b", commit_id="id-1")
        context.add_to_history("b", "user", "more")
        context.fork_context("a", "b", commit_id="id-1")
        assert contents(context, "b") == [0, 1, "more"]
        with pytest.raises(StateConflictError):
            context.fork_context("a", "b", commit_id="id-2")

    def test_a_fork_with_a_remembered_id_is_done_even_where_its_source_is_gone(self, context: Context) -> None:
        fill(context, "a", 2)
        context.fork_context("a", "b", commit_id="id-1")
        context.clear_context("a")  # the conversation has been moved
        context.fork_context("a", "b", commit_id="id-1")
        assert contents(context, "b") == [0, 1]
        with pytest.raises(ContextNotFoundError):
            context.fork_context("a", "c", commit_id="id-1")  # ids are those of the target

    def test_a_remembered_update_does_not_call_the_function_again(self, context: Context) -> None:
        def take(items: list[int]) -> list[int]:
            calls.append(items)
            items.pop()
            return items

        calls: list[list[int]] = []
        context.set_variable("a", "todo", [1])
        assert context.update_variable("a", "todo", take, commit_id="id-1") == []
        assert context.update_variable("a", "todo", take, commit_id="id-1") == []
        context.clear_context("a")
        with suppress(StateConflictError):  # a backend may remember only the ids of a cleared context
            assert context.update_variable("a", "todo", take, commit_id="id-1") == []
        assert len(calls) == 1
        with pytest.raises(IndexError):
            context.update_variable("a", "todo", take, [], commit_id="id-2")

    def test_an_id_of_another_kind_of_commit_answers_nothing(self, context: Context) -> None:
        context.set_variable("a", "n", 1, commit_id="id-1")
        assert context.update_variable("a", "n", lambda _: 2, commit_id="id-1") is None
        assert context.increment_variable("a", "n", commit_id="id-1") is None
        assert context.pop_history("a", commit_id="id-1") == []
        assert context.get_variables("a") == {"n": 1}

    def test_a_batch_with_a_remembered_id_is_not_applied_again(self, context: Context) -> None:
        for _ in range(3):
            with context.batch("a", commit_id="id-1") as batch:
                batch.increment_variable("n")
                batch.add_to_history("user", "once")
        assert context.get_variables("a") == {"n": 1}
        assert contents(context, "a") == ["once"]

    def test_a_turn_with_a_remembered_id_is_not_applied_again(self, context: Context) -> None:
        for _ in range(3):
            with context.turn("a", commit_id="id-1") as turn:
                turn.increment_variable("n")
        assert context.get_variables("a") == {"n": 1}

    def test_a_repeated_clear_does_not_clear_what_came_after(self, context: Context) -> None:
        prepared(context)
        assert context.clear_context("a", commit_id="id-1") is True
        assert context.clear_context("a", commit_id="id-1") is True
        context.add_to_history("a", "user", "anew")
        assert context.clear_context("a", commit_id="id-1") is True
        assert contents(context, "a") == ["anew"]

    def test_commit_ids_survive_a_clear(self, context: Context) -> None:
        context.add_to_history("a", "user", "hi", commit_id="id-1")
        context.increment_variable("a", "n", 5, commit_id="id-2")
        context.clear_context("a")
        context.add_to_history("a", "user", "hi", commit_id="id-1")
        with suppress(StateConflictError):  # a backend may remember only the ids of a cleared context
            assert context.increment_variable("a", "n", 5, commit_id="id-2") == 5
        assert not context.exists("a")
        context.set_variable("a", "x", 1)
        context.add_to_history("a", "user", "hi", commit_id="id-1")
        assert context.count_history("a") == 0
        context.add_to_history("a", "user", "hi", commit_id="id-3")
        assert contents(context, "a") == ["hi"]

    def test_the_last_64_commits_are_remembered(self, context: Context) -> None:
        oldest = REMEMBERED_COMMITS - 1
        for number in range(5 * REMEMBERED_COMMITS // 2):
            assert context.increment_variable("a", "n", commit_id=f"id-{number}") == number + 1
            if number >= oldest:  # after every single commit: a backend may forget in blocks
                again = number - oldest
                assert context.increment_variable("a", "n", commit_id=f"id-{again}") == again + 1
        for again in range(number - oldest, number + 1):
            assert context.increment_variable("a", "n", commit_id=f"id-{again}") == again + 1
        assert context.get_variable("a", "n") == number + 1

    def test_commit_ids_are_scoped_to_their_context(self, context: Context) -> None:
        assert context.increment_variable("a", "n", commit_id="same") == 1
        assert context.increment_variable("b", "n", 7, commit_id="same") == 7
        assert context.increment_variable("a", "n", commit_id="same") == 1

    def test_an_answer_too_large_to_keep_is_a_conflict_the_second_time(self, context: Context) -> None:
        context.extend_history("a", [{"role": "user", "content": "x" * 1000}] * 20)
        popped = context.pop_history("a", 10, commit_id="id-1")
        assert len(popped) == 10
        with pytest.raises(StateConflictError, match="already applied") as caught:
            context.pop_history("a", 10, commit_id="id-1")
        assert caught.value.context_id == "a"
        assert context.count_history("a") == 10
        value = context.update_variable("a", "big", lambda _: "y" * 5000, commit_id="id-2")
        assert value == "y" * 5000
        with pytest.raises(StateConflictError, match="already applied"):
            context.update_variable("a", "big", lambda _: "z", commit_id="id-2")

    def test_a_refused_commit_is_not_remembered(self, context: Context) -> None:
        context.set_variable("a", "n", "text")
        with pytest.raises(StateConflictError):
            context.increment_variable("a", "n", commit_id="id-1")
        context.set_variable("a", "n", 1)
        assert context.increment_variable("a", "n", commit_id="id-1") == 2

    @pytest.mark.parametrize("commit_id", ["", "x" * 201, "é", "a\nb", 5, b"x", "\0"])
    def test_a_commit_id_is_short_printable_ascii(self, context: Context, commit_id: Any) -> None:
        with pytest.raises(ValueError, match="commit_id"):
            context.set_variable("a", "x", 1, commit_id=commit_id)
        with pytest.raises(ValueError, match="commit_id"):
            context.batch("a", commit_id=commit_id).__enter__()
        assert not context.exists("a")
        context.set_variable("a", "x", 1, commit_id="~ {any} \"other\" 'one' *:% " + "x" * 170)

    def test_expected_values_are_compared_in_the_commit(self, context: Context) -> None:
        call = context.storage.call
        put = Put(Space.VARIABLES, (("x", b"2"),))
        assert call(Commit("a", (put,), "c1", expect=("x", b"1"))) == CHANGED
        assert not context.exists("a")
        assert call(Commit("a", (put,), "c2", expect=("x", None), answer=b"2")) == b"2"
        assert call(Commit("a", (put,), "c3", expect=("x", None))) == CHANGED
        assert call(Commit("a", (Put(Space.VARIABLES, (("x", b"3"),)),), "c3", expect=("x", b"2"))) == b""
        assert call(Commit("a", (put,), "c2", expect=("x", None), answer=b"9")) == b"2"  # the first answer, again
        assert context.get_variables("a") == {"x": 3}

    def test_a_commit_of_all_changes_answers_its_last_answer(self, context: Context) -> None:
        prepared(context)
        changes = (
            Create("alice"),
            Append((b'{"role":"user","content":5,"timestamp":"","metadata":{}}',)),
            Put(Space.METADATA, (("k", b'"v"'),)),
            Drop(Space.METADATA, "m"),
            Increment("n", b"4"),
            Pop(1),
            Trim(3),
        )
        answer = context.storage.call(Commit("a", changes, "c1"))
        assert answer == b'[{"role":"user","content":5,"timestamp":"","metadata":{}}]'
        state = context.get_state("a")
        assert state is not None
        assert (state.user_id, state.metadata, state.variables["n"]) == ("alice", {"k": "v"}, 5)
        assert (contents(context, "a"), state.history_start) == ([2, 3, 4], 2)

    def test_a_pop_takes_what_its_own_commit_appended_first(self, context: Context) -> None:
        fill(context, "a", 3)
        texts = tuple(b'{"role":"user","content":%d,"timestamp":"","metadata":{}}' % number for number in (3, 4))
        answer = context.storage.call(Commit("a", (Append(texts), Pop(3)), "c1"))
        assert isinstance(answer, bytes)
        assert [message["content"] for message in decode(answer)] == [2, 3, 4]
        assert contents(context, "a") == [0, 1]
        assert decode(answer)[1:] == [decode(text) for text in texts]

    def test_operations_of_one_call_are_carried_out_in_order(self, connect: Connect) -> None:
        storage = connect().storage
        changes: tuple[Change, ...] = (
            Increment("n", b"1"),
            Increment("n", b"10"),
            Delete(),
            Increment("n", b"100"),
        )
        outcomes: dict[int, Any] = {}

        def settle(index: int, outcome: Any) -> None:
            assert index not in outcomes
            outcomes[index] = outcome

        group: list[Any] = []
        for number, change in enumerate(changes):
            group.append(Commit("a", (change,), f"c{number}"))
            group.append(Query("a", variables=("n",)))
            group.append(Commit(f"other-{number}", (change,), "c"))
        group.append(Listing())
        storage.execute(group, settle)
        assert sorted(outcomes) == list(range(len(group)))
        assert [outcomes[index] for index in (0, 3, 6, 9)] == [b"1", b"11", b"true", b"100"]
        seen = [outcomes[index] for index in (1, 4, 7, 10)]
        assert [None if one is None else one.variables["n"] for one in seen] == [b"1", b"11", None, b"100"]
        assert storage.call(Query("other-2")) is None

    def test_a_failed_operation_fails_alone(self, context: Context) -> None:
        context.set_variable("a", "text", "x")
        outcomes: dict[int, Any] = {}
        context.storage.execute(
            (
                Commit("a", (Increment("n", b"1"),), "c1"),
                Commit("a", (Increment("text", b"1"),), "c2"),
                Commit("a", (Increment("n", b"1"),), "c3"),
                Commit("a", (Increment("n", b"1"),), "c4", deadline=time.monotonic() - 1),
                Query("a", deadline=time.monotonic() - 1),
                Commit("b", (Increment("n", b"1"),), "c1", absent=True),
                Commit("a", (Increment("n", b"1"),), "c5", absent=True),
                Query("a", variables=("n",)),
            ),
            outcomes.__setitem__,
        )
        assert [outcomes[index] for index in (0, 2, 5)] == [b"1", b"2", b"1"]
        assert isinstance(outcomes[1], StateConflictError)
        assert isinstance(outcomes[3], StateTimeoutError)
        assert isinstance(outcomes[4], StateTimeoutError)
        assert isinstance(outcomes[6], StateConflictError)
        assert isinstance(outcomes[7], Snapshot)
        assert outcomes[7].variables == {"n": b"2"}
        for error in (outcomes[1], outcomes[3], outcomes[6]):
            assert error.context_id == "a"

    def test_after_its_deadline_nothing_is_attempted(self, context: Context) -> None:
        past = time.monotonic() - 0.001
        operations = (
            Commit("a", (Create(),), "c1", deadline=past),
            Query("a", deadline=past),
            Lease("a", "take", "token", 30.0, deadline=past),
            Listing(deadline=past),
        )
        for operation in operations:
            with pytest.raises(StateTimeoutError):
                context.storage.call(operation)
        assert not context.exists("a")

    def test_a_restored_history_has_room_for_what_was_trimmed(self, context: Context) -> None:
        call = context.storage.call
        text = b'{"role":"user","content":1,"timestamp":"","metadata":{}}'
        call(Commit("a", (Restore(None, start=100), Append((text, text, text)), Trim(2)), "c1", absent=True))
        snapshot = call(Query("a", history=Window()))
        assert isinstance(snapshot, Snapshot)
        assert (snapshot.start, snapshot.end, snapshot.first) == (101, 103, 101)
        assert call(Commit("a", (Append((text,)), Trim(1), Pop(5)), "c2")) == b"[" + text + b"]"
        snapshot = call(Query("a", history=Window()))
        assert isinstance(snapshot, Snapshot)
        assert (snapshot.start, snapshot.end, list(snapshot.messages)) == (103, 103, [])

    def test_errors_say_which_conversation_they_are_about(self, context: Context) -> None:
        context.set_variable("a", "x", "text")
        failures: tuple[tuple[type[StateError], Callable[[], Any]], ...] = (
            (StateConflictError, lambda: context.increment_variable("a", "x")),
            (StateSerializationError, lambda: context.set_variable("a", "x", {1})),
            (ContextNotFoundError, lambda: context.fork_context("a!", "b")),
        )
        for kind, call in failures:
            with pytest.raises(kind) as caught:
                call()
            assert caught.value.context_id in ("a", "a!")
