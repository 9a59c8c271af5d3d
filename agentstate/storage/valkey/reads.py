"""Reads by plain commands: what most queries ask needs no script, and costs a third without.

Where the script is needed after all (another type under the key, AgentUp's document for example), the answer says so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from ...errors import StateConflictError, StateCorruptedError, StateError
from ...operations import Query, Snapshot
from ..resolve import access_error
from .wire import ServerError, bulk, number

BASE: Final = ("id", "user", "created", "updated", "rev", "start", "end", "exp")
"""The fields of a context's hash that are neither variables nor metadata."""

_BASE: Final = tuple(name.encode() for name in BASE)
_PACKED_BASE: Final = b"".join(map(bulk, _BASE))
_MOST_FIELDS: Final = 1000

_EXISTS: Final = b"*2\r\n$6\r\nEXISTS\r\n"
_MULTI: Final = b"*1\r\n$5\r\nMULTI\r\n"
_EXEC: Final = b"*1\r\n$4\r\nEXEC\r\n"


def is_plain(query: Query) -> bool:
    """Whether plain commands can answer it. Others have to know where the history starts before they can read it."""
    window = query.history
    return window is None or (window.before is None and window.first is None and window.limit != 0)


def reads_everything(query: Query) -> bool:
    """Whether the whole hash is read, rather than the fields that are named."""
    if query.variables is None or query.metadata is None:
        return True
    return len(query.variables) + len(query.metadata) > _MOST_FIELDS  # Lua's stack is small


def pack_read(query: Query, state: bytes, history: bytes) -> bytes:
    """The commands of a plain read; `state` and `history` are the packed keys."""
    if query.variables is None or query.metadata is None or reads_everything(query):
        commands = b"*2\r\n$7\r\nHGETALL\r\n" + state
    else:
        head, tail = _around_key(query.variables, query.metadata)
        # Whether there is anything: of another's hash none of our fields is found either.
        commands = b"%b%b%b%b%b" % (head, state, tail, _EXISTS, state)
    if query.history is None:
        return commands
    limit = query.history.limit
    span = b"$1\r\n0\r\n" if limit is None else number(-limit)
    return b"%b%b*4\r\n$6\r\nLRANGE\r\n%b%b$2\r\n-1\r\n%b" % (_MULTI, commands, history, span, _EXEC)


@lru_cache(256)  # a program asks for the same few keys again and again
def _around_key(variables: tuple[str, ...], metadata: tuple[str, ...]) -> tuple[bytes, bytes]:
    """What stands before and behind the key in the command that reads these fields."""
    fields = [bulk(b"v:" + key.encode()) for key in variables] + [bulk(b"m:" + key.encode()) for key in metadata]
    return b"*%d\r\n$5\r\nHMGET\r\n" % (10 + len(fields)), _PACKED_BASE + b"".join(fields)


def reply_count(query: Query) -> int:
    """How many replies there are to a plain read."""
    return (1 if reads_everything(query) else 2) + (0 if query.history is None else 3)


def outcome_of(query: Query, replies: list[Any]) -> Snapshot | StateError | ServerError | None:
    """What the replies to a plain read mean. A ServerError tells that they do not answer the query."""
    for reply in replies:
        if isinstance(reply, ServerError):
            return reply
    messages: list[bytes] | None = None
    if query.history is not None:
        replies = replies[-1]
        for reply in replies:
            if isinstance(reply, ServerError):
                return reply
        messages = replies[-1]
    try:
        outcome = snapshot_of(query, replies[0], messages, None)
    except StateError as error:
        return error
    if outcome is None and not reads_everything(query) and replies[1]:
        return ServerError("WRONGTYPE a hash without our fields")
    return outcome


def snapshot_of(query: Query, fields: list[Any], messages: list[bytes] | None, first: int | None) -> Snapshot | None:
    """The snapshot that was read, or None where there is no context. Raises a StateError.

    `fields`: names and values of the whole hash if the query reads everything, else the values of `BASE` and of the
    keys it names. `first`: the position of the first message; None where they are the last ones.
    """
    variables: dict[str, bytes] = {}
    metadata: dict[str, bytes] = {}
    if reads_everything(query):
        pairs = iter(fields)
        found = dict(zip(pairs, pairs, strict=True))
        if not found:
            return None
        base = [found.pop(name, None) for name in _BASE]
        for field, value in found.items():
            space = field[:2]
            if space == b"v:":
                variables[field[2:].decode()] = value
            elif space == b"m:":
                metadata[field[2:].decode()] = value
        if query.variables is not None:
            variables = {key: variables[key] for key in query.variables if key in variables}
        if query.metadata is not None:
            metadata = {key: metadata[key] for key in query.metadata if key in metadata}
    else:
        base = fields[:8]
        if base[0] is None:
            return None
        place = 8
        for key in query.variables or ():
            if (value := fields[place]) is not None:
                variables[key] = value
            place += 1
        for key in query.metadata or ():
            if (value := fields[place]) is not None:
                metadata[key] = value
            place += 1
    return _snapshot(query, base, variables, metadata, messages, first)


def _snapshot(
    query: Query,
    base: list[Any],
    variables: dict[str, bytes],
    metadata: dict[str, bytes],
    messages: list[bytes] | None,
    first: int | None,
) -> Snapshot:
    try:
        context_id, user, created, updated, revision, start, end, expires = base
        if context_id.decode() != query.context_id:
            raise foreign(context_id, query.context_id)
        owner = user.decode() or None
        if query.user is not None and query.user != owner:
            raise access_error(query.context_id)
        begin, stop = int(start), int(end)
        if messages is None:
            first = stop
        elif first is None:
            first = stop - len(messages)
            limit = query.history.limit if query.history is not None else None
            if first != (begin if limit is None else max(begin, stop - limit)):
                raise torn_history(query.context_id)
        return Snapshot(
            owner, int(created), int(updated), int(revision), begin, stop, variables, metadata, first,
            () if messages is None else messages,
            int(expires) if expires else None,
        )  # fmt: skip
    except (AttributeError, ValueError, TypeError) as error:
        raise StateCorruptedError(
            f"the hash of {query.context_id!r} lacks what every context has; left as it is", context_id=query.context_id
        ) from error


def foreign(stored_id: bytes, context_id: str) -> StateConflictError:
    return StateConflictError(
        f"under the key of {context_id!r} is the context {stored_id.decode(errors='replace')!r} of another key_prefix; "
        "not touched",
        context_id=context_id,
    )


def torn_history(context_id: str) -> StateCorruptedError:
    return StateCorruptedError(
        f"the list of messages of {context_id!r} is not as long as its hash says; left as it is", context_id=context_id
    )
