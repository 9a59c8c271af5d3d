"""The script of the log layout: its text, and operations packed as its arguments.

What the letters mean is described in script.lua.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pkgutil import get_data
from typing import Any, Final, NamedTuple, TypeAlias

from ...operations import (
    LARGEST_KEPT_ANSWER,
    REMEMBER_CLEARED,
    REMEMBERED_COMMITS,
    Append,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Lease,
    Own,
    Pop,
    Put,
    Query,
    Restore,
    Space,
    Trim,
)
from .reads import FORMAT, reads_everything
from .wire import bulk, number

ATTEMPT: Final = 10.0
"""Seconds for which a copy of a call is valid at most: the server refuses it afterwards."""

WINDOW: Final = ATTEMPT + 1.0
"""Seconds for which a copy of a commit may still arrive: the server remembers its id for at least so long."""

MICROSECONDS: Final = 1_000_000

_EMPTY: Final = bulk(b"")


class Summed(NamedTuple):
    """An `Increment` whose sum was computed here from `before` (None: absent). Refused if the value is another one."""

    key: str
    before: bytes | None
    total: bytes


class Conversion(NamedTuple):
    """AgentUp's `document` replaced by what a commit makes of it, resolved here; no `fields` if that deletes it."""

    context_id: str
    commit_id: str
    fence: str | None
    document: bytes
    answer: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    messages: tuple[bytes, ...]
    remembered: tuple[tuple[bytes, bytes], ...]  # earlier commits and their answers
    deadline: float


OnContext: TypeAlias = Commit | Query | Lease | Conversion
"""What the script carries out."""


def script() -> bytes:
    """The script, with the constants that it shares with Python."""
    text = get_data(__package__, "script.lua")
    assert text is not None
    constants = {
        b"WINDOW": b"%d" % (WINDOW * MICROSECONDS),
        b"REMEMBERED": b"%d" % REMEMBERED_COMMITS,
        b"REMEMBER_CLEARED": b"%d" % (REMEMBER_CLEARED * 1000),
        b"LARGEST_KEPT": b"%d" % LARGEST_KEPT_ANSWER,
        b"FORMAT": b"'%b'" % FORMAT,
    }
    return re.sub(rb"\b(%b)\b" % b"|".join(constants), lambda match: constants[match[1]], text)


def pack(operation: OnContext, context_id: bytes, arguments: list[bytes]) -> bool:
    """Add the packed shape and arguments of an operation, and return whether it needs the key of the lease.

    `context_id` is packed. Every element that is added is one argument.
    """
    if (
        type(operation) is Commit
        and operation.fresh
        and len(operation.changes) == 1
        and _pack_plainly(operation, context_id, arguments)
    ):
        return False
    place = len(arguments)
    arguments += (b"", context_id)
    shape = _KINDS[type(operation)](operation, arguments)
    arguments[place] = _packed_shape(len(arguments) - place - 1, shape)
    return shape[0] in b"FGL"


def _pack_plainly(commit: Commit, context_id: bytes, arguments: list[bytes]) -> bool:
    """`pack` for a commit that appends one message or sets one key without any condition: a third of the time.

    False, and nothing is added, for other commits.
    """
    _, (change,), commit_id, user, fence, absent, idle_for, expect, answer, _, _ = commit
    if user is not None or fence is not None or absent or idle_for is not None or expect is not None or answer:
        return False
    if type(change) is Append and len(change.messages) == 1:
        (message,) = change.messages
        arguments += (
            b"$5\r\n\0\0\4CA\r\n",
            context_id,
            b"$%d\r\n%b\r\n" % (len(commit_id), commit_id.encode()),
            b"$1\r\n1\r\n",
            b"$%d\r\n%b\r\n" % (len(message), message),
        )
        return True
    if type(change) is Put and len(change.items) == 1 and not change.replace:
        ((key, value),) = change.items
        arguments += (
            b"$5\r\n\0\0\5CS\r\n",
            context_id,
            b"$%d\r\n%b\r\n" % (len(commit_id), commit_id.encode()),
            b"$1\r\n1\r\n",
            _variable(key) if change.space is Space.VARIABLES else _metadata(key),
            b"$%d\r\n%b\r\n" % (len(value), value),
        )
        return True
    return False


@lru_cache(256)  # there are only a few
def _packed_shape(count: int, shape: bytes) -> bytes:
    return bulk(count.to_bytes(3) + shape)


# --- operations: each adds its arguments and returns its letters ---


