"""The script of the log layout: its text, and operations packed as its arguments.

What each letter means stands in script.lua.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from .reads import reads_everything
from .wire import bulk, number

ATTEMPT: Final = 10.0
"""Seconds for which an attempt waits for its answer at most."""

WINDOW: Final = ATTEMPT + 1.0
"""Seconds for which a copy of a commit may still be on its way: at least so long the server remembers its id."""

MICROSECONDS: Final = 1_000_000

_EMPTY: Final = bulk(b"")

_SPELLED_OUT: Final = 50
"""Messages or keys of one change that get a letter each: the script's short way knows no counts."""


class Summed(NamedTuple):
    """An `Increment` whose sum was computed here: from `before` (None: absent), otherwise it has to be done again."""

    key: str
    before: bytes | None
    total: bytes


class Conversion(NamedTuple):
    """AgentUp's `document` replaced by what a commit makes of it, resolved here; no `fields` where it is deleted."""

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

GROUP: Final = 64
"""Contexts that one call of the script serves at most: the server does nothing else meanwhile."""


def script() -> bytes:
    """The script, with the constants that it shares with Python."""
    text = get_data(__package__, "script.lua")
    assert text is not None
    constants = {
        b"WINDOW": WINDOW * MICROSECONDS,
        b"REMEMBERED": REMEMBERED_COMMITS,
        b"REMEMBER_CLEARED": REMEMBER_CLEARED * 1000,
        b"LARGEST_KEPT": LARGEST_KEPT_ANSWER,
    }
    return re.sub(rb"\b(%b)\b" % b"|".join(constants), lambda match: b"%d" % constants[match[1]], text)


