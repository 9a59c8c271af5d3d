"""A complete backend from three byte hooks: contexts as plain JSON documents, exactly those that AgentUp writes.

A document has AgentUp's fields: ``context_id``, ``user_id``, ``created_at``, ``updated_at``, ``metadata``,
``variables``, ``history``. What we need beyond them (revision, remembered commit ids, lease, expiry) lives in
``metadata["agentstate"]``, which AgentUp hands on untouched and our API hides. A document of which nothing but that is
left (a lease on a context that does not exist, the commit ids of a cleared one) is an empty conversation for AgentUp
and an absent one for us; it is removed once what it holds has expired and somebody cleans up.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import isfinite
from typing import Any, Final, NoReturn, TypeAlias, TypeVar
from zlib import crc32

from ..codec import MAX_DEPTH, check_digits, decode
from ..errors import (
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)
from ..operations import REMEMBER_CLEARED, Commit, Lease, Listing, Operation, Outcome, Page, Query
from ..state import from_microseconds, parse_time, to_microseconds
from .base import Settle, StateStorage, check_deadline, concerns_one_context, now_microseconds
from .resolve import Effects, Image, check_owner, resolve

T = TypeVar("T")
Write: TypeAlias = Commit | Lease

BOOKKEEPING: Final = "agentstate"
"""The key of a document's metadata that is ours."""

_FIELDS: Final = ("context_id", "user_id", "created_at", "updated_at", "metadata", "variables", "history")
_VERSION: Final = 1
_MICROSECONDS: Final = 1_000_000

_logger = logging.getLogger("agentstate.storage.document")


