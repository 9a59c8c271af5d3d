"""Decodes stored values as types: ``get_variable(..., as_type=Profile)``.

The type is an annotation: JSON's own types, dataclasses (also generic ones, and those with settings of
dataclasses-json), models of pydantic, TypedDict, named tuples, enums, collections, unions, `Literal`, times, `UUID`,
`Decimal` and paths, in any combination.

dataclasses-json's own decoder is not used: it reads times as numbers, and decodes neither nested tuples nor unions.
"""

from __future__ import annotations

import collections
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from datetime import date, datetime, time
from decimal import Decimal, DecimalException
from enum import Enum
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Final, Literal, NewType, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from .errors import StateSerializationError

Bindings = Mapping[Any, Any]
"""The values of type variables and of `Self`."""

_WRAPPERS: Final = (typing.Annotated, typing.Final, typing.Required, typing.NotRequired)
_FROM_TEXT: Final[dict[type, Callable[[str], Any]]] = {
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    UUID: UUID,
    Decimal: Decimal,
    Path: Path,
    PurePath: PurePath,
}
_DATACLASSES_JSON: Final = "dataclasses_json.api"
"""The module of dataclasses-json's own `from_dict`, which is not called."""

_LISTS: Final[dict[Any, Callable[[list[Any]], Any]]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.deque: collections.deque,
    collections.abc.Set: frozenset,
    collections.abc.MutableSet: set,
    **dict.fromkeys(
        (
            collections.abc.Iterable,
            collections.abc.Collection,
            collections.abc.Sequence,
            collections.abc.MutableSequence,
        ),
        list,
    ),
}
_MAPPINGS: Final[dict[Any, Callable[[dict[Any, Any]], Any]]] = {
    dict: dict,
    collections.abc.Mapping: dict,
    collections.abc.MutableMapping: dict,
    collections.OrderedDict: collections.OrderedDict,
    collections.Counter: collections.Counter,
    collections.defaultdict: lambda items: collections.defaultdict(None, items),
}


class _MismatchError(Exception):
    """Why a value is not of a type. `path` is completed while the exception propagates."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path = ""


def decode_as(annotation: Any, value: Any, name: str, *, context_id: str | None = None) -> Any:
    """A JSON value as an instance of the type `annotation`.

    Raises StateSerializationError if the value is not of that type, with the path of the offending part, which begins
    with `name`; and if nothing can be decoded into the type.
    """
    try:
        return _decode(annotation, value, {}, strict=False)
    except _MismatchError as mismatch:
        path = name + mismatch.path
        message = f"{path}: {mismatch.reason}"
        raise StateSerializationError(message, context_id=context_id, path=path) from mismatch.__cause__


def _decode(annotation: Any, value: Any, bindings: Bindings, *, strict: bool) -> Any:
    """`value` as an instance of `annotation`. Raises _MismatchError.

    `strict` accepts a value only if storing the result would give that value: it selects the member of a union.
    """
    annotation, bindings = _resolved(annotation, bindings)
    if annotation is Any or annotation is object or isinstance(annotation, TypeVar):
        return value
    if annotation is None or annotation is types.NoneType:
        return _checked(value, value is None, "null")
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    if origin is Union or origin is types.UnionType:
        return _union(arguments, value, bindings, strict)
    if origin is Literal:
        fits = any(type(value) is type(member) and value == member for member in arguments)
        return _checked(value, fits, " or ".join(map(repr, arguments)))
    if origin is bool or origin is str:
        return _checked(value, type(value) is origin, _name(origin))
    if origin is int or origin is float:
        return _number(origin, value, strict)
    if origin in _FROM_TEXT:
        return _from_text(origin, value, strict)
    if origin in _MAPPINGS:
        return _mapping(origin, arguments, value, bindings, strict)
    if origin in _LISTS:
        return _list(origin, arguments, value, bindings, strict)
    if isinstance(origin, type):
        return _object(origin, arguments, value, bindings, strict)
    raise _MismatchError(f"nothing can be decoded into {_name(annotation)}")


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Adds `place` to the paths of mismatches."""
    try:
        yield
    except _MismatchError as mismatch:
        mismatch.path = place + mismatch.path
        raise


def _resolved(annotation: Any, bindings: Bindings) -> tuple[Any, Bindings]:
    """The annotation without aliases and wrappers, and with bound type variables replaced."""
    while True:
        origin = get_origin(annotation)
        if annotation in bindings:
            annotation, bindings = bindings[annotation], {}  # already resolved in its own scope
        elif origin in _WRAPPERS:
            annotation = get_args(annotation)[0]
        elif annotation is typing.LiteralString:
            annotation = str
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif hasattr(origin or annotation, "__value__"):  # `type Name = ...`, from Python 3.12 on
            alias = origin or annotation
            bindings = dict(zip(alias.__type_params__, _bound(get_args(annotation), bindings), strict=False))
            annotation = alias.__value__
        else:
            return annotation, bindings


