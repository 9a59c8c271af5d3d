"""JSON in and out: what may be stored, and how.

Kept exactly: integers up to Python's own text limit of 4,300 digits, finite floats, valid Unicode, ``[]`` beside
``{}``. Converted: tuple to list, datetime and date to ISO 8601 text, dataclass to dict, a model of pydantic to its JSON
dump, and subclasses of JSON's types to these types. Everything else is refused with the path of the culprit, before
anything is changed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from .errors import StateSerializationError

if TYPE_CHECKING:
    from datetime import datetime


MAX_DEPTH: Final = 200
"""Levels of nesting. Python's own reader and writer recurse, and a handler may call them from a deep stack."""

_SHOWN_STEPS: Final = 8
"""Steps of a path that leads too deep."""

MAX_VALUE_BYTES: Final = 16 * 1024 * 1024
"""Default of the option `max_value_bytes`."""

MAX_INTEGER_DIGITS: Final = 4300
"""Python's default limit for integers as text (sys.int_info.default_max_str_digits), whatever a process sets."""

_LARGEST_INTEGER: Final = 10**MAX_INTEGER_DIGITS
_SMALLEST_INTEGER: Final = -_LARGEST_INTEGER  # made once: it is long


def _encoder() -> Callable[[Any], str]:
    """A function from plain values to JSON text. JSONEncoder.encode would create it anew for each value."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # a Python without it
        return json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
    chunks = make(None, None, quoted, None, ":", ",", False, False, False)
    return lambda plain: "".join(chunks(plain, 0))


quoted: Callable[[str], str] = json.encoder.encode_basestring
"""The JSON text of a text."""

json_text = _encoder()
"""The JSON text of a value of JSON's own types. Other values are a TypeError, or give text that is not JSON."""

_decoder: Any = json.JSONDecoder()
_from_text = _decoder.scan_once


class _Refused(Exception):
    """Why a value cannot be stored. The steps that lead to it are recorded while the exception propagates."""

    def __init__(self, reason: str, *, too_deep: bool = False) -> None:
        self.reason = reason
        self.too_deep = too_deep
        self.steps: list[tuple[str, object]] = []  # innermost first, each with its container

    def to_error(self, name: str, context_id: str | None) -> StateSerializationError:
        """The error for a value of that name."""
        steps = self.steps[::-1]
        path, reason = name + "".join(step for step, _ in steps), self.reason
        if self.too_deep:
            path = name + "".join(step for step, _ in steps[:_SHOWN_STEPS]) + "..."
            containers = [id(container) for _, container in steps]
            for index, container in enumerate(containers):
                if container in containers[:index]:
                    path = name + "".join(step for step, _ in steps[:index])
                    reason = "contains itself, which JSON cannot hold"
                    break
        return _refusal(path, reason, context_id)


def encode(value: Any, name: str, *, context_id: str | None = None, limit: int = MAX_VALUE_BYTES) -> bytes:
    """The JSON text of `value` as UTF-8, at most `limit` bytes long.

    Raises StateSerializationError with the path of the part that cannot be stored; the path begins with `name`.
    """
    try:
        text = _json(value).encode()
    except _Refused as refused:
        raise refused.to_error(name, context_id) from None
    except UnicodeEncodeError:
        path = name + _path_of_surrogate(_plain(value, 0))
        raise _refusal(path, "text with a lone surrogate is not valid Unicode", context_id) from None
    except ValueError as error:  # the process set a lower limit for integers as text
        raise _refusal(name, str(error), context_id) from None
    if len(text) > limit:
        raise _too_large(name, len(text), limit, context_id)
    return text


def decode(text: bytes) -> Any:
    """The value of a JSON text from `encode`: a new copy on every call. Raises ValueError for any other text.

    Raises StateSerializationError if it contains an integer of more digits than this process reads.
    """
    try:
        return _from_text(text.decode(), 0)[0]
    except StopIteration as nothing:  # it would end a generator that calls this
        raise json.JSONDecodeError("Expecting value", text.decode(), nothing.value) from None
    except ValueError as error:
        check_digits(error)
        raise


def check_digits(error: ValueError) -> None:
    """Raise StateSerializationError where JSON could not be read because of the process's limit for integers."""
    limit = sys.get_int_max_str_digits()
    if type(error) is ValueError and 0 < limit < MAX_INTEGER_DIGITS:  # other faults of a text have errors of their own
        raise StateSerializationError(
            f"a stored integer has more digits than this process reads ({limit:,}); raise its limit by "
            f"sys.set_int_max_str_digits({MAX_INTEGER_DIGITS})"
        ) from error


def decode_all(texts: Collection[bytes]) -> list[Any]:
    """The values of several such texts, decoded at once, which costs hardly more than one."""
    values: list[Any] = decode(b"[" + b",".join(texts) + b"]")
    if len(values) != len(texts):  # one is not a JSON text, so the values cannot be matched with the texts
        values = [decode(text) for text in texts]
    return values


