"""JSON in and out: what may be stored, and how.

Kept exactly: integers up to Python's own text limit of 4,300 digits, finite floats, valid Unicode, ``[]`` beside
``{}``. Converted: tuple to list, datetime and date to ISO 8601 text, dataclass to dict, and subclasses of JSON's types
to these types. Everything else is refused with the path of the culprit, before anything is changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from math import isfinite

from .errors import StateSerializationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Final, TypeVar

    T = TypeVar("T")

MAX_DEPTH: Final = 200
"""Levels of nesting. Python's own reader and writer recurse, and a handler may call them from a deep stack."""

MAX_VALUE_BYTES: Final = 16 * 1024 * 1024
"""Default of the option `max_value_bytes`."""

MAX_INTEGER_DIGITS: Final = 4300
"""Python's default limit for integers as text (sys.int_info.default_max_str_digits), whatever a process sets."""

_LARGEST_INTEGER: Final = 10**MAX_INTEGER_DIGITS
_SMALLEST_INTEGER: Final = -_LARGEST_INTEGER  # made once: it is long


def _encoder() -> Callable[[Any], str]:
    """What turns plain values into JSON text: what JSONEncoder.encode makes anew for each value, made once."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # a Python without it
        return json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
    chunks = make(None, None, quoted, None, ":", ",", False, False, False)
    return lambda plain: "".join(chunks(plain, 0))


quoted: Callable[[str], str] = json.encoder.encode_basestring
"""The JSON text of a text."""

json_text = _encoder()
"""The JSON text of a value of JSON's own types; what else it is given is a TypeError, or text that is not JSON."""

_decoder: Any = json.JSONDecoder()
_from_text = _decoder.scan_once


class _Refused(Exception):
    """Why a value cannot be stored; the path is put together while this travels up."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path = ""


def encode(value: Any, name: str, *, context_id: str | None = None, limit: int = MAX_VALUE_BYTES) -> bytes:
    """The JSON text of `value` as UTF-8, at most `limit` bytes long.

    Raises StateSerializationError with the path of what cannot be stored, which begins with `name`.
    """
    try:
        text = _json(value).encode()
    except _Refused as refused:
        raise _refusal(name + refused.path, refused.reason, context_id) from None
    except UnicodeEncodeError:
        path = name + _path_of_surrogate(_plain(value, 0))
        raise _refusal(path, "text with a lone surrogate is not valid Unicode", context_id) from None
    except ValueError as error:  # the process set a lower limit for integers as text
        raise _refusal(name, str(error), context_id) from None
    if len(text) > limit:
        raise _too_large(name, len(text), limit, context_id)
    return text


def decode(text: bytes) -> Any:
    """The value of a JSON text that `encode` made: a new copy on every call. Raises ValueError for any other."""
    try:
        return _from_text(text.decode(), 0)[0]
    except StopIteration as nothing:  # which would end the generator that asks
        raise json.JSONDecodeError("Expecting value", text.decode(), nothing.value) from None


def decode_all(texts: Collection[bytes]) -> list[Any]:
    """The values of several such texts: at once, which costs hardly more than one."""
    values: list[Any] = decode(b"[" + b",".join(texts) + b"]")
    if len(values) != len(texts):  # somebody stored what is no JSON text, and which is whose cannot be told any more
        values = [decode(text) for text in texts]
    return values


def decode_as(cls: type[T], value: Any) -> T:
    """A decoded value as an instance of the dataclass `cls`, by dataclasses-json.

    Times stored as ISO text become datetime and date where the fields say so. Raises TypeError where `cls` is no
    dataclass, and what dataclasses-json raises where the value does not fit.
    """
    from dataclasses import is_dataclass

    if not is_dataclass(cls):
        raise TypeError(f"as_type must be a dataclass, not {cls!r}")
    from dataclasses_json import DataClassJsonMixin

    made_by: Any = cls
    if "from_dict" in vars(cls) or issubclass(cls, DataClassJsonMixin):
        reader = made_by.from_dict  # the class's own settings (letter case, field names) hold
    else:
        reader = DataClassJsonMixin.from_dict.__func__.__get__(cls)  # type: ignore[attr-defined]
    result: T = reader(_with_times(cls, value))
    return result


def message(
    role: Any,
    content: Any,
    metadata: Any,
    timestamp: str | datetime | None,
    *,
    context_id: str | None = None,
    limit: int = MAX_VALUE_BYTES,
) -> bytes:
    """The stored form of one message, at most `limit` bytes long. `timestamp` None is now, by this machine's clock."""
    if not isinstance(role, str):
        raise _refusal("role", f"a role is text, not {_type_name(role)}", context_id)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise _refusal("metadata", f"a message's metadata is a mapping, not {_type_name(metadata)}", context_id)
    at = _now() if timestamp is None else _time(timestamp, context_id)
    more = dict(metadata) if metadata else {}
    try:
        said = _json(more) if more else "{}"
        who = quoted(role) if type(role) is str else _json(role)
        what = quoted(content) if type(content) is str else _json(content)
        text = f'{{"role":{who},"content":{what},"timestamp":"{at}","metadata":{said}}}'.encode()
    except (_Refused, ValueError):
        text = b""
    if not text or len(text) > limit:
        encode(role, "role", context_id=context_id)  # raises, if it is the culprit
        encode(content, "content", context_id=context_id, limit=limit)
        encode(more, "metadata", context_id=context_id, limit=limit)
        raise _too_large("message", len(text), limit, context_id)
    return text