def pack_commit(commit: Commit, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a commit, and say how many they are. `context_id` is packed already."""
    _, changes, commit_id, user, fence, absent, idle_for, expect, answer, _, fresh = commit
    unconditional = (
        fresh and user is None and fence is None and expect is None and idle_for is None and not (absent or answer)
    )
    if unconditional and len(changes) == 1:
        change = changes[0]  # the most frequent ones, with less ado
        if type(change) is Append and len(change.messages) == 1:
            message = change.messages[0]
            arguments.append(
                b"$5\r\n\0\0\3CA\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n"
                % (context_id, len(commit_id), commit_id.encode(), len(message), message)
            )
            return 4
        if type(change) is Put and len(change.items) == 1 and not change.replace:
            ((key, value),) = change.items
            field = _variable(key) if change.space is Space.VARIABLES else _metadata(key)
            arguments.append(
                b"$5\r\n\0\0\4CS\r\n%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n"
                % (context_id, len(commit_id), commit_id.encode(), field, len(value), value)
            )
            return 5
    place = len(arguments)
    arguments += (b"", context_id, b"$%d\r\n%b\r\n" % (len(commit_id), commit_id.encode()))
    shape = b"C" if fence is None else b"F"
    if not unconditional:
        shape += _pack_conditions(commit, arguments)
    for change in changes:
        shape += _PACKERS[type(change)](change, arguments)
    return _finish(shape, arguments, place)


def change_at(commit: Commit, place: int) -> int:
    """Which of a commit's changes the letter at `place` in its shape belongs to."""
    shape = _pack_conditions(commit, [])
    for index, change in enumerate(commit.changes):
        shape += _PACKERS[type(change)](change, [])
        if place < len(shape):
            return index
    raise IndexError(place)


def _pack_conditions(commit: Commit, parts: list[bytes]) -> bytes:
    """Add the arguments of what comes before the changes, and return its letters."""
    shape = b"" if commit.fresh else b"q"
    if commit.user is not None:
        shape += b"u"
        parts.append(bulk(commit.user.encode()))
    if commit.fence is not None:
        shape += b"f"
        parts.append(bulk(commit.fence.encode()))
    if commit.absent:
        shape += b"n"
    if commit.idle_for is not None:
        shape += b"w"
        parts.append(number(int(commit.idle_for * MICROSECONDS)))
    if commit.expect is not None:
        key, value = commit.expect
        shape += b"g" if value is None else b"e"
        parts.append(_variable(key))
        if value is not None:
            parts.append(bulk(value))
    if commit.answer:
        shape += b"r"
        parts.append(bulk(commit.answer))
    return shape


def pack_query(query: Query, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a query, and say how many they are."""
    place = len(arguments)
    arguments += (b"", context_id)
    shape = b"Q"
    if query.user is not None:
        shape += b"u"
        arguments.append(bulk(query.user.encode()))
    if query.history is not None:
        shape += b"h"
        limit, before, first = query.history
        arguments += [_EMPTY if bound is None else number(bound) for bound in (first, before, limit)]
    if reads_everything(query):
        shape += b"g"
    else:
        shape += b"F"
        variables, metadata = query.variables or (), query.metadata or ()
        arguments.append(number(len(variables) + len(metadata)))
        arguments += [_variable(key) for key in variables]
        arguments += [_metadata(key) for key in metadata]
    return _finish(shape, arguments, place)


def pack_lease(lease: Lease, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a lease, and say how many they are."""
    place = len(arguments)
    shape = b"L" + _ACTIONS[lease.action]
    arguments += (b"", context_id, bulk(lease.token.encode()), number(max(1, int(lease.seconds * 1000))))
    if lease.user is not None:
        shape += b"u"
        arguments.append(bulk(lease.user.encode()))
    return _finish(shape, arguments, place)


_ACTIONS: Final = {"take": b"t", "renew": b"r", "release": b"l"}


def pack_conversion(conversion: Conversion, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a conversion, and say how many they are."""
    place = len(arguments)
    arguments += (b"", context_id, bulk(conversion.commit_id.encode()))
    arguments += (bulk(conversion.document), bulk(conversion.answer))
    shape = b"D" if conversion.fence is None else b"Gf"
    if conversion.fence is not None:
        arguments.append(bulk(conversion.fence.encode()))
    arguments.append(number(2 * len(conversion.fields)))
    for name, value in conversion.fields:
        arguments += (bulk(name), bulk(value))
    arguments.append(number(len(conversion.messages)))
    arguments += map(bulk, conversion.messages)
    arguments.append(number(2 * len(conversion.remembered)))
    for name, value in conversion.remembered:
        arguments += (bulk(name), bulk(value))
    return _finish(shape, arguments, place)


def _finish(shape: bytes, arguments: list[bytes], place: int) -> int:
    """Put the shape before its arguments, and say how many there are with it."""
    count = len(arguments) - place
    arguments[place] = _packed_shape(count - 1, shape)
    return count


@lru_cache(256)  # there are but a few
def _packed_shape(count: int, shape: bytes) -> bytes:
    return bulk(count.to_bytes(3) + shape)


# --- changes: each adds its arguments, and returns its letters ---


@lru_cache(256)  # a program uses the same few keys again and again
def _variable(key: str) -> bytes:
    return bulk(b"v:" + key.encode())


@lru_cache(256)
def _metadata(key: str) -> bytes:
    return bulk(b"m:" + key.encode())


def _field(space: Space, key: str) -> bytes:
    return _variable(key) if space is Space.VARIABLES else _metadata(key)


def _pack_create(change: Create, parts: list[bytes]) -> bytes:
    if change.user_id is None:
        return b"C"
    parts.append(bulk(change.user_id.encode()))
    return b"O"


def _pack_restore(change: Restore, parts: list[bytes]) -> bytes:
    parts.append(bulk((change.user_id or "").encode()))
    parts.append(number(change.start))
    parts += [_EMPTY if moment is None else bulk(b"%016d" % moment) for moment in (change.created, change.updated)]
    parts += [_EMPTY if figure is None else number(figure) for figure in (change.revision, change.expires)]
    return b"R"


def _pack_own(change: Own, parts: list[bytes]) -> bytes:
    parts.append(bulk((change.user_id or "").encode()))
    return b"T"


def _pack_append(change: Append, parts: list[bytes]) -> bytes:
    messages = change.messages
    spelled_out = len(messages) <= _SPELLED_OUT
    if not spelled_out:
        parts.append(number(len(messages)))
    parts += [b"$%d\r\n%b\r\n" % (len(message), message) for message in messages]
    return b"A" * len(messages) if spelled_out else b"B"


def _pack_put(change: Put, parts: list[bytes]) -> bytes:
    space, items, replace = change
    spelled_out = 0 < len(items) <= _SPELLED_OUT and not replace
    if not spelled_out:
        parts.append(number(len(items)))
    for key, value in items:
        parts += (_field(space, key), b"$%d\r\n%b\r\n" % (len(value), value))
    if spelled_out:
        return b"S" * len(items)
    if not replace:
        return b"M"
    return b"Y" if space is Space.VARIABLES else b"Z"


def _pack_drop(change: Drop, parts: list[bytes]) -> bytes:
    parts.append(_field(change.space, change.key))
    return b"d"


def _pack_increment(change: Increment, parts: list[bytes]) -> bytes:
    parts += (_variable(change.key), bulk(change.by))
    return b"I"


def _pack_summed(change: Summed, parts: list[bytes]) -> bytes:
    parts.append(_variable(change.key))
    parts += (number(0), _EMPTY) if change.before is None else (number(1), bulk(change.before))
    parts.append(bulk(change.total))
    return b"J"


def _pack_trim(change: Trim, parts: list[bytes]) -> bytes:
    parts.append(number(change.keep))
    return b"t"


def _pack_pop(change: Pop, parts: list[bytes]) -> bytes:
    parts.append(number(change.n))
    return b"p"


def _pack_delete(change: Delete, parts: list[bytes]) -> bytes:
    return b"x"


_PACKERS: Final[dict[type, Callable[[Any, list[bytes]], bytes]]] = {
    Create: _pack_create,
    Restore: _pack_restore,
    Own: _pack_own,
    Append: _pack_append,
    Put: _pack_put,
    Drop: _pack_drop,
    Increment: _pack_increment,
    Summed: _pack_summed,
    Trim: _pack_trim,
    Pop: _pack_pop,
    Delete: _pack_delete,
}
