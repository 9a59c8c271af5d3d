"""Reads by plain commands: most queries need no script, and cost a third without it.

Where the script is needed after all (another type under the key, a context of format 1), the replies show it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from ...errors import StateConflictError, StateCorruptedError, StateError
from ...operations import Query, Snapshot
from ..resolve import access_error
from .wire import ServerError, bulk, number

FORMAT: Final = b"2"
"""The version of the format that is written. Format 1 had no such field, and other names for the keys."""

UNANSWERED: Final[Any] = object()
"""Stands for the outcome of a read that needs the script."""

_BASE: Final = (b"id", b"format", b"user", b"created", b"updated", b"rev", b"start", b"end", b"exp")
"""The fields of a context's hash that are read with it, besides variables and metadata."""

_MOST_FIELDS: Final = 1000

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


def pack_read(query: Query, keys: bytes, state: bytes, history: bytes) -> bytes:
    """The commands of a plain read; `keys` are the packed keys of state, history and commits."""
    if query.variables is None or query.metadata is None or reads_everything(query):
        commands = b"*2\r\n$7\r\nHGETALL\r\n" + state
    else:
        head, tail = _around_key(query.variables, query.metadata)
        commands = b"%b%b%b" % (head, state, tail)
    if query.history is not None:
        limit = query.history.limit
        span = b"$1\r\n0\r\n" if limit is None else number(-limit)
        commands = b"%b%b*4\r\n$6\r\nLRANGE\r\n%b%b$2\r\n-1\r\n%b" % (_MULTI, commands, history, span, _EXEC)
    # Behind the transaction, which a slot that is being moved would refuse because of it.
    return b"%b*4\r\n$6\r\nEXISTS\r\n%b" % (commands, keys)


@lru_cache(256)  # a program asks for the same few keys again and again
def _around_key(variables: tuple[str, ...], metadata: tuple[str, ...]) -> tuple[bytes, bytes]:
    """What is before and after the key in the command that reads these fields."""
    fields = [*_BASE, *_named(variables, metadata)]
    return b"*%d\r\n$5\r\nHMGET\r\n" % (2 + len(fields)), b"".join(map(bulk, fields))


def _named(variables: tuple[str, ...], metadata: tuple[str, ...]) -> list[bytes]:
    return [b"v:" + key.encode() for key in variables] + [b"m:" + key.encode() for key in metadata]


def reply_count(query: Query) -> int:
    """How many replies there are to a plain read."""
    return 2 if query.history is None else 5


def outcome_of(query: Query, replies: list[Any]) -> Any:
    """What the replies to a plain read mean: a snapshot, None, a StateError, a ServerError, or UNANSWERED."""
    *answers, remains = replies
    if query.history is not None and type(answers[-1]) is list:
        answers = answers[-1]
    for answer in answers:
        if isinstance(answer, ServerError):
            return UNANSWERED if answer.code in ("WRONGTYPE", "ASK") else answer
    fields = answers[0]
    messages = None if query.history is None else answers[1]
    if not (fields if reads_everything(query) else fields[0]):
        # There may be a hash of somebody else, or something is left of a context.
        if isinstance(remains, ServerError):
            return remains
        return UNANSWERED if remains else None
    try:
        return snapshot_of(query, fields, messages, None)
    except StateError as error:
        return error


def snapshot_of(query: Query, fields: list[Any], messages: list[bytes] | None, first: int | None) -> Any:
    """The snapshot that was read. Raises a StateError. UNANSWERED where the messages are elsewhere.

    `fields`: names and values of the whole hash if the query reads everything, else the values of the fields that
    every context has and of the keys it names. `first`: the position of the first message; None where they are the
    last ones.
    """
    try:
        return _snapshot(query, fields, messages, first)
    except ValueError as error:  # no text, or no number
        raise torn_hash(query.context_id) from error


def _snapshot(query: Query, fields: list[Any], messages: list[bytes] | None, first: int | None) -> Any:
    variables: dict[str, bytes] = {}
    metadata: dict[str, bytes] = {}
    if reads_everything(query):
        pairs = iter(fields)
        found = dict(zip(pairs, pairs, strict=True))
        base = [found.pop(name, None) for name in _BASE]
        for field, value in found.items():
            if field.startswith(b"v:"):
                variables[field[2:].decode()] = value
            elif field.startswith(b"m:"):
                metadata[field[2:].decode()] = value
        if query.variables is not None:
            variables = {key: variables[key] for key in query.variables if key in variables}
        if query.metadata is not None:
            metadata = {key: metadata[key] for key in query.metadata if key in metadata}
    else:
        base = fields[: len(_BASE)]
        if query.variables:
            variables = _present(query.variables, fields[len(_BASE) :])
        if query.metadata:
            metadata = _present(query.metadata, fields[-len(query.metadata) :])
    context_id, version, user, created, updated, revision, start, end, expires = base
    if context_id is not None and context_id != query.context_id.encode():
        raise foreign(context_id, query.context_id)
    if version not in (None, FORMAT):
        raise newer_format(version, query.context_id)
    if None in (context_id, user, created, updated, revision, start, end):
        raise torn_hash(query.context_id)
    owner = user.decode() or None
    if query.user is not None and query.user != owner:
        raise access_error(query.context_id)
    begin, stop = int(start), int(end)
    if messages is None:
        first = stop
    elif first is None:
        if version is None:
            return UNANSWERED  # the list has another name
        first = stop - len(messages)
        limit = query.history.limit if query.history is not None else None
        if first != (begin if limit is None else max(begin, stop - limit)):
            raise torn_history(query.context_id)
    return Snapshot(
        owner, int(created), int(updated), int(revision), begin, stop, variables, metadata, first,
        () if messages is None else messages,
        int(expires) if expires else None,
    )  # fmt: skip


def _present(keys: Iterable[str], values: Iterable[bytes | None]) -> dict[str, bytes]:
    return {key: value for key, value in zip(keys, values, strict=False) if value is not None}


def foreign(stored_id: bytes, context_id: str) -> StateConflictError:
    return StateConflictError(
        f"the key of {context_id!r} holds the context {stored_id.decode(errors='replace')!r} of another key_prefix; "
        "not touched",
        context_id=context_id,
    )


def torn_history(context_id: str) -> StateCorruptedError:
    return StateCorruptedError(
        f"the list of messages of {context_id!r} does not have the length that its hash says; left as it is",
        context_id=context_id,
    )


def torn_hash(context_id: str) -> StateCorruptedError:
    return StateCorruptedError(
        f"the hash of {context_id!r} lacks fields that every context has, or holds values that none has; left as it is",
        context_id=context_id,
    )


def newer_format(version: bytes, context_id: str) -> StateConflictError:
    return StateConflictError(
        f"{context_id!r} was written by a newer version of agentstate (format {version.decode(errors='replace')}); "
        "update agentstate here; not touched",
        context_id=context_id,
    )