def message_from_mapping(
    given: Any, path: str, *, context_id: str | None = None, limit: int = MAX_VALUE_BYTES
) -> bytes:
    """The stored form of a message given as a mapping; `timestamp` and `metadata` may be absent."""
    if not isinstance(given, Mapping):
        raise _refusal(path, f"a message is a mapping with role and content, not {_type_name(given)}", context_id)
    unknown = [key for key in given if key not in ("role", "content", "timestamp", "metadata")]
    missing = [key for key in ("role", "content") if key not in given]
    if unknown or missing:
        what = f"has no {missing[0]!r}" if missing else f"has an unknown key {unknown[0]!r}; put it in its metadata"
        raise _refusal(path, f"a message {what}", context_id)
    timestamp = given.get("timestamp")
    try:
        return message(
            given["role"], given["content"], given.get("metadata"), timestamp, context_id=context_id, limit=limit
        )
    except StateSerializationError as error:
        raise error.within(path) from None


def key(name: Any, what: str, context_id: str | None = None) -> str:
    """`name`, if it can be the key of a variable or of metadata: text that is valid Unicode, "" included."""
    if type(name) is str and name.isascii():
        return name
    if not isinstance(name, str):
        raise _refusal(what, f"a key is text, not {_type_name(name)}", context_id)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _refusal(what, "a key with a lone surrogate is not valid Unicode", context_id) from None
    return name if type(name) is str else str.__str__(name)


_last_second: tuple[int, str] = (-1_000_000_000, "")


def _now() -> str:
    """This machine's time, as a message says it. All but the fraction is the same for a second."""
    global _last_second
    now = time.time_ns()
    begin, text = _last_second
    if not 0 <= now - begin < 1_000_000_000:
        seconds = now // 1_000_000_000
        begin, text = seconds * 1_000_000_000, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        _last_second = begin, text
    return f"{text}.{(now - begin) // 1000:06}+00:00"


def _time(given: Any, context_id: str | None) -> str:
    """A given time, in UTC, as a message says it. One without an offset is taken to be in UTC already."""
    from datetime import datetime  # late, with `state`: a fresh message does without both

    from .state import parse_time

    try:
        at = parse_time(given.isoformat() if isinstance(given, datetime) else given)
    except (TypeError, ValueError):
        raise _refusal("timestamp", f"{given!r:.60} is no ISO 8601 text and no datetime", context_id) from None
    return at.isoformat(timespec="microseconds")


def _refusal(path: str, reason: str, context_id: str | None) -> StateSerializationError:
    return StateSerializationError(f"{path}: {reason}", context_id=context_id, path=path)


def _too_large(name: str, size: int, limit: int, context_id: str | None) -> StateSerializationError:
    return _refusal(name, f"{size:,} bytes as JSON are more than max_value_bytes ({limit:,})", context_id)


def _type_name(value: Any) -> str:
    return type(value).__name__


def _json(value: Any) -> str:
    """The JSON text of a value. Raises _Refused, and ValueError where the process set a lower limit for integers."""
    return quoted(value) if type(value) is str else json_text(_plain(value, 0))


