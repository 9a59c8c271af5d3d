"""What is sent for operations: calls of the script and plain reads, packed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ...keys import KeySpace
from ...operations import Query
from .reads import pack_read
from .script import MICROSECONDS, OnContext, pack, script
from .wire import bulk, command, number

_GROUP: Final = 64
"""Contexts that one call of the script serves at most: the server does nothing else meanwhile."""


class Names(NamedTuple):
    """What is sent of a context with every operation, packed."""

    keys: bytes  # state, history, commits
    state: bytes
    history: bytes
    lease: bytes
    context_id: bytes
    slot: int


class Calls:
    """Packs operations on the contexts of one key prefix.

    `slot` is called with the state key of a context for its cluster slot.
    """

    def __init__(self, keys: KeySpace, slot: Callable[[bytes], int], *, ttl: float | None, min_replicas: int) -> None:
        self._keys = keys
        self._slot = slot
        self.ttl = ttl
        self.min_replicas = min_replicas
        text = script()
        self.load_script = command("SCRIPT", "LOAD", text)
        self._head = b"$7\r\nEVALSHA\r\n" + bulk(hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())
        microseconds = 0 if ttl is None else max(1, int(ttl * MICROSECONDS))
        self._ttl = number(microseconds)
        self._confirm = number(bool(min_replicas))
        self._names: dict[str, Names] = {}

    def names(self, context_id: str) -> Names:
        """What is sent of a context."""
        names = self._names.get(context_id)
        if names is None:
            keys = self._keys.keys(context_id)
            packed = [bulk(key.encode()) for key in keys]
            slot = self._slot(keys.state.encode())
            names = Names(b"".join(packed[:3]), packed[0], packed[1], packed[3], bulk(context_id.encode()), slot)
            if len(self._names) >= 4096:  # a cache, not a store
                self._names.clear()
            self._names[context_id] = names
        return names

    def groups(self, operations: Sequence[OnContext], indexes: list[int]) -> list[list[int]]:
        """The operations in groups, one for each call of the script. Those of a context stay together, in order."""
        if len(indexes) <= 1:
            return [indexes] if indexes else []
        if len({operations[index].context_id for index in indexes}) == len(indexes):
            return [indexes[start : start + _GROUP] for start in range(0, len(indexes), _GROUP)]
        contexts: dict[str, list[int]] = {}
        for index in indexes:
            contexts.setdefault(operations[index].context_id, []).append(index)
        groups: list[list[int]] = [[]]
        for together in contexts.values():
            if groups[-1] and len(groups[-1]) + len(together) > _GROUP:
                groups.append([])
            groups[-1].extend(together)
        return groups

    def read(self, query: Query) -> bytes:
        """The commands of a plain read."""
        names = self._names.get(query.context_id) or self.names(query.context_id)
        return pack_read(query, names.keys, names.state, names.history)

    def script(self, operations: Sequence[OnContext], group: list[int], not_after: int, earlier: int) -> bytes:
        """One call of the script."""
        keys: list[bytes] = []
        arguments: list[bytes] = []
        for index in group:
            operation = operations[index]
            names = self._names.get(operation.context_id) or self.names(operation.context_id)
            keys.append(names.keys)
            if pack(operation, names.context_id, arguments):
                keys.append(names.lease)
        named = len(keys) + 2 * len(group)  # those of a context are packed as one
        return b"".join(
            (
                b"*%d\r\n" % (7 + named + len(arguments)),  # EVALSHA, its hash, the number of keys, four settings
                self._head,
                number(named),
                *keys,
                number(not_after),
                self._ttl,
                number(earlier),
                self._confirm,
                *arguments,
            )
        )
