"""The log layout in Valkey: four keys a context, all in one cluster slot, changed by one script.

- state, a hash, is the truth: ``id``, ``user`` (may be empty), ``created`` and ``updated`` (microseconds), ``rev``,
  ``start`` and ``end`` of the history, ``exp`` (microseconds; empty for never), ``v:<variable>``, ``m:<metadata key>``
- history, a list of the messages; without its hash it is debris
- commits, a list of the ids of remembered commits, oldest first. What belongs to one follows it:
  ``\\n<time>\\n<answer>``, or ``\\t<time>\\t<not_after>`` for one that was refused while a copy of it was on its
  way. It outlives the context; a last element ``\\r`` then says that it was cleared
- lease, a string: the token of who holds the turn, with its time to live

Operations are packed into one call of the script for `GROUP` contexts (in a cluster: for each slot), all sent in one
go, so that however many operations wait together they cost one round trip. What only reads goes by plain commands.

**Exactly once.** Every attempt carries a not_after in the server's time, and the script remembers each commit id for
longer than any of its copies can live. An attempt that was cut off is made again with the same id. Where a repeated
commit is refused, or changes nothing, a tombstone keeps the earlier copies from contradicting that answer. Ids are
looked up only where they may be known; the hash's ``guard`` says until when copies of repeated commits may arrive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from ...errors import StateConflictError, StateCorruptedError, StateError
from ...keys import KeySpace
from ...operations import NEVER, Commit, Lease, Listing, Operation, Outcome, Page, Query
from ..documentformat import parse_document
from .execution import Execution
from .failures import repeat
from .listing import Listed, chosen, scan_page
from .lone import carry_out, is_lone
from .nodes import Servers
from .reads import pack_read
from .script import (
    ATTEMPT,
    GROUP,
    MICROSECONDS,
    Conversion,
    OnContext,
    pack_commit,
    pack_conversion,
    pack_lease,
    pack_query,
    script,
)
from .wire import bulk, command, number

if TYPE_CHECKING:
    from ..base import Settle


class Names(NamedTuple):
    """What is sent of a context with every operation, packed."""

    keys: bytes  # state, history, commits
    state: bytes
    history: bytes
    lease: bytes
    context_id: bytes
    slot: int


class LogLayout:
    """Carries out operations on contexts in the log layout."""

    def __init__(
        self, servers: Servers, keys: KeySpace, *, ttl: float | None, min_replicas: int, deadline: float
    ) -> None:
        self.servers = servers
        self.keys = keys
        self.deadline = deadline
        self.min_replicas = min_replicas
        self.ttl = ttl
        text = script()
        self.load_script = command("SCRIPT", "LOAD", text)
        sha = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        self._head = b"$7\r\nEVALSHA\r\n" + bulk(sha)
        microseconds = 0 if ttl is None else max(1, int(ttl * MICROSECONDS))
        self._settings = b"%%d %d %%d %d" % (microseconds, bool(min_replicas))
        self._plain = not microseconds and not min_replicas
        self._names: dict[str, Names] = {}

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        others = list(range(len(operations)))
        listings = [index for index in others if type(operations[index]) is Listing]
        if listings:
            others = [index for index in others if type(operations[index]) is not Listing]
        if is_lone(operations) and not listings:
            carry_out(self, cast(Sequence[OnContext], operations), settle, looks=False)
        elif others:
            Execution(self, cast(Sequence[OnContext], operations), settle).run(others)
        for index in listings:
            settle(index, self._list(cast(Listing, operations[index])))

    def call(self, operation: Operation) -> Outcome:
        """Carry out one operation, and return its outcome or raise its error."""
        outcomes: list[Any] = [None]
        if type(operation) is Listing:
            outcomes[0] = self._list(operation)
        else:
            carry_out(self, (cast(OnContext, operation),), outcomes.__setitem__, looks=False)
        outcome: Outcome | StateError = outcomes[0]
        if isinstance(outcome, StateError):
            raise outcome
        return outcome

    def _list(self, listing: Listing) -> Outcome | StateError:
        deadline = monotonic() + self.deadline if listing.deadline == NEVER else listing.deadline

        def read() -> Page:
            end = min(deadline, monotonic() + ATTEMPT)
            choose = chosen(listing, _listed_document)
            return scan_page(self.servers, self.keys, listing.cursor, listing.size, end, choose)

        try:
            return repeat(read, deadline, self.servers.tally)
        except StateError as error:
            return error

    def names(self, context_id: str) -> Names:
        """What is sent of a context."""
        names = self._names.get(context_id)
        if names is None:
            keys = self.keys.keys(context_id)
            packed = [bulk(key.encode()) for key in keys]
            slot = self.servers.slot(keys.state.encode())
            names = Names(b"".join(packed[:3]), packed[0], packed[1], packed[3], bulk(context_id.encode()), slot)
            if len(self._names) >= 4096:  # a cache, not a store
                self._names.clear()
            self._names[context_id] = names
        return names

    def groups(self, operations: Sequence[OnContext], indexes: list[int]) -> Iterable[list[int]]:
        """The operations in groups, one for each call of the script. Those of a context stay together, in order."""
        if len(indexes) == 1:
            return (indexes,)
        if len({operations[index].context_id for index in indexes}) == len(indexes):
            return (indexes[start : start + GROUP] for start in range(0, len(indexes), GROUP))
        contexts: dict[str, list[int]] = {}
        for index in indexes:
            contexts.setdefault(operations[index].context_id, []).append(index)
        groups: list[list[int]] = [[]]
        for together in contexts.values():
            if groups[-1] and len(groups[-1]) + len(together) > GROUP:
                groups.append([])
            groups[-1].extend(together)
        return groups

    def pack_read(self, query: Query) -> bytes:
        """The commands of a plain read, packed."""
        names = self._names.get(query.context_id) or self.names(query.context_id)
        return pack_read(query, names.state, names.history)

    def pack(self, operations: Sequence[OnContext], group: list[int], not_after: int, earlier: int) -> bytes:
        """One call of the script, packed."""
        keys: list[bytes] = []
        arguments: list[bytes] = []
        count = 0
        leases = 0
        known = self._names
        for index in group:
            operation: Any = operations[index]
            names = known.get(operation.context_id) or self.names(operation.context_id)
            keys.append(names.keys)
            kind = type(operation)
            count += _PACKERS[kind](operation, names.context_id, arguments)
            if kind is not Query and (kind is Lease or operation.fence is not None):
                keys.append(names.lease)
                leases += 1
        return b"".join(
            (
                b"*%d\r\n"
                % (count + 3 * len(group) + leases + 4),  # EVALSHA, its hash, the number of keys, the settings
                self._head,
                number(3 * len(group) + leases),
                *keys,
                number(not_after) if self._plain and not earlier else bulk(self._settings % (not_after, earlier)),
                *arguments,
            )
        )


_PACKERS: Final[dict[type, Callable[[Any, bytes, list[bytes]], int]]] = {
    Commit: pack_commit,
    Query: pack_query,
    Lease: pack_lease,
    Conversion: pack_conversion,
}


def _listed_document(data: bytes, context_id: str, now: int) -> Listed | None:
    try:
        document = parse_document(data, context_id)
    except StateConflictError:  # of a longer prefix
        return None
    except StateCorruptedError:  # it is there; but whose it is and how old, nobody can say
        return Listed(None, now)
    return Listed(document.user_id, document.updated) if document.lives(now) else None
