"""Reads by plain commands: what most queries ask needs no script, and costs a third without.

Where the script is needed after all (another type under the key, AgentUp's document for example), the answer says so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from ...errors import StateConflictError, StateCorruptedError
from ...operations import Query, Snapshot
from ..resolve import access_error
from .wire import Connection, ServerError, bulk, number

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


def read_reply(query: Query, connection: Connection) -> Any:
    """What the server answers to a plain read: a ServerError, or fields, whether there is any, messages or None."""
    count = 1 if reads_everything(query) else 2
    if query.history is None:
        replies = [connection.read() for _ in range(count)]
        answers = replies
    else:
        replies = [connection.read() for _ in range(count + 2)]
        answers = connection.read()
        replies += answers if isinstance(answers, list) else (answers,)
    for reply in replies:
        if isinstance(reply, ServerError):
            return reply
    return answers[0], count == 1 or answers[1], None if query.history is None else answers[-1]


def snapshot_of(query: Query, fields: list[Any], messages: list[bytes] | None) -> Snapshot | None:
    """The snapshot that the answer to a plain read is, or None where there is no context. Raises a StateError."""
    if reads_everything(query):
        pairs = iter(fields)
        found = dict(zip(pairs, pairs, strict=True))
        if not found:
            return None
        base = [found.get(name) for name in _BASE]
        variables, metadata = named(query, found)
    else:
        base = fields[:8]
        if base[0] is None:
            return None
        values = iter(fields[8:])
        variables = {key: value for key, value in zip(query.variables or (), values, strict=False) if value is not None}
        metadata = {key: value for key, value in zip(query.metadata or (), values, strict=True) if value is not None}
    return snapshot(query, base, variables, metadata, messages, None)


def named(query: Query, found: dict[bytes, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The variables and the metadata that a query wants, out of all fields of a hash."""
    variables = {field[2:].decode(): value for field, value in found.items() if field[:2] == b"v:"}
    metadata = {field[2:].decode(): value for field, value in found.items() if field[:2] == b"m:"}
    return _selected(variables, query.variables), _selected(metadata, query.metadata)


def _selected(found: dict[str, bytes], keys: tuple[str, ...] | None) -> dict[str, bytes]:
    return found if keys is None else {key: found[key] for key in keys if key in found}


def snapshot(
    query: Query,
    base: list[Any],
    variables: dict[str, bytes],
    metadata: dict[str, bytes],
    messages: list[bytes] | None,
    first: int | None,
) -> Snapshot:
    """The snapshot of the `BASE` fields and what was read beside. `first` None: the messages are the last ones."""
    try:
        context_id, user, created, updated, revision, start, end, expires = base
        if context_id.decode() != query.context_id:
            raise foreign(context_id, query.context_id)
        owner = user.decode() or None
        if query.user is not None and query.user != owner:
            raise access_error(query.context_id)
        stop = int(end)
        result = Snapshot(
            owner,
            int(created),
            int(updated),
            int(revision),
            int(start),
            stop,
            variables,
            metadata,
            stop - len(messages or ()) if first is None else first,
            () if messages is None else messages,
            int(expires) if expires else None,
        )
    except (AttributeError, ValueError, TypeError) as error:
        raise StateCorruptedError(
            f"the hash of {query.context_id!r} lacks what every context has; left as it is", context_id=query.context_id
        ) from error
    if messages is not None and first is None:
        count = result.end - result.start
        limit = query.history.limit if query.history is not None else None
        if len(messages) != (count if limit is None else min(limit, count)):
            raise torn_history(query.context_id)
    return result


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
