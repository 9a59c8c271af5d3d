"""Conversations in the memory of this process: the fastest backend, and gone at its exit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial

from ..errors import StateError
from ..operations import (
    REMEMBER_CLEARED,
    REMEMBERED_COMMITS,
    Append,
    Commit,
    Lease,
    Listing,
    Operation,
    Outcome,
    Page,
    Put,
    Query,
    Snapshot,
    Space,
    kept_answer,
)
from .base import Settle, StateStorage, check_deadline, now_microseconds
from .resolve import Effects, Image, check_owner, expiry, only_adds, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar


class _Context(Image):
    """An image with its messages, and when it may be forgotten entirely (None: as long as it lives)."""

    __slots__ = ("forget_at", "messages")

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[bytes] = []
        self.forget_at: float | None = None

    def read(self, first: int, stop: int) -> list[bytes]:
        return self.messages[first - self.start : stop - self.start]

    def add(self, commit: Commit, now: int, ttl: float | None) -> None:
        """Become what the context is after a commit that `only_adds`.

        Nearly all commits do: this is what `resolve` and `apply` make of them, in a third of the time.
        """
        for change in commit.changes:
            if isinstance(change, Append):
                self.messages += change.messages
                self.end = self.start + len(self.messages)
            elif isinstance(change, Put):
                (self.variables if change.space is Space.VARIABLES else self.metadata).update(change.items)
        self.revision += 1
        if now > self.updated:
            self.updated = now
        self.expires = None if ttl is None else expiry(now, ttl)
        answer = commit.answer
        self.remember(commit.commit_id, kept_answer(answer) if answer else answer)

    def apply(self, effects: Effects) -> None:
        if effects.deletes:
            self.messages = []
        else:
            del self.messages[max(0, effects.keep - self.start) :]
            del self.messages[: effects.start - self.start]
        self.messages += effects.appended
        super().apply(effects)


class InMemoryStorage(StateStorage):
    """Keeps conversations in memory, within one process; nothing survives its exit.

    Values are kept as JSON text, so every value read is the caller's own copy. Every operation costs the same however
    long the conversation is; thread-safe.
    """

    blocking: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._contexts: dict[str, _Context] = {}
        self._leases: dict[str, tuple[str, float]] = {}  # context id to token and its end (monotonic)
        self._lock = threading.Lock()
        self._commits_until_sweep = 1

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        for index, operation in enumerate(operations):
            outcome: Outcome | StateError
            try:
                outcome = self._carry_out(operation)
            except StateError as error:
                outcome = error
            settle(index, outcome)

    def _carry_out(self, operation: Operation) -> Outcome:
        with self._lock:
            if self.closed or time.monotonic() >= operation.deadline:
                self.check_open()
                check_deadline(operation)
            return self._execute(operation)

    execute_one = _carry_out

    def _execute(self, operation: Operation) -> Outcome:
        if isinstance(operation, Query):
            return self._query(operation)
        if isinstance(operation, Commit):
            return self._commit(operation)
        if isinstance(operation, Lease):
            return self._lease(operation)
        return self._list(operation)

    def _query(self, query: Query) -> Snapshot | None:
        context = self._contexts.get(query.context_id)
        if context is None or not context.exists:
            return None
        if context.expires is not None and context.expires <= now_microseconds():
            return None
        check_owner(context, query.user, query.context_id)
        return context.snapshot(query, context.read)

    def _commit(self, commit: Commit) -> bytes:
        context = self._contexts.get(commit.context_id)
        now = now_microseconds()
        if context is None:
            context = _Context()
        else:
            if context.expires is not None:
                self._expire(context, now)
            if only_adds(commit, context):
                context.add(commit, now, self.ttl)
                self._commits_until_sweep -= 1
                if self._commits_until_sweep <= 0:
                    self._sweep(now)
                return commit.answer
        lease = self._leaseholder(commit.context_id) if commit.fence is not None else None
        effects = resolve(context, commit, now=now, ttl=self.ttl, lease=lease, read=context.read)
        if not isinstance(effects, Effects):
            return effects
        context.apply(effects)
        context.forget_at = None if context.exists else time.monotonic() + REMEMBER_CLEARED
        self._contexts[commit.context_id] = context
        self._commits_until_sweep -= 1
        if self._commits_until_sweep <= 0:
            self._sweep(now)
        return effects.answer

    def _expire(self, context: _Context, now: int) -> None:
        if context.exists and not context.lives(now):
            context.expire(now)
            context.messages = []
            context.forget_at = time.monotonic() + REMEMBER_CLEARED

    def _sweep(self, now: int) -> None:
        """Forget what expired or was cleared long ago; so seldom that it costs nothing per commit."""
        monotonic = time.monotonic()
        for context_id, context in list(self._contexts.items()):
            self._expire(context, now)
            if context.forget_at is not None and context.forget_at <= monotonic:
                del self._contexts[context_id]
        self._leases = {key: lease for key, lease in self._leases.items() if lease[1] > monotonic}
        self._commits_until_sweep = max(REMEMBERED_COMMITS, len(self._contexts))

    def _leaseholder(self, context_id: str) -> str | None:
        token, end = self._leases.get(context_id, ("", 0.0))
        return token if end > time.monotonic() else None

    def _lease(self, lease: Lease) -> bool:
        context = self._contexts.get(lease.context_id)
        if context is not None and context.lives(now_microseconds()):
            check_owner(context, lease.user, lease.context_id)
        holder = self._leaseholder(lease.context_id)
        if holder != lease.token and not (holder is None and lease.action == "take"):
            return False
        if lease.action == "release":
            del self._leases[lease.context_id]
        else:
            self._leases[lease.context_id] = (lease.token, time.monotonic() + lease.seconds)
        return True

    def _list(self, listing: Listing) -> Page:
        # Insertion order of the dict is the order of the cursor: how many keys were passed so far cannot be trusted
        # once keys disappear, so a listing is taken whole. Ids are shared strings: 8 bytes each.
        now = now_microseconds()
        wanted = partial(_listed, listing=listing, now=now)
        ids = (context_id for context_id, context in self._contexts.items() if wanted(context))
        return Page(tuple(ids), None)

    def telemetry_attributes(self) -> dict[str, str | int]:
        return {"db.system.name": "agentstate.memory"}

    def close(self) -> None:
        super().close()
        with self._lock:
            self._contexts.clear()
            self._leases.clear()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def _listed(context: _Context, *, listing: Listing, now: int) -> bool:
    if not context.lives(now) or (listing.user is not None and context.user_id != listing.user):
        return False
    return listing.idle_for is None or context.updated <= now - listing.idle_for * 1_000_000
