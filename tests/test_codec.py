"""JSON in and out. What can be stored at all is in `agentstate.testing.values`, for it holds on every backend."""

from __future__ import annotations

import enum
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic
import pytest
from dataclasses_json import LetterCase, dataclass_json
from hypothesis import given
from hypothesis import strategies as st

from agentstate import InMemoryStorage, SyncConversationContext, codec, get_context_manager
from agentstate.errors import StateError, StateSerializationError

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_goes_in_comes_out(value: Any) -> None:
    text = codec.encode(value, "x")
    assert b"\n" not in text
    back = codec.decode(text)
    assert repr(back) == repr(value)  # the signs of zeros, the types of numbers and the order of keys included
    assert json.loads(text) == value


@given(VALUES)
def test_encoding_changes_nothing_of_what_it_is_given(value: Any) -> None:
    before = repr(value)
    codec.encode({"list": [value, (value,)], "dict": {"k": value}}, "x")
    assert repr(value) == before


@given(st.lists(VALUES, max_size=5))
def test_several_texts_are_decoded_as_each_of_them_is(values: list[Any]) -> None:
    texts = [codec.encode(value, "x") for value in values]
    assert codec.decode_all(texts) == [codec.decode(text) for text in texts]


@pytest.mark.parametrize("text", [b"", b" ", b"x", b"{", b"[1,", b"\xff", b'"'])
def test_what_is_no_json_text_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        codec.decode(text)
    with pytest.raises(ValueError):
        codec.decode_all([b"1", text, b"2"])


@pytest.mark.parametrize("text", [b"1,2", b"1],[2", b"1]"])
def test_a_text_that_goes_on_after_its_value_shifts_no_other(text: bytes) -> None:
    assert codec.decode_all([b"0", text, b"3"]) == [0, 1, 3]


def test_a_converted_part_does_not_show_in_the_original() -> None:
    original = {"kept": [1, {"time": date(2026, 1, 31)}], "tuple": (1, (2,))}
    assert codec.decode(codec.encode(original, "x")) == {"kept": [1, {"time": "2026-01-31"}], "tuple": [1, [2]]}
    assert original == {"kept": [1, {"time": date(2026, 1, 31)}], "tuple": (1, (2,))}


def test_a_value_twice_in_another_is_no_cycle() -> None:
    shared = [1]
    assert codec.decode(codec.encode([shared, shared, {"again": shared}], "x")) == [[1], [1], {"again": [1]}]


def test_the_limit_is_in_bytes_of_utf_8() -> None:
    assert codec.encode("é" * 4, "x", limit=10) == '"éééé"'.encode()
    with pytest.raises(StateSerializationError, match=r"x: 11 bytes as JSON are more than max_value_bytes \(10\)"):
        codec.encode("é" * 4 + "e", "x", limit=10)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"b": [0, {"c": {1}}]}}, "x.a.b[1].c"),
        ([[["\ud800"]]], "x[0][0][0]"),
        ({"a": ["fine", {"b": "\udfff"}]}, "x.a[1].b"),
        ({"a": {"\ud800": 1}}, "x.a.'\\ud800'"),
        ({"a": 1, "b": {2: 3}}, "x.b"),
        ("\ud800", "x"),
    ],
)
def test_the_path_leads_to_the_culprit(value: Any, path: str) -> None:
    with pytest.raises(StateSerializationError) as caught:
        codec.encode(value, "x", context_id="c")
    assert caught.value.path == path
    assert caught.value.context_id == "c"
    assert str(caught.value).startswith(f"{path}: ")
    str(caught.value).encode()  # a message that can be logged, whatever it is about


@dataclass_json(letter_case=LetterCase.CAMEL)
@dataclass
class Camel:
    user_name: str
    again: Any = None


@dataclass
class Plain:
    inside: Any = None


class Model(pydantic.BaseModel):
    role: str = "user"
    content: Any = None
    at: datetime = NOON
    schema_: str = pydantic.Field("s", alias="schema")


