"""What both contexts are made of: a storage and a user, the steps of calls, commit ids, and changes put together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from contextvars import ContextVar
from itertools import count
from math import inf

from . import codec
from .engine import engine_of
from .errors import StateAccessError, StateConfigError
from .keys import check_context_id, check_user_id
from .operations import (
    CHANGED,
    LONGEST,
    MOST,
    Append,
    Change,
    Commit,
    Increment,
    Operation,
    Own,
    Put,
    Query,
    Space,
    Trim,
    Window,
)
from .records import new_tuple
from .storage.base import StateStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

    R = TypeVar("R")
    CallerT = TypeVar("CallerT", bound="Caller")
else:
    from .records import NamedTuple

    Generic, R = tuple, object  # which a class statement below names


UPDATABLE = ("user_id", "variables", "metadata", "history")
"""The fields that `update_state` sets."""


# --- steps ----------------------------------------------------------------------------------------------------------


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
if TYPE_CHECKING:
    Calls: TypeAlias = Generator[Step, Any, R]
    """What a documented call is here; R is what it returns to the caller."""

    Emits: TypeAlias = Generator[Operation | Emit[R], Any, None]
    """What a documented iterator is here; R is what it hands out."""
else:
    Calls = Emits = Generator


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


_GENERATOR = 0x20 | 0x200  # of code objects: inspect.CO_GENERATOR, CO_ASYNC_GENERATOR


class HeldTurn:
    """A turn whose block the running code is inside of, or was: tasks, and the callers of generators, inherit it.

    `block` is the frame of the block; None when the turn has ended.
    """

    __slots__ = ("block", "caller", "context_id", "token")

    def __init__(self, caller: Caller, context_id: str, token: str, block: FrameType) -> None:
        self.caller = caller
        self.context_id = context_id
        self.token = token
        self.block: FrameType | None = block

    def is_running(self) -> bool:
        """Whether this is called from inside the block, directly or through others."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.block:
            frame = frame.f_back
        return frame is not None

    def is_left(self) -> bool:
        """Whether the turn has ended, or its block is one of a generator whose caller is running instead."""
        block = self.block
        return block is None or (bool(block.f_code.co_flags & _GENERATOR) and not self.is_running())


held_turns: ContextVar[tuple[HeldTurn, ...]] = ContextVar("agentstate_turns", default=())


class Caller:
    """What both contexts are: a storage, the user they are bound to, and the turns held through them."""

    degraded: bool = False
    """Whether this stands in for a storage that cannot be reached (`on_unavailable="ephemeral"`)."""

    def __init__(self, storage: StateStorage | None = None, *, user_id: str | None = None) -> None:
        if storage is None:
            from .storage.memory import InMemoryStorage

            storage = InMemoryStorage()
        self.storage = check_storage(storage)
        self._engine = engine_of(self.storage)
        self.user_id = None if user_id is None else check_user_id(user_id)
        self._tag = "" if user_id is None else _tag(user_id)
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
        for turn in held_turns.get():
            if turn.caller is self and turn.context_id == context_id and turn.block is not None:
                return turn.token
        return None

    def _commit(self, context_id: str, commit_id: str | None, *changes: Change) -> Commit:
        check_context_id(context_id)
        storage = self.storage
        if storage.max_history is not None and any(type(change) is Append for change in changes):
            changes = (*changes, Trim(storage.max_history))
        return new_tuple(
            Commit,
            (
                context_id,
                changes,
                self._own_id(new_commit_id() if commit_id is None else check_commit_id(commit_id)),
                self.user_id,
                self._fence(context_id) if self._fences or held_turns.get() else None,
                False,
                None,
                None,
                b"",
                time.monotonic() + storage.deadline,
                commit_id is None,
            ),
        )

    def _own_id(self, commit_id: str) -> str:
        """The commit id as it is remembered, which is for each user apart: what a bound caller gives carries its tag.

        An id that carries it already, such as that of an error, stays as it is.
        """
        return commit_id if commit_id.endswith(self._tag) else commit_id + self._tag

    def _look_up(self, context_id: str, commit_id: str) -> Commit:
        """An operation that answers as the remembered commit of that id did, and CHANGED where none is remembered."""
        return self._commit(context_id, commit_id)._replace(answer=CHANGED)

    def _query(
        self,
        context_id: str,
        variables: tuple[str, ...] | None = (),
        metadata: tuple[str, ...] | None = (),
        history: Window | None = None,
    ) -> Query:
        deadline = time.monotonic() + self.storage.deadline
        return new_tuple(Query, (check_context_id(context_id), variables, metadata, history, self.user_id, deadline))

    def _encode(self, value: Any, name: str, context_id: str) -> bytes:
        return codec.encode(value, name, context_id=context_id, limit=self.storage.max_value_bytes)

    def _owner(self, user_id: str | None, context_id: str | None = None) -> str | None:
        """The user that a call acts for: the given one, or the one this context is bound to."""
        if user_id is None:
            return self.user_id
        if self.user_id is not None and user_id != self.user_id:
            raise StateAccessError(f"this context is bound to {self.user_id!r}, not {user_id!r}", context_id=context_id)
        return check_user_id(user_id)


