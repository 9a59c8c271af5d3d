"""Writing contexts to a storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Final

from ..caller import new_commit_id
from ..errors import StateConflictError, StateError, StateOutcomeUnknownError, StateSerializationError
from ..operations import Append, Change, Commit, Delete, Drop, Put, Restore, Snapshot, Space
from ..state import to_microseconds
from ..storage.base import StateStorage, now_microseconds
from .compare import Measured, measure, result_of, same, same_head
from .pieces import PAGE, Changed, Context, Pages, Result, Sink
from .stored import UNFINISHED, perform, read_beginnings, read_one, rest_of

_LARGEST_COUNT: Final = 10**15  # exact in a double, which is what Lua counts with, with room to grow
_LATEST_YEAR: Final = 2199
_LATEST: Final = to_microseconds(datetime(_LATEST_YEAR + 1, 1, 1, tzinfo=UTC))

_logger = logging.getLogger("agentstate.transfer")


class Target(Sink):
    """A storage that contexts are written to and read back from."""

    def __init__(self, storage: StateStorage, replace: bool, dry_run: bool) -> None:
        self.storage = storage
        self.replace = replace
        self.dry_run = dry_run

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        fitting = []
        for context in contexts:
            try:
                self._check_fits(context)
            except StateError as error:
                yield Result(context.context_id, "failed", error=error)
            else:
                fitting.append(context)
        if fitting:
            yield from self._take_fitting(fitting)

    def _take_fitting(self, contexts: list[Context]) -> Iterator[Result]:
        # Written first and compared afterwards: usually nothing exists yet, which makes that one step less.
        refusals = [None] * len(contexts) if self.dry_run else self._write(contexts)
        found = read_beginnings(self.storage, [context.context_id for context in contexts])
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
        """The result for a context, by the error of its write and what was read afterwards."""
        if isinstance(found, StateError):
            return Result(context.context_id, "failed", error=found)
        existed = found is not None and (self.dry_run or isinstance(refusal, StateConflictError))
        if found is not None and same(context.snapshot, found):
            # Whatever the error of the write was: an unknown outcome is known now.
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
            found = read_one(self.storage, context.context_id)
        except StateError as error:
            return Result(context.context_id, "failed", error=error)
        if found is not None and same(context.snapshot, found):
            return result_of(context, "copied")
        return Result(context.context_id, "failed", error=refusal) if refusal else _unverified(context.context_id)

    def _check_fits(self, context: Context) -> None:
        """Raise StateSerializationError for what this storage, or any, would refuse or could not count up from."""
        snapshot = context.snapshot
        if max(snapshot.revision, snapshot.end) > _LARGEST_COUNT:
            raise StateSerializationError(
                f"{context.context_id!r} has a revision or a message position above {_LARGEST_COUNT:,}",
                context_id=context.context_id,
            )
        times = (snapshot.created, snapshot.updated, snapshot.expires or 0)
        if min(times) < 0 or max(times) > _LATEST:
            raise StateSerializationError(
                f"{context.context_id!r} has a time before 1970 or after {_LATEST_YEAR}", context_id=context.context_id
            )
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
        self._check_fits(context)
        found = read_one(self.storage, context.context_id)
        if found is not None and self._is_worth_comparing(context, found, repeatable):
            measured = measure(context.snapshot, pages)
            if self._holds(context, measured):
                return result_of(context, "unchanged", measured)
            if not self._may_replace(found):
                return _conflict(context.context_id)
            if not self.dry_run:
                self._commit(context.context_id, (Delete(),))
                raise Changed  # its pages are used up
            return result_of(context, "copied", measured)
        if self.dry_run:
            return result_of(context, "copied", measure(context.snapshot, pages))
        if found is not None:
            self._commit(context.context_id, (Delete(),))
        measured = self._write_long(context, pages)
        if self._holds(context, measured):
            return result_of(context, "copied", measured)
        return _unverified(context.context_id)

    def _is_worth_comparing(self, context: Context, found: Snapshot, repeatable: bool) -> bool:
        """Whether to read all of a context to see whether it is equal. One that may be replaced need not be read."""
        if not self._may_replace(found):
            return True
        return (repeatable or self.dry_run) and same_head(context.snapshot, found)

    def _holds(self, context: Context, measured: Measured) -> bool:
        """Whether the context is stored here with this history."""
        found = read_one(self.storage, context.context_id)
        if found is None or not same_head(context.snapshot, found):
            return False
        try:
            return measure(found, rest_of(self.storage, Context(context.context_id, found))) == measured
        except Changed:
            return False

    def _write_long(self, context: Context, pages: Pages) -> Measured:
        """Write a context by several commits, the last of which gives it its own revision.

        There are never more commits than that revision: a context made by a single commit is written by a single one.
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
        """Delete an unfinished context. Where this fails, the next transfer does it."""
        try:
            found = read_one(self.storage, context_id)
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
    """The changes that create this context."""
    changes: list[Change] = [_restore(snapshot)]
    if snapshot.variables:
        changes.append(Put(Space.VARIABLES, tuple(snapshot.variables.items())))
    if snapshot.metadata:
        changes.append(Put(Space.METADATA, tuple(snapshot.metadata.items())))
    if snapshot.messages:
        changes.append(Append(tuple(snapshot.messages)))
    return tuple(changes)


def _chunks(messages: Iterator[bytes], first: int, rest: int, further: int) -> Iterator[list[bytes]]:
    """The messages in one chunk of `first` and `further` ones of nearly the same size; in one if `further` is 0.

    Raises Changed where there are not as many as there should be.
    """
    for index in range(further + 1):
        if not further:
            size = first + rest
        else:
            size = rest * index // further - rest * (index - 1) // further if index else first
        last = index == further
        chunk = list(islice(messages, size + last))  # one too many is noticed before the last chunk is written
        if len(chunk) != size:
            raise Changed
        yield chunk


def _conflict(context_id: str) -> Result:
    different = StateConflictError(f"{context_id!r} exists and is different: not changed", context_id=context_id)
    return Result(context_id, "conflict", error=different)


def _unverified(context_id: str) -> Result:
    changed = StateConflictError(
        f"{context_id!r} was written, but reading it back gives something different: another program writes to it, or "
        "the storage changes what it stores",
        context_id=context_id,
    )
    return Result(context_id, "failed", error=changed)


def _has_expired(snapshot: Snapshot) -> bool:
    return snapshot.expires is not None and snapshot.expires <= now_microseconds()
