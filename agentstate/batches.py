"""Writes that are committed as one: `Batch`, and `Turn`, which also holds the conversation's lease."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, Final

from . import codec
from .caller import (
    Caller,
    Calls,
    HeldTurn,
    Sleep,
    check_commit_id,
    entries,
    held_turns,
    increment,
    message_texts,
    natural,
    positive,
    put,
    state_changes,
)
from .engine import CallBack
from .engine.renewal import keep_renewing
from .errors import StateConflictError, StateError, StateOutcomeUnknownError, StateTimeoutError
from .keys import check_context_id
from .operations import Append, Change, Delete, Drop, Lease, Put, Space, Trim


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

    def _check_no_context_id(self, last: object) -> None:
        """Raise TypeError where the last argument is text: the arguments begin with a context id, as elsewhere."""
        if isinstance(last, str):
            raise TypeError(f"the methods of a batch take no context_id: its context is {self._context_id!r}")

    def _finish(self, failed: bool) -> Calls[None]:
        """Commit what was collected, unless the block failed."""
        self._open = False
        if self._changes and not failed:
            yield self._caller._commit(self._context_id, self._commit_id, *self._changes)

    def add_to_history(
        self, role: str, content: Any, metadata: Mapping[str, Any] | None = None, *, timestamp: str | None = None
    ) -> None:
        """Append a message."""
        self._check_no_context_id(metadata)
        limit = self._caller.storage.max_value_bytes
        text = codec.message(role, content, metadata, timestamp, context_id=self._context_id, limit=limit)
        self._record(Append((text,)))

    def extend_history(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Append messages."""
        texts = message_texts(self._caller, self._context_id, messages)
        self._record(*([Append(texts)] if texts else []))

    def trim_history(self, keep: int) -> None:
        """Drop all messages but the last `keep`, those of this batch included."""
        self._record(Trim(natural("keep", keep)))

    def clear_history(self) -> None:
        """Drop all messages."""
        self._record(Trim(0))

    def set_variable(self, key: str, value: Any) -> None:
        """Set a variable."""
        self._record(put(self._caller, Space.VARIABLES, self._context_id, key, value))

    def set_variables(self, variables: Mapping[str, Any]) -> None:
        """Set several variables."""
        changed = entries(self._caller, self._context_id, variables, "variables")
        self._record(*([Put(Space.VARIABLES, changed)] if changed else []))

    def delete_variable(self, key: str) -> None:
        """Remove a variable."""
        self._record(Drop(Space.VARIABLES, codec.key(key, "key", self._context_id)))

    def increment_variable(self, key: str, by: float = 1) -> None:
        """Add to a variable. If it is not a number, committing the batch raises StateConflictError."""
        self._check_no_context_id(by)
        self._record(increment(self._caller, self._context_id, key, by))

    def set_metadata(self, key: str, value: Any) -> None:
        """Set a metadata key."""
        self._record(put(self._caller, Space.METADATA, self._context_id, key, value))

    def delete_metadata(self, key: str) -> None:
        """Remove a metadata key."""
        self._record(Drop(Space.METADATA, codec.key(key, "key", self._context_id)))

    def update_state(self, **fields: Any) -> None:
        """Replace whole fields of the state."""
        self._record(*state_changes(self._caller, self._context_id, fields))

    def clear_context(self) -> None:
        """Delete the context; later writes of the batch create a new one."""
        self._record(Delete())


_FIRST_ANSWER: Final = 1.0
"""Seconds that the store has for saying whether a turn is free, however short the timeout of the turn."""

_holders: dict[tuple[int, str], HeldTurn] = {}
"""The turns that this process holds, by the id of the storage and the context id."""


