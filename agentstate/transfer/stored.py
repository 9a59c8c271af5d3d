"""Reading contexts from a storage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from ..errors import StateConflictError, StateError, StateTimeoutError
from ..keys import check_user_id
from ..operations import Listing, Operation, Outcome, Query, Snapshot, Window
from ..storage.base import StateStorage
from .pieces import GROUP_BYTES, LARGEST_GROUP, PAGE, Changed, Context, Pages, Progress, Result, Source

UNFINISHED: Final = "agentstate.transfer"
"""The metadata key of a long context that is being written, by which a later transfer recognises an unfinished one."""


def count_contexts(storage: StateStorage, user_id: str | None = None) -> int:
    """The number of contexts, counted by listing them."""
    return sum(map(len, pages_of_ids(storage, user_id)))


def perform(storage: StateStorage, operations: Sequence[Operation]) -> list[Outcome | StateError]:
    """The outcomes of operations that are sent together, errors as values. No two may be on the same context."""
    outcomes = storage.carry_out(operations)
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, StateTimeoutError) and len(operations) > 1:  # not done, since there were too many
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
        yield list(dict.fromkeys(page.context_ids))  # a listing may repeat an id, a group must not
        cursor = page.cursor


class Stored(Source):
    """The contexts of a storage with these ids, page by page."""

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
        for context_id, outcome in zip(group, read_beginnings(self.storage, group), strict=True):
            if isinstance(outcome, StateError):
                settle(Result(context_id, "failed", error=outcome))
            elif outcome is None:
                settle(Result(context_id, "gone"))
            elif UNFINISHED in outcome.metadata:
                left = StateConflictError(
                    f"{context_id!r} is an unfinished copy that an interrupted transfer left: run that transfer again",
                    context_id=context_id,
                )
                settle(Result(context_id, "failed", error=left))
            else:
                yield Context(context_id, outcome)

    def rest(self, context: Context) -> Pages:
        return rest_of(self.storage, context)

    def again(self, context: Context) -> Context | None:
        found = read_one(self.storage, context.context_id)
        return None if found is None else Context(context.context_id, found)


def _next_group_size(size: int, taken: int) -> int:
    if taken > GROUP_BYTES:
        return max(1, size // 4)
    return min(LARGEST_GROUP, size * 2) if taken < GROUP_BYTES // 4 else size


def read_beginnings(storage: StateStorage, context_ids: Sequence[str]) -> list[Snapshot | StateError | None]:
    """Several contexts with all their values and the first page of their histories."""
    window = Window(limit=PAGE, first=0)
    return read_contexts(storage, context_ids, variables=None, metadata=None, history=window)


def read_one(storage: StateStorage, context_id: str) -> Snapshot | None:
    """The same for one context. Raises StateError."""
    outcome = read_beginnings(storage, [context_id])[0]
    if isinstance(outcome, StateError):
        raise outcome
    return outcome


def rest_of(storage: StateStorage, context: Context) -> Pages:
    """The further pages of a history. Raises StateError, and Changed where the context changed."""
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
