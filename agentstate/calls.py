"""The documented calls, each as a small generator that does no input or output itself.

A call yields what it wants from the storage, a `Step`, and is sent the outcome (or thrown the error). Two drivers run
them: `agentstate.context` blocks, `agentstate.aio` awaits. So both contexts are one API by construction.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextvars import ContextVar
from functools import cache
from itertools import count
from math import inf, isfinite
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

from . import codec
from .errors import (
    ContextNotFoundError,
    StateAccessError,
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
)
from .keys import check_context_id, check_user_id
from .operations import (
    CHANGED,
    Append,
    Change,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Lease,
    Listing,
    Operation,
    Own,
    Pop,
    Put,
    Query,
    Restore,
    Snapshot,
    Space,
    Trim,
    Window,
)

if TYPE_CHECKING:
    from logging import Logger

    from .state import ConversationState, Message
    from .storage.base import StateStorage

P = ParamSpec("P")
R = TypeVar("R")


class Sleep(NamedTuple):
    """A step: let `seconds` pass."""

    seconds: float


class InOrder(NamedTuple):
    """A step: operations on one context, one after the other. Outcome: the list of their outcomes."""

    operations: tuple[Operation, ...]


class Each(NamedTuple):
    """A step: independent operations. Outcome: the list of their outcomes, errors as values."""

    operations: list[Operation]


class Emit(NamedTuple, Generic[R]):
    """A step of an iterator: hand these items out."""

    items: list[R]


Step: TypeAlias = Operation | Sleep | InOrder | Each
Calls: TypeAlias = Generator[Step, Any, R]
"""What a documented call is here; R is what it returns to the caller."""

Emits: TypeAlias = Generator[Operation | Emit[R], Any, None]
"""What a documented iterator is here; R is what it hands out."""

UPDATABLE = ("user_id", "variables", "metadata", "history")
_VARIABLES, _METADATA = Space.VARIABLES, Space.METADATA


# --- commit ids and turns -------------------------------------------------------------------------------------------

_process_id = os.urandom(6).hex()
_commit_number = count(1)


def new_commit_id() -> str:
    """An id that no other commit has: random per process, then counted."""
    return f"{_process_id}-{next(_commit_number):x}"


def _new_process_id() -> None:
    global _process_id
    _process_id = os.urandom(6).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_process_id)


class HeldTurn(NamedTuple):
    """A turn that the running code is inside of."""

    caller: Caller
    context_id: str
    token: str


_turns: ContextVar[tuple[HeldTurn, ...]] = ContextVar("agentstate_turns", default=())


class Caller:
    """What both contexts are: a storage, the user they are bound to, and the turns held through them."""

    degraded: bool = False
    """Whether this stands in for a storage that cannot be reached (`on_unavailable="ephemeral"`)."""

    def __init__(self, storage: StateStorage | None = None, *, user_id: str | None = None) -> None:
        if storage is None:
            from .storage.memory import InMemoryStorage

            storage = InMemoryStorage()
        self.storage = storage
        self.user_id = None if user_id is None else check_user_id(user_id)
        self._fences: dict[str, str] = {}

    def __repr__(self) -> str:
        bound = f", user_id={self.user_id!r}" if self.user_id is not None else ""
        return f"{type(self).__name__}({self.storage!r}{bound})"

    def holding(self: CallerT, context_id: str, token: str) -> CallerT:
        """The same context, for code that runs inside a turn wherever it runs (contextvars do not matter to it)."""
        twin = type(self)(self.storage, user_id=self.user_id)
        twin._fences = {**self._fences, context_id: token}
        twin.degraded = self.degraded
        return twin

    def _deadline(self) -> float:
        return time.monotonic() + self.storage.deadline

    def _fence(self, context_id: str) -> str | None:
        """The token of the turn on this context that the running code is inside of."""
        token = self._fences.get(context_id)
        if token is not None:
            return token
        for turn in _turns.get():
            if turn.caller is self and turn.context_id == context_id:
                return turn.token
        return None

    def _commit(self, context_id: str, commit_id: str | None, *changes: Change) -> Commit:
        check_context_id(context_id)
        if self.storage.max_history is not None and any(type(change) is Append for change in changes):
            changes = (*changes, Trim(self.storage.max_history))
        return Commit(
            context_id,
            changes,
            new_commit_id() if commit_id is None else check_commit_id(commit_id),
            self.user_id,
            self._fence(context_id),
            deadline=self._deadline(),
        )

    def _query(self, context_id: str, **what: Any) -> Query:
        return Query(check_context_id(context_id), user=self.user_id, deadline=self._deadline(), **what)

    def _encode(self, value: Any, name: str, context_id: str) -> bytes:
        return codec.encode(value, name, context_id=context_id, limit=self.storage.max_value_bytes)

    def _owner(self, user_id: str | None, context_id: str | None = None) -> str | None:
        """The user that a call acts for: the given one, or the one this context is bound to."""
        if user_id is None:
            return self.user_id
        if self.user_id is not None and user_id != self.user_id:
            raise StateAccessError(f"this context is bound to {self.user_id!r}, not {user_id!r}", context_id=context_id)
        return check_user_id(user_id)


CallerT = TypeVar("CallerT", bound=Caller)


def check_commit_id(commit_id: Any) -> str:
    """`commit_id`, if it can be one: text of 1 to 200 characters of printable ASCII. Raises ValueError otherwise."""
    if isinstance(commit_id, str) and 0 < len(commit_id) <= 200 and commit_id.isascii() and commit_id.isprintable():
        return commit_id
    raise ValueError(f"a commit_id is text of 1 to 200 printable ASCII characters, not {commit_id!r:.80}")


# --- the whole context ----------------------------------------------------------------------------------------------


def get_or_create(
    self: Caller, /, context_id: str, user_id: str | None = None, *, commit_id: str | None = None
) -> Calls[ConversationState]:
    """The state of the context, which is created for `user_id` if it does not exist.

    Claims a context that has no owner yet; raises StateAccessError if it belongs to another user. Reading an existing
    context is no write: neither `updated_at` nor its ttl move. Atomic; costs a read of the whole history.
    """
    owner = self._owner(user_id, context_id)
    commit = self._commit(context_id, commit_id, Create(owner))
    everything = self._query(context_id, variables=None, metadata=None, history=Window())
    for _ in range(2):  # it may expire right after the commit that found it existing, and had nothing to do
        _, snapshot = yield InOrder((commit, everything))
        if snapshot is not None:
            return _state(context_id, snapshot)
    raise ContextNotFoundError(f"{context_id!r} was cleared after this commit created it", context_id=context_id)


def get_state(self: Caller, /, context_id: str, *, history_limit: int | None = None) -> Calls[ConversationState | None]:
    """Everything about the context in one consistent read, or None if it does not exist.

    With `history_limit` only the last so many messages are read; the cost is then the same however long the history.
    """
    window = Window(limit=_count("history_limit", history_limit))
    snapshot = yield self._query(context_id, variables=None, metadata=None, history=window)
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
    _count("upto", upto)
    check_context_id(target)
    snapshot = yield self._query(source, variables=None, metadata=None, history=Window(before=upto))
    if snapshot is None:
        raise ContextNotFoundError(f"there is no context {source!r} to fork", context_id=source)
    changes: list[Change] = [Restore(snapshot.user_id, snapshot.start)]
    if snapshot.variables:
        changes.append(Put(_VARIABLES, tuple(snapshot.variables.items())))
    if snapshot.metadata:
        changes.append(Put(_METADATA, tuple(snapshot.metadata.items())))
    if snapshot.messages:
        changes.append(Append(tuple(snapshot.messages)))
    yield self._commit(target, commit_id, *changes)._replace(absent=True)


def cleanup_old_contexts(self: Caller, /, max_age_hours: float = 24) -> Calls[int]:
    """Delete the contexts that were last written more than `max_age_hours` ago, and say how many.

    Each is deleted atomically and only if it is still that old. Memory use is bounded. Goes on past a context that
    fails, and raises the first error at the end.
    """
    seconds = min(_positive("max_age_hours", max_age_hours, zero=True, unit="hours") * 3600.0, 1e11)
    deleted = 0
    failures: list[StateError] = []
    cursor: str | None = ""
    while cursor is not None:
        page = yield Listing(cursor, user=self.user_id, idle_for=seconds, deadline=self._deadline())
        commits = [self._commit(context_id, None, Delete())._replace(idle_for=seconds) for context_id in page[0]]
        for outcome in (yield Each(list(commits))) if commits else ():
            if isinstance(outcome, StateError):
                failures.append(outcome)
            else:
                deleted += _boolean(outcome)
        cursor = page[1]
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
    yield self._commit(context_id, commit_id, Append((text,)))


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
    window = Window(limit=_count("limit", limit), before=_count("before", before))
    snapshot = yield self._query(context_id, history=window)
    return [] if snapshot is None else _messages(snapshot)


def iter_history(self: Caller, /, context_id: str, *, page_size: int = 100) -> Emits[Message]:
    """The messages, oldest first, read `page_size` at a time: an iterator that needs no more memory than a page."""
    if not _count("page_size", page_size):
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
    yield self._commit(context_id, commit_id, Trim(_required_count("keep", keep)))


def pop_history(self: Caller, /, context_id: str, n: int = 1, *, commit_id: str | None = None) -> Calls[list[Message]]:
    """Remove the last `n` messages (fewer if there are fewer) and return them, oldest first."""
    answer = yield self._commit(context_id, commit_id, Pop(_required_count("n", n)))
    return codec.decode(answer) if answer else []


def clear_history(self: Caller, /, context_id: str, *, commit_id: str | None = None) -> Calls[None]:
    """Drop all messages. Variables and metadata stay, and positions go on from where they were."""
    yield self._commit(context_id, commit_id, Trim(0))


# --- variables ------------------------------------------------------------------------------------------------------


def get_variable(
    self: Caller, /, context_id: str, key: str, default: Any = None, *, as_type: type[Any] | None = None
) -> Calls[Any]:
    """The value of a variable: the caller's own copy. `default` if the variable or the context does not exist.

    `as_type`: a dataclass to decode it into, with dataclasses-json.
    """
    snapshot = yield self._query(context_id, variables=(codec.key(key, "key", context_id),))
    text = None if snapshot is None else snapshot.variables.get(key)
    if text is None:
        return default
    value = codec.decode(text)
    return value if as_type is None else codec.decode_as(as_type, value)


def get_variables(self: Caller, /, context_id: str) -> Calls[dict[str, Any]]:
    """All variables of the context; an absent context has none."""
    snapshot = yield self._query(context_id, variables=None)
    return {} if snapshot is None else _decoded(snapshot.variables)


def set_variable(
    self: Caller, /, context_id: str, key: str, value: Any, *, commit_id: str | None = None
) -> Calls[None]:
    """Set a variable to a JSON value. Creates the context if it does not exist."""
    yield self._commit(context_id, commit_id, _put(self, _VARIABLES, context_id, key, value))


def set_variables(
    self: Caller, /, context_id: str, variables: Mapping[str, Any], *, commit_id: str | None = None
) -> Calls[None]:
    """Set several variables, all or none. The others stay."""
    items = _items(self, context_id, variables, "variables")
    if items:
        yield self._commit(context_id, commit_id, Put(_VARIABLES, items))


def delete_variable(self: Caller, /, context_id: str, key: str, *, commit_id: str | None = None) -> Calls[bool]:
    """Remove a variable. True if it was there."""
    answer = yield self._commit(context_id, commit_id, Drop(_VARIABLES, codec.key(key, "key", context_id)))
    return _boolean(answer)


def increment_variable(
    self: Caller, /, context_id: str, key: str, by: float = 1, *, commit_id: str | None = None
) -> Calls[Any]:
    """Add `by`, an integer or a finite float, to a variable, atomically, and return the new value.

    An absent variable counts as 0. Raises StateConflictError if it is no number.
    """
    answer = yield self._commit(context_id, commit_id, increment(self, context_id, key, by))
    return codec.decode(answer)


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
    commit_id = new_commit_id() if commit_id is None else check_commit_id(commit_id)
    deadline = self._deadline()
    fallback = self._encode(default, "default", context_id)
    for attempt in count(1):
        snapshot = yield self._query(context_id, variables=(name,))._replace(deadline=deadline)
        before = None if snapshot is None else snapshot.variables.get(name)
        after = self._encode(function(codec.decode(fallback if before is None else before)), name, context_id)
        commit = self._commit(context_id, commit_id, Put(_VARIABLES, ((name, after),)))
        outcome = yield commit._replace(expect=(name, before), answer=after, deadline=deadline)
        if outcome != CHANGED:
            return codec.decode(outcome)
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
    yield self._commit(context_id, commit_id, _put(self, _METADATA, context_id, key, value))


def delete_metadata(self: Caller, /, context_id: str, key: str, *, commit_id: str | None = None) -> Calls[bool]:
    """Remove a metadata key. True if it was there."""
    answer = yield self._commit(context_id, commit_id, Drop(_METADATA, codec.key(key, "key", context_id)))
    return _boolean(answer)


# --- batches and turns ----------------------------------------------------------------------------------------------


class Batch:
    """Collects writes to one context, to be committed as one. The methods are those of the contexts, without
    `context_id`; nothing is sent, and so nothing can be answered, before the end."""

    def __init__(self, caller: Caller, context_id: str, commit_id: str | None) -> None:
        self._caller = caller
        self._context_id = check_context_id(context_id)
        self._commit_id = None if commit_id is None else check_commit_id(commit_id)
        self._changes: list[Change] = []
        self._open = False

    def _record(self, *changes: Change) -> None:
        if not self._open:
            raise StateConflictError(
                "this batch is not open; use it inside its with block", context_id=self._context_id
            )
        self._changes += changes

    def _enter(self) -> None:
        if self._open:
            raise StateConflictError("this batch is open already", context_id=self._context_id)
        self._open = True
        self._changes = []

    def _finish(self, failed: bool) -> Calls[None]:
        """Commit what was collected, unless the block failed."""
        self._open = False
        if self._changes and not failed:
            yield self._caller._commit(self._context_id, self._commit_id, *self._changes)

    def add_to_history(
        self, role: str, content: Any, metadata: Mapping[str, Any] | None = None, *, timestamp: str | None = None
    ) -> None:
        """Append a message."""
        limit = self._caller.storage.max_value_bytes
        text = codec.message(role, content, metadata, timestamp, context_id=self._context_id, limit=limit)
        self._record(Append((text,)))

    def extend_history(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Append messages."""
        texts = message_texts(self._caller, self._context_id, messages)
        self._record(*([Append(texts)] if texts else []))

    def trim_history(self, keep: int) -> None:
        """Drop all messages but the last `keep`, those of this batch included."""
        self._record(Trim(_required_count("keep", keep)))

    def clear_history(self) -> None:
        """Drop all messages."""
        self._record(Trim(0))

    def set_variable(self, key: str, value: Any) -> None:
        """Set a variable."""
        self._record(_put(self._caller, _VARIABLES, self._context_id, key, value))

    def set_variables(self, variables: Mapping[str, Any]) -> None:
        """Set several variables."""
        items = _items(self._caller, self._context_id, variables, "variables")
        self._record(*([Put(_VARIABLES, items)] if items else []))

    def delete_variable(self, key: str) -> None:
        """Remove a variable."""
        self._record(Drop(_VARIABLES, codec.key(key, "key", self._context_id)))

    def increment_variable(self, key: str, by: float = 1) -> None:
        """Add to a variable. If it turns out to be no number, the whole batch is a StateConflictError."""
        self._record(increment(self._caller, self._context_id, key, by))

    def set_metadata(self, key: str, value: Any) -> None:
        """Set a metadata key."""
        self._record(_put(self._caller, _METADATA, self._context_id, key, value))

    def delete_metadata(self, key: str) -> None:
        """Remove a metadata key."""
        self._record(Drop(_METADATA, codec.key(key, "key", self._context_id)))

    def update_state(self, **fields: Any) -> None:
        """Replace whole fields of the state."""
        self._record(*state_changes(self._caller, self._context_id, fields))

    def clear_context(self) -> None:
        """Delete the context; what the batch writes after this makes a new one."""
        self._record(Delete())


