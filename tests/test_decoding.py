"""Stored values as the types that callers ask for."""

from __future__ import annotations

import collections
import enum
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    Self,
    TypedDict,
    TypeVar,
    Union,
)
from uuid import UUID

import pydantic
import pytest
from dataclasses_json import CatchAll, DataClassJsonMixin, LetterCase, Undefined, config, dataclass_json
from hypothesis import given
from hypothesis import strategies as st

from agentstate import SyncConversationContext
from agentstate.codec import decode, encode
from agentstate.decoding import decode_as
from agentstate.errors import StateSerializationError

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
DAY = date(2026, 1, 31)
T = TypeVar("T")
UserId = NewType("UserId", str)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    at: datetime


class Address(TypedDict):
    city: str
    since: NotRequired[date]


@dataclass
class Inner:
    at: datetime
    day: date | None = None


@dataclass
class Box(Generic[T]):
    content: T
    more: list[T] = field(default_factory=list)


@dataclass
class DateBox(Box[date]):
    label: str = ""


@dataclass
class Node:
    value: int
    below: list[Node] = field(default_factory=list)
    twin: Self | None = None


@dataclass
class Circle:
    radius: float
    kind: Literal["circle"] = "circle"


@dataclass
class Square:
    side: float
    kind: Literal["square"] = "square"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    name: str
    derived: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a name must not be empty")


@dataclass
class WithInitVar:
    seed: InitVar[int]
    value: int = 0


class Model(pydantic.BaseModel):
    name: str
    at: datetime = NOON
    schema_: int = pydantic.Field(1, alias="schema")


@dataclass_json(letter_case=LetterCase.CAMEL)
@dataclass
class Camel:
    user_name: str
    born_at: datetime
    inner_part: Inner | None = None