def _bound(arguments: tuple[Any, ...], bindings: Bindings) -> list[Any]:
    """The arguments of a generic type, with their type variables replaced."""
    bound = []
    for argument in arguments:
        parameters = getattr(argument, "__parameters__", ())
        if argument in bindings:
            bound.append(bindings[argument])
        elif parameters and not isinstance(argument, type):
            bound.append(argument[tuple(bindings.get(parameter, parameter) for parameter in parameters)])
        else:
            bound.append(argument)
    return bound


def _checked(value: Any, fits: bool, expected: str) -> Any:
    if not fits:
        raise _mismatch(expected, value)
    return value


def _mismatch(expected: str, value: Any) -> _MismatchError:
    shown = repr(value)
    found = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return _MismatchError(f"must be {expected}, got {found}")


def _name(annotation: Any) -> str:
    if annotation is None or annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


# --- single values --------------------------------------------------------------------------------------------------


def _number(kind: type[int] | type[float], value: Any, strict: bool) -> Any:
    if kind is float and type(value) is int and not strict:
        try:
            return float(value)
        except OverflowError:
            raise _mismatch("float", value) from None
    return _checked(value, type(value) is kind, kind.__name__)


def _from_text(kind: type, value: Any, strict: bool) -> Any:
    if not isinstance(value, str):
        raise _mismatch(f"the text of a {kind.__name__}", value)
    try:
        made = _FROM_TEXT[kind](value)
    except (ValueError, DecimalException):
        raise _mismatch(f"the text of a {kind.__name__}", value) from None
    if strict and value != (made.isoformat() if isinstance(made, date | time) else str(made)):
        raise _mismatch(f"the text of a {kind.__name__}", value)
    return made