class Turn(Batch):
    """A batch that also holds the context's lease: one turn at a time, across threads, processes and machines."""

    def __init__(
        self, caller: Caller, context_id: str, lease: float, timeout: float | None, commit_id: str | None
    ) -> None:
        super().__init__(caller, context_id, commit_id)
        self._lease = _positive("lease", lease)
        self._timeout = self._lease + 10 if timeout is None else _positive("timeout", timeout, zero=True)
        self.token = ""
        """The fencing token of the turn while it is held."""

    def _lease_step(self, action: Any) -> Lease:
        caller = self._caller
        return Lease(self._context_id, action, self.token, self._lease, caller.user_id, caller._deadline())

    def _take(self, *, track: bool = True) -> Calls[None]:
        """Wait for the lease. `track`: writes of the running code through the caller carry the fence from now on."""
        from .storage.renewal import keep_renewing

        if self._caller._fence(self._context_id) is not None:
            raise StateConflictError(
                f"a turn on {self._context_id!r} is held here already; turns do not nest", context_id=self._context_id
            )
        self._enter()
        self.token = os.urandom(12).hex()
        give_up = time.monotonic() + self._timeout
        pause = 0.002
        unanswered = False
        try:
            while True:
                unanswered = True
                taken = yield self._lease_step("take")
                unanswered = False
                if taken:
                    break
                left = give_up - time.monotonic()
                if left <= 0:
                    raise StateTimeoutError(
                        f"waited {self._timeout:g} s in vain for the turn on {self._context_id!r}",
                        context_id=self._context_id,
                    )
                yield Sleep(min(pause, left))
                pause = min(pause * 1.5, 0.1)
        except BaseException as error:
            self._open = False
            if unanswered and isinstance(error, GeneratorExit | StateOutcomeUnknownError):
                self._give_back()  # it may be held, though nobody heard of it
            raise
        if track:
            _turns.set((*_turns.get(), HeldTurn(self._caller, self._context_id, self.token)))
        self._renewal = keep_renewing(self._caller.storage, self._lease_step("renew"))

    def _end(self, failed: bool) -> Calls[None]:
        """Commit what was collected, with the fence, unless the block failed; give the lease back in any case."""
        interrupted = False
        try:
            if self._changes and not failed:
                commit = self._caller._commit(self._context_id, self._commit_id, *self._changes)
                yield commit._replace(fence=self.token)
        except GeneratorExit:
            interrupted = True
            raise
        finally:
            self._open = False
            self._renewal.stop()
            _turns.set(tuple(turn for turn in _turns.get() if turn.token != self.token))
            if interrupted:
                self._give_back()
            else:
                yield from self._release()

    def _give_back(self) -> None:
        """Give the lease back without waiting for it, where the code that would have waited was cancelled."""
        self._caller.storage.dispatcher.submit((self._lease_step("release"),), lambda _: None)

    def _release(self) -> Calls[None]:
        try:
            yield self._lease_step("release")
        except GeneratorExit:
            self._give_back()
            raise
        except StateError as error:
            # The lease ends by itself; the outcome of the turn is known and must not be replaced by this.
            from logging import getLogger

            getLogger("agentstate.context").warning("a turn's lease was not given back, and will expire: %s", error)


