"""The kinds of values of the keys: how each is converted, and how it is described."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isfinite
from os import PathLike, fspath
from typing import Any, NamedTuple

from agentstate.errors import StateConfigError
from agentstate.keys import KeySpace

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FRACTION = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|h|d|w)[a-z]*", re.IGNORECASE)
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"([0-9]+)\s*(k|m|g)(?:i?b)?", re.IGNORECASE)
_SIZE_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_URL_SCHEME = re.compile(r"((valkey|redis)s?(\+(sentinel|cluster))?|((valkey|redis)\+)?unix)://", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?")


class RefusedError(ValueError):
    """The value is not of the kind. The message, if any, is what was probably meant."""


class Kind(NamedTuple):
    """A kind of value.

    `convert` takes the text of a YAML scalar, or a Python value, and raises `RefusedError` for any other value;
    `expects` completes "must be ..."; `example` is valid YAML; `schema` is its JSON Schema.
    """

    convert: Callable[[object], Any]
    expects: str
    example: str
    schema: Mapping[str, Any]


def _number(value: object) -> int | float:
    if isinstance(value, str):
        try:
            if _WHOLE.fullmatch(value):
                return int(value)
            if _FRACTION.fullmatch(value):
                return float(value)
        except ValueError:  # more digits than Python converts
            pass
        raise RefusedError
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError
    return value


def _seconds(value: object) -> float:
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        seconds = float(match[1]) * _DURATION_UNITS[match[2].lower()]
        raise RefusedError(str(int(seconds) if seconds.is_integer() else seconds))
    number = _number(value)
    try:
        if number > 0 and isfinite(number):
            return number
    except OverflowError:  # an integer too large for a float
        pass
    raise RefusedError


def _at_least(minimum: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        number = _number(value)
        if isinstance(number, int):
            if number >= minimum:
                return number
            raise RefusedError
        raise RefusedError(f"{number:.0f}" if isfinite(number) and round(number) >= max(minimum, 1) else "")

    return convert


def _bytes(minimum: int) -> Callable[[object], int]:
    plain = _at_least(minimum)

    def convert(value: object) -> int:
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            raise RefusedError(str(int(match[1]) * _SIZE_UNITS[match[2].lower()]))
        return plain(value)

    return convert


def _boolean(value: object) -> bool:
    if isinstance(value, str):
        value = _BOOLEANS.get(value.lower())
    if isinstance(value, bool):
        return value
    raise RefusedError


def _text(value: object) -> str:
    if isinstance(value, str) and value and "\0" not in value:
        return value
    raise RefusedError


def _path(value: object) -> str:
    return _text(fspath(value) if isinstance(value, PathLike) else value)


def _key_prefix(value: object) -> str:
    try:
        return KeySpace(_text(value)).prefix
    except StateConfigError:
        raise RefusedError from None


def _url(value: object) -> str:
    text = _text(value)
    scheme = _URL_SCHEME.match(text)
    if scheme and len(text) > scheme.end():
        return text
    raise RefusedError(f'"valkey://{text}"' if _HOST_AND_PORT.fullmatch(text) else "")


def _mapping(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    raise RefusedError


def one_of(*allowed: str) -> Kind:
    def convert(value: object) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise RefusedError(value.lower() if isinstance(value, str) and value.lower() in allowed else "")

    *first, last = (f"`{word}`" for word in allowed)
    return Kind(convert, f"{', '.join(first)} or {last}", allowed[0], {"enum": list(allowed)})


SECONDS = Kind(_seconds, "a positive number of seconds", "3600", {"type": "number", "exclusiveMinimum": 0})
COUNT = Kind(_at_least(1), "a positive whole number", "1000", {"type": "integer", "minimum": 1})
NATURAL = Kind(_at_least(0), "a whole number, 0 or more", "0", {"type": "integer", "minimum": 0})
POSITIVE_BYTES = Kind(_bytes(1), "a positive number of bytes", "16777216", {"type": "integer", "minimum": 1})
BYTES = Kind(_bytes(0), "a number of bytes, 0 or more", "16777216", {"type": "integer", "minimum": 0})
BOOLEAN = Kind(_boolean, "`true` or `false`", "true", {"type": "boolean"})
TEXT = Kind(_text, "text", '"..."', {"type": "string", "minLength": 1})
BACKEND = Kind(_text, "the name of a backend", "file", {"type": "string", "minLength": 1})
PATH = Kind(_path, "the path of a directory", '"./conversation_states"', {"type": "string", "minLength": 1})
MAPPING = Kind(_mapping, "a mapping of keys to values", "{}", {"type": "object"})
KEY_PREFIX = Kind(
    _key_prefix, "text, with braces only around one hash tag", '"agentup:state:"', {"type": "string", "minLength": 1}
)
URL = Kind(
    _url,
    "a URL that begins with `valkey://`, `valkeys://` (TLS), `valkey+sentinel://`, `valkey+cluster://`, `redis://` "
    "(likewise) or `unix://`",
    '"valkey://localhost:6379"',
    {"type": "string", "pattern": f"^{_URL_SCHEME.pattern}."},
)