@dataclass
class DataMessage:
    role: str
    content: Any


class ModelMessage(pydantic.BaseModel):
    role: str
    content: Any


class Color(enum.Enum):
    RED = "red"


class Array:
    def tolist(self) -> list[int]:
        return [1]


async def coroutine() -> None: ...


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (b"x", "bytes is not JSON; store base64 text instead"),
        (memoryview(b"x"), "memoryview is not JSON; store base64 text instead"),
        ({1}, "set is not JSON; store a sorted list instead"),
        (float("nan"), "nan is not JSON; store None or text instead"),
        (Decimal(1), "Decimal is not JSON; store text instead"),
        (UUID(int=1), "UUID is not JSON; store text instead"),
        (time(12), "time is not JSON; store text instead"),
        (timedelta(1), "timedelta is not JSON; store its seconds instead"),
        (Color.RED, "Color is not JSON; store its value instead"),
        (Path("a"), f"{type(Path()).__name__} is not JSON; store str(path) instead"),
        (Array(), "Array is not JSON; store its tolist() instead"),
        (range(3), "range is not JSON; store a list instead"),
        (iter([]), "list_iterator is not JSON; store a list instead"),
        (object(), "object is not JSON; store text, numbers, lists, dicts or a dataclass instead"),
    ],
    ids=repr,
)
def test_the_error_says_what_to_store_instead(value: Any, advice: str) -> None:
    with pytest.raises(StateSerializationError) as raised:
        codec.encode({"a": value}, "x")
    assert str(raised.value) == f"x.a: {advice}"


def test_a_coroutine_is_to_be_awaited_first() -> None:
    forgotten = coroutine()
    with pytest.raises(StateSerializationError, match="x: coroutine is not JSON; await it first"):
        codec.encode(forgotten, "x")
    forgotten.close()


def cyclic_list() -> Any:
    inner: list[Any] = []
    inner.append({"again": inner})
    return {"first": [1, inner]}


def cyclic_dict() -> Any:
    outer: dict[str, Any] = {"a": {}}
    outer["a"]["b"] = (1, outer)
    return outer


def cyclic_dataclass() -> Any:
    one = Plain()
    one.inside = Plain(one)
    return [one]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (cyclic_list(), "x.first[1][0].again"),
        (cyclic_dict(), "x.a.b[1]"),
        (cyclic_dataclass(), "x[0].inside.inside"),
    ],
    ids=["list", "dict", "dataclass"],
)
def test_a_cycle_is_told_once(value: Any, path: str) -> None:
    with pytest.raises(StateSerializationError) as raised:
        codec.encode(value, "x")
    assert str(raised.value) == f"{path}: contains itself, which JSON cannot hold"
    assert raised.value.path == path


def test_cycles_of_models_are_refused_too() -> None:
    camel, model = Camel("a"), Model()
    camel.again = camel
    model.content = [model]
    for value in (camel, model):
        with pytest.raises(StateSerializationError, match=r"x\[0\]: \w+ cannot be dumped: "):
            codec.encode([value], "x")


def test_the_path_to_what_is_too_deep_is_short() -> None:
    value: Any = 0
    for _ in range(10_000):
        value = [value]
    with pytest.raises(StateSerializationError) as raised:
        codec.encode(value, "x")
    assert str(raised.value) == "x[0][0][0][0][0][0][0][0]...: nested more than 200 levels deep"


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "not what it holds"


class Number(int):
    def __repr__(self) -> str:
        return "five"


class Fraction(float):
    def __repr__(self) -> str:
        return "half"


