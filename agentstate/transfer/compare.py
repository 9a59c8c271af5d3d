"""Comparing contexts of different storages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain
from typing import Final

from ..codec import decode
from ..operations import Snapshot
from .pieces import Context, Fate, Pages, Result

_EXPIRY_TOLERANCE: Final = (
    10_000  # microseconds: Valkey has milliseconds, and for keys of AgentUp only the remaining time
)


class Measured:
    """The number of messages of a history, their bytes, and a digest of their content."""

    def __init__(self) -> None:
        self.messages = 0
        self.size = 0
        self._digest = sha256()

    def watching(self, first: Sequence[bytes], pages: Pages) -> Iterator[bytes]:
        """The messages of all pages, measured while they are consumed."""
        for page in chain([first], pages):
            for message in page:
                self.messages += 1
                self.size += len(message)
                self._digest.update(_canonical(message) + b"\n")
                yield message

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measured) and self._digest.digest() == other._digest.digest()

    __hash__ = None  # type: ignore[assignment]


def measure(snapshot: Snapshot, pages: Pages) -> Measured:
    """Read a history to its end and measure it."""
    measured = Measured()
    for _ in measured.watching(snapshot.messages, pages):
        pass
    return measured


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two contexts are equal, as far as they were read."""
    return (
        same_head(a, b)
        and len(a.messages) == len(b.messages)
        and all(_same_value(x, y) for x, y in zip(a.messages, b.messages, strict=True))
    )


def same_head(given: Snapshot, found: Snapshot) -> bool:
    """Whether all but the messages is equal. A context without expiry may get one by the ttl of the other storage."""
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
    """The same text for all JSON texts of a value: storages may differ in numbers, escapes and order of keys."""
    return json.dumps(decode(text), sort_keys=True, separators=(",", ":")).encode()


def _values_size(snapshot: Snapshot) -> int:
    return sum(map(len, snapshot.variables.values())) + sum(map(len, snapshot.metadata.values()))


def result_of(context: Context, fate: Fate, measured: Measured | None = None) -> Result:
    """The result for a context; `measured` is its history, if that is a long one."""
    if measured is None:
        return Result(context.context_id, fate, len(context.snapshot.messages), context.size)
    return Result(context.context_id, fate, measured.messages, measured.size + _values_size(context.snapshot))
