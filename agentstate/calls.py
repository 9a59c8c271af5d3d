"""The documented calls, each as a small generator that does no input or output itself.

A call yields what it wants from the storage, a `Step`, and is sent the outcome (or thrown the error). Two drivers run
them: `agentstate.blocking` blocks, `agentstate.aio` awaits. So both contexts are one API by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import count
from types import FunctionType

from . import codec
from .caller import (
    Caller,
    Calls,
    Each,
    Emit,
    Emits,
    InOrder,
    Sleep,
    check_commit_id,
    count_or_none,
    entries,
    increment,
    message_texts,
    natural,
    new_commit_id,
    positive,
    put,
    state_changes,
)
from .errors import ContextNotFoundError, StateError, StateTimeoutError
from .keys import check_context_id
from .operations import (
    CHANGED,
    Append,
    Change,
    Create,
    Delete,
    Drop,
    Listing,
    Pop,
    Put,
    Restore,
    Snapshot,
    Space,
    Trim,
    Window,
)
from .records import new_tuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Final, ParamSpec, TypeVar

    from .state import ConversationState, Message

    P = ParamSpec("P")
    R = TypeVar("R")


# --- the whole context ----------------------------------------------------------------------------------------------


def get_or_create(
    self: Caller, /, context_id: str, user_id: str | None = None, *, commit_id: str | None = None
) -> Calls[ConversationState]:
    """The state of the context, which is created for `user_id` if it does not exist.

    Claims a context that has no owner yet; raises StateAccessError if it belongs to another user. Reading an existing
    context is no write: neither `updated_at` nor its ttl move. Atomic; costs a read of the whole history.
    """
    owner = self._owner(user_id, context_id)
    everything = self._query(context_id, variables=None, metadata=None, history=Window())
    if commit_id is None and self.storage.expects(context_id):
        snapshot = yield everything
        if snapshot is not None and (owner is None or owner == snapshot.user_id):
            return _state(context_id, snapshot)  # which is what the commit would have left, too
    commit = self._commit(context_id, commit_id, Create(owner))._replace(deadline=everything.deadline)
    for _ in range(2):  # it may expire right after the commit that found it existing, and had nothing to do
        _, snapshot = yield InOrder((commit, everything))
        if snapshot is not None:
            return _state(context_id, snapshot)
    raise ContextNotFoundError(f"{context_id!r} was cleared after this commit created it", context_id=context_id)


def get_state(self: Caller, /, context_id: str, *, history_limit: int | None = None) -> Calls[ConversationState | None]:
    """Everything about the context in one consistent read, or None if it does not exist.

    With `history_limit` only the last so many messages are read; the cost is then the same however long the history.
    """
    window = new_tuple(Window, (count_or_none("history_limit", history_limit), None, None))
    snapshot = yield self._query(context_id, None, None, window)
    return None if snapshot is None else _state(context_id, snapshot)


def exists(self: Caller, /, context_id: str) -> Calls[bool]:
    """Whether the context exists."""
    snapshot = yield self._query(context_id)
    return snapshot is not None


def update_state(self: Caller, /, context_id: str, *, commit_id: str | None = None, **fields: Any) -> Calls[None]:
    """Replace whole fields of the state, atomically: `user_id`, `variables`, `metadata`, `history`.

    Creates the context if it does not exist. Messages of a replaced history get new positions. Raises TypeError for
    any other field.
    """
    changes = state_changes(self, context_id, fields)
    if changes:
        yield self._commit(context_id, commit_id, *changes)


def clear_context(self: Caller, /, context_id: str, *, commit_id: str | None = None) -> Calls[bool]:
    """Delete the context with all its data. True if it existed. Commit ids stay remembered for ten minutes."""
    answer = yield self._commit(context_id, commit_id, Delete())
    return _boolean(answer)


def fork_context(
    self: Caller, /, source: str, target: str, upto: int | None = None, *, commit_id: str | None = None
) -> Calls[None]:
    """Copy a context, with owner, variables and metadata, to one that does not exist yet.

    `upto`: only messages before that position. Positions stay the same. Raises ContextNotFoundError if there is no
    `source`, StateConflictError if there is a `target`. The read and the write are atomic each.
    """
    count_or_none("upto", upto)
    check_context_id(target)
    if commit_id is not None and (yield self._look_up(target, commit_id)) != CHANGED:
        return  # applied before; the source may be gone by now
    snapshot = yield self._query(source, variables=None, metadata=None, history=Window(before=upto))
    if snapshot is None:
        raise ContextNotFoundError(f"there is no context {source!r} to fork", context_id=source)
    changes: list[Change] = [Restore(snapshot.user_id, snapshot.start)]
    if snapshot.variables:
        changes.append(Put(Space.VARIABLES, tuple(snapshot.variables.items())))
    if snapshot.metadata:
        changes.append(Put(Space.METADATA, tuple(snapshot.metadata.items())))
    if snapshot.messages:
        changes.append(Append(tuple(snapshot.messages)))
    yield self._commit(target, commit_id, *changes)._replace(absent=True)


_DELETED_AT_A_TIME: Final = 64
"""Contexts. Each has a deadline, and on a slow disk one may take a hundredth of it."""


def cleanup_old_contexts(self: Caller, /, max_age_hours: float = 24) -> Calls[int]:
    """Delete the contexts that were last written more than `max_age_hours` ago, and say how many.

    Each is deleted atomically and only if it is still that old. Memory use is bounded. Goes on past a context that
    fails, and raises the first error at the end.
    """
    age = min(positive("max_age_hours", max_age_hours, zero=True, unit="hours") * 3600.0, 1e11)
    began = time.monotonic()
    deleted = 0
    failures: list[StateError] = []
    cursor: str | None = ""
    while cursor is not None:
        seconds = age + (time.monotonic() - began)  # what grows old meanwhile is left to the next cleanup
        page = yield Listing(cursor, user=self.user_id, idle_for=seconds, deadline=self._deadline())
        ids, cursor = page
        for first in range(0, len(ids), _DELETED_AT_A_TIME):
            some = ids[first : first + _DELETED_AT_A_TIME]
            outcomes = yield Each([self._commit(each, None, Delete())._replace(idle_for=seconds) for each in some])
            for outcome in outcomes:
                if isinstance(outcome, StateError):
                    failures.append(outcome)
                else:
                    deleted += _boolean(outcome)
    if failures:
        raise failures[0]
    return deleted


def list_contexts(self: Caller, /, user_id: str | None = None) -> Emits[str]:
    """The ids of all contexts, or of those that `user_id` owns, in no order.

    A context that exists all along is listed; in Valkey one may be listed twice while the server reorganises its keys.
    """
    owner = self._owner(user_id)
    cursor: str | None = ""
    while cursor is not None:
        page = yield Listing(cursor, user=owner, deadline=self._deadline())
        yield Emit(list(page.context_ids))
        cursor = page.cursor


# --- history --------------------------------------------------------------------------------------------------------


def add_to_history(
    self: Caller,
    /,
    context_id: str,
    role: str,
    content: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    commit_id: str | None = None,
) -> Calls[None]:
    """Append a message. Creates the context if it does not exist.

    `content` is text, or any JSON value. The message gets this machine's time. Raises StateSerializationError, with
    the path, for what JSON cannot hold.
    """
    limit = self.storage.max_value_bytes
    text = codec.message(role, content, metadata, None, context_id=context_id, limit=limit)
    yield self._commit(context_id, commit_id, new_tuple(Append, ((text,),)))


def extend_history(
    self: Caller, /, context_id: str, messages: Iterable[Mapping[str, Any]], *, commit_id: str | None = None
) -> Calls[None]:
    """Append messages, all or none: mappings with `role` and `content`, and maybe `timestamp` and `metadata`."""
    texts = message_texts(self, context_id, messages)
    if texts:
        yield self._commit(context_id, commit_id, Append(texts))


def get_history(
    self: Caller, /, context_id: str, limit: int | None = None, *, before: int | None = None
) -> Calls[list[Message]]:
    """The messages, oldest first: all of them, or the last `limit`. An absent context has none.

    `before`: only messages before this position, for paging backwards. Raises ValueError for a negative `limit`.
    Costs the same for any length of the history if `limit` is given (and the page is near one of its ends).
    """
    window = new_tuple(Window, (count_or_none("limit", limit), count_or_none("before", before), None))
    snapshot = yield self._query(context_id, history=window)
    return [] if snapshot is None else _messages(snapshot)


def iter_history(self: Caller, /, context_id: str, *, page_size: int = 100) -> Emits[Message]:
    """The messages, oldest first, read `page_size` at a time: an iterator that needs no more memory than a page."""
    if not count_or_none("page_size", page_size):
        raise ValueError("page_size is at least 1")
    position = 0
    while True:
        window = Window(limit=page_size, first=position)
        snapshot = yield self._query(context_id, history=window)
        if snapshot is None or not snapshot.messages:
            return
        yield Emit(_messages(snapshot))
        position = snapshot.first + len(snapshot.messages)


def count_history(self: Caller, /, context_id: str) -> Calls[int]:
    """How many messages the context holds; 0 if it does not exist."""
    snapshot = yield self._query(context_id)
    return 0 if snapshot is None else snapshot.end - snapshot.start


def trim_history(self: Caller, /, context_id: str, keep: int, *, commit_id: str | None = None) -> Calls[None]:
    """Drop all messages but the last `keep`. Positions of the others stay the same: `history_start` rises."""
    yield self._commit(context_id, commit_id, Trim(natural("keep", keep)))


def pop_history(self: Caller, /, context_id: str, n: int = 1, *, commit_id: str | None = None) -> Calls[list[Message]]:
    """Remove the last `n` messages (fewer if there are fewer) and return them, oldest first."""
    answer = yield self._commit(context_id, commit_id, Pop(natural("n", n)))
    return codec.decode(answer) if answer else []


def clear_history(self: Caller, /, context_id: str, *, commit_id: str | None = None) -> Calls[None]:
    """Drop all messages. Variables and metadata stay, and positions go on from where they were."""
    yield self._commit(context_id, commit_id, Trim(0))


# --- variables ------------------------------------------------------------------------------------------------------


def get_variable(
    self: Caller, /, context_id: str, key: str, default: Any = None, *, as_type: type[Any] | None = None
) -> Calls[Any]:
    """The value of a variable: the caller's own copy. `default` if the variable or the context does not exist.

    `as_type`: what to decode it into, a dataclass (dataclasses-json's settings hold), a model of pydantic, or anything
    else that a dataclass's field may be annotated with. Raises StateSerializationError, with the path of the field,
    where the stored value does not fit.
    """
    snapshot = yield self._query(context_id, variables=(codec.key(key, "key", context_id),))
    text = None if snapshot is None else snapshot.variables.get(key)
    if text is None:
        return default
    value = codec.decode(text)
    if as_type is None:
        return value
    from .decoding import decode_as  # late: few need it

    return decode_as(as_type, value, key, context_id=context_id)


def get_variables(self: Caller, /, context_id: str) -> Calls[dict[str, Any]]:
    """All variables of the context; an absent context has none."""
    snapshot = yield self._query(context_id, variables=None)
    return {} if snapshot is None else _decoded(snapshot.variables)


def set_variable(
    self: Caller, /, context_id: str, key: str, value: Any, *, commit_id: str | None = None
) -> Calls[None]:
    """Set a variable to a JSON value. Creates the context if it does not exist."""
    yield self._commit(context_id, commit_id, put(self, Space.VARIABLES, context_id, key, value))


def set_variables(
    self: Caller, /, context_id: str, variables: Mapping[str, Any], *, commit_id: str | None = None
) -> Calls[None]:
    """Set several variables, all or none. The others stay."""
    changed = entries(self, context_id, variables, "variables")
    if changed:
        yield self._commit(context_id, commit_id, Put(Space.VARIABLES, changed))


def delete_variable(self: Caller, /, context_id: str, key: str, *, commit_id: str | None = None) -> Calls[bool]:
    """Remove a variable. True if it was there."""
    answer = yield self._commit(context_id, commit_id, Drop(Space.VARIABLES, codec.key(key, "key", context_id)))
    return _boolean(answer)


def increment_variable(
    self: Caller, /, context_id: str, key: str, by: float = 1, *, commit_id: str | None = None
) -> Calls[Any]:
    """Add `by`, an integer or a finite float, to a variable, atomically, and return the new value.

    An absent variable counts as 0. Raises StateConflictError if it is no number.
    """
    answer = yield self._commit(context_id, commit_id, increment(self, context_id, key, by))
    return _value(answer)


def update_variable(
    self: Caller,
    /,
    context_id: str,
    key: str,
    function: Callable[[Any], Any],
    default: Any = None,
    *,
    commit_id: str | None = None,
) -> Calls[Any]:
    """Replace a variable's value by `function(value)`, atomically, and return the new value.

    `function` gets `default` if the variable is absent. It runs in the caller's thread, outside of every lock, and
    again whenever another writer came between (compare-and-set), until the deadline.
    """
    name = codec.key(key, "key", context_id)
    fresh = commit_id is None  # nothing else has had the id before; an attempt that changed nothing leaves none
    commit_id = new_commit_id() if commit_id is None else check_commit_id(commit_id)
    deadline = self._deadline()
    fallback = self._encode(default, "default", context_id)
    query = self._query(context_id, variables=(name,))._replace(deadline=deadline)
    for attempt in count(1):
        if fresh:
            snapshot = yield query
        else:  # applied before, it answers as then, without another call of the function
            applied, snapshot = yield InOrder((self._look_up(context_id, commit_id), query))
            if applied != CHANGED:
                return _value(applied)
        before = None if snapshot is None else snapshot.variables.get(name)
        value = function(codec.decode(fallback if before is None else before))
        if hasattr(value, "__await__"):
            getattr(value, "close", bool)()  # nobody will await it
            raise TypeError("function must be a plain function, got an async one: await what it needs beforehand")
        after = self._encode(value, name, context_id)
        commit = self._commit(context_id, commit_id, Put(Space.VARIABLES, ((name, after),)))
        outcome = yield commit._replace(expect=(name, before), answer=after, deadline=deadline, fresh=fresh)
        if outcome != CHANGED:
            return _value(outcome)
        if time.monotonic() > deadline:
            break
        if attempt > 2:  # the clock's last digits spread those who compete
            yield Sleep(min(0.02, 0.0005 * attempt) * (time.monotonic_ns() % 997) / 997)
    raise StateTimeoutError(
        f"the variable {name!r} kept changing until the deadline; not updated", context_id=context_id
    )


# --- metadata -------------------------------------------------------------------------------------------------------


def get_metadata(self: Caller, /, context_id: str, key: str, default: Any = None) -> Calls[Any]:
    """The value of a metadata key: the caller's own copy. `default` if the key or the context does not exist."""
    snapshot = yield self._query(context_id, metadata=(codec.key(key, "key", context_id),))
    text = None if snapshot is None else snapshot.metadata.get(key)
    return default if text is None else codec.decode(text)


def get_all_metadata(self: Caller, /, context_id: str) -> Calls[dict[str, Any]]:
    """All metadata of the context; an absent context has none."""
    snapshot = yield self._query(context_id, metadata=None)
    return {} if snapshot is None else _decoded(snapshot.metadata)


def set_metadata(
    self: Caller, /, context_id: str, key: str, value: Any, *, commit_id: str | None = None
) -> Calls[None]:
    """Set a metadata key to a JSON value. Creates the context if it does not exist."""
    yield self._commit(context_id, commit_id, put(self, Space.METADATA, context_id, key, value))


def delete_metadata(self: Caller, /, context_id: str, key: str, *, commit_id: str | None = None) -> Calls[bool]:
    """Remove a metadata key. True if it was there."""
    answer = yield self._commit(context_id, commit_id, Drop(Space.METADATA, codec.key(key, "key", context_id)))
    return _boolean(answer)


# --- what was read --------------------------------------------------------------------------------------------------


@cache
def _data() -> tuple[type[ConversationState], Callable[[int], datetime]]:
    """Imported late: `state` brings dataclasses along, which many scripts do without."""
    from .state import ConversationState, from_microseconds

    return ConversationState, from_microseconds


def _state(context_id: str, snapshot: Snapshot) -> ConversationState:
    state, time_of = _data()
    user_id, created, updated, revision, start, _, variables, metadata, _, messages, _ = snapshot
    values = codec.decode_all([*variables.values(), *metadata.values(), *messages])
    first = len(variables) + len(metadata)
    return state(
        context_id,
        user_id,
        time_of(created),
        time_of(updated),
        dict(zip(variables, values, strict=False)),
        dict(zip(metadata, values[len(variables) : first], strict=True)),
        values[first:],
        start,
        revision,
    )


def _messages(snapshot: Snapshot) -> list[Message]:
    messages: list[Message] = codec.decode_all(snapshot.messages)
    return messages


def _decoded(texts: dict[str, bytes]) -> dict[str, Any]:
    return dict(zip(texts, codec.decode_all(texts.values()), strict=True)) if texts else {}


def _value(answer: bytes) -> Any:
    """What a commit answered; None where its id is that of a commit that had no answer."""
    return codec.decode(answer) if answer else None


def _boolean(answer: bytes) -> bool:
    return answer == b"true"


def describe(method: Callable[P, R], call: Callable[..., Any], returns: str) -> Callable[P, R]:
    """`method` with the name, docstring and signature of the call that it runs; `returns` is a pattern like ``{}``.

    inspect.signature() looks at `__wrapped__`, which is the call with what the method returns instead of a generator.
    (Importing inspect to make a signature here would be a third of the cost of importing this package.)
    """
    assert isinstance(call, FunctionType)
    inner = str(call.__annotations__["return"]).partition("[")[2].removesuffix("]")
    shown = FunctionType(call.__code__, call.__globals__, call.__name__, call.__defaults__)
    shown.__kwdefaults__ = call.__kwdefaults__
    shown.__annotations__ = {**call.__annotations__, "return": returns.format(inner)}
    for name, value in (
        ("__name__", call.__name__),
        ("__qualname__", call.__qualname__),
        ("__doc__", call.__doc__),
        ("__annotations__", shown.__annotations__),
        ("__wrapped__", shown),
    ):
        setattr(method, name, value)
    return method