@dataclass_json
@dataclass
class Renamed:
    name: str = field(metadata=config(field_name="n"))
    doubled: int = field(metadata=config(encoder=lambda value: value * 2, decoder=lambda value: value // 2))


@dataclass_json(undefined=Undefined.RAISE)
@dataclass
class Closed:
    a: int = 0


@dataclass_json(undefined=Undefined.INCLUDE)
@dataclass
class Open:
    a: int
    rest: CatchAll = field(default_factory=dict)


@dataclass
class Mixed(DataClassJsonMixin):
    left: int
    right: list[datetime]


@dataclass
class OwnReader:
    text: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OwnReader:
        return cls(data["text"].upper())


ROUND_TRIPS: list[tuple[Any, Any]] = [
    (Inner, Inner(NOON, DAY)),
    (Inner, Inner(NOON)),
    (list[Inner], [Inner(NOON)]),
    (dict[str, Inner], {"a": Inner(NOON)}),
    (tuple[datetime, str], (NOON, "2026-01-31")),
    (tuple[datetime, ...], (NOON, NOON)),
    (tuple[()], ()),
    (tuple, (1, "a")),
    (list[tuple[date, list[tuple[str, datetime]]]], [(DAY, [("a", NOON)])]),
    (str | datetime, "tomorrow"),
    (str | datetime, NOON),
    (datetime | str, "2026-01-31T12:00"),
    (date | datetime, DAY),
    (date | datetime, NOON),
    (datetime | date, DAY),
    (int | str, "5"),
    (int | float, 5),
    (float | int, 5),
    (float | int, 0.5),
    (bool | int, 1),
    (int | bool, True),
    (Optional[Union[int, date]], DAY),  # noqa: UP007, UP045 - the old spellings
    (int | None, None),
    (list[int] | dict[str, int], {"a": 1}),
    (Circle | Square, Square(2.0)),
    (Square | Circle, Square(2.0)),
    (Inner | Box[int], Box(1, [2])),
    (Box[datetime], Box(NOON, [NOON])),
    (Box[list[Box[date]]], Box([Box(DAY)])),
    (DateBox, DateBox(DAY, [DAY], "x")),
    (Node, Node(1, [Node(2, twin=Node(3))])),
    (Point, Point(1, NOON)),
    (Address, {"city": "Rome", "since": DAY}),
    (Address, {"city": "Rome"}),
    (Literal["a", 1], 1),
    (Annotated[date, "when"], DAY),
    (UserId, "alice"),
    (Sequence[date], [DAY]),
    (Mapping[str, date], {"a": DAY}),
    (collections.OrderedDict[str, date], collections.OrderedDict(a=DAY)),
    (Any, [1]),
    (object, {"a": None}),
    (Strict, Strict(name="a")),
    (Model, Model(name="a", schema=2)),
    (list[Model], [Model(name="a")]),
    (Camel, Camel("alice", NOON, Inner(NOON))),
    (Renamed, Renamed("a", 4)),
    (Closed, Closed(1)),
    (Open, Open(1, {"b": 2})),
    (Mixed, Mixed(1, [NOON])),
]


@pytest.mark.parametrize(("annotation", "value"), ROUND_TRIPS, ids=repr)
def test_what_was_stored_comes_back(annotation: Any, value: Any) -> None:
    stored = decode(encode(value, "x"))
    back = decode_as(annotation, stored, "x")
    assert back == value
    assert type(back) is type(value)


@dataclass
class Everything:
    text: str
    number: Final[int] = 1  # type: ignore[misc]
    half: float = 0.5
    flag: bool = False
    nothing: None = None
    color: Color = Color.RED
    level: Level = Level.LOW
    id: UUID | None = None
    amount: Decimal = Decimal(0)
    place: Path = Path()
    hour: time = time()
    tags: frozenset[str] = frozenset()
    unique: set[date] = field(default_factory=set)
    queue: collections.deque[int] = field(default_factory=collections.deque)
    by_color: dict[Color, int] = field(default_factory=dict)
    by_number: dict[int, str] = field(default_factory=dict)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    groups: collections.defaultdict[str, list[date]] = field(default_factory=lambda: collections.defaultdict(list))


def test_text_and_numbers_become_what_the_fields_say() -> None:
    stored = {
        "text": "t",
        "half": 1,
        "color": "blue",
        "level": 1,
        "id": "00000000-0000-0000-0000-000000000007",
        "amount": "1.50",
        "place": "a/b",
        "hour": "12:30:00",
        "tags": ["a", "b"],
        "unique": ["2026-01-31"],
        "queue": [1, 2],
        "by_color": {"blue": 1},
        "by_number": {"7": "x"},
        "counts": {"a": 2},
        "groups": {"a": ["2026-01-31"]},
        "unknown to the class": 1,
    }
    back = decode_as(Everything, stored, "x")
    assert back == Everything(
        "t",
        half=1.0,
        color=Color.BLUE,
        id=UUID(int=7),
        amount=Decimal("1.50"),
        place=Path("a/b"),
        hour=time(12, 30),
        tags=frozenset({"a", "b"}),
        unique={DAY},
        queue=collections.deque([1, 2]),
        by_color={Color.BLUE: 1},
        by_number={7: "x"},
        counts=collections.Counter(a=2),
        groups=collections.defaultdict(list, a=[DAY]),
    )
    assert type(back.half) is float


def test_a_class_may_have_a_reader_of_its_own() -> None:
    assert decode_as(OwnReader, {"text": "a"}, "x") == OwnReader("A")
    with pytest.raises(StateSerializationError, match="x: OwnReader refuses what is stored: 'text'"):
        decode_as(OwnReader, {}, "x")


def test_the_settings_of_dataclasses_json_are_those_of_the_stored_names() -> None:
    assert decode(encode(Camel("a", NOON), "x")) == {
        "userName": "a",
        "bornAt": "2026-01-31T12:00:00+00:00",
        "innerPart": None,
    }
    assert decode(encode(Renamed("a", 4), "x")) == {"n": "a", "doubled": 8}


MISMATCHES: list[tuple[Any, Any, str, str]] = [
    (Inner, {"other": 1}, "x", "'at' is missing, for Inner; there is 'other'"),
    (Inner, {}, "x", "'at' is missing, for Inner; there is nothing"),
    (Inner, 3, "x", "must be a mapping, for Inner, got 3"),
    (Inner, {"at": 5}, "x.at", "must be the text of a datetime, got 5"),
    (Inner, {"at": "tomorrow"}, "x.at", "must be the text of a datetime, got 'tomorrow'"),
    (list[Inner], [{"at": NOON.isoformat()}, {"at": None}], "x[1].at", "must be the text of a datetime, got None"),
    (dict[str, list[int]], {"a": [1, "2"]}, "x.a[1]", "must be int, got '2'"),
    (dict[int, str], {"01": "a"}, "x", "must be a mapping with whole numbers as keys, got '01'"),
    (dict[Color, int], {"green": 1}, "x.green", "must be the value of a Color, got 'green'"),
    (Node, {"value": 1, "below": [{"value": 2, "twin": {"value": "3"}}]}, "x.below[0].twin.value", "must be int"),
    (tuple[int, str], [1], "x", "must be a list of 2, got [1]"),
    (int, True, "x", "must be int, got True"),
    (bool, 1, "x", "must be bool, got 1"),
    (float, "1", "x", "must be float, got '1'"),
    (float, 10**400, "x", "must be float, got 1000"),
    (str, 1, "x", "must be str, got 1"),
    (None, 1, "x", "must be null, got 1"),
    (Literal["a", "b"], "c", "x", "must be 'a' or 'b', got 'c'"),
    (Circle | Square, {"kind": "triangle"}, "x", "must be Circle or Square, got {'kind': 'triangle'}"),
    (Inner | None, {"at": 1}, "x.at", "must be the text of a datetime, got 1"),
    (int | str, None, "x", "must be int or str, got None"),
    (UUID, "7", "x", "must be the text of a UUID, got '7'"),
    (Decimal, "many", "x", "must be the text of a Decimal, got 'many'"),
    (Address, {"since": "2026-01-31"}, "x", "'city' is missing, for Address"),
    (Address, {"city": 1}, "x.city", "must be str, got 1"),
    (Point, [1, "then"], "x.at", "must be the text of a datetime, got 'then'"),
    (Point, [1], "x", "Point refuses what is stored:"),
    (Point, [1, NOON.isoformat(), 3], "x", "must be a list of at most 2, for Point"),
    (set[list[int]], [[1]], "x", "no set can hold this:"),
    (Strict, {"name": ""}, "x", "Strict refuses what is stored: a name must not be empty"),
    (WithInitVar, {"value": 1}, "x", "WithInitVar refuses what is stored:"),
    (Model, {"name": 1}, "x", "Model refuses what is stored: 1 validation error for Model"),
    (Camel, {"userName": 1, "bornAt": "x"}, "x.userName", "must be str, got 1"),
    (Camel, {"userName": "a", "bornAt": "x"}, "x.bornAt", "must be the text of a datetime, got 'x'"),
    (Renamed, {"n": "a", "doubled": "x"}, "x.doubled", "Renamed refuses what is stored:"),
    (Closed, {"b": 1}, "x", "Closed refuses what is stored:"),
    (list[bytes], ["a"], "x[0]", "nothing can be decoded into bytes"),
    (type[int], "a", "x", "nothing can be decoded into"),
]


@pytest.mark.parametrize(("annotation", "value", "path", "reason"), MISMATCHES, ids=repr)
def test_what_does_not_fit_is_one_error_with_the_path_of_the_culprit(
    annotation: Any, value: Any, path: str, reason: str
) -> None:
    with pytest.raises(StateSerializationError) as raised:
        decode_as(annotation, value, "x", context_id="c")
    assert raised.value.path == path
    assert raised.value.context_id == "c"
    assert str(raised.value).startswith(f"{path}: {reason}")


class TimeLimitError(Exception):
    """As the handler of a signal raises it, anywhere."""


@dataclass
class Interrupted:
    value: int

    def __post_init__(self) -> None:
        raise TimeLimitError


def test_what_is_no_refusal_passes_untouched() -> None:
    with pytest.raises(TimeLimitError):
        decode_as(Interrupted, {"value": 1}, "x")


def test_annotations_that_cannot_be_resolved_are_an_error_too() -> None:
    @dataclass
    class Local:
        other: Elsewhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(StateSerializationError, match=r"x: an annotation of Local cannot be resolved: .*Elsewhere"):
        decode_as(Local, {"other": 1}, "x")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type` statements came with Python 3.12")
def test_type_aliases_are_what_they_stand_for() -> None:
    names: dict[str, Any] = {"date": date}
    exec("type Days = list[date]\ntype Many[T] = dict[str, T]", names)
    assert decode_as(names["Days"], ["2026-01-31"], "x") == [DAY]
    assert decode_as(names["Many"][date], {"a": "2026-01-31"}, "x") == {"a": DAY}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=9,
)
ANNOTATIONS = st.sampled_from([annotation for annotation, _ in ROUND_TRIPS] + [Everything])


@given(ANNOTATIONS, JSON)
def test_whatever_is_stored_it_is_decoded_or_the_one_error(annotation: Any, value: Any) -> None:
    before = json.dumps(value)
    with suppress(StateSerializationError):
        decode_as(annotation, value, "x")
    assert json.dumps(value) == before


def test_the_error_of_a_context_names_variable_and_field() -> None:
    with SyncConversationContext() as context:
        context.set_variable("a", "profile", {"name": "Alice"})
        with pytest.raises(
            StateSerializationError, match="profile: 'at' is missing, for Inner; there is 'name'"
        ) as raised:
            context.get_variable("a", "profile", as_type=Inner)
        assert raised.value.context_id == "a"
        assert context.get_variable("a", "absent", as_type=Inner) is None