# --- debug logging --------------------------------------------------------------------------------------------------

LOGGED_AS = ["agentstate.context"]
"""Names of the loggers that operations may be logged by: the first that is enabled for DEBUG takes the record."""

_DEBUG = 10  # logging.DEBUG
_LOGGED_NAMES = {"_finish": "batch", "_take": "turn", "_end": "end of turn"}

S = TypeVar("S")


def logged(steps: Generator[S, Any, R]) -> Generator[S, Any, R]:
    """`steps`, which write one DEBUG record when they end, if somebody wants it.

    It says what was called, for which context, how many bytes of values went each way and how long the storage took;
    never what the values are. An application that does not use `logging` does not pay for its import.
    """
    if "logging" in sys.modules:
        for name in LOGGED_AS:
            logger = _logger(name)
            if logger.isEnabledFor(_DEBUG):
                return _logging(steps, logger)
    return steps


@cache
def _logger(name: str) -> Logger:
    from logging import getLogger

    return getLogger(name)


def _logging(steps: Generator[S, Any, R], logger: Logger) -> Generator[S, Any, R]:
    context_id: str | None = None
    written = read = 0
    seconds = 0.0
    end = ""
    try:
        step = next(steps)
        while True:
            context_id = context_id or _context_id_of(step)
            written += _bytes_in(step)
            began = time.perf_counter()
            try:
                outcome = yield step
            except StateError as error:
                seconds += time.perf_counter() - began
                step = steps.throw(error)
            else:
                if type(step) is not Emit:  # the time of an emitted item is its consumer's
                    seconds += time.perf_counter() - began
                    read += _bytes_in(outcome)
                step = steps.send(outcome)
    except StopIteration as stop:
        result: R = stop.value
        return result
    except GeneratorExit:
        end = ", not finished"
        steps.close()
        raise
    except BaseException as error:
        end = f", {type(error).__name__}"
        raise
    finally:
        name = getattr(steps, "__name__", "")
        logger.debug(
            "%s %r: %d bytes written, %d read, %.3f ms%s",
            _LOGGED_NAMES.get(name, name),
            context_id,
            written,
            read,
            seconds * 1000,
            end,
        )