def _plain(value: Any, depth: int) -> Any:
    """`value` in JSON's own types; itself where it is so already. Raises _Refused."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        if _SMALLEST_INTEGER < value < _LARGEST_INTEGER:
            return value
        raise _Refused(f"an integer of more than {MAX_INTEGER_DIGITS:,} digits cannot be stored")
    if kind is float:
        if isfinite(value):
            return value
        raise _Refused(f"{value} is not JSON; store None or text instead")
    if depth >= MAX_DEPTH:
        raise _Refused(f"nested more than {MAX_DEPTH} levels deep (or containing itself)")
    if kind is list:
        return _plain_list(value, depth)
    if kind is dict:
        return _plain_dict(value, depth)
    return _converted(value, depth)


def _plain_list(value: list[Any], depth: int) -> list[Any]:
    result = value
    for index, item in enumerate(value):
        kind = type(item)
        if kind is str or kind is bool or (kind is int and _SMALLEST_INTEGER < item < _LARGEST_INTEGER):
            continue
        try:
            plain = _plain(item, depth + 1)
        except _Refused as refused:
            refused.path = f"[{index}]{refused.path}"
            raise
        if plain is not item:
            if result is value:
                result = list(value)
            result[index] = plain
    return result


def _plain_dict(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    result = value
    for name, item in value.items():
        if type(name) is not str:
            if not isinstance(name, str):
                raise _Refused(f"the key {name!r} is {_type_name(name)}; JSON's keys are text")
            return _plain_dict({str.__str__(k) if isinstance(k, str) else k: v for k, v in value.items()}, depth)
        kind = type(item)
        if kind is str or kind is bool or (kind is int and _SMALLEST_INTEGER < item < _LARGEST_INTEGER):
            continue
        try:
            plain = _plain(item, depth + 1)
        except _Refused as refused:
            refused.path = f".{name}{refused.path}"
            raise
        if plain is not item:
            if result is value:
                result = dict(value)
            result[name] = plain
    return result


def _converted(value: Any, depth: int) -> Any:
    """What the documented conversions make of a value that is not of JSON's own types."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return _plain(int.__int__(value), depth)
    if isinstance(value, float):
        return _plain(float.__float__(value), depth)
    if isinstance(value, list | tuple):
        return _plain_list(list(value), depth)
    if isinstance(value, dict):
        return _plain_dict(dict(value), depth)
    from datetime import date  # late: there is a time among the values only where it is imported already

    if isinstance(value, date):
        return value.isoformat()
    if hasattr(type(value), "__dataclass_fields__"):
        from dataclasses import fields

        if hasattr(type(value), "dataclass_json_config"):  # the class says how its fields are called in JSON
            return _plain_dict(value.to_dict(), depth)
        return _plain_dict({field.name: getattr(value, field.name) for field in fields(value)}, depth)
    hint = {
        "bytes": "; store base64 text instead",
        "bytearray": "; store base64 text instead",
        "set": "; store a sorted list instead",
        "frozenset": "; store a sorted list instead",
        "Decimal": "; store text instead",
        "UUID": "; store text instead",
    }.get(_type_name(value), "")
    raise _Refused(f"{_type_name(value)} is not JSON{hint}")


def _path_of_surrogate(value: Any) -> str:
    """Where in a plain value the text is that cannot be encoded."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _encodable(name):
                return f".{name!a}"
            if not _encodable(item):
                return f".{name}{_path_of_surrogate(item)}"
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not _encodable(item):
                return f"[{index}]{_path_of_surrogate(item)}"
    return ""


def _encodable(plain: Any) -> bool:
    try:
        json_text(plain).encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_times(annotation: Any, value: Any) -> Any:
    """`value` with ISO text turned into times where `annotation` asks for them.

    dataclasses-json reads numbers of seconds there, and passes datetime objects through.
    """
    from dataclasses import is_dataclass
    from datetime import date, datetime
    from typing import get_args, get_origin, get_type_hints

    if annotation is datetime and isinstance(value, str):
        return datetime.fromisoformat(value)
    if annotation is date and isinstance(value, str):
        return date.fromisoformat(value)
    if is_dataclass(annotation) and isinstance(value, dict):
        hints = get_type_hints(annotation)
        return {name: _with_times(hints.get(name), item) for name, item in value.items()}
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if isinstance(value, list) and arguments and origin is not dict:
        return [_with_times(arguments[0], item) for item in value]
    if isinstance(value, dict) and origin is dict:
        return {name: _with_times(arguments[1], item) for name, item in value.items()}
    for alternative in arguments if not isinstance(value, list | dict) or origin is not None else ():
        revived = _with_times(alternative, value)
        if revived is not value and revived != value:
            return revived
    return value
