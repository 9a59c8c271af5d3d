"""The log layout in Valkey: four keys a context, all in one cluster slot, changed by one script.

**Format 2.** The keys of a context, where `state` stands for the key of its hash:

====================================  ===================================================================
``<key_prefix><id>``                  state, a hash: the truth
``<key_prefix>{<state>}:history``     history, a list of the messages
``<key_prefix>{<state>}:commits``     commits, a list of the ids of remembered commits, oldest first
``<key_prefix>{<state>}:lease``       lease, a string: the token of the turn's holder, with its time to live
====================================  ===================================================================

In ids ``{`` and ``}`` are percent-encoded, so no state key begins with ``<key_prefix>{``. What the braces hold is the
hash tag; a `key_prefix` with a hash tag of its own keeps that one for all its contexts.

- Fields of state: ``id``, ``format`` (2), ``user`` (may be empty), ``created`` and ``updated`` (microseconds), ``rev``,
  ``start`` and ``end`` of the history, ``exp`` (microseconds; empty for never), ``guard`` (below), ``v:<variable>``,
  ``m:<metadata key>``. Without it, a history is debris.
- What belongs to a commit follows its id in commits: ``\\n<time>\\n<answer>``, or ``\\t<time>\\t<not_after>`` for a
  commit that was refused while a copy of it was in flight. The list outlives the context; a last element ``\\r`` then
  says that the context was cleared.

**Format 1** had no field ``format``, and named the other keys ``{<state>}:history`` and so on, or ``<state>{history}``
where the prefix has a hash tag. Such a context is read as it is. The first commit that is made to it renames its keys
and sets ``format``, in the step that makes the commit; commits remembered of a cleared context are renamed when the
context is created again. A hash with a later format is refused.

Operations are packed into one call of the script for many contexts (in a cluster: of one slot), and all calls are sent
before any answer is read, so operations that wait together cost one round trip. What only reads uses plain commands.

**Exactly once.** Every attempt carries a not_after in the server's time, and the script remembers each commit id for
longer than any of its copies can live. An attempt that was cut off is repeated with the same id. Where a repeated
commit is refused, or changes nothing, a tombstone keeps the earlier copies from contradicting that answer. Ids are
looked up only where they may be known: if the caller gave the id, if the commit was sent before, if the context is
absent, and until ``guard``, the time (microseconds) until which copies of earlier commits may still arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

from ...errors import StateConflictError, StateCorruptedError, StateError
from ...keys import KeySpace
from ...operations import NEVER, Listing, Operation, Outcome, Page
from ..base import Settle
from ..documentformat import parse_document
from .calls import Calls
from .execution import Execution
from .failures import repeat
from .listing import Listed, chosen, scan_page
from .nodes import Servers
from .script import ATTEMPT
from .wire import Connection, command

_PERMISSIONS: Final = """\
-- Tries commands in ways that change nothing, on a key that does not exist, and answers those that are forbidden. What
-- RPUSH adds is gone at once.
local key, forbidden = KEYS[1], {}
for _, arguments in ipairs({
  { 'HDEL', key, 'f' }, { 'HSET', key, 'f', 'v', 'f' }, { 'LINDEX', key, 0 }, { 'LRANGE', key, 0, 0 },
  { 'LSET', key, 0, 'x' }, { 'LTRIM', key, 0, 0 }, { 'PERSIST', key }, { 'PEXPIRE', key, 1 }, { 'PEXPIREAT', key, 1 },
  { 'RPOP', key }, { 'UNLINK', key }, { 'RPUSH', key, 'x' }, { 'UNLINK', key },
}) do
  local reply = not forbidden[1] and redis.pcall(unpack(arguments))
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'ACL', 1, true) then
    forbidden[#forbidden + 1] = arguments[1]
  end
end
return forbidden
"""


class LogLayout:
    """Carries out operations on contexts in the log layout."""

    def __init__(
        self, servers: Servers, keys: KeySpace, *, ttl: float | None, min_replicas: int, deadline: float
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._deadline = deadline
        self._calls = Calls(keys, servers.slot, ttl=ttl, min_replicas=min_replicas)
        self.load_script = self._calls.load_script

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        others = [index for index, operation in enumerate(operations) if type(operation) is not Listing]
        if others:
            on_contexts: Any = operations
            Execution(self._servers, self._calls, on_contexts, settle, self._deadline).run(others)
        if len(others) < len(operations):
            for index, operation in enumerate(operations):
                if isinstance(operation, Listing):
                    settle(index, self._list(operation))

    def missing_permissions(self, connection: Connection) -> str:
        """The commands that writing needs and the user of a connection may not run; nothing is changed.

        What else the script runs fails before it has written anything.
        """
        key = self._keys.prefix + "{permissions}"
        (reply,) = connection.ask(command("EVAL", _PERMISSIONS, 1, key))
        return b", ".join(reply).decode() if isinstance(reply, list) else ""

    def slot(self, context_id: str) -> int:
        """The cluster slot of a context."""
        return self._calls.names(context_id).slot

    def _list(self, listing: Listing) -> Outcome | StateError:
        deadline = monotonic() + self._deadline if listing.deadline == NEVER else listing.deadline

        def read() -> Page:
            end = min(deadline, monotonic() + ATTEMPT)
            choose = chosen(listing, _listed_document)
            return scan_page(self._servers, self._keys, listing.cursor, listing.size, end, choose)

        try:
            return repeat(read, deadline, self._servers)
        except StateError as error:
            return error


def _listed_document(data: bytes, context_id: str, now: int) -> Listed | None:
    try:
        document = parse_document(data, context_id)
    except StateConflictError:  # of a longer prefix
        return None
    except StateCorruptedError:  # it is there, but whose it is and how old cannot be known
        return Listed(None, now)
    return Listed(document.user_id, document.updated) if document.lives(now) else None