def _pack_commit(commit: Commit, arguments: list[bytes]) -> bytes:
    _, changes, commit_id, user, fence, absent, idle_for, expect, answer, _, fresh = commit
    arguments.append(bulk(commit_id.encode()))
    shape = b"C" if fence is None else b"F"
    if not fresh:
        shape += b"q"
    if user is not None:
        shape += b"u"
        arguments.append(bulk(user.encode()))
    if fence is not None:
        shape += b"f"
        arguments.append(bulk(fence.encode()))
    if absent:
        shape += b"n"
    if idle_for is not None:
        shape += b"w"
        arguments.append(number(int(idle_for * MICROSECONDS)))
    if expect is not None:
        key, value = expect
        shape += b"g" if value is None else b"e"
        arguments.append(_variable(key))
        if value is not None:
            arguments.append(bulk(value))
    if answer:
        shape += b"r"
        arguments.append(bulk(answer))
    for change in changes:
        shape += _pack_change(change, arguments)
    return shape


def _pack_query(query: Query, arguments: list[bytes]) -> bytes:
    shape = b"Q"
    if query.user is not None:
        shape += b"u"
        arguments.append(bulk(query.user.encode()))
    if query.history is not None:
        shape += b"h"
        limit, before, first = query.history
        arguments += [_EMPTY if bound is None else number(bound) for bound in (first, before, limit)]
    if reads_everything(query):
        return shape + b"g"
    variables, metadata = query.variables or (), query.metadata or ()
    arguments.append(number(len(variables) + len(metadata)))
    arguments += map(_variable, variables)
    arguments += map(_metadata, metadata)
    return shape + b"F"


def _pack_lease(lease: Lease, arguments: list[bytes]) -> bytes:
    arguments += (bulk(lease.token.encode()), number(max(1, int(lease.seconds * 1000))))
    shape = {"take": b"Lt", "renew": b"Lr", "release": b"Ll"}[lease.action]
    if lease.user is None:
        return shape
    arguments.append(bulk(lease.user.encode()))
    return shape + b"u"


def _pack_conversion(conversion: Conversion, arguments: list[bytes]) -> bytes:
    arguments += map(bulk, (conversion.commit_id.encode(), conversion.document, conversion.answer))
    shape = b"D" if conversion.fence is None else b"Gf"
    if conversion.fence is not None:
        arguments.append(bulk(conversion.fence.encode()))
    _pack_pairs(conversion.fields, arguments)
    _pack_counted(conversion.messages, arguments)
    _pack_pairs(conversion.remembered, arguments)
    return shape


def _pack_counted(items: Sequence[bytes], arguments: list[bytes]) -> None:
    arguments.append(number(len(items)))
    arguments += map(bulk, items)


def _pack_pairs(pairs: Sequence[tuple[bytes, bytes]], arguments: list[bytes]) -> None:
    _pack_counted([item for pair in pairs for item in pair], arguments)


_KINDS: Final[dict[type, Callable[[Any, list[bytes]], bytes]]] = {
    Commit: _pack_commit,
    Query: _pack_query,
    Lease: _pack_lease,
    Conversion: _pack_conversion,
}


# --- changes ---


@lru_cache(256)  # a program uses the same few keys again and again
def _variable(key: str) -> bytes:
    return bulk(b"v:" + key.encode())


@lru_cache(256)
def _metadata(key: str) -> bytes:
    return bulk(b"m:" + key.encode())


def _field(space: Space, key: str) -> bytes:
    return _variable(key) if space is Space.VARIABLES else _metadata(key)


def _pack_change(change: Any, arguments: list[bytes]) -> bytes:
    match change:
        case Append():
            _pack_counted(change.messages, arguments)
            return b"A"
        case Put():
            arguments.append(number(len(change.items)))
            for key, value in change.items:
                arguments += (_field(change.space, key), bulk(value))
            if not change.replace:
                return b"S"
            return b"Y" if change.space is Space.VARIABLES else b"Z"
        case Increment():
            arguments += (_variable(change.key), bulk(change.by))
            return b"I"
        case Summed():
            arguments.append(_variable(change.key))
            arguments += (number(0), _EMPTY) if change.before is None else (number(1), bulk(change.before))
            arguments.append(bulk(change.total))
            return b"J"
        case Drop():
            arguments.append(_field(change.space, change.key))
            return b"d"
        case Trim():
            arguments.append(number(change.keep))
            return b"t"
        case Pop():
            arguments.append(number(change.n))
            return b"p"
        case Delete():
            return b"x"
        case Create():
            if change.user_id is None:
                return b"C"
            arguments.append(bulk(change.user_id.encode()))
            return b"O"
        case Own():
            arguments.append(bulk((change.user_id or "").encode()))
            return b"T"
        case Restore():
            arguments.append(bulk((change.user_id or "").encode()))
            arguments.append(number(change.start))
            times = (change.created, change.updated)
            arguments += [_EMPTY if time is None else bulk(b"%016d" % time) for time in times]
            figures = (change.revision, change.expires)
            arguments += [_EMPTY if figure is None else number(figure) for figure in figures]
            return b"R"
    raise TypeError(f"unknown change {change!r}")