def test_subclasses_of_json_types_are_stored_as_what_they_hold() -> None:
    assert codec.encode(Text("text"), "x") == b'"text"'
    assert codec.encode([Number(5), Fraction(0.5)], "x") == b"[5,0.5]"
    assert codec.encode({Text("key"): Text("value")}, "x") == b'{"key":"value"}'
    defaults: dict[str, int] = types.SimpleNamespace(a=1).__dict__
    assert codec.encode(defaults, "x") == b'{"a":1}'
    with pytest.raises(StateSerializationError):
        codec.encode(Fraction("inf"), "x")
    with pytest.raises(StateSerializationError):
        codec.encode(Number(10**4300), "x")


@pytest.fixture
def short_integers() -> Iterator[None]:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.usefixtures("short_integers")
def test_a_process_may_set_a_lower_limit_for_integers() -> None:
    assert codec.decode(codec.encode(10**600, "x")) == 10**600
    with pytest.raises(StateSerializationError, match="digits"):
        codec.encode([10**700], "x")


# --- dataclasses and models -----------------------------------------------------------------------------------------


DUMPED = {"role": "user", "content": None, "at": "2026-01-31T12:00:00Z", "schema": "s"}


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (Camel("alice"), {"userName": "alice", "again": None}),
        (Plain(Camel("alice")), {"inside": {"userName": "alice", "again": None}}),
        (Model(), DUMPED),
        ([{"a": Model(content=(1, 2))}], [{"a": {**DUMPED, "content": [1, 2]}}]),
        (Plain(Model(content=Plain(b""))), {"inside": {**DUMPED, "content": {"inside": ""}}}),
        (pydantic.RootModel[list[date]]([date(2026, 1, 31)]), ["2026-01-31"]),
        (pydantic.RootModel[None](None), None),
    ],
    ids=repr,
)
def test_dataclasses_and_models_are_stored_as_what_they_dump(value: Any, stored: Any) -> None:
    assert codec.decode(codec.encode(value, "x")) == stored


def test_a_model_that_cannot_be_dumped_is_refused_with_its_path() -> None:
    with pytest.raises(StateSerializationError, match=r"x\[0\]: Model cannot be dumped: .*object"):
        codec.encode([Model(content=object())], "x")


# --- messages and keys ----------------------------------------------------------------------------------------------


def test_a_message_has_four_fields_in_their_order() -> None:
    text = codec.message("user", "hi", {"k": (1,)}, None)
    message = codec.decode(text)
    assert list(message) == ["role", "content", "timestamp", "metadata"]
    assert (message["role"], message["content"], message["metadata"]) == ("user", "hi", {"k": [1]})
    now = datetime.fromisoformat(message["timestamp"])
    assert now.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - now) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("2026-01-31T12:00:00.000000+00:00", "2026-01-31T12:00:00.000000+00:00"),
        ("2026-01-31T12:00:00", "2026-01-31T12:00:00.000000+00:00"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00.000000+00:00"),
        ("2026-01-31T14:00:00.5+02:00", "2026-01-31T12:00:00.500000+00:00"),
        (NOON, "2026-01-31T12:00:00.000000+00:00"),
        (NOON.replace(tzinfo=None), "2026-01-31T12:00:00.000000+00:00"),
        (NOON.astimezone(timezone(timedelta(hours=-5))), "2026-01-31T12:00:00.000000+00:00"),
    ],
)
def test_a_timestamp_is_stored_in_utc_with_its_offset(given: Any, stored: str) -> None:
    assert codec.decode(codec.message("user", "", None, given))["timestamp"] == stored


