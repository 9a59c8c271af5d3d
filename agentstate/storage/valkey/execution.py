"""One run of operations in the log layout: attempts, what the answers of the script mean, and what failures mean.

Each attempt takes what is not settled yet, divides it among the servers, and to each of them sends everything before it
reads the first answer. Operations that were not carried out, or whose outcome is unknown, go into the next attempt.
How an attempt that was cut off is repeated is described in `loglayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic, sleep
from typing import Any, Final, cast

from ...errors import (
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
    TurnLostError,
)
from ...operations import NEVER, Commit, Lease, Outcome, Query, Snapshot
from ..base import Settle
from ..documentformat import Document, parse_document
from ..resolve import Effects, access_error, added, already_applied, check_owner, resolve
from .calls import Calls
from .failures import failure, passes, pauses
from .nodes import ASKING, Servers, takes_over
from .pool import Pool
from .reads import (
    UNANSWERED,
    foreign,
    is_plain,
    newer_format,
    outcome_of,
    reply_count,
    snapshot_of,
    torn_hash,
    torn_history,
)
from .script import ATTEMPT, MICROSECONDS, Conversion, OnContext, Summed
from .url import Address
from .wire import Connection, LostConnectionError, NoTimeLeftError, ServerError, command

_AGAIN: Final[Any] = object()
"""Stands for the outcome of an operation that has to be sent again."""


class Execution:
    """One run of `execute`: attempts until every operation is settled."""

    __slots__ = (
        "_asking", "_calls", "_deadline", "_floors", "_given", "_last", "_now", "_operations", "_problem", "_scripted",
        "_servers", "_settle", "_unknown",
    )  # fmt: skip

    def __init__(
        self, servers: Servers, calls: Calls, operations: Sequence[OnContext], settle: Settle, deadline: float
    ) -> None:
        self._servers = servers
        self._calls = calls
        self._given = operations
        self._operations = operations  # what to send for them now
        self._settle = settle
        self._deadline = monotonic() + deadline  # of operations that have none of their own
        self._unknown: dict[int, int] = {}  # sent and not answered: index to the largest not_after of its copies
        self._floors: dict[int, int] = {}  # index to what its not_after has to exceed
        self._scripted: set[int] = set()  # queries that plain commands could not answer
        self._asking: dict[int, Address] = {}  # index to the server that is taking over its slot
        self._problem: Exception | None = None  # why the last attempt did not settle everything
        self._last: Exception | None = None  # the last problem of all attempts
        self._now = 0  # the server's time, as of the last answer

    def run(self, todo: list[int]) -> None:
        """Settle these operations."""
        waits = pauses()
        needed = 0.0
        while todo:
            began = monotonic()
            end, ready = self._in_time(todo, began, needed)
            todo = []
            for pool, reads, groups in self._by_server(ready, end, todo):
                self._exchange(pool, reads, groups, end, todo)
            if todo and self._problem is not None:
                now = monotonic()
                # An attempt with less time than the last one took would fail for that alone, and hide what is wrong.
                needed = min(now - began, 0.05)
                sleep(max(0.0, min(end - now, next(waits))))

    def _in_time(self, todo: list[int], now: float, needed: float) -> tuple[float, list[int]]:
        """When an attempt must end, and the operations that there is time for; the others are settled."""
        problem, self._problem = self._problem, None
        if problem is not None and not (isinstance(problem, NoTimeLeftError) and self._last is not None):
            self._last = problem
        if problem is None:
            needed = 0.0
        end = now + ATTEMPT
        ready = []
        for index in todo:
            deadline = self._operations[index].deadline
            if deadline == NEVER:
                deadline = self._deadline
            if deadline <= now + needed:
                self._settle(index, self._timed_out(index))
                continue
            ready.append(index)
            if deadline < end:
                end = deadline
        if problem is not None:
            self._servers.tally.add(attempts_repeated=len(ready))
        return end, ready

    def _by_server(
        self, indexes: list[int], end: float, again: list[int]
    ) -> list[tuple[Pool, list[int], list[list[int]]]]:
        """The operations by the server that they go to: plain reads, and groups for the script.

        The engine keeps servers apart (see `ValkeyStorage.lane`), so there are several only where a cluster is met for
        the first time or has changed. Those with a connection come first.
        """
        reads, others = self._plain_reads(indexes)
        servers, calls, operations = self._servers, self._calls, self._operations
        if not servers.is_cluster:
            return [(servers.pool(0, end), reads, calls.groups(operations, others))] if indexes else []
        plans: dict[Pool, tuple[Pool, list[int], list[list[int]]]] = {}
        for members, plain in ((reads, True), (others, False)):
            slots: dict[int, list[int]] = {}
            for index in members:
                slots.setdefault(calls.names(operations[index].context_id).slot, []).append(index)
            for slot, together in slots.items():
                try:
                    asking = self._asking.get(together[0])
                    pool = servers.pool(slot, end) if asking is None else servers.pool_at(asking)
                except (LostConnectionError, ServerError, StateError) as error:
                    self._failed(error, together, again)
                    continue
                plan = plans.setdefault(pool, (pool, [], []))
                if plain:
                    plan[1].extend(together)
                else:
                    plan[2].extend(calls.groups(operations, together))
        return sorted(plans.values(), key=lambda plan: not plan[0].has_idle())

    def _plain_reads(self, indexes: list[int]) -> tuple[list[int], list[int]]:
        """Those that plain commands can answer, and the others. A read stays behind a write to its context."""
        operations: Any = self._operations
        scripted = self._scripted
        others = [
            index
            for index in indexes
            if type(operations[index]) is not Query or index in scripted or not is_plain(operations[index])
        ]
        if not others:
            return indexes, []
        if len(others) == len(indexes):
            return [], indexes
        written = {operations[index].context_id for index in others}
        reads = [index for index in indexes if operations[index].context_id not in written]
        return reads, [index for index in indexes if operations[index].context_id in written]

    def _exchange(self, pool: Pool, reads: list[int], groups: list[list[int]], end: float, again: list[int]) -> None:
        """Send everything to one server, read all answers, and settle what they settle."""
        calls = self._calls
        operations: Any = self._operations
        try:
            connection = pool.acquire(end)
        except (LostConnectionError, ServerError, StateError) as error:
            for group in (reads, *groups):
                self._failed(error, group, again)
            return
        if connection.lacks:
            groups = self._permitted(connection.lacks, groups)
        not_after = int(end * MICROSECONDS) + pool.offset
        sent = read = answered = 0
        intact = False  # whether the connection may be used again
        try:
            if reads:
                connection.send(b"".join([calls.read(operations[index]) for index in reads]))
            for group in groups:
                sent += 1
                connection.send(self._packed(group, not_after))
            confirmed: Any = calls.min_replicas
            if confirmed and groups:
                connection.send(command("WAIT", confirmed, max(1, int((end - monotonic()) * 800))))
            for index in reads:
                query = operations[index]
                outcome = outcome_of(query, [connection.read() for _ in range(reply_count(query))])
                read += 1
                self._read(index, outcome, again)
            held = [self._reply(connection, group) for group in groups] if confirmed else []
            if held:
                connection.silence = NEVER  # WAIT ends by itself
                confirmed = connection.read()
            unloaded = False
            for group in groups:
                reply = held[answered] if held else self._reply(connection, group)
                answered += 1
                if not isinstance(reply, ServerError):
                    self._answered(pool, group, reply, again, confirmed)
                else:
                    self._failed(reply, group, again)
                    unloaded = unloaded or reply.code == "NOSCRIPT"
            if unloaded:
                connection.ask(calls.load_script)
            intact = not connection.lacks  # the next one looks at the permissions again
        except LostConnectionError as error:
            self._failed(error, reads[read:], again)
            for group in groups[answered:sent]:
                for index in group:
                    self._unknown[index] = max(self._unknown.get(index, 0), not_after, self._floors.get(index, 0))
            for group in groups[answered:]:
                self._failed(error, group, again)
        finally:
            if intact:
                pool.release(connection)
            else:
                pool.discard(connection)

    def _permitted(self, lacks: str, groups: list[list[int]]) -> list[list[int]]:
        """The groups without what writes: a user who may not run all commands would leave it half done."""
        permitted = [[index for index in group if type(self._operations[index]) is Query] for group in groups]
        for group in groups:
            for index in group:
                if type(self._operations[index]) is not Query:
                    self._settle(index, self._failure(index, ServerError(f"NOPERM it may not run {lacks}")))
        return [group for group in permitted if group]

    def _packed(self, group: list[int], not_after: int) -> bytes:
        if not self._unknown and not self._floors and not self._asking:
            return self._calls.script(self._operations, group, not_after, 0)
        not_after = max(not_after, *(self._floors.get(index, 0) for index in group))
        earlier = max(0, *(self._unknown.get(index, 0) for index in group))
        packed = self._calls.script(self._operations, group, not_after, earlier)
        return ASKING + packed if group[0] in self._asking else packed

    def _reply(self, connection: Connection, group: list[int]) -> Any:
        if self._asking and self._asking.pop(group[0], None) is not None:
            connection.read()
        return connection.read()

    # --- answers ---

    def _read(self, index: int, outcome: Any, again: list[int]) -> None:
        """What came of a plain read."""
        if outcome is UNANSWERED:
            self._scripted.add(index)
            again.append(index)
        elif isinstance(outcome, ServerError):
            self._failed(outcome, [index], again)
        else:
            self._settle(index, outcome)

    def _answered(
        self, pool: Pool, group: list[int], reply: bytes | list[Any], again: list[int], confirmed: Any
    ) -> None:
        """The answer to a call of the script."""
        header, details = (reply, ()) if isinstance(reply, bytes) else (reply[0], reply[1:])
        self._now = int(header[:16])
        pool.offset = self._now - int(monotonic() * MICROSECONDS)
        wanted = self._calls.min_replicas
        short = wanted and (not isinstance(confirmed, int) or confirmed < wanted)
        if not short and header[16:] == b"k" * len(group):
            for index in group:
                self._settle(index, b"")
            return
        more = iter(details)
        for index, code in zip(group, header[16:].decode(), strict=True):
            detail = next(more) if code in _DETAILED else None
            outcome: Outcome | StateError
            try:
                outcome = self._meaning(index, code, detail)
            except StateError as error:
                outcome = error
            if outcome is _AGAIN:
                again.append(index)
            elif short and code in "ka":
                self._servers.doubt()
                problem = f"{confirmed} of {wanted} replicas confirmed in time (min_replicas)"
                if isinstance(confirmed, ServerError):
                    problem = f"WAIT is refused, so no replica confirmed (min_replicas): {confirmed}"
                unconfirmed = ServerError(f"the primary has the change; {problem}")
                self._settle(index, self._outcome_unknown(index, unconfirmed))
            else:
                self._settle(index, outcome)

    def _meaning(self, index: int, code: str, detail: Any) -> Outcome:
        """The outcome that a code of the script stands for (see script.lua). Raises a StateError."""
        operation: Any = self._operations[index]
        context_id = operation.context_id
        match code:
            case "k":
                return b""
            case "a":
                return cast(Outcome, detail)
            case "s":
                return cast(Snapshot, snapshot_of(operation, detail, None, None))
            case "S":
                stored, first, messages, everything = detail
                return cast(Snapshot, snapshot_of(operation, everything or stored, messages, int(first)))
            case "n":
                return None
            case "t" | "f":
                return code == "t"
            case "A":
                already_applied(cast(Commit, self._given[index]))
            case "o":
                raise access_error(context_id)
            case "l":
                raise TurnLostError(
                    f"the turn on {context_id!r} lost its lease; nothing was changed", context_id=context_id
                )
            case "x":
                raise StateConflictError(f"the context {context_id!r} exists already", context_id=context_id)
            case "i":
                raise foreign(detail, context_id)
            case "w":
                key, kind = (part.decode(errors="replace") for part in detail)
                raise StateConflictError(
                    f"the key {key!r} holds a {kind}, which is not ours; not touched", context_id=context_id
                )
            case "y":
                raise StateConflictError(
                    f"an AgentUp document was written over the converted context {context_id!r}; neither is touched",
                    context_id=context_id,
                )
            case "b":
                raise torn_history(context_id)
            case "h":
                raise torn_hash(context_id)
            case "v":
                raise newer_format(detail, context_id)
            case "L":
                if detail:
                    self._floors[index] = int(detail) + 1
            case "z":
                self._replace(index, self._given[index])
            case "u":
                self._sum(index, operation, detail)
            case "d":
                return self._document(index, operation, detail)
            case "e":
                error = ServerError(detail.decode(errors="replace"))
                if not passes(error):
                    raise self._failure(index, error)
                self._problem = error
                self._servers.changed(error)
            case "E":
                raise self._outcome_unknown(index, ServerError(detail.decode(errors="replace")))
            case _:
                raise StateCorruptedError(f"unknown answer {code!r} of the script", context_id=context_id)
        return cast(Outcome, _AGAIN)

    def _sum(self, index: int, commit: Commit, detail: Any) -> None:
        """Numbers that the script cannot add: Python adds them, and the script compares."""
        place = len(commit.changes) - 1 - int(detail[0])
        increment: Any = cast(Commit, self._given[index]).changes[place]
        total = added(detail[1], increment.by, increment.key, commit.context_id)
        changes: list[Any] = list(commit.changes)
        changes[place] = Summed(increment.key, detail[1], total)
        self._replace(index, commit._replace(changes=tuple(changes)))

    def _document(self, index: int, operation: Any, detail: Any) -> Outcome:
        """Under the key is AgentUp's document: read it here; the first commit that changes it converts it."""
        data, milliseconds = detail
        document = parse_document(data, operation.context_id)
        if milliseconds > 0:  # the key's own expiry, which is how AgentUp's documents end
            document.expires = self._now + milliseconds * 1000
        document.expire(self._now)
        if type(operation) is Query:
            return document.answer(operation) if document.exists else None
        if type(operation) is Lease:
            check_owner(document, operation.user, operation.context_id)
            self._replace(index, operation._replace(user=None))
            return cast(Outcome, _AGAIN)
        commit = cast(Commit, self._given[index])
        # Whether the fence is the current lease is for the script to see.
        effects = resolve(document, commit, now=self._now, ttl=self._calls.ttl, lease=commit.fence, read=document.read)
        if not isinstance(effects, Effects):
            return effects
        remembered = tuple((name.encode(), answer) for name, answer in document.commits.items())
        document.apply(effects)
        self._replace(index, _conversion(commit, data, effects.answer, document, remembered))
        return cast(Outcome, _AGAIN)

    def _replace(self, index: int, operation: OnContext) -> None:
        """Send `operation` from now on instead of the one given."""
        if self._operations is self._given:
            self._operations = list(self._given)
        cast(list[OnContext], self._operations)[index] = operation

    # --- failures ---

    def _failed(self, error: Exception, group: list[int], again: list[int]) -> None:
        """A call was not carried out at all."""
        if passes(error):
            self._problem = error
            self._servers.changed(error)
            if group and isinstance(error, ServerError) and (target := takes_over(error)) is not None:
                self._asking[group[0]] = target
            again.extend(group)
            return
        for index in group:
            self._settle(index, self._failure(index, error))

    def _failure(self, index: int, error: Exception) -> StateError:
        """What is said of an operation that `error` ended."""
        if index in self._unknown:
            return self._outcome_unknown(index, error)
        operation = self._given[index]
        return failure(error, operation.context_id, reads=type(operation) is Query)

    def _timed_out(self, index: int) -> StateError:
        problem = self._last
        if problem is not None:
            return self._failure(index, problem)
        return StateTimeoutError(
            "the deadline passed before anything was done", context_id=self._given[index].context_id
        )

    def _outcome_unknown(self, index: int, problem: Exception | None) -> StateError:
        operation = self._given[index]
        if type(operation) is Query:
            return failure(problem, operation.context_id, reads=True)
        error = StateOutcomeUnknownError(
            f"sent, but not confirmed: {problem}",
            context_id=operation.context_id,
            commit_id=operation.commit_id if isinstance(operation, Commit) else None,
        )
        error.__cause__ = problem
        return error


_DETAILED: Final = "asSiwvLudeE"
"""The codes with an element of their own in the answer."""


def _conversion(
    commit: Commit, data: bytes, answer: bytes, document: Document, remembered: tuple[tuple[bytes, bytes], ...]
) -> Conversion:
    """The operation that puts our keys, with the state that `document` has now, in the place of its bytes `data`."""
    fields: list[tuple[bytes, bytes]] = []
    if document.exists:
        fields = [
            (b"id", commit.context_id.encode()),
            (b"user", (document.user_id or "").encode()),
            (b"created", b"%016d" % document.created),
            (b"updated", b"%016d" % document.updated),
            (b"rev", b"%d" % document.revision),
            (b"start", b"%d" % document.start),
            (b"end", b"%d" % document.end),
            *((b"v:" + key.encode(), value) for key, value in document.variables.items()),
            *((b"m:" + key.encode(), value) for key, value in document.metadata.items()),
        ]
    messages = tuple(document.read(document.start, document.end)) if document.exists else ()
    return Conversion(
        commit.context_id,
        commit.commit_id,
        commit.fence,
        data,
        answer,
        tuple(fields),
        messages,
        remembered,
        commit.deadline,
    )
