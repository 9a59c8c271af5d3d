"""Values: JSON is stored exactly; everything else is refused at once, with its path."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any
from uuid import UUID

import pytest

from ..codec import MAX_DEPTH
from ..errors import StateSerializationError
from .harness import Connect, Context, Harness, contents


@dataclass
class Point:
    x: int
    label: Any


class Color(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


Pair = namedtuple("Pair", "left right")

EXACT: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    2**53 + 1,
    2**63,
    -(2**64),
    2**70,
    10**4300 - 1,
    -(10**4300 - 1),
    0.0,
    -0.0,
    0.1,
    1e-320,
    5e-324,
    1.7976931348623157e308,
    1e22,
    123456789.123456789,
    1.0,
    "",
    "text",
    'quotes " and \\ and / and \b\f\n\r\t',
    "NUL \0 and \x01 and \x1f and \x7f",
    "Zoë, naïve, Ω, 中文, \u2028\u2029\ufeff\ufffd",
    "🙂🏳️‍🌈\U0010ffff",
    "e\u0301 is not é",
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    {"k": []},
    [None, [None], {"n": None}],
    {"b": 1, "a": 2},
    {"null": None, "NUL\0": "\0"},
    [1, 1.0, "1", True],
    "x" * 100_000,
    list(range(2000)),
)

CONVERTED: tuple[tuple[Any, Any], ...] = (
    ((1, 2), [1, 2]),
    ((), []),
    ({"t": (1, (2,))}, {"t": [1, [2]]}),
    (Pair(1, 2), [1, 2]),
    (datetime(2026, 1, 31, 12, 30, tzinfo=UTC), "2026-01-31T12:30:00+00:00"),
    (datetime(2026, 1, 31, 12, 30, 0, 5), "2026-01-31T12:30:00.000005"),  # noqa: DTZ001 - the naive one is tested
    ([date(2026, 1, 31)], ["2026-01-31"]),
    (Point(1, (2, 3)), {"x": 1, "label": [2, 3]}),
    ([Point(1, Point(2, None))], [{"x": 1, "label": {"x": 2, "label": None}}]),
    (Color.RED, "red"),
    ({Color.RED: Level.HIGH}, {"red": 3}),
    (OrderedDict(a=1), {"a": 1}),
)


def cycle() -> Any:
    inner: list[Any] = []
    inner.append({"again": inner})
    return inner


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


REFUSED: tuple[tuple[str, Callable[[], Any], str], ...] = (
    ("nan", lambda: float("nan"), ""),
    ("infinity", lambda: {"a": [0, float("inf")]}, ".a[1]"),
    ("minus infinity", lambda: [float("-inf")], "[0]"),
    ("bytes", lambda: {"theme": [0, 1, 2, b"raw"]}, ".theme[3]"),
    ("bytearray", lambda: bytearray(b"x"), ""),
    ("set", lambda: {"tags": {"a"}}, ".tags"),
    ("frozenset", lambda: [frozenset()], "[0]"),
    ("object", lambda: [object()], "[0]"),
    ("class", lambda: Point, ""),
    ("function", lambda: {"f": print}, ".f"),
    ("complex", lambda: 1j, ""),
    ("decimal", lambda: Decimal("1.5"), ""),
    ("uuid", lambda: UUID(int=0), ""),
    ("range", lambda: range(3), ""),
    ("generator", lambda: iter(()), ""),
    ("integer key", lambda: {"a": {1: "x"}}, ".a"),
    ("none key", lambda: {None: 1}, ""),
    ("tuple key", lambda: [{(1, 2): 3}], "[0]"),
    ("lone surrogate", lambda: {"a": ["ok", "\ud800"]}, ".a[1]"),
    ("low surrogate", lambda: "\udfff!", ""),
    ("surrogate in a key", lambda: {"\udc00": 1}, "."),
    ("in a dataclass", lambda: Point(1, {b"x"}), ".label"),
    ("cycle", cycle, "[0].again"),
    ("10,000 levels", lambda: nested(10_000), "[0][0]"),
    ("too deep by one", lambda: nested(MAX_DEPTH + 1), "[0][0]"),
    ("4,301 digits", lambda: 10**4300, ""),
    ("minus 4,301 digits", lambda: [-(10**4300)], "[0]"),
)


def same(left: Any, right: Any) -> bool:
    """Equal in value, in type, in order of keys, and in the sign of zero."""
    return type(left) is type(right) and json.dumps(left) == json.dumps(right)


class ValueTests(Harness):
    def test_an_integer_that_the_process_may_not_read_is_refused(self, context: Context) -> None:
        context.set_variable("a", "n", 10**1000)
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(640)
        try:
            for read in (
                lambda: context.get_variable("a", "n"),
                lambda: context.get_variables("a"),
                lambda: context.get_state("a"),
                lambda: context.increment_variable("a", "n"),
                lambda: context.update_variable("a", "n", lambda n: n),
            ):
                with pytest.raises(StateSerializationError, match="more digits than this process reads"):
                    read()
        finally:
            sys.set_int_max_str_digits(limit)
        assert context.increment_variable("a", "n") == 10**1000 + 1

    def test_json_values_are_kept_exactly(self, context: Context) -> None:
        values = {f"value {index}": value for index, value in enumerate(EXACT)}
        context.set_variables("a", values)
        context.extend_history("a", [{"role": "user", "content": value} for value in EXACT])
        with context.batch("a") as batch:
            for key, value in values.items():
                batch.set_metadata(key, value)
        variables, metadata = context.get_variables("a"), context.get_all_metadata("a")
        for (key, value), content in zip(values.items(), contents(context, "a"), strict=True):
            assert same(variables[key], value)
            assert same(metadata[key], value)
            assert same(content, value)

    def test_a_value_of_one_megabyte_is_kept(self, context: Context) -> None:
        value = ["é" * 1000] * 500
        context.set_variable("a", "x", value)
        assert context.get_variable("a", "x") == value

    @pytest.mark.parametrize(("given", "stored"), CONVERTED)
    def test_some_types_are_converted(self, context: Context, given: Any, stored: Any) -> None:
        context.set_variable("a", "x", given)
        context.set_metadata("a", "x", given)
        context.add_to_history("a", "user", given)
        assert same(context.get_variable("a", "x"), stored)
        assert same(context.get_metadata("a", "x"), stored)
        assert same(contents(context, "a")[0], stored)
        assert same(context.update_variable("a", "y", lambda _: given), stored)

    @pytest.mark.parametrize(("make", "path"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
    def test_everything_else_is_refused_with_its_path(
        self, context: Context, make: Callable[[], Any], path: str
    ) -> None:
        context.set_variable("a", "x", "before")
        context.add_to_history("a", "user", "before")
        before = context.get_state("a")
        attempts: tuple[tuple[Callable[[], Any], str], ...] = (
            (lambda: context.set_variable("a", "x", make()), "x" + path),
            (lambda: context.set_variables("a", {"fine": 1, "x": make()}), "variables.x" + path),
            (lambda: context.set_metadata("a", "m", make()), "m" + path),
            (lambda: context.add_to_history("a", "user", make()), "content" + path),
            (lambda: context.add_to_history("a", "user", "hi", {"k": make()}), "metadata.k" + path),
            (lambda: context.update_variable("a", "x", lambda _: make()), "x" + path),
            (lambda: context.update_state("a", variables={"x": make()}), "variables.x" + path),
        )
        for attempt, where in attempts:
            with pytest.raises(StateSerializationError) as caught:
                attempt()
            assert caught.value.path.startswith(where)
            assert where in str(caught.value)
            assert caught.value.context_id == "a"
            assert isinstance(caught.value, TypeError)
        assert context.get_state("a") == before

    def test_the_path_names_the_culprit(self, context: Context) -> None:
        with pytest.raises(StateSerializationError, match=r"preferences\.theme\[3\]") as caught:
            context.set_variable("a", "preferences", {"theme": [1, 2, 3, {1, 2}]})
        assert caught.value.path == "preferences.theme[3]"
        assert not context.exists("a")

    def test_the_deepest_allowed_nesting_is_kept(self, context: Context) -> None:
        value = nested(MAX_DEPTH)
        context.set_variable("a", "x", value)
        assert context.get_variable("a", "x") == value

    @pytest.mark.parametrize("key", [1, None, b"x", ("a",), "\ud800"])
    def test_a_key_is_text_of_valid_unicode(self, context: Context, key: Any) -> None:
        for attempt in (
            lambda: context.set_variable("a", key, 1),
            lambda: context.set_variables("a", {key: 1}),
            lambda: context.increment_variable("a", key),
            lambda: context.update_variable("a", key, lambda _: 1),
            lambda: context.set_metadata("a", key, 1),
            lambda: context.get_variable("a", key),
            lambda: context.get_metadata("a", key),
            lambda: context.delete_variable("a", key),
            lambda: context.delete_metadata("a", key),
        ):
            with pytest.raises(StateSerializationError):
                attempt()
        assert not context.exists("a")

    def test_a_value_larger_than_max_value_bytes_is_refused(self, connect: Connect) -> None:
        context = connect(max_value_bytes=1000)
        context.set_variable("a", "x", "v" * 998)  # with its quotes that makes 1,000
        context.set_metadata("a", "x", "é" * 499)
        context.add_to_history("a", "user", "v" * 800)
        before = context.get_state("a")
        for attempt in (
            lambda: context.set_variable("a", "x", "v" * 999),
            lambda: context.set_variables("a", {"y": 1, "x": "v" * 999}),
            lambda: context.set_metadata("a", "x", "é" * 500),
            lambda: context.add_to_history("a", "user", "v" * 1000),
            lambda: context.add_to_history("a", "user", "", {"k": "v" * 1000}),
            lambda: context.extend_history("a", [{"role": "user", "content": "v" * 1000}]),
            lambda: context.update_variable("a", "x", lambda value: value + "v"),
            lambda: context.update_state("a", metadata={"x": "v" * 999}),
        ):
            with pytest.raises(StateSerializationError, match="max_value_bytes"):
                attempt()
        assert context.get_state("a") == before
        context.set_variables("a", {f"v{number}": "v" * 998 for number in range(5)})  # the limit is for each

    def test_max_value_bytes_is_16_mib_unless_set(self, context: Context) -> None:
        with pytest.raises(StateSerializationError, match="max_value_bytes"):
            context.set_variable("a", "x", "v" * (16 * 1024 * 1024 - 1))  # 16 MiB + 1 with its quotes
        assert not context.exists("a")
