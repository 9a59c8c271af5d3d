"""Concurrent writers: no commit is lost, duplicated or partly visible."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from .. import errors
from ..errors import StateError
from .harness import Connect, Context, Harness, contents, in_threads, together


def appended(item: Any, items: list[Any]) -> list[Any]:
    return [*items, item]


def fail_on_error(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


class ConcurrencyTests(Harness):
    def test_no_increment_is_lost_between_threads(self, context: Context) -> None:
        def work(one: Context) -> None:
            for _ in range(20):
                one.increment_variable("a", "n")
                one.increment_variable("a", "half", 0.5)

        fail_on_error(in_threads(context, *[work] * 8))
        assert context.get_variables("a") == {"n": 160, "half": 80.0}

    def test_no_increment_is_lost_between_calls_that_wait_together(self, context: Context) -> None:
        answers = together(context, *[lambda one: one.increment_variable("a", "n")] * 40)
        assert sorted(answers) == list(range(1, 41))
        assert context.get_variables("a") == {"n": 40}

    def test_no_update_is_lost_between_threads(self, context: Context) -> None:
        def work(number: int) -> Callable[[Context], None]:
            def update(one: Context) -> None:
                for step in range(5):
                    one.update_variable("a", "list", partial(appended, [number, step]), [])

            return update

        fail_on_error(in_threads(context, *[work(number) for number in range(6)]))
        stored = context.get_variable("a", "list")
        assert sorted(stored) == [[number, step] for number in range(6) for step in range(5)]

    def test_messages_of_each_writer_stay_in_order(self, context: Context) -> None:
        def work(number: int) -> Callable[[Context], None]:
            def append(one: Context) -> None:
                for step in range(15):
                    one.add_to_history("a", f"writer-{number}", step)
                    one.add_to_history(f"own-{number}", "user", step)

            return append

        fail_on_error(in_threads(context, *[work(number) for number in range(6)]))
        history = context.get_history("a")
        assert len(history) == 90
        for number in range(6):
            assert [m["content"] for m in history if m["role"] == f"writer-{number}"] == list(range(15))
            assert contents(context, f"own-{number}") == list(range(15))
        state = context.get_state("a")
        assert state is not None
        assert state.revision == 90

    def test_readers_never_see_half_a_commit(self, context: Context) -> None:
        def write(one: Context) -> None:
            for number in range(1, 31):
                with one.batch("a") as batch:
                    batch.set_variables({"x": number, "y": -number})
                    batch.add_to_history("user", number)
                    batch.add_to_history("assistant", -number)
                    batch.set_metadata("z", number)

        def read(one: Context) -> None:
            last = 0
            while last < 30:
                state = one.get_state("a")
                if state is None:
                    continue
                last = state.variables["x"]
                assert state.variables == {"x": last, "y": -last}
                assert state.metadata == {"z": last}
                assert state.revision == last
                assert [m["content"] for m in state.history[-2:]] == [last, -last]
                assert len(state.history) == 2 * last

        fail_on_error(in_threads(context, write, read, read))

    def test_many_conversations_at_once(self, context: Context) -> None:
        def work(number: int) -> Callable[[Context], Any]:
            return lambda one: one.add_to_history(f"context-{number % 50}", "user", number)

        for _ in range(2):
            together(context, *[work(number) for number in range(100)])
        for number in range(50):
            assert sorted(contents(context, f"context-{number}")) == [number, number, number + 50, number + 50]

    def test_only_one_of_many_creates_and_one_of_many_clears(self, context: Context) -> None:
        states = in_threads(context, *[lambda one: one.get_or_create("a", "alice")] * 6)
        fail_on_error(states)
        assert {(state.created_at, state.revision) for state in states} == {(states[0].created_at, 1)}
        answers = in_threads(context, *[lambda one: one.clear_context("a")] * 6)
        fail_on_error(answers)
        assert sorted(answers) == [False] * 5 + [True]

    def test_the_same_commit_from_many_threads_is_applied_once(self, context: Context) -> None:
        def work(one: Context) -> Any:
            return one.increment_variable("a", "n", commit_id="same")

        answers = in_threads(context, *[work] * 8)
        fail_on_error(answers)
        assert answers == [1] * 8
        assert context.get_variables("a") == {"n": 1}

    def test_no_write_is_lost_between_two_storages(self, connect: Connect, context: Context) -> None:
        other = self.another(connect, context)

        def work(through: Context) -> Callable[[Context], None]:
            def write(_: Context) -> None:
                def steps(one: Context) -> None:
                    for number in range(10):
                        one.increment_variable("a", "n")
                        one.add_to_history("a", "user", number)
                        one.update_variable("a", "list", lambda value: [*value, 1], [])

                fail_on_error(in_threads(through, steps))

            return write

        fail_on_error(in_threads(context, work(context), work(other), work(context), work(other)))
        assert context.get_variable("a", "n") == 40
        assert other.get_variable("a", "list") == [1] * 40
        assert sorted(contents(other, "a")) == sorted(list(range(10)) * 4)

    @pytest.mark.parametrize("kind", [getattr(errors, name) for name in sorted(vars(errors)) if name.endswith("Error")])
    def test_errors_survive_pickling(self, kind: type[StateError]) -> None:
        error = kind("what to do", context_id="a")
        error.__dict__["more"] = [1]
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is kind
            assert str(twin) == "what to do"
            assert twin.__dict__ == error.__dict__
