"""Conversations in the memory of this process: the fastest backend. They are lost when it exits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Final

from ..errors import StateConflictError, StateError
from ..operations import (
    REMEMBER_CLEARED,
    REMEMBERED_COMMITS,
    Answer,
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
from .resolve import Effects, Image, check_owner, expiry, only_adds, resolve, without_content

_COMPACT: Final = 64
"""A list of messages is made anew where more than half of it, and more than so many, are gone."""


class _Context(Image):
    """A context after a commit. It is immutable: the next commit creates another one and replaces it by a single
    assignment, so that an exception or a fork in the middle of a commit leaves the previous one in place.

    All versions of a context share one list of messages. The messages of this version are those from position `start`
    to `end`; `base` is the position of the first message of the list. Only the messages behind `end` may be changed: a
    commit removes those that were popped, or left behind by an interrupted commit, and appends its own.

    Remembered commits are a chain of `(id, answer, the commit before, how many)`. `forget_at`: when an absent context
    may be forgotten entirely (`time.monotonic`; None: as long as it lives).
    """

    __slots__ = ("base", "chain", "forget_at", "messages")

    def __init__(self) -> None:
        self.chain: Any = None
        super().__init__()
        self.messages: list[bytes] = []
        self.base = 0
        self.forget_at: float | None = None

    def read(self, first: int, stop: int) -> list[bytes]:
        return self.messages[first - self.base : stop - self.base]

    def remembered(self, commit_id: str) -> Answer | None:
        link = self.chain
        while link is not None:
            if link[0] == commit_id:
                answer: Answer = link[1]
                return answer
            link = link[2]
        return None

    def remember(self, commit_id: str, answer: Answer) -> None:
        count = self.chain[3] if self.chain is not None else 0
        if count >= 2 * REMEMBERED_COMMITS - 1:  # in blocks, so that forgetting costs nothing per commit
            self._forget_oldest()
            count = self.chain[3]
        self.chain = (commit_id, answer, self.chain, count + 1)

    def _forget_oldest(self) -> None:
        kept: list[tuple[str, Answer]] = []
        link = self.chain
        while len(kept) < REMEMBERED_COMMITS - 1:
            kept.append(link[:2])
            link = link[2]
        self._chain_up(kept)

    def _chain_up(self, commits: list[tuple[str, Answer]]) -> None:
        """Remember these commits alone, given from the newest to the oldest."""
        self.chain = None
        for count, (commit_id, answer) in enumerate(reversed(commits), 1):
            self.chain = (commit_id, answer, self.chain, count)

    def forget_answers(self) -> None:
        kept: list[tuple[str, Answer]] = []
        link = self.chain
        while link is not None:
            kept.append((link[0], without_content(link[1])))
            link = link[2]
        self._chain_up(kept)

    def with_added(self, commit: Commit, now: int, ttl: float | None) -> _Context:
        """The context after a commit that `only_adds`.

        Nearly all commits do. The result is that of `resolve` and `after`, in half the time.
        """
        new = _Context.__new__(_Context)
        new.exists = True
        new.user_id = self.user_id
        new.created = self.created
        new.updated = max(self.updated, now)
        new.revision = self.revision + 1
        new.expires = None if ttl is None else expiry(now, ttl)
        new.variables = self.variables
        new.metadata = self.metadata
        new.start = self.start
        new.end = self.end
        new.base = self.base
        new.messages = self.messages
        new.forget_at = None
        new.chain = self.chain
        for change in commit.changes:
            if isinstance(change, Append):
                new.append(change.messages)
            elif isinstance(change, Put):
                if change.space is Space.VARIABLES:
                    new.variables = new.variables.copy()
                    new.variables.update(change.items)
                else:
                    new.metadata = new.metadata.copy()
                    new.metadata.update(change.items)
        answer = commit.answer
        new.remember(commit.commit_id, kept_answer(answer) if answer else answer)
        return new

    def append(self, messages: Sequence[bytes]) -> None:
        """Append messages to a version that is not in place yet, behind those that it shares with others."""
        own = self.messages
        size = self.end - self.base
        if len(own) > size:
            del own[size:]
        own += messages
        self.end += len(messages)

    def after(self, effects: Effects) -> _Context:
        """The context after `effects`."""
        if not effects.exists:
            new = self.expired()
            new.remember(effects.commit_id, kept_answer(effects.answer))
            return new
        new = _Context.__new__(_Context)
        new.chain = self.chain
        new.forget_at = None
        # `apply` changes these.
        new.variables = self.variables.copy() if effects.variables or effects.replaces_variables else self.variables
        new.metadata = self.metadata.copy() if effects.metadata or effects.replaces_metadata else self.metadata
        new.messages = self.messages
        new.base = self.base
        new.apply(effects)
        if effects.keep == self.end and not effects.deletes:
            new.end = effects.keep
            new.append(effects.appended)
        elif effects.deletes or effects.keep > self.end or effects.appended:
            kept = [] if effects.deletes else self.read(effects.start, effects.keep)
            new.messages, new.base = [*kept, *effects.appended], effects.start
        gone = len(new.messages) - (new.end - new.start)
        if gone > _COMPACT and gone > len(new.messages) // 2:
            new.messages, new.base = new.read(new.start, new.end), new.start
        return new

    def expired(self) -> _Context:
        """The context without anything but its remembered commits."""
        new = _Context()
        new.chain = self.chain
        new.forget_answers()
        new.forget_at = time.monotonic() + REMEMBER_CLEARED
        return new


class InMemoryStorage(StateStorage):
    """Keeps conversations in memory, within one process; nothing survives its exit.

    Values are kept as JSON text, so every value read is the caller's own copy. An operation costs the same however long
    the history is; setting a key costs in proportion to the number of keys. Thread-safe. A commit takes effect whole or
    not at all, whatever a signal handler raises in the middle of it. Code that runs in the middle of a write of the
    same thread (a signal handler, a finalizer) may read; its writes are a StateConflictError.
    """

    blocking: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._contexts: dict[str, _Context] = {}
        self._leases: dict[str, tuple[str, float]] = {}  # context id to token and its end (monotonic)
        self._lock = threading.RLock()  # for writes; that of a thread that holds it already is refused
        self._writing = False
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
        if isinstance(operation, Query):
            self._check(operation)
            return self._query(operation)
        if isinstance(operation, Listing):
            self._check(operation)
            return self._list(operation)
        with self._lock:
            if self._writing:
                raise StateConflictError(
                    "this runs in the middle of another write of the same thread, as a signal handler or a finalizer "
                    "does; nothing was changed: let a thread or the event loop make this call",
                    context_id=operation.context_id,
                )
            try:
                self._writing = True
                self._check(operation)
                return self._commit(operation) if isinstance(operation, Commit) else self._lease(operation)
            finally:
                self._writing = False

    execute_one = _carry_out

    def _check(self, operation: Operation) -> None:
        if self.closed or time.monotonic() >= operation.deadline:
            self.check_open()
            check_deadline(operation)

    def _query(self, query: Query) -> Snapshot | None:
        while True:
            context = self._contexts.get(query.context_id)
            if context is None or not context.exists:
                self.check_open()  # `close` empties the store
                return None
            if context.expires is not None and context.expires <= now_microseconds():
                return None
            check_owner(context, query.user, query.context_id)
            snapshot = context.snapshot(query, context.read)
            # Popped messages may have been overwritten meanwhile: read again then.
            if self._contexts.get(query.context_id) is context:
                return snapshot

    def _commit(self, commit: Commit) -> bytes:
        now = now_microseconds()
        context = self._contexts.get(commit.context_id) or _Context()
        if context.exists and not context.lives(now):
            context = context.expired()
        if only_adds(commit, context):
            self._contexts[commit.context_id] = context.with_added(commit, now, self.ttl)
            answer = commit.answer
        else:
            lease = self._leaseholder(commit.context_id) if commit.fence is not None else None
            effects = resolve(context, commit, now=now, ttl=self.ttl, lease=lease, read=context.read)
            if not isinstance(effects, Effects):
                return effects
            self._contexts[commit.context_id] = context.after(effects)
            answer = effects.answer
        self._commits_until_sweep -= 1
        if self._commits_until_sweep <= 0:
            self._sweep(now)
        return answer

    def _sweep(self, now: int) -> None:
        """Remove what expired or was cleared long ago. Called so rarely that its cost per commit is negligible."""
        monotonic = time.monotonic()
        for context_id, context in list(self._contexts.items()):
            if context.exists and not context.lives(now):
                self._contexts[context_id] = context.expired()
            elif context.forget_at is not None and context.forget_at <= monotonic:
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
        # One page: a position in the dict would be wrong once keys are removed. Ids are shared strings: 8 bytes each.
        now = now_microseconds()
        wanted = partial(_listed, listing=listing, now=now)
        ids = tuple(context_id for context_id, context in list(self._contexts.items()) if wanted(context))
        self.check_open()  # `close` empties the store
        return Page(ids, None)

    def telemetry_attributes(self) -> dict[str, str | int]:
        return {"db.system.name": "agentstate.memory"}

    def close(self) -> None:
        super().close()
        with self._lock:
            self._contexts = {}
            self._leases = {}

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._writing = False


def _listed(context: _Context, *, listing: Listing, now: int) -> bool:
    if not context.lives(now) or (listing.user is not None and context.user_id != listing.user):
        return False
    return listing.idle_for is None or context.updated <= now - listing.idle_for * 1_000_000