def _tag(user_id: str) -> str:
    from hashlib import sha256  # late: only bound contexts pay for OpenSSL

    return "~" + sha256(user_id.encode()).hexdigest()[:16]


def check_storage(storage: Any) -> StateStorage:
    """`storage`, if it is a storage object. Raises StateConfigError, for a name or a class too."""
    if isinstance(storage, StateStorage):
        return storage
    if isinstance(storage, type):
        advice = f"make an object of the class: {storage.__name__}(...)"
    else:
        name = storage if isinstance(storage, str) and storage.isidentifier() else "file"
        manager = f"get_context_manager({name!r}"
        advice = f"for a storage by its name use {manager}) or, for the blocking context, {manager}, blocking=True)"
    raise StateConfigError(f"storage must be a storage object such as InMemoryStorage(), got {storage!r:.80}; {advice}")


def check_commit_id(commit_id: Any) -> str:
    """`commit_id`, if it is text of 1 to 200 printable ASCII characters. Raises ValueError otherwise."""
    if isinstance(commit_id, str) and 0 < len(commit_id) <= 200 and commit_id.isascii() and commit_id.isprintable():
        return commit_id
    raise ValueError(f"commit_id must be text of 1 to 200 printable ASCII characters, got {commit_id!r:.80}")


# --- changes --------------------------------------------------------------------------------------------------------


def state_changes(self: Caller, context_id: str, fields: Mapping[str, Any]) -> list[Change]:
    """The changes that replace these fields of the state."""
    changes: list[Change] = []
    for field, value in fields.items():
        if field == "user_id":
            changes.append(Own(None if value is None else self._owner(value, context_id)))
        elif field == "variables":
            changes.append(Put(Space.VARIABLES, entries(self, context_id, value, field), replace=True))
        elif field == "metadata":
            changes.append(Put(Space.METADATA, entries(self, context_id, value, field), replace=True))
        elif field == "history":
            texts = message_texts(self, context_id, value)
            changes += [Trim(0), Append(texts)] if texts else [Trim(0)]
        else:
            raise TypeError(f"update_state() cannot set {field!r}; fields are {', '.join(UPDATABLE)}")
    return changes


def message_texts(self: Caller, context_id: str, messages: Iterable[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """The stored forms of messages given as mappings, dataclasses or models of pydantic."""
    given: object = messages
    if isinstance(given, Mapping | str) or not hasattr(given, "__iter__") or hasattr(given, "role"):
        raise TypeError(
            f"messages must be a list of messages, got {type(given).__name__}; put a single one into a list"
        )
    limit = self.storage.max_value_bytes
    return tuple(
        codec.message_from_mapping(given, f"messages[{index}]", context_id=context_id, limit=limit)
        for index, given in enumerate(messages)
    )


def increment(self: Caller, context_id: str, key: str, by: float) -> Increment:
    """The change that adds `by`. Raises TypeError or ValueError unless it is an integer or a finite float."""
    if isinstance(by, bool) or not isinstance(by, int | float):
        raise TypeError(f"by must be an integer or a float, got {type(by).__name__}")
    if by != by or abs(by) == inf:  # not isfinite(): it fails for large integers
        raise ValueError(f"by must be finite, got {by!r}")
    return Increment(codec.key(key, "key", context_id), self._encode(by, "by", context_id))


def put(self: Caller, space: Space, context_id: str, key: str, value: Any) -> Put:
    name = codec.key(key, "key", context_id)
    text = codec.encode(value, name, context_id=context_id, limit=self.storage.max_value_bytes)
    return new_tuple(Put, (space, ((name, text),), False))


def entries(self: Caller, context_id: str, values: Mapping[str, Any], what: str) -> tuple[tuple[str, bytes], ...]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be a mapping of names to values, got {type(values).__name__}")
    return tuple(
        (codec.key(name, what, context_id), self._encode(value, f"{what}.{name}", context_id))
        for name, value in values.items()
    )


# --- arguments ------------------------------------------------------------------------------------------------------


def count_or_none(option: str, value: int | None) -> int | None:
    return None if value is None else natural(option, value)


def natural(option: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be a whole number, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{option} must not be negative, got {value}")
    return min(value, MOST)


def positive(option: str, value: float, *, zero: bool = False, unit: str = "seconds") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number of {unit}, got {type(value).__name__}")
    if not 0 <= value < inf or (value == 0 and not zero):
        raise ValueError(f"{option} must be a {'' if zero else 'positive '}number of {unit}, got {value!r}")
    return min(value, LONGEST)
