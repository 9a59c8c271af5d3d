"""The script of the log layout: its text, and operations packed as its arguments.

What each letter means stands in script.lua.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    if (
        fresh
        and len(changes) == 1
        and user is None
        and fence is None
        and expect is None
        and idle_for is None
        and not (absent or answer)
    ):
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
            name = key.encode()
            space = b"v:" if change.space is Space.VARIABLES else b"m:"
            arguments.append(
                b"$5\r\n\0\0\4CS\r\n%b$%d\r\n%b\r\n$%d\r\n%b%b\r\n$%d\r\n%b\r\n"
                % (context_id, len(commit_id), commit_id.encode(), len(name) + 2, space, name, len(value), value)
            )
            return 5
    shape = bytearray(b"C" if commit.fence is None else b"F")
    parts = [context_id, bulk(commit_id.encode())]
    _pack_conditions(commit, shape, parts)
    for change in changes:
        _PACKERS[type(change)](change, shape, parts)
    return _finish(shape, parts, arguments)


def change_at(commit: Commit, place: int) -> int:
    """Which of a commit's changes the letter at `place` in its shape belongs to."""
    shape = bytearray()
    _pack_conditions(commit, shape, [])
    for index, change in enumerate(commit.changes):
        _PACKERS[type(change)](change, shape, [])
        if place < len(shape):
            return index
    raise IndexError(place)


def _pack_conditions(commit: Commit, shape: bytearray, parts: list[bytes]) -> None:
    if not commit.fresh:
        shape += b"q"
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
        parts.append(bulk(b"v:" + key.encode()))
        if value is not None:
            parts.append(bulk(value))
    if commit.answer:
        shape += b"r"
        parts.append(bulk(commit.answer))


def pack_query(query: Query, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a query, and say how many they are."""
    shape = bytearray(b"Q")
    parts = [context_id]
    if query.user is not None:
        shape += b"u"
        parts.append(bulk(query.user.encode()))
    if query.history is not None:
        shape += b"h"
        limit, before, first = query.history
        parts += [_EMPTY if bound is None else number(bound) for bound in (first, before, limit)]
    if reads_everything(query):
        shape += b"g"
    else:
        shape += b"F"
        variables, metadata = query.variables or (), query.metadata or ()
        parts.append(number(len(variables) + len(metadata)))
        parts += [bulk(b"v:" + key.encode()) for key in variables]
        parts += [bulk(b"m:" + key.encode()) for key in metadata]
    return _finish(shape, parts, arguments)


def pack_lease(lease: Lease, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a lease, and say how many they are."""
    shape = bytearray(b"L")
    shape += _ACTIONS[lease.action]
    parts = [context_id, bulk(lease.token.encode()), number(max(1, int(lease.seconds * 1000)))]
    if lease.user is not None:
        shape += b"u"
        parts.append(bulk(lease.user.encode()))
    return _finish(shape, parts, arguments)


_ACTIONS: Final = {"take": b"t", "renew": b"r", "release": b"l"}


def pack_conversion(conversion: Conversion, context_id: bytes, arguments: list[bytes]) -> int:
    """Add the packed arguments of a conversion, and say how many they are."""
    shape = bytearray(b"D" if conversion.fence is None else b"G")
    parts = [context_id, bulk(conversion.commit_id.encode()), bulk(conversion.document), bulk(conversion.answer)]
    if conversion.fence is not None:
        shape += b"f"
        parts.append(bulk(conversion.fence.encode()))
    parts.append(number(2 * len(conversion.fields)))
    for name, value in conversion.fields:
        parts += (bulk(name), bulk(value))
    parts.append(number(len(conversion.messages)))
    parts += map(bulk, conversion.messages)
    parts.append(number(2 * len(conversion.remembered)))
    for name, value in conversion.remembered:
        parts += (bulk(name), bulk(value))
    return _finish(shape, parts, arguments)


def _finish(shape: bytearray, parts: list[bytes], arguments: list[bytes]) -> int:
    count = len(parts)
    arguments.append(b"$%d\r\n%b%b\r\n" % (len(shape) + 3, count.to_bytes(3), bytes(shape)))
    arguments += parts
    return count + 1


# --- changes ---


def _field(space: Space, key: str) -> bytes:
    return bulk((b"v:" if space is Space.VARIABLES else b"m:") + key.encode())


def _pack_create(change: Create, shape: bytearray, parts: list[bytes]) -> None:
    if change.user_id is None:
        shape += b"C"
    else:
        shape += b"O"
        parts.append(bulk(change.user_id.encode()))


def _pack_restore(change: Restore, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"R"
    parts.append(bulk((change.user_id or "").encode()))
    parts.append(number(change.start))
    parts += [_EMPTY if moment is None else bulk(b"%016d" % moment) for moment in (change.created, change.updated)]
    parts += [_EMPTY if figure is None else number(figure) for figure in (change.revision, change.expires)]


def _pack_own(change: Own, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"T"
    parts.append(bulk((change.user_id or "").encode()))


def _pack_append(change: Append, shape: bytearray, parts: list[bytes]) -> None:
    if len(change.messages) <= _SPELLED_OUT:
        shape += b"A" * len(change.messages)
    else:
        shape += b"B"
        parts.append(number(len(change.messages)))
    parts += map(bulk, change.messages)


def _pack_put(change: Put, shape: bytearray, parts: list[bytes]) -> None:
    if change.replace:
        shape += b"Y" if change.space is Space.VARIABLES else b"Z"
    elif 0 < len(change.items) <= _SPELLED_OUT:
        shape += b"S" * len(change.items)
    else:
        shape += b"M"
    if shape[-1:] != b"S":
        parts.append(number(len(change.items)))
    for key, value in change.items:
        parts += (_field(change.space, key), bulk(value))


def _pack_drop(change: Drop, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"d"
    parts.append(_field(change.space, change.key))


def _pack_increment(change: Increment, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"I"
    parts += (_field(Space.VARIABLES, change.key), bulk(change.by))


def _pack_summed(change: Summed, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"J"
    parts.append(_field(Space.VARIABLES, change.key))
    parts += (number(0), bulk(b"")) if change.before is None else (number(1), bulk(change.before))
    parts.append(bulk(change.total))


def _pack_trim(change: Trim, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"t"
    parts.append(number(change.keep))


def _pack_pop(change: Pop, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"p"
    parts.append(number(change.n))


def _pack_delete(change: Delete, shape: bytearray, parts: list[bytes]) -> None:
    shape += b"x"


_PACKERS: Final[dict[type, Callable[[Any, bytearray, list[bytes]], None]]] = {
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