class DocumentStorage(StateStorage):
    """Keeps each context as one JSON document, in whatever can read, replace and list documents.

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
            # What is read together costs one read, what is written together one replacement.
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
            # It is there, so it is listed; but whose it is and how old, nobody can say.
            if listing.user is None and listing.idle_for is None:
                return True
            _logger.warning("passed over in a listing: %s", error)
            return False
        now = self.clock()
        if listing.user is not None and document.user_id != listing.user:
            return False
        if not document.lives(now):
            return listing.idle_for is not None and document.without_use(now)
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
        """When what the last call returned will mean nothing any more: microseconds since 1970, or None for never. A
        store whose keys expire by themselves may let it expire then."""
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
        """What a tally is to know of it: all calls but the last were in vain."""
        repeated = max(0, self._calls - 1) * len(self._writes)
        return {"attempts_repeated": repeated, "bytes_read": self._read, "bytes_written": self._written}

    def _carry_out(self, write: Write, document: Document, now: int) -> Outcome:
        check_deadline(write)  # again: there may have been a wait for a lock
        if isinstance(write, Lease):
            return document.take_or_give(write, now)
        return document.commit(write, now, self._storage.ttl)


class Document(Image):
    """A context as its document tells it, with its messages, its lease, and what the document holds beside."""

    __slots__ = ("changed", "context_id", "extra", "forget_at", "history", "lease_end", "lease_token")

    def __init__(self, context_id: str) -> None:
        super().__init__()
        self.context_id = context_id
        self.history: list[Any] = []  # as values, not texts: most operations need none of them, or all at once
        self.extra: dict[str, Any] = {}  # fields that are neither AgentUp's nor ours, kept as they are
        self.lease_token = ""
        self.lease_end = 0
        self.forget_at = 0  # when the commit ids of a context that does not exist may be forgotten
        self.changed = False

    def read(self, first: int, stop: int) -> list[bytes]:
        """The messages at positions [first, stop)."""
        return [_to_bytes(message) for message in self.history[first - self.start : stop - self.start]]

    def answer(self, query: Query) -> Outcome:
        """What `query` asks of this (living) context. Raises StateAccessError."""
        check_owner(self, query.user, self.context_id)
        return self.snapshot(query, self.read)

    def commit(self, commit: Commit, now: int, ttl: float | None) -> Outcome:
        """Apply `commit` and return its answer. Raises what `resolve` raises, and then changes nothing."""
        lease = self.lease_token if self.lease_end > now else None
        effects = resolve(self, commit, now=now, ttl=ttl, lease=lease, read=self.read)
        if isinstance(effects, Effects):
            self.apply(effects)
            self.changed = True
            if not self.exists:
                self.forget_at = now + int(REMEMBER_CLEARED * _MICROSECONDS)
            return effects.answer
        if commit.idle_for is not None and self.without_use(now):
            self.changed = True  # cleanup: `render` finds nothing worth keeping
        return effects

    def take_or_give(self, lease: Lease, now: int) -> bool:
        """Carry out a lease operation. Raises StateAccessError."""
        check_owner(self, lease.user, self.context_id)
        held = self.lease_end > now
        if self.lease_token != lease.token if held else lease.action != "take":
            return False
        self.changed = True
        if lease.action == "release":
            self.lease_token, self.lease_end = "", 0
        else:
            self.lease_token, self.lease_end = lease.token, now + int(lease.seconds * _MICROSECONDS)
        return True

    def apply(self, effects: Effects) -> None:
        if effects.deletes:
            self.history, self.extra = [], {}
        else:
            del self.history[max(0, effects.keep - self.start) :]
            del self.history[: effects.start - self.start]
        self.history += map(decode, effects.appended)
        super().apply(effects)

    def expire(self, now: int) -> None:
        if self.exists and not self.lives(now):
            super().expire(now)
            self.history, self.extra = [], {}

    def without_use(self, now: int) -> bool:
        """Whether the context is absent, and nothing about it needs to be remembered either."""
        return not self.lives(now) and self.lease_end <= now and (self.exists or self.forget_at <= now)

    def remove_at(self) -> int | None:
        """When the document will mean nothing any more, in microseconds since 1970; None for never."""
        end = self.expires if self.exists else self.forget_at
        return None if end is None else max(end, self.lease_end)

    def render(self, now: int) -> bytes | None:
        """The document; None if there is nothing to be kept."""
        if self.without_use(now):
            return None
        if not self.exists:
            self.created = self.updated = now
        metadata = [_to_bytes(BOOKKEEPING) + b":" + _to_bytes(self._bookkeeping(now))]
        metadata += _members({key: text for key, text in self.metadata.items() if key != BOOKKEEPING})
        fields = {
            "context_id": _to_bytes(self.context_id),
            "user_id": _to_bytes(self.user_id),
            "created_at": _to_bytes(from_microseconds(self.created).isoformat()),
            "updated_at": _to_bytes(from_microseconds(self.updated).isoformat()),
            "metadata": b"{" + b",".join(metadata) + b"}",
            "variables": b"{" + b",".join(_members(self.variables)) + b"}",
            "history": _to_bytes(self.history),
        }
        extra = {key: _to_bytes(value) for key, value in self.extra.items()}
        return b"{" + b",".join(_members(fields | extra)) + b"}"

    def _bookkeeping(self, now: int) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "document_version": _VERSION,
            "revision": self.revision,
            "updated": self.updated,
            "start": self.start,
            "end": self.end,
            "last": _checksum(self.history[-1]) if self.history else None,
            "commits": {commit_id: answer.decode() for commit_id, answer in self.commits.items()},
        }
        if self.expires is not None:
            kept["expires"] = self.expires
        if not self.exists:
            kept["forget_at"] = self.forget_at
        if self.lease_end > now:
            kept["lease"] = {"token": self.lease_token, "expires": self.lease_end}
        if BOOKKEEPING in self.metadata:  # the user has a key of that name too
            kept["metadata"] = decode(self.metadata[BOOKKEEPING])
        return kept


# --- reading documents ----------------------------------------------------------------------------------------------


class _MalformedError(ValueError):
    """Why this is not a document."""


def parse_document(data: bytes, context_id: str) -> Document:
    """The context that a document holds: one of ours, or one that AgentUp wrote.

    Raises StateCorruptedError for anything else, and StateConflictError for the document of another context.
    """
    try:
        fields = _fields(data)
        stored_id = _typed(fields.pop("context_id"), str, "context_id")
        if stored_id == context_id:
            return _document(fields, context_id, data)
    except (ValueError, KeyError, OverflowError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise StateCorruptedError(
            f"what is stored for {context_id!r} is not a conversation: {reason}; it was left as it is",
            context_id=context_id,
        ) from error
    raise StateConflictError(
        f"what is stored for {context_id!r} is the document of {stored_id!r}; it was left as it is",
        context_id=context_id,
    )


def document_id(data: bytes) -> str:
    """The id of the context whose document this is. Raises StateCorruptedError."""
    try:
        return _typed(_fields(data)["context_id"], str, "context_id")
    except (ValueError, KeyError, RecursionError) as error:
        raise StateCorruptedError(f"this is not a conversation document: {error}") from error


def _fields(data: bytes) -> dict[str, Any]:
    try:
        return _mapping(_decode(data.decode()), "the document")
    except ValueError as error:
        check_digits(error)
        raise


def _document(fields: dict[str, Any], context_id: str, data: bytes) -> Document:
    document = Document(context_id)
    document.exists = True
    user_id = fields.pop("user_id", None)
    document.user_id = None if user_id is None else _encodable(_typed(user_id, str, "user_id"))
    document.created = _time(fields.pop("created_at"), "created_at")
    document.updated = _time(fields.pop("updated_at"), "updated_at")
    metadata = _mapping(fields.pop("metadata", None), "metadata")
    variables = _mapping(fields.pop("variables", None), "variables")
    history = fields.pop("history", None)
    document.history = [] if history is None else _typed(history, list, "history")
    if not all(isinstance(message, dict) for message in document.history):
        raise _MalformedError("a message in its history is no object")
    document.extra = fields
    kept = metadata.get(BOOKKEEPING)
    if isinstance(kept, dict) and "document_version" in kept:
        del metadata[BOOKKEEPING]
        _read_bookkeeping(document, kept)
        ours = document.updated == kept["updated"]
        if "metadata" in kept:
            metadata[BOOKKEEPING] = kept["metadata"]
    else:
        ours = False
        document.revision = 1
        document.end = len(document.history)
    if not ours and not _shallow(data.decode()):
        raise _MalformedError(f"it is nested more than {MAX_DEPTH} levels deep")
    document.variables = {_encodable(key): _to_bytes(value) for key, value in variables.items()}
    document.metadata = {_encodable(key): _to_bytes(value) for key, value in metadata.items()}
    return document


def _read_bookkeeping(document: Document, kept: dict[str, Any]) -> None:
    if kept["document_version"] != _VERSION:
        raise _MalformedError(f"a newer agentstate wrote it (version {kept['document_version']!r})")
    document.revision = _natural(kept, "revision")
    document.start, document.end = _natural(kept, "start"), _natural(kept, "end")
    document.expires = _natural(kept, "expires") if "expires" in kept else None
    for commit_id, answer in _mapping(kept["commits"], "commits").items():
        document.commits[commit_id] = _typed(answer, str, "commits").encode()
    if "lease" in kept:
        lease = _mapping(kept["lease"], "lease")
        document.lease_token, document.lease_end = _typed(lease["token"], str, "token"), _natural(lease, "expires")
    if "forget_at" in kept:
        document.exists = False
        document.forget_at = _natural(kept, "forget_at")
    updated = _typed(kept["updated"], int, "updated")
    if document.updated == updated and len(document.history) == document.end - document.start:
        return
    # Another program wrote since, and handed our bookkeeping on.
    document.exists = True
    document.revision += 1
    if document.expires is not None:
        document.expires += document.updated - updated
    document.start = _start_after(document, kept["last"])
    document.end = document.start + len(document.history)


def _start_after(document: Document, last: Any) -> int:
    """The position of the first message, after another program appended and trimmed (as AgentUp does beyond 100).

    The message that was the last one at our last write says how far the others moved.
    """
    if document.start == document.end:
        return document.start
    newest = document.end - 1
    for index in range(min(newest - document.start, len(document.history) - 1), -1, -1):
        if _checksum(document.history[index]) == last:
            return newest - index
    return document.end  # all of them are new


# --- JSON -----------------------------------------------------------------------------------------------------------


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):  # one of them would be lost at the next write
        raise _MalformedError("an object has a key twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise _MalformedError("it holds a number that is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise _MalformedError(f"it holds {name}, which is not JSON")


_decode = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_no_constant).decode
_compact: Final[dict[str, Any]] = {"allow_nan": False, "check_circular": False, "separators": (",", ":")}
_to_text = json.JSONEncoder(ensure_ascii=False, **_compact).encode
_to_ascii = json.JSONEncoder(**_compact).encode
_but_brackets = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^"\[\]{}]+')


def _to_bytes(value: Any) -> bytes:
    try:
        return _to_text(value).encode()
    except UnicodeEncodeError:  # AgentUp stores lone surrogates, as escapes
        return _to_ascii(value).encode()


def _members(texts: dict[str, bytes]) -> list[bytes]:
    return [_to_bytes(key) + b":" + text for key, text in texts.items()]


def _shallow(text: str) -> bool:
    """Whether a valid JSON text nests at most as deep as a document of values that may be stored."""
    brackets = _but_brackets.sub("", text)
    for _ in range(MAX_DEPTH + 3):
        if not brackets:
            return True
        brackets = brackets.replace("[]", "").replace("{}", "")
    return not brackets


def _checksum(message: Any) -> int:
    return crc32(_to_bytes(message))


def _typed(value: Any, kind: type[T], name: str) -> T:
    if type(value) is not kind:
        raise _MalformedError(f"{name} is not of the type {kind.__name__}")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    return {} if value is None else _typed(value, dict, name)


def _natural(mapping: dict[str, Any], name: str) -> int:
    number = _typed(mapping[name], int, name)
    if number < 0:
        raise _MalformedError(f"{name} is negative")
    return number


def _time(value: Any, name: str) -> int:
    return to_microseconds(parse_time(_typed(value, str, name)))


def _encodable(text: str) -> str:
    text.encode()
    return text


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
        error = copy.copy(failure)  # each is raised in a place of its own
        error.__cause__ = failure
        if error.context_id is None:
            error.context_id = operation.context_id
        if isinstance(error, StateOutcomeUnknownError) and isinstance(operation, Commit):
            error.commit_id = operation.commit_id
        errors.append(error)
    return errors
