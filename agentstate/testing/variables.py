"""Variables and metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pytest

from ..errors import StateConflictError
from .harness import Context, Harness


@dataclass
class Preferences:
    theme: str
    since: datetime
    day: date
    tags: list[str] = field(default_factory=list)


class VariableTests(Harness):
    def test_a_variable_is_read_as_it_was_set(self, context: Context) -> None:
        context.set_variable("a", "user_name", "Alice")
        context.set_variable("a", "preferences", {"theme": "dark", "language": "en"})
        assert context.get_variable("a", "user_name", "Anonymous") == "Alice"
        assert context.get_variable("a", "preferences") == {"theme": "dark", "language": "en"}
        assert context.get_variable("a", "missing") is None
        assert context.get_variable("a", "missing", []) == []
        context.set_variable("a", "user_name", "Bob")
        assert context.get_variables("a") == {"user_name": "Bob", "preferences": {"theme": "dark", "language": "en"}}

    def test_a_variable_that_is_null_is_not_absent(self, context: Context) -> None:
        context.set_variable("a", "x", None)
        assert context.get_variable("a", "x", "default") is None
        assert context.get_variables("a") == {"x": None}
        assert context.delete_variable("a", "x") is True

    def test_set_variables_leaves_the_others(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        context.set_variables("a", {"y": 2, "z": 3})
        assert context.get_variables("a") == {"x": 1, "y": 2, "z": 3}
        with pytest.raises(TypeError):
            context.set_variables("a", [("x", 1)])  # type: ignore[arg-type]

    def test_delete_variable_says_whether_it_was_there(self, context: Context) -> None:
        context.set_variables("a", {"x": 1, "y": 2})
        assert context.delete_variable("a", "x") is True
        assert context.delete_variable("a", "x") is False
        assert context.get_variables("a") == {"y": 2}

    def test_metadata_is_read_as_it_was_set(self, context: Context) -> None:
        context.set_metadata("a", "user_id", "user_123")
        context.set_metadata("a", "tags", ["x"])
        assert context.get_metadata("a", "user_id") == "user_123"
        assert context.get_metadata("a", "missing", "d") == "d"
        assert context.get_all_metadata("a") == {"user_id": "user_123", "tags": ["x"]}
        assert context.delete_metadata("a", "tags") is True
        assert context.delete_metadata("a", "tags") is False
        assert context.get_all_metadata("a") == {"user_id": "user_123"}

    def test_variables_and_metadata_are_two_spaces(self, context: Context) -> None:
        context.set_variable("a", "x", "variable")
        context.set_metadata("a", "x", "metadata")
        assert context.get_variable("a", "x") == "variable"
        assert context.get_metadata("a", "x") == "metadata"
        context.delete_metadata("a", "x")
        assert context.get_variables("a") == {"x": "variable"}

    @pytest.mark.parametrize(
        "key",
        ["", " ", "a\0b", "\0", "agentstate", "__proto__", "história", "🙂", "*", "a.b[0]", '"', "\\", "x" * 3000],
    )
    def test_any_text_can_be_a_key(self, context: Context, key: str) -> None:
        context.set_variables("a", {key: [key], "beside": 1})
        context.set_metadata("a", key, {key: key})
        assert context.get_variable("a", key) == [key]
        assert context.get_variables("a") == {key: [key], "beside": 1}
        assert context.get_all_metadata("a") == {key: {key: key}}
        assert context.increment_variable("a", key + "n", 2) == 2
        assert context.delete_variable("a", key) is True
        assert context.delete_metadata("a", key) is True
        assert context.get_variables("a") == {"beside": 1, key + "n": 2}

    def test_a_dataclass_comes_back_as_one(self, context: Context) -> None:
        given = Preferences("dark", datetime(2026, 1, 31, 12, tzinfo=UTC), date(2026, 2, 1), ["x"])
        context.set_variable("a", "preferences", given)
        assert context.get_variable("a", "preferences") == {
            "theme": "dark",
            "since": "2026-01-31T12:00:00+00:00",
            "day": "2026-02-01",
            "tags": ["x"],
        }
        assert context.get_variable("a", "preferences", as_type=Preferences) == given
        assert context.get_variable("a", "missing", as_type=Preferences) is None

    @pytest.mark.parametrize(
        ("start", "by", "total"),
        [
            (None, 1, 1),
            (None, -5, -5),
            (None, 0.5, 0.5),
            (41, 1, 42),
            (1, 0, 1),
            (-3, 5, 2),
            (1, 0.5, 1.5),
            (0.1, 0.2, 0.1 + 0.2),
            (1.0, 1, 2.0),
            (2**53, 1, 2**53 + 1),
            (2**63 - 1, 1, 2**63),
            (-(2**63), -1, -(2**63) - 1),
            (2**70, 2**70, 2**71),
            (10**4200, 1, 10**4200 + 1),
            (1, 1e300, 1e300),
            (1e16, 1, 1e16 + 1),
        ],
    )
    def test_increment_has_pythons_arithmetic(self, context: Context, start: Any, by: Any, total: Any) -> None:
        if start is not None:
            context.set_variable("a", "n", start)
        answered = context.increment_variable("a", "n", by)
        stored = context.get_variable("a", "n")
        assert answered == stored == total
        assert type(answered) is type(stored) is type(total)

    @pytest.mark.parametrize("value", ["5", None, True, False, [1], {}, ""])
    def test_increment_of_what_is_no_number_is_a_conflict(self, context: Context, value: Any) -> None:
        context.set_variable("a", "n", value)
        before = context.get_state("a")
        for by in (1, 1.5, 2**70):
            with pytest.raises(StateConflictError) as caught:
                context.increment_variable("a", "n", by)
            assert caught.value.context_id == "a"
        assert context.get_state("a") == before

    @pytest.mark.parametrize(("start", "by"), [(1.7e308, 1.7e308), (10**4300 - 1, 1), (10**400, 0.5)])
    def test_increment_out_of_range_is_a_conflict(self, context: Context, start: Any, by: Any) -> None:
        context.set_variable("a", "n", start)
        with pytest.raises(StateConflictError):
            context.increment_variable("a", "n", by)
        assert context.get_variable("a", "n") == start

    def test_increment_by_what_is_no_number_is_refused(self, context: Context) -> None:
        nonsense: Any
        for nonsense in ("1", None, True, [1]):
            with pytest.raises(TypeError):
                context.increment_variable("a", "n", nonsense)
        for nonsense in (float("nan"), float("inf")):
            with pytest.raises(ValueError):
                context.increment_variable("a", "n", nonsense)
        assert not context.exists("a")

    def test_update_variable_replaces_a_value_by_a_function_of_it(self, context: Context) -> None:
        assert context.update_variable("a", "list", lambda value: [*value, 1], []) == [1]
        assert context.update_variable("a", "list", lambda value: [*value, 2], []) == [1, 2]
        assert context.get_variable("a", "list") == [1, 2]
        assert context.update_variable("a", "fresh", lambda value: value) is None
        assert context.get_variables("a") == {"list": [1, 2], "fresh": None}

    def test_update_variable_passes_the_functions_error_on(self, context: Context) -> None:
        context.set_variable("a", "x", 1)

        def fail(value: Any) -> Any:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            context.update_variable("a", "x", fail)
        assert context.get_variable("a", "x") == 1

    def test_update_variable_calls_again_when_another_writer_came_between(self, context: Context) -> None:
        context.set_variable("a", "x", 1)
        seen = []

        def update(value: int) -> int:
            seen.append(value)
            if len(seen) == 1:
                self.write_behind(context, "a", "x", 10)
            return value + 1

        assert context.update_variable("a", "x", update) == 11
        assert seen == [1, 10]

    def test_update_variable_notices_a_variable_that_appeared_or_went(self, context: Context) -> None:
        seen: list[Any] = []

        def update(value: Any) -> Any:
            seen.append(value)
            if len(seen) == 1:
                self.write_behind(context, "a", "x", "appeared")
            return [value]

        assert context.update_variable("a", "x", update) == ["appeared"]
        assert seen == [None, "appeared"]

    @staticmethod
    def write_behind(context: Context, context_id: str, key: str, value: Any) -> None:
        """Set a variable during a call of `context`, whose event loop may be busy with that call."""
        from ..blocking import SyncConversationContext

        SyncConversationContext(context.storage).set_variable(context_id, key, value)

    def test_two_dicts_read_are_two_copies(self, context: Context) -> None:
        given = {"list": [1], "dict": {"k": "v"}}
        context.set_variable("a", "x", given)
        context.set_metadata("a", "m", given)
        context.add_to_history("a", "user", given, given)
        given["list"].append("changed after the call")  # type: ignore[attr-defined]
        expected = {"list": [1], "dict": {"k": "v"}}
        for _ in range(2):
            read = [
                context.get_variable("a", "x"),
                context.get_variables("a")["x"],
                context.get_metadata("a", "m"),
                context.get_all_metadata("a")["m"],
                context.get_history("a")[0]["content"],
                context.get_history("a")[0]["metadata"],
                next(iter(context.iter_history("a")))["content"],
            ]
            state = context.get_state("a")
            assert state is not None
            read += [state.variables["x"], state.metadata["m"], state.history[0]["content"]]
            state = context.get_or_create("a")
            read += [state.variables["x"], state.metadata["m"], state.history[0]["metadata"]]
            for value in read:
                assert value == expected
                value["list"].append("changed")
                value["dict"]["k"] = "changed"
            state.variables.clear()
            state.history.clear()

    def test_a_default_is_the_callers_own(self, context: Context) -> None:
        default: list[int] = []
        assert context.get_variable("a", "x", default) is default
        context.update_variable("a", "x", lambda value: [*value, 1], default)
        assert default == []