@pytest.mark.parametrize("timestamp", ["yesterday", "", 5, b"2026-01-31", [], "2026-13-01T00:00:00"])
def test_a_timestamp_is_iso_8601(timestamp: Any) -> None:
    with pytest.raises(StateSerializationError, match="timestamp"):
        codec.message("user", "", None, timestamp)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("text", "messages[3]"),
        ({"role": "user"}, "messages[3]"),
        ({"role": "user", "content": "", "name": "x"}, "messages[3]"),
        ({"role": 5, "content": ""}, "messages[3].role"),
        (Plain(), "messages[3]"),
        (Model(role="user", content=[b"\xff"]), "messages[3]"),
        (DataMessage("user", {"k": {1}}), "messages[3].content.k"),
        ({"role": "user", "content": [b""]}, "messages[3].content[0]"),
        ({"role": "user", "content": "", "metadata": {"k": {1}}}, "messages[3].metadata.k"),
        ({"role": "user", "content": "", "metadata": [1]}, "messages[3].metadata"),
        ({"role": "user", "content": "", "timestamp": "never"}, "messages[3].timestamp"),
    ],
)
def test_a_bad_message_is_refused_with_its_path(given: Any, path: str) -> None:
    with pytest.raises(StateSerializationError) as caught:
        codec.message_from_mapping(given, "messages[3]", context_id="c")
    assert caught.value.path == path
    assert caught.value.context_id == "c"
    assert str(caught.value).startswith(path + ":")


@pytest.mark.parametrize(
    "given", [DataMessage("user", ["hi", NOON]), ModelMessage(role="user", content=["hi", NOON.isoformat()])], ids=repr
)
def test_a_message_may_be_a_dataclass_or_a_model(given: Any) -> None:
    message = codec.decode(codec.message_from_mapping(given, "messages[0]"))
    assert (message["role"], message["content"], message["metadata"]) == ("user", ["hi", NOON.isoformat()], {})


def test_a_message_counts_as_a_whole_against_the_limit() -> None:
    text = codec.message("user", "x" * 100, {"k": "v"}, None)
    assert codec.message("user", "x" * 100, {"k": "v"}, None, limit=len(text)) is not None
    with pytest.raises(StateSerializationError, match="max_value_bytes"):
        codec.message("user", "x" * 100, {"k": "v"}, None, limit=len(text) - 1)


def test_a_key_is_any_text_that_is_valid_unicode() -> None:
    assert codec.key("", "key") == ""
    assert codec.key("\0🙂", "key") == "\0🙂"
    assert type(codec.key(Text("k"), "key")) is str
    assert codec.key(Text("k"), "key") == "k"
    for bad in (1, None, b"k", "\ud800"):
        with pytest.raises(StateSerializationError) as caught:
            codec.key(bad, "variables", "c")
        assert (caught.value.path, caught.value.context_id) == ("variables", "c")


# --- names in errors ------------------------------------------------------------------------------------------------

NAME = "e\n\x1b[31m\u202e\u200b\x9bv"


@pytest.mark.parametrize(
    "fail",
    [
        lambda context: context.set_variable("x", NAME, {NAME: {1}}),
        lambda context: context.set_metadata("x", NAME, float("nan")),
        lambda context: context.get_variable("x", NAME, as_type=int),
        lambda context: context.increment_variable("x", NAME),
        lambda context: context.fork_context(NAME, "y"),
        lambda context: context.add_to_history("x", "user", [{NAME: {1}}]),
        lambda context: get_context_manager("file", **{NAME: 1}),
        lambda context: get_context_manager(NAME),
        lambda context: InMemoryStorage(**{NAME: 1}),
    ],
)
def test_names_in_errors_cannot_forge_lines(fail: Callable[[SyncConversationContext], object]) -> None:
    context = SyncConversationContext(InMemoryStorage())
    context.set_variable("x", NAME, "text")
    with pytest.raises(StateError) as caught:
        fail(context)
    assert str(caught.value).isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_path_of_an_error_inside_of_messages_is_printable_and_there_once() -> None:
    context = SyncConversationContext(InMemoryStorage())
    with pytest.raises(StateSerializationError) as caught:
        context.extend_history("x", [{"role": "user", "content": {NAME: {1}}}])
    shown = "messages[0].content.e\\n\\x1b[31m\\u202e\\u200b\\x9bv"
    assert str(caught.value).startswith(f"{shown}: set is not JSON")
    assert str(caught.value).count("content") == 1