def _union(members: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> Any:
    others = [member for member in members if member is not types.NoneType]
    if value is None and len(others) < len(members):
        return None
    if len(others) == 1:
        return _decode(others[0], value, bindings, strict=strict)
    # Times and enums are stored as text, too: plain text is tried last.
    others.sort(key=lambda member: _resolved(member, bindings)[0] in (str, Any, object))
    for strictness in (True,) if strict else (True, False):
        for member in others:
            try:
                return _decode(member, value, bindings, strict=strictness)
            except _MismatchError:
                continue
    raise _mismatch(" or ".join(map(_name, members)), value)


# --- collections ----------------------------------------------------------------------------------------------------


def _items(pairs: Iterator[tuple[str, Any, Any]], bindings: Bindings, strict: bool) -> Iterator[Any]:
    """The decoded parts of a value, given as (place, annotation, value)."""
    for place, annotation, value in pairs:
        with _within(place):
            decoded = _decode(annotation, value, bindings, strict=strict)
        yield decoded


def _list(origin: Any, arguments: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> Any:
    if not isinstance(value, list):
        raise _mismatch(f"a list, for {_name(origin)}", value)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return tuple(_items(_places(arguments, value), bindings, strict))
    item = arguments[0] if arguments else Any
    decoded = list(_items(((f"[{index}]", item, each) for index, each in enumerate(value)), bindings, strict))
    try:
        return _LISTS[origin](decoded)
    except TypeError as error:  # an item of a set is not hashable
        raise _MismatchError(f"no {_name(origin)} can hold this: {error}") from error


def _places(annotations: tuple[Any, ...], values: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    if len(annotations) != len(values):
        raise _mismatch(f"a list of {len(annotations)}", values)
    return ((f"[{index}]", *pair) for index, pair in enumerate(zip(annotations, values, strict=True)))


def _mapping(origin: Any, arguments: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(f"a mapping, for {_name(origin)}", value)
    key = arguments[0] if arguments else Any
    item = arguments[1] if len(arguments) > 1 else int if origin is collections.Counter else Any
    decoded = _items(((f".{name}", item, each) for name, each in value.items()), bindings, strict)
    keys = [_key(key, name, bindings, strict) for name in value]
    return _MAPPINGS[origin](dict(zip(keys, decoded, strict=True)))


def _key(annotation: Any, name: str, bindings: Bindings, strict: bool) -> Any:
    if _resolved(annotation, bindings)[0] is int:  # a key of JSON is text
        number = int(name) if name.lstrip("-").isdecimal() and name.isascii() else None
        return _checked(name, str(number) == name, "a mapping with whole numbers as keys") and number
    with _within(f".{name}"):
        return _decode(annotation, name, bindings, strict=strict)


# --- classes --------------------------------------------------------------------------------------------------------


def _object(cls: type[Any], arguments: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> Any:
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and issubclass(cls, pydantic.BaseModel):
        return _made(cls, cls.model_validate, value)
    if issubclass(cls, Enum):
        try:
            return cls(value)
        except ValueError:
            raise _mismatch(f"the value of a {cls.__name__}", value) from None
    if is_dataclass(cls):
        return _dataclass(cls, arguments, value, bindings, strict)
    if typing.is_typeddict(cls):
        return _typed_dict(cls, arguments, value, bindings, strict)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        if not isinstance(value, list):
            raise _mismatch(f"a list, for {cls.__name__}", value)
        hints = _hints(cls)
        inside = _bindings(cls, arguments, bindings)
        given = zip(cls._fields, value, strict=False)
        decoded = _items(((f".{name}", hints.get(name, Any), each) for name, each in given), inside, strict)
        if len(value) > len(cls._fields):
            raise _mismatch(f"a list of at most {len(cls._fields)}, for {cls.__name__}", value)
        return _made(cls, cls, *decoded)
    if issubclass(cls, str | int | float) and type(value) in cls.__mro__:
        return _made(cls, cls, value)
    raise _MismatchError(f"nothing can be decoded into {_name(cls)}")


def _made(cls: type[Any], make: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """Call `make`, and turn the exceptions that a class raises for invalid values into a mismatch."""
    try:
        return make(*values, **named)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise _MismatchError(f"{cls.__name__} refuses what is stored: {first}") from error


def _typed_dict(cls: Any, arguments: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _mismatch(f"a mapping, for {cls.__name__}", value)
    hints = _hints(cls)
    for name, hint in hints.items():
        # If annotations are text (`from __future__ import annotations`), `__required_keys__` ignores `NotRequired`.
        required = name in cls.__required_keys__ and get_origin(hint) is not typing.NotRequired
        if name not in value and (required or get_origin(hint) is typing.Required):
            raise _MismatchError(f"{name!r} is missing, for {cls.__name__}; there is {_keys(value)}")
    _check_known(cls, value, hints, strict)
    inside = _bindings(cls, arguments, bindings)
    decoded = _items(((f".{name}", hints.get(name, Any), each) for name, each in value.items()), inside, strict)
    return dict(zip(value, decoded, strict=True))


def _check_known(cls: type, value: Mapping[str, Any], known: Mapping[str, Any], strict: bool) -> None:
    """Refuse unknown keys if `strict`; otherwise they are ignored."""
    if strict and value.keys() - known.keys():
        raise _mismatch(cls.__name__, value)


def _dataclass(cls: Any, arguments: tuple[Any, ...], value: Any, bindings: Bindings, strict: bool) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(f"a mapping, for {cls.__name__}", value)
    own = vars(cls).get("from_dict")
    if isinstance(own, classmethod) and own.__func__.__module__ != _DATACLASSES_JSON:
        return _made(cls, cls.from_dict, value)
    of_class = getattr(cls, "dataclass_json_config", None) or {}
    settings = {each.name: {**of_class, **each.metadata.get("dataclasses_json", {})} for each in fields(cls)}
    stored = {_stored_name(each.name, settings[each.name]): each for each in fields(cls)}
    given = {stored[name].name if name in stored else name: item for name, item in value.items()}
    if undefined := of_class.get("undefined"):
        from dataclasses_json.undefined import UndefinedParameterError

        try:
            given = undefined.value.handle_from_dict(cls, given)
        except UndefinedParameterError as error:
            raise _MismatchError(f"{cls.__name__} refuses what is stored: {error}") from error
    else:
        _check_known(cls, given, settings, strict)
    hints = _hints(cls)
    inside = _bindings(cls, arguments, bindings)
    decoded = {}
    for name, each in stored.items():
        if not each.init:
            continue
        if each.name in given:
            decoder = settings[each.name].get("decoder")
            with _within(f".{name}"):
                if decoder is not None:
                    decoded[each.name] = _made(cls, decoder, given[each.name])
                else:
                    decoded[each.name] = _decode(hints[each.name], given[each.name], inside, strict=strict)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise _MismatchError(f"{name!r} is missing, for {cls.__name__}; there is {_keys(value)}")
    return _made(cls, cls, **decoded)


def _stored_name(name: str, setting: Mapping[str, Any]) -> str:
    rename = setting.get("letter_case")
    return rename(name) if rename else name


def _keys(value: Mapping[str, Any]) -> str:
    shown = ", ".join(map(repr, list(value)[:8])) or "nothing"
    return shown if len(value) <= 8 else f"{shown}, ..."


@lru_cache(maxsize=256)
def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise _MismatchError(f"an annotation of {cls.__name__} cannot be resolved: {error}") from error


def _bindings(cls: type[Any], arguments: tuple[Any, ...], bindings: Bindings) -> Bindings:
    """The values of type variables inside a class, including those of its generic bases."""
    inside: dict[Any, Any] = {typing.Self: cls[arguments] if arguments else cls}
    inside.update(zip(getattr(cls, "__parameters__", ()), _bound(arguments, bindings), strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = get_origin(base)
        if isinstance(origin, type) and origin is not typing.Generic:
            outer = _bindings(origin, tuple(_bound(get_args(base), inside)), inside)
            inside = {**outer, **inside}
    return inside