class Turn(Batch):
    """A batch that also holds the context's lease: one turn at a time, across threads, processes and machines."""

    def __init__(
        self, caller: Caller, context_id: str, lease: float, timeout: float | None, commit_id: str | None
    ) -> None:
        super().__init__(caller, context_id, commit_id)
        self._lease = positive("lease", lease)
        self._timeout = self._lease + 10 if timeout is None else positive("timeout", timeout, zero=True)
        self._held: HeldTurn | None = None
        self.token = ""
        """The fencing token of the turn while it is held."""

    def _lease_step(self, action: Any) -> Lease:
        caller = self._caller
        return Lease(self._context_id, action, self.token, self._lease, caller.user_id, caller._deadline())

    def _check_not_nested(self) -> None:
        """Raise StateConflictError where the running code is inside a turn on this context: it would wait for itself.

        Inside is what the block called, and what inherited the turn from there (a task, a thread with the same
        context variables). The caller of a generator that holds one is not: it waits, until the generator is closed.
        """
        caller, context_id = self._caller, self._context_id
        holder = _holders.get((id(caller.storage), context_id))
        if (
            context_id in caller._fences
            or (holder is not None and holder.is_running())
            or any(
                turn.caller is caller and turn.context_id == context_id and not turn.is_left()
                for turn in held_turns.get()
            )
        ):
            raise StateConflictError(
                f"this code runs inside a turn on {context_id!r} already; turns do not nest", context_id=context_id
            )

    def _take(self, block: FrameType, *, track: bool = True) -> Calls[None]:
        """Wait for the lease, for the code of a frame.

        `track`: writes of the running code through the caller carry the fence from now on.
        """
        self._check_not_nested()
        self._enter()
        self.token = os.urandom(12).hex()
        begun = time.monotonic()
        give_up = begun + self._timeout
        pause = 0.002
        taken = unanswered = False
        try:
            while True:
                unanswered = True
                step = self._lease_step("take")
                # A store that does not answer is not waited for longer than the turn; a first answer gets its time.
                taken = yield step._replace(deadline=min(step.deadline, max(give_up, begun + _FIRST_ANSWER)))
                unanswered = False
                if taken:
                    break
                left = give_up - time.monotonic()
                if left <= 0:
                    raise StateTimeoutError(
                        f"the turn on {self._context_id!r} was not available within {self._timeout:g} s",
                        context_id=self._context_id,
                    )
                yield Sleep(min(pause, left))
                pause = min(pause * 1.5, 0.1)
            self._renewal = keep_renewing(self._caller.storage, self._lease_step("renew"))
        except BaseException as error:
            self._open = False
            if taken or (unanswered and isinstance(error, GeneratorExit | StateOutcomeUnknownError)):
                self._give_back()  # it may be held, though nobody heard of it
            raise
        self._held = HeldTurn(self._caller, self._context_id, self.token, block)
        _holders[id(self._caller.storage), self._context_id] = self._held
        if track:
            held_turns.set((*held_turns.get(), self._held))

    def _end(self, failed: bool) -> Calls[None]:
        """Commit what was collected, with the fence, unless the block failed; release the lease in any case."""
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
            self._leave()
            if interrupted:
                self._give_back()
            else:
                yield from self._release()

    def _leave(self) -> None:
        held = self._held
        if held is not None:
            held.block = None
            if _holders.get(key := (id(self._caller.storage), self._context_id)) is held:
                del _holders[key]
            held_turns.set(tuple(turn for turn in held_turns.get() if turn is not held))

    def _give_back(self) -> None:
        """Release the lease without waiting for it: the code that would have waited was cancelled."""
        self._caller._engine.submit(CallBack((self._lease_step("release"),), lambda _: None))

    def _release(self) -> Calls[None]:
        try:
            yield self._lease_step("release")
        except GeneratorExit:
            self._give_back()
            raise
        except StateError as error:
            # The lease ends by itself; the outcome of the turn is known and must not be replaced by this.
            from logging import getLogger

            getLogger("agentstate.context").warning(
                "the lease of a turn could not be released, and will expire: %s", error
            )
