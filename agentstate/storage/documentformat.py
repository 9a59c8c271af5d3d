"""The JSON document of one context, exactly as AgentUp writes it: reading and writing it. No input or output here.

A document has AgentUp's fields: ``context_id``, ``user_id``, ``created_at``, ``updated_at``, ``metadata``,
``variables``, ``history``. What agentstate needs beyond them (revision, remembered commit ids, lease, expiry) is in
``metadata["agentstate"]``, which AgentUp preserves and the API hides. A document that holds nothing else (a lease on a
context that does not exist, the commit ids of a cleared one) is an empty conversation for AgentUp and an absent one for
agentstate; cleanup removes it once what it holds has expired.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import Any, Final, NoReturn, TypeVar
from zlib import crc32

from ..codec import MAX_DEPTH, check_digits, decode
from ..errors import StateConflictError, StateCorruptedError
from ..operations import REMEMBER_CLEARED, Commit, Lease, Outcome, Query
from ..state import from_microseconds, parse_time, to_microseconds
from .resolve import Effects, Image, check_owner, resolve

T = TypeVar("T")

BOOKKEEPING: Final = "agentstate"
"""The key of a document's metadata that is agentstate's own."""

_FIELDS: Final = ("context_id", "user_id", "created_at", "updated_at", "metadata", "variables", "history")
_VERSION: Final = 1
_MICROSECONDS: Final = 1_000_000
_REMEMBER: Final = int(REMEMBER_CLEARED * _MICROSECONDS)


class Document(Image):
    """A context as its document describes it, with its messages, its lease, and fields of other programs."""

    __slots__ = ("changed", "context_id", "expired", "extra", "forget_at", "history", "lease_end", "lease_token")

    def __init__(self, context_id: str) -> None:
        super().__init__()
        self.context_id = context_id
        self.history: list[Any] = []  # as values, not texts: most operations need none of them, or all at once
        self.extra: dict[str, Any] = {}  # fields of other programs, kept as they are
        self.lease_token = ""
        self.lease_end = 0
        self.forget_at = 0  # when the commit ids of a context that does not exist may be forgotten
        self.expired = False  # since it was read
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
                self.forget_at = now + _REMEMBER
            return effects.answer
        if commit.idle_for is not None and (self.expired or self.without_use(now)):
            self.changed = True  # cleanup: `render` keeps commit ids for their time, or nothing
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
            self.expired, self.forget_at = True, self.updated + _REMEMBER
            super().expire(now)
            self.history, self.extra = [], {}

    def without_use(self, now: int) -> bool:
        """Whether the context is absent, and its commit ids and lease are no longer needed."""
        return not self.lives(now) and self.lease_end <= now and self._forget_at() <= now

    def _forget_at(self) -> int:
        """When the commit ids of a context that is gone, or has expired, may be forgotten."""
        return self.updated + _REMEMBER if self.exists else self.forget_at

    def remove_at(self) -> int | None:
        """When the document may be removed, in microseconds since 1970; None for never."""
        if self.exists and self.expires is None:
            return None
        return max(self.expires or 0, self._forget_at(), self.lease_end)

    def render(self, now: int) -> bytes | None:
        """The bytes of the document; None if it is to be removed."""
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
        if BOOKKEEPING in self.metadata:  # the user has a key of the same name
            kept["metadata"] = decode(self.metadata[BOOKKEEPING])
        return kept


# --- reading documents ----------------------------------------------------------------------------------------------


class _MalformedError(ValueError):
    """The document is not valid."""


class _NewerError(Exception):
    """A newer agentstate wrote the document."""


def parse_document(data: bytes, context_id: str) -> Document:
    """Parse a document that agentstate or AgentUp wrote.

    Raises StateCorruptedError for anything else, and StateConflictError for the document of another context.
    """
    try:
        fields = _fields(data)
        stored_id = _typed(fields.pop("context_id"), str, "context_id")
        if stored_id == context_id:
            return _document(fields, context_id, data)
    except _NewerError as error:
        raise StateConflictError(
            f"a newer agentstate wrote the document of {context_id!r} ({error}); update agentstate on this host. The "
            "document was left as it is",
            context_id=context_id,
        ) from error
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
    """The context id in a document. Raises StateCorruptedError."""
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
        raise _MalformedError("a message in its history is not an object")
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
    version = kept["document_version"]
    if type(version) is int and version > _VERSION:
        raise _NewerError(f"its bookkeeping has version {version}")
    if version != _VERSION:
        raise _MalformedError(f"its bookkeeping has the unknown version {version!r}")
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
    # Another program wrote since, and preserved our bookkeeping.
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
    return document.end  # all messages are new


# --- JSON -----------------------------------------------------------------------------------------------------------


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):  # one of the values would be lost at the next write
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
        raise _MalformedError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
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