def _context_id_of(step: Any) -> str | None:
    operations = step.operations if isinstance(step, InOrder | Each) else [step]
    return getattr(operations[0], "context_id", None)


def _bytes_in(value: Any) -> int:
    """The length of all values in a step or an outcome."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, tuple | list) else 0


# --- what the calls share -------------------------------------------------------------------------------------------


def state_changes(self: Caller, context_id: str, fields: Mapping[str, Any]) -> list[Change]:
    """The changes that replace these fields of the state."""
    changes: list[Change] = []
    for field, value in fields.items():
        if field == "user_id":
            changes.append(Own(None if value is None else self._owner(value, context_id)))
        elif field == "variables":
            changes.append(Put(_VARIABLES, _items(self, context_id, value, field), replace=True))
        elif field == "metadata":
            changes.append(Put(_METADATA, _items(self, context_id, value, field), replace=True))
        elif field == "history":
            texts = message_texts(self, context_id, value)
            changes += [Trim(0), Append(texts)] if texts else [Trim(0)]
        else:
            raise TypeError(f"update_state() cannot set {field!r}; fields are {', '.join(UPDATABLE)}")
    return changes


def message_texts(self: Caller, context_id: str, messages: Iterable[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """The stored forms of messages given as mappings."""
    limit = self.storage.max_value_bytes
    return tuple(
        codec.message_from_mapping(given, f"messages[{index}]", context_id=context_id, limit=limit)
        for index, given in enumerate(messages)
    )


def increment(self: Caller, context_id: str, key: str, by: float) -> Increment:
    """The change that adds `by`. Raises TypeError or ValueError unless it is an integer or a finite float."""
    if isinstance(by, bool) or not isinstance(by, int | float):
        raise TypeError(f"by is an integer or a float, not {type(by).__name__}")
    if by != by or abs(by) == inf:  # not isfinite(): it fails for large integers
        raise ValueError(f"by is finite, not {by!r}")
    return Increment(codec.key(key, "key", context_id), self._encode(by, "by", context_id))


def _put(self: Caller, space: Space, context_id: str, key: str, value: Any) -> Put:
    name = codec.key(key, "key", context_id)
    return Put(space, ((name, self._encode(value, name, context_id)),))


def _items(self: Caller, context_id: str, values: Mapping[str, Any], what: str) -> tuple[tuple[str, bytes], ...]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} is a mapping of names to values, not {type(values).__name__}")
    return tuple(
        (codec.key(name, what, context_id), self._encode(value, f"{what}.{name}", context_id))
        for name, value in values.items()
    )


def _state(context_id: str, snapshot: Snapshot) -> ConversationState:
    from .state import ConversationState, from_microseconds

    return ConversationState(
        context_id,
        snapshot.user_id,
        from_microseconds(snapshot.created),
        from_microseconds(snapshot.updated),
        _decoded(snapshot.variables),
        _decoded(snapshot.metadata),
        _messages(snapshot),
        snapshot.start,
        snapshot.revision,
    )


def _messages(snapshot: Snapshot) -> list[Message]:
    messages: list[Message] = codec.decode(b"[" + b",".join(snapshot.messages) + b"]")
    return messages


def _decoded(texts: dict[str, bytes]) -> dict[str, Any]:
    return {key: codec.decode(text) for key, text in texts.items()}


def _boolean(answer: bytes) -> bool:
    return answer == b"true"


def _count(option: str, value: int | None) -> int | None:
    return None if value is None else _required_count(option, value)


def _required_count(option: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} is a whole number, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{option} must not be negative, and is {value}")
    return value


def _positive(option: str, value: float, *, zero: bool = False, unit: str = "seconds") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} is a number of {unit}, not {type(value).__name__}")
    if not isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{option} is a {'' if zero else 'positive '}number of {unit}, not {value!r}")
    return value


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