def message(
    role: Any,
    content: Any,
    metadata: Any,
    timestamp: str | datetime | None,
    *,
    context_id: str | None = None,
    limit: int = MAX_VALUE_BYTES,
) -> bytes:
    """The stored form of a message, at most `limit` bytes long. `timestamp` defaults to this machine's time."""
    if not isinstance(role, str):
        raise _refusal("role", f"a role must be text, got {_type_name(role)}", context_id)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise _refusal("metadata", f"a message's metadata must be a mapping, got {_type_name(metadata)}", context_id)
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
    """The stored form of a message given as a mapping, a dataclass or a model of pydantic; `timestamp` and `metadata`
    may be absent."""
    if not isinstance(given, Mapping):
        try:
            given = _dumped(given)
        except _Refused as refused:
            needed = f"a message must be a mapping with role and content, got {_type_name(given)}"
            raise _refusal(path, refused.reason if refused.__cause__ else needed, context_id) from refused.__cause__
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
        raise _refusal(what, f"a key must be text, got {_type_name(name)}", context_id)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _refusal(what, "a key with a lone surrogate is not valid Unicode", context_id) from None
    return name if type(name) is str else str.__str__(name)


_last_second: tuple[int, str] = (-1_000_000_000, "")


def _now() -> str:
    """This machine's time in the format of a message. All but the fraction is formatted once a second."""
    global _last_second
    now = time.time_ns()
    begin, text = _last_second
    if not 0 <= now - begin < 1_000_000_000:
        seconds = now // 1_000_000_000
        begin, text = seconds * 1_000_000_000, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        _last_second = begin, text
    return f"{text}.{(now - begin) // 1000:06}+00:00"


def _time(given: Any, context_id: str | None) -> str:
    """A given time in the format of a message, in UTC. One without an offset is taken to be in UTC."""
    from datetime import datetime  # late, with `state`: a fresh message does without both

    from .state import parse_time

    try:
        at = parse_time(given.isoformat() if isinstance(given, datetime) else given)
    except (TypeError, ValueError):
        raise _refusal("timestamp", f"must be a datetime or ISO 8601 text, got {given!r:.60}", context_id) from None
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
    """`value` in JSON's own types; the same object if it is already. Raises _Refused."""
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
        raise _Refused(f"nested more than {MAX_DEPTH} levels deep", too_deep=True)
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
            refused.steps.append((f"[{index}]", value))
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
                raise _Refused(f"a key must be text, got {name!r:.60}")
            return _plain_dict({str.__str__(k) if isinstance(k, str) else k: v for k, v in value.items()}, depth)
        kind = type(item)
        if kind is str or kind is bool or (kind is int and _SMALLEST_INTEGER < item < _LARGEST_INTEGER):
            continue
        try:
            plain = _plain(item, depth + 1)
        except _Refused as refused:
            refused.steps.append((f".{name}", value))
            raise
        if plain is not item:
            if result is value:
                result = dict(value)
            result[name] = plain
    return result


def _converted(value: Any, depth: int) -> Any:
    """A value that is not of JSON's own types, converted as documented. Raises _Refused."""
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
    from datetime import date  # late: a value can only be a date if the module is imported already

    if isinstance(value, date):
        return value.isoformat()
    try:
        return _plain(_dumped(value), depth)
    except _Refused as refused:
        if refused.steps:
            refused.steps[-1] = (refused.steps[-1][0], value)
        raise


def _dumped(value: Any) -> Any:
    """The stored form of a dataclass or a model of pydantic, its parts not yet converted. Else raises _Refused."""
    cls = type(value)
    # An object of such a class exists only if its package is imported.
    pydantic = sys.modules.get("pydantic")
    dataclasses_json = sys.modules.get("dataclasses_json")
    try:
        if pydantic is not None and isinstance(value, pydantic.BaseModel):
            # By alias: so the model reads it again, and these are the field names of the API that it describes.
            return value.model_dump(mode="json", by_alias=True)
        if dataclasses_json is not None and isinstance(value, dataclasses_json.DataClassJsonMixin):
            return value.to_dict()  # with the names that the class gives its fields in JSON
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{cls.__name__} cannot be dumped: {str(error).partition(chr(10))[0]}") from error
    if not hasattr(cls, "__dataclass_fields__"):
        raise _Refused(f"{cls.__name__} is not JSON{_advice(value)}")
    from dataclasses import fields

    return {field.name: getattr(value, field.name) for field in fields(value)}


def _advice(value: Any) -> str:
    """What to store instead of a value that is not JSON."""
    from enum import Enum  # loaded by `operations` already

    if isinstance(value, Enum):
        return "; store its value instead"
    if isinstance(value, set | frozenset):
        return "; store a sorted list instead"
    if isinstance(value, bytes | bytearray | memoryview):
        return "; store base64 text instead"
    if hasattr(value, "__fspath__"):
        return "; store str(path) instead"
    if hasattr(value, "tolist"):  # arrays of numpy and their like
        return "; store its tolist() instead"
    if hasattr(value, "__await__"):
        return "; await it first"
    if hasattr(value, "__next__") or type(value) is range:
        return "; store a list instead"
    if _type_name(value) in ("Decimal", "UUID", "time"):
        return "; store text instead"
    if _type_name(value) == "timedelta":
        return "; store its seconds instead"
    return "; store text, numbers, lists, dicts or a dataclass instead"


def _path_of_surrogate(value: Any) -> str:
    """The path, in a plain value, of the text that cannot be encoded."""
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
