"""A complete backend from three byte hooks: contexts as plain JSON documents (see `documentformat`)."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final, TypeAlias

from ..errors import (
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)
from ..operations import Commit, Lease, Listing, Operation, Outcome, Page, Query
from .base import Settle, StateStorage, check_deadline, concerns_one_context, now_microseconds
from .documentformat import Document, parse_document

Write: TypeAlias = Commit | Lease

_MICROSECONDS: Final = 1_000_000

_logger = logging.getLogger("agentstate.storage.document")


class DocumentStorage(StateStorage):
    """Keeps each context as one JSON document, in any store that can read, replace and list documents.

    A backend implements `read_document`, `replace_document`, `list_documents`, and `close` if it holds anything; all
    else is here. The hooks are called from several threads. They raise StateUnavailableError where the store cannot
    be reached and nothing was done, StateOutcomeUnknownError where a replacement may have happened, and
    StateTimeoutError where waiting would go past `deadline` (a reading of `time.monotonic()`).

    Every operation costs in proportion to the size of the conversation. Times, leases, ttl and cleanup go by `clock`.
    """

    @abstractmethod
    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        """The bytes of the document that is stored for `context_id`, or None if there is none."""

    @abstractmethod
    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        """Replace the document of `context_id` by ``update(current)``, atomically.

        `update` is called with the current bytes (None: there is no document) and returns the new ones; None where
        the document is to be removed; the very object that it was given where nothing is to be written. It may be
        called several times (only the last call counts), so compare-and-set will do as well as a lock or a
        transaction. If it raises, nothing may be written, and the error is passed on.
        """

    @abstractmethod
    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        """About `size` ids of documents, and the cursor of the next page (None: this is the last one).

        The first cursor is ``""``; what the others look like is the backend's business. A document that exists all
        along must be listed; order does not matter.
        """

    def clock(self) -> int:
        """Microseconds since 1970: this host's clock, unless a subclass knows a better one.

        Hosts that share a store need clocks that agree to within a fraction of the shortest lease and ttl.
        """
        return now_microseconds()

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        by_context: dict[str, list[tuple[int, Query | Write]]] = {}
        for index, operation in enumerate(operations):
            try:
                self.check_open()
                check_deadline(operation)
                if isinstance(operation, Listing):
                    settle(index, self._list(operation))
                else:
                    by_context.setdefault(operation.context_id, []).append((index, operation))
            except StateError as error:
                settle(index, error)
        for context_id, indexed in by_context.items():
            # Queries share one read, and writes share one replacement.
            for _, run in groupby(indexed, key=lambda pair: isinstance(pair[1], Query)):
                indexes, part = zip(*run, strict=True)
                carry_out = self._read if isinstance(part[0], Query) else self._write
                deadline = max(operation.deadline for operation in part)
                outcomes: Iterable[Outcome | StateError]
                try:
                    outcomes = carry_out(context_id, part, deadline)
                except StateError as error:
                    outcomes = _failures(error, part)
                for index, outcome in zip(indexes, outcomes, strict=True):
                    settle(index, outcome)

    def _read(self, context_id: str, queries: Sequence[Any], deadline: float) -> list[Outcome | StateError]:
        data = self._read_bytes(context_id, deadline)
        document = None if data is None else parse_document(data, context_id)
        if document is None or not document.lives(self.clock()):
            return [None for _ in queries]
        return [_attempt(document.answer, query) for query in queries]

    def _read_bytes(self, context_id: str, deadline: float) -> bytes | None:
        data = self.read_document(context_id, deadline=deadline)
        self.tally.read(len(data or b""))
        return data

    def _write(self, context_id: str, writes: Sequence[Any], deadline: float) -> list[Outcome | StateError]:
        update = DocumentUpdate(self, context_id, writes)
        try:
            self.replace_document(context_id, update, deadline=deadline)
        finally:
            self.tally.add(**update.counts())
        return update.outcomes

    def _list(self, listing: Listing) -> Page:
        page = self.list_documents(listing.cursor, listing.size, deadline=listing.deadline)
        return Page(tuple(name for name in page.context_ids if self._listed(name, listing)), page.cursor)

    def _listed(self, context_id: str, listing: Listing) -> bool:
        check_deadline(listing)
        try:
            data = self._read_bytes(context_id, listing.deadline)
            if data is None:  # removed meanwhile
                return False
            document = parse_document(data, context_id)
        except (StateCorruptedError, StateConflictError, StateUnavailableError) as error:
            if not concerns_one_context(error):
                raise
            # It exists, so it is listed; but its owner and its age are not known.
            if listing.user is None and listing.idle_for is None:
                return True
            _logger.warning("skipped in a listing: %s", error)
            return False
        now = self.clock()
        if listing.user is not None and document.user_id != listing.user:
            return False
        if not document.lives(now):
            return listing.idle_for is not None and (document.exists or document.without_use(now))
        return listing.idle_for is None or document.updated <= now - listing.idle_for * _MICROSECONDS


class DocumentUpdate:
    """A pure function from the bytes of a document to those that replace it: some writes, resolved."""

    def __init__(self, storage: DocumentStorage, context_id: str, writes: Sequence[Write]) -> None:
        self._storage = storage
        self._context_id = context_id
        self._writes = writes
        self.outcomes: list[Outcome | StateError] = []
        """Of the writes, as of the last call."""
        self.remove_at: int | None = None
        """When the document that the last call returned may be removed: microseconds since 1970, or None for never. A
        store with expiring keys may let it expire then."""
        self._calls = self._read = self._written = 0

    def __call__(self, data: bytes | None) -> bytes | None:
        now = self._storage.clock()
        self._calls += 1
        self._read += len(data or b"")
        self._written = 0
        document = Document(self._context_id) if data is None else parse_document(data, self._context_id)
        document.expire(now)
        self.outcomes = [_attempt(self._carry_out, write, document, now) for write in self._writes]
        if not document.changed:
            return data
        self.remove_at = document.remove_at()
        new = document.render(now)
        self._written = len(new or b"")
        return new

    def counts(self) -> dict[str, int]:
        """The counts for the tally: all calls but the last were repeated attempts."""
        repeated = max(0, self._calls - 1) * len(self._writes)
        return {"attempts_repeated": repeated, "bytes_read": self._read, "bytes_written": self._written}

    def _carry_out(self, write: Write, document: Document, now: int) -> Outcome:
        check_deadline(write)  # again: waiting for a lock may have taken long
        if isinstance(write, Lease):
            return document.take_or_give(write, now)
        return document.commit(write, now, self._storage.ttl)


# --- outcomes -------------------------------------------------------------------------------------------------------


def _attempt(function: Callable[..., Outcome], *args: Any) -> Outcome | StateError:
    try:
        return function(*args)
    except StateError as error:
        return error


def _failures(failure: StateError, operations: Sequence[Query | Write]) -> list[StateError]:
    """The error of each operation, where what they share failed."""
    errors = []
    for operation in operations:
        error = copy.copy(failure)  # each is raised separately, with its own traceback
        error.__cause__ = failure
        if error.context_id is None:
            error.context_id = operation.context_id
        if isinstance(error, StateOutcomeUnknownError) and isinstance(operation, Commit):
            error.commit_id = operation.commit_id
        errors.append(error)
    return errors
