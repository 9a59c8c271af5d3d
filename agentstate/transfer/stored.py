"""Contexts out of a storage and into one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice
from typing import Any, ClassVar, Final

from ..caller import new_commit_id
from ..codec import decode
from ..errors import (
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateSerializationError,
    StateTimeoutError,
)
from ..keys import check_user_id
from ..operations import (
    Append,
    Change,
    Commit,
    Delete,
    Drop,
    Listing,
    Operation,
    Outcome,
    Put,
    Query,
    Restore,
    Snapshot,
    Space,
    Window,
)
from ..storage.base import StateStorage, now_microseconds
from .pieces import GROUP_BYTES, LARGEST_GROUP, PAGE, Changed, Context, Fate, Pages, Progress, Result, Sink, Source

UNFINISHED: Final = "agentstate.transfer"
"""The metadata key that a long context has while it is being written: an interrupted transfer finds what it left."""

_EXPIRY_TOLERANCE: Final = 10_000  # microseconds: Valkey knows milliseconds, and of AgentUp's keys only what is left

_logger = logging.getLogger("agentstate.transfer")


# --- reading --------------------------------------------------------------------------------------------------------


def count_contexts(storage: StateStorage, user_id: str | None = None) -> int:
    """How many contexts a listing of the storage gives."""
    return sum(map(len, pages_of_ids(storage, user_id)))


def perform(storage: StateStorage, operations: Sequence[Operation]) -> list[Outcome | StateError]:
    """The outcomes of operations that travel together, errors as values. No two may be on the same context."""
    outcomes: list[Outcome | StateError] = [None] * len(operations)
    storage.execute(operations, outcomes.__setitem__)
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, StateTimeoutError) and len(operations) > 1:  # not done: there were too many
            alone = operations[index]._replace(deadline=time.monotonic() + storage.deadline)
            outcomes[index] = perform(storage, [alone])[0]
    return outcomes


def read_contexts(storage: StateStorage, context_ids: Sequence[str], **what: Any) -> list[Snapshot | StateError | None]:
    """Read several contexts together; `what` are the fields of their `Query`."""
    deadline = time.monotonic() + storage.deadline
    return perform(storage, [Query(name, deadline=deadline, **what) for name in context_ids])  # type: ignore[return-value]


def pages_of_ids(storage: StateStorage, user_id: str | None = None) -> Iterator[list[str]]:
    """The ids of all contexts, page by page."""
    owner = None if user_id is None else check_user_id(user_id)
    cursor: str | None = ""
    while cursor is not None:
        page: Any = storage.call(Listing(cursor, user=owner, deadline=time.monotonic() + storage.deadline))
        yield list(dict.fromkeys(page.context_ids))  # one that is listed twice must not be in a group twice
        cursor = page.cursor


class Stored(Source):
    repeatable: ClassVar[bool] = True

    def __init__(self, storage: StateStorage, ids: Iterator[list[str]]) -> None:
        self.storage = storage
        self.ids = ids

    def pieces(self, settle: Progress) -> Iterator[list[Context] | Context]:
        size = LARGEST_GROUP // 8
        for page in self.ids:
            position = 0
            while position < len(page):
                group = page[position : position + size]
                position += size
                contexts = list(self._read(group, settle))
                yield [context for context in contexts if context.whole]
                yield from (context for context in contexts if not context.whole)
                size = _next_group_size(size, sum(context.size for context in contexts))

    def _read(self, group: list[str], settle: Progress) -> Iterator[Context]:
        for context_id, outcome in zip(group, _read(self.storage, group), strict=True):
            if isinstance(outcome, StateError):
                settle(Result(context_id, "failed", error=outcome))
            elif outcome is None:
                settle(Result(context_id, "gone"))
            elif UNFINISHED in outcome.metadata:
                left = StateConflictError(
                    f"{context_id!r} is the unfinished copy that an interrupted transfer left here: run that again",
                    context_id=context_id,
                )
                settle(Result(context_id, "failed", error=left))
            else:
                yield Context(context_id, outcome)

    def rest(self, context: Context) -> Pages:
        return _rest(self.storage, context)

    def again(self, context: Context) -> Context | None:
        found = _read_one(self.storage, context.context_id)
        return None if found is None else Context(context.context_id, found)


def _next_group_size(size: int, taken: int) -> int:
    if taken > GROUP_BYTES:
        return max(1, size // 4)
    return min(LARGEST_GROUP, size * 2) if taken < GROUP_BYTES // 4 else size


def _read(storage: StateStorage, context_ids: Sequence[str]) -> list[Snapshot | StateError | None]:
    window = Window(limit=PAGE, first=0)
    return read_contexts(storage, context_ids, variables=None, metadata=None, history=window)


def _read_one(storage: StateStorage, context_id: str) -> Snapshot | None:
    outcome = _read(storage, [context_id])[0]
    if isinstance(outcome, StateError):
        raise outcome
    return outcome


def _rest(storage: StateStorage, context: Context) -> Pages:
    before = context.snapshot
    position = before.start + len(before.messages)
    while position < before.end:
        outcome = read_contexts(storage, [context.context_id], history=Window(limit=PAGE, first=position))[0]
        if isinstance(outcome, StateError):
            raise outcome
        if outcome is None or outcome.revision != before.revision or outcome.first != position:
            raise Changed
        yield outcome.messages
        position += len(outcome.messages)


# --- writing --------------------------------------------------------------------------------------------------------


class Target(Sink):
    def __init__(self, storage: StateStorage, replace: bool, dry_run: bool) -> None:
        self.storage = storage
        self.replace = replace
        self.dry_run = dry_run

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        fitting = []
        for context in contexts:
            try:
                self._check_sizes(context)
            except StateError as error:
                yield Result(context.context_id, "failed", error=error)
            else:
                fitting.append(context)
        if fitting:
            yield from self._take_fitting(fitting)

    def _take_fitting(self, contexts: list[Context]) -> Iterator[Result]:
        # Written first and compared afterwards: where nothing is there yet, which is usual, that is one step less.
        refusals = [None] * len(contexts) if self.dry_run else self._write(contexts)
        found = _read(self.storage, [context.context_id for context in contexts])
        for context, refusal, outcome in zip(contexts, refusals, found, strict=True):
            yield self._judged(context, refusal, outcome)

    def _write(self, contexts: list[Context]) -> list[StateError | None]:
        deadline = time.monotonic() + self.storage.deadline
        commits = [
            Commit(context.context_id, _changes(context.snapshot), new_commit_id(), absent=True, deadline=deadline)
            for context in contexts
        ]
        outcomes = perform(self.storage, commits)
        return [outcome if isinstance(outcome, StateError) else None for outcome in outcomes]

    def _judged(self, context: Context, refusal: StateError | None, found: Snapshot | StateError | None) -> Result:
        """What became of a context, by how its write was refused and what was found afterwards."""
        if isinstance(found, StateError):
            return Result(context.context_id, "failed", error=found)
        existed = found is not None and (self.dry_run or isinstance(refusal, StateConflictError))
        if found is not None and _same(context.snapshot, found):
            # Whatever the write's error was: an outcome that was unknown is known now.
            return result_of(context, "unchanged" if existed else "copied")
        if existed and found is not None:
            if not self._may_replace(found):
                return _conflict(context.context_id)
            return result_of(context, "copied") if self.dry_run else self._rewrite(context)
        if self.dry_run:
            return result_of(context, "copied")
        if refusal is not None:
            return Result(context.context_id, "failed", error=refusal)
        if found is None and _has_expired(context.snapshot):
            return Result(context.context_id, "gone")
        return _unverified(context.context_id)

    def _may_replace(self, found: Snapshot) -> bool:
        return self.replace or UNFINISHED in found.metadata

    def _rewrite(self, context: Context) -> Result:
        try:
            self._commit(context.context_id, (Delete(),))
            refusal = self._write([context])[0]
            found = _read_one(self.storage, context.context_id)
        except StateError as error:
            return Result(context.context_id, "failed", error=error)
        if found is not None and _same(context.snapshot, found):
            return result_of(context, "copied")
        return Result(context.context_id, "failed", error=refusal) if refusal else _unverified(context.context_id)

    def _check_sizes(self, context: Context) -> None:
        snapshot = context.snapshot
        for values in (snapshot.variables.values(), snapshot.metadata.values(), snapshot.messages):
            _check_sizes(values, self.storage.max_value_bytes, context.context_id)

    def _commit(self, context_id: str, changes: tuple[Change, ...], *, absent: bool = False) -> None:
        commit = Commit(context_id, changes, new_commit_id(), absent=absent)
        try:
            self.storage.call(commit._replace(deadline=time.monotonic() + self.storage.deadline))
        except StateOutcomeUnknownError:
            self.storage.call(commit._replace(deadline=time.monotonic() + self.storage.deadline))

    # --- long contexts

    def take_long(self, context: Context, pages: Pages, *, repeatable: bool) -> Result:
        self._check_sizes(context)
        found = _read_one(self.storage, context.context_id)
        if found is not None and self._is_worth_comparing(context, found, repeatable):
            measured = _measured(context.snapshot, pages)
            if self._holds(context, measured):
                return result_of(context, "unchanged", measured)
            if not self._may_replace(found):
                return _conflict(context.context_id)
            if not self.dry_run:
                self._commit(context.context_id, (Delete(),))
                raise Changed  # its pages are used up
            return result_of(context, "copied", measured)
        if self.dry_run:
            return result_of(context, "copied", _measured(context.snapshot, pages))
        if found is not None:
            self._commit(context.context_id, (Delete(),))
        measured = self._write_long(context, pages)
        if self._holds(context, measured):
            return result_of(context, "copied", measured)
        return _unverified(context.context_id)

    def _is_worth_comparing(self, context: Context, found: Snapshot, repeatable: bool) -> bool:
        """Whether to read all of a context just to see whether it is there. What may be replaced need not be."""
        if not self._may_replace(found):
            return True
        return (repeatable or self.dry_run) and _same_head(context.snapshot, found)

    def _holds(self, context: Context, measured: Measured) -> bool:
        """Whether the context is stored here, with a history of that digest."""
        found = _read_one(self.storage, context.context_id)
        if found is None or not _same_head(context.snapshot, found):
            return False
        try:
            return _measured(found, _rest(self.storage, Context(context.context_id, found))) == measured
        except Changed:
            return False

    def _write_long(self, context: Context, pages: Pages) -> Measured:
        """Write a context by several commits, the last of which has the context's own revision.

        So there are never more of them than the context itself saw: one that was made by a single commit is written by
        a single commit.
        """
        snapshot = context.snapshot
        rest = snapshot.end - snapshot.start - len(snapshot.messages)
        further = min(snapshot.revision - 1, -(-rest // PAGE))
        measured = Measured()
        chunks = _chunks(measured.watching(snapshot.messages, pages), len(snapshot.messages), rest, further)
        restore = _restore(snapshot)
        first: tuple[Change, ...] = _changes(
            snapshot._replace(
                messages=next(chunks),
                revision=snapshot.revision - further,
                metadata=snapshot.metadata | ({UNFINISHED: b"true"} if further else {}),
            )
        )
        try:
            self._commit(context.context_id, first, absent=True)
            for left, chunk in zip(range(further - 1, -1, -1), chunks, strict=True):
                _check_sizes(chunk, self.storage.max_value_bytes, context.context_id)
                last = () if left else (Drop(Space.METADATA, UNFINISHED),)
                self._commit(context.context_id, (restore, Append(tuple(chunk)), *last))
        except BaseException:
            self._forget(context.context_id)
            raise
        return measured

    def _forget(self, context_id: str) -> None:
        """Delete a context that is unfinished. Where this fails, the next run sees that it is, and does it."""
        try:
            found = _read_one(self.storage, context_id)
            if found is not None and UNFINISHED in found.metadata:
                self._commit(context_id, (Delete(),))
        except StateError as error:
            _logger.warning("an unfinished copy was left behind: %s", error)


def _check_sizes(values: Iterable[bytes], limit: int, context_id: str) -> None:
    size = max(map(len, values), default=0)
    if size > limit:
        raise StateSerializationError(
            f"{context_id!r} has a value of {size:,} bytes as JSON, more than the target's max_value_bytes ({limit:,})",
            context_id=context_id,
        )


def _restore(snapshot: Snapshot) -> Restore:
    return Restore(
        snapshot.user_id, snapshot.start, snapshot.created, snapshot.updated, snapshot.revision, snapshot.expires
    )


def _changes(snapshot: Snapshot) -> tuple[Change, ...]:
    """What makes an absent context this one."""
    changes: list[Change] = [_restore(snapshot)]
    if snapshot.variables:
        changes.append(Put(Space.VARIABLES, tuple(snapshot.variables.items())))
    if snapshot.metadata:
        changes.append(Put(Space.METADATA, tuple(snapshot.metadata.items())))
    if snapshot.messages:
        changes.append(Append(tuple(snapshot.messages)))
    return tuple(changes)


def _chunks(messages: Iterator[bytes], first: int, rest: int, further: int) -> Iterator[list[bytes]]:
    """The messages in one chunk of `first` and `further` ones of nearly the same size; in one if there are no others.

    Raises Changed where there are not as many as there should be.
    """
    if not further:
        sizes = [first + rest]
    else:
        sizes = [first, *(rest * (i + 1) // further - rest * i // further for i in range(further))]
    for left, size in zip(range(len(sizes) - 1, -1, -1), sizes, strict=True):
        chunk = list(islice(messages, size if left else size + 1))  # one too many is found out before the last one
        if len(chunk) != size:
            raise Changed
        yield chunk


def result_of(context: Context, fate: Fate, measured: Measured | None = None) -> Result:
    if measured is None:
        return Result(context.context_id, fate, len(context.snapshot.messages), context.size)
    return Result(context.context_id, fate, measured.messages, measured.size + _values_size(context.snapshot))


def _conflict(context_id: str) -> Result:
    different = StateConflictError(
        f"{context_id!r} is there already, and different; it was left as it is", context_id=context_id
    )
    return Result(context_id, "conflict", error=different)


def _unverified(context_id: str) -> Result:
    changed = StateConflictError(
        f"{context_id!r} was written, but reading it back gives something else: another program writes to it, or the "
        "storage changes what it stores",
        context_id=context_id,
    )
    return Result(context_id, "failed", error=changed)


def _has_expired(snapshot: Snapshot) -> bool:
    return snapshot.expires is not None and snapshot.expires <= now_microseconds()


# --- comparing ------------------------------------------------------------------------------------------------------


class Measured:
    """What a history amounts to: how many messages, of how many bytes, and a digest of what they say."""

    def __init__(self) -> None:
        self.messages = 0
        self.size = 0
        self._digest = sha256()

    def watching(self, first: Sequence[bytes], pages: Pages) -> Iterator[bytes]:
        """The messages of all pages, which are measured as they pass."""
        for page in chain([first], pages):
            for message in page:
                self.messages += 1
                self.size += len(message)
                self._digest.update(_canonical(message) + b"\n")
                yield message

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measured) and self._digest.digest() == other._digest.digest()

    __hash__ = None  # type: ignore[assignment]


def _measured(snapshot: Snapshot, pages: Pages) -> Measured:
    measured = Measured()
    for _ in measured.watching(snapshot.messages, pages):
        pass
    return measured


def _same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two contexts are the same, as far as they were read."""
    return (
        _same_head(a, b)
        and len(a.messages) == len(b.messages)
        and all(_same_value(x, y) for x, y in zip(a.messages, b.messages, strict=True))
    )


def _same_head(given: Snapshot, found: Snapshot) -> bool:
    """All but the messages. A context without expiry may have got one by the ttl of the other storage."""
    return (
        (given.user_id, given.created, given.updated, given.revision, given.start, given.end)
        == (found.user_id, found.created, found.updated, found.revision, found.start, found.end)
        and _same_values(given.variables, found.variables)
        and _same_values(given.metadata, found.metadata)
        and (given.expires is None or abs(given.expires - (found.expires or 0)) <= _EXPIRY_TOLERANCE)
    )


def _same_values(a: dict[str, bytes], b: dict[str, bytes]) -> bool:
    return a.keys() == b.keys() and all(_same_value(value, b[key]) for key, value in a.items())


def _same_value(a: bytes, b: bytes) -> bool:
    return a == b or _canonical(a) == _canonical(b)


def _canonical(text: bytes) -> bytes:
    """One text for all JSON texts of a value: storages may write numbers, escapes and order of keys as they like."""
    return json.dumps(decode(text), sort_keys=True, separators=(",", ":")).encode()


def _values_size(snapshot: Snapshot) -> int:
    return sum(map(len, snapshot.variables.values())) + sum(map(len, snapshot.metadata.values()))
