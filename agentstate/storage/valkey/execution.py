"""One run of operations in the log layout: attempts, what the answers of the script mean, and what failures mean.

How an attempt that was cut off is made again is told in `loglayout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final, cast

from ...errors import (
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
    TurnLostError,
)
from ...operations import NEVER, Answer, Commit, Lease, Outcome, Query
from ..documentformat import Document, parse_document
from ..resolve import Effects, access_error, added, already_applied, check_owner, resolve
from .failures import failure, passes, pauses
from .nodes import ASKING, Pool, takes_over
from .reads import (
    foreign,
    is_plain,
    outcome_of,
    reply_count,
    snapshot_of,
    torn_history,
)
from .script import ATTEMPT, GROUP, MICROSECONDS, Conversion, OnContext, Summed, change_at
from .url import Address
from .wire import Connection, LostConnectionError, ServerError, Several, command

if TYPE_CHECKING:
    from ..base import Settle
    from .loglayout import LogLayout

PATIENCE: Final = 0.02

_AGAIN: Final[Any] = object()
"""Stands for the outcome of an operation that has to be sent again."""


class Execution:
    """One run of `execute`: attempts until every operation is settled."""

    __slots__ = (
        "asking", "final", "floors", "given", "last", "layout", "now", "operations", "problem", "scripted", "settle",
        "unknown",
    )  # fmt: skip

    def __init__(self, layout: LogLayout, operations: Sequence[OnContext], settle: Settle) -> None:
        self.layout = layout
        self.given = operations
        self.operations = operations  # what to send for them now
        self.settle = settle
        self.unknown: dict[int, int] = {}  # sent and not answered: index to the largest not_after of its copies
        self.floors: dict[int, int] = {}  # index to what its not_after has to exceed
        self.scripted: set[int] = set()  # queries that plain commands could not answer
        self.asking: dict[int, Address] = {}  # index to the server that takes over its slot at this moment
        self.problem: Exception | None = None  # why the last attempt did not settle everything
        self.last: Exception | None = (
            None  # the last problem of all attempts: one that came too late has none of its own
        )
        self.now = 0  # the server's time, as of the last answer
        self.final = 0.0  # the deadline of operations that have none of their own

    def run(self, todo: list[int]) -> None:
        """Attempts until all is settled."""
        for _ in self.steps(todo):
            pass

    def steps(self, todo: list[int]) -> Iterator[Connection | Several]:
        """`run`, which yields a connection (or several) before it waits for answers."""
        waits = pauses()
        needed = 0.0
        while todo:
            end, ready = self._in_time(todo, needed)
            todo = []
            began = monotonic()
            plans = self._by_server(ready, end, todo)
            # A server that cannot be connected to leaves the others their share of the time.
            patience = began + (end - began) / max(1, len(plans))
            exchanges = [self._exchange(*plan, end, patience, todo) for plan in plans]
            if len(exchanges) == 1:
                yield from exchanges[0]
            else:
                yield from _side_by_side(exchanges, sum(pool.has_idle() for pool, *_ in plans))
            if todo and self.problem is not None:
                now = monotonic()
                # An attempt with less time than the last one took would fail for that alone, and hide what is wrong.
                needed = min(now - began, 0.05)
                sleep(max(0.0, min(end - now, next(waits))))

    def _in_time(self, todo: list[int], needed: float) -> tuple[float, list[int]]:
        """Until when an attempt may take, and what there still is time for; all others are settled."""
        now = monotonic()
        problem, self.problem = self.problem, None
        self.last = problem or self.last
        if not self.final:
            self.final = now + self.layout.deadline
        end = now + ATTEMPT
        ready = []
        for index in todo:
            deadline = self.operations[index].deadline
            if deadline == NEVER:
                deadline = self.final
            if deadline <= now + (needed if problem is not None else 0.0):
                self.settle(index, self._timed_out(index, self.last))
                continue
            ready.append(index)
            if deadline < end:
                end = deadline
        if problem is not None:
            self.layout.servers.tally.add(attempts_repeated=len(ready))
        return end, ready

    def _by_server(
        self, indexes: list[int], end: float, again: list[int]
    ) -> Sequence[tuple[Pool, list[int], Iterable[list[int]]]]:
        """The operations by the server that they go to: plain reads, and groups for the script.

        First come those for servers to which there is a connection.
        """
        reads, others = self._plain_reads(indexes)
        servers = self.layout.servers
        if not servers.is_cluster:
            return ((servers.pool(0, end), reads, self.layout.groups(self.operations, others)),) if indexes else ()
        plans: dict[int, tuple[Pool, list[int], list[list[int]]]] = {}
        for members, plain in ((reads, True), (others, False)):
            slots: dict[int, list[int]] = {}
            for index in members:
                slots.setdefault(self.layout.names(self.operations[index].context_id).slot, []).append(index)
            for slot, together in slots.items():
                try:
                    asking = self.asking.get(together[0])
                    pool = servers.pool(slot, end) if asking is None else servers.pool_at(asking)
                except (LostConnectionError, ServerError, StateError) as error:
                    self._failed(error, together, again)
                    continue
                plan = plans.setdefault(id(pool), (pool, [], []))
                if plain:
                    plan[1].extend(together)
                else:
                    plan[2].extend(self.layout.groups(self.operations, together))
        return sorted(plans.values(), key=lambda plan: not plan[0].has_idle())

    def _plain_reads(self, indexes: list[int]) -> tuple[list[int], list[int]]:
        """Those that plain commands can answer, and the others. What shares a context with a write goes with it."""
        operations = self.operations
        if len(indexes) == 1 and type(operations[indexes[0]]) is not Query:
            return [], indexes
        reads = [
            index
            for index in indexes
            if type(operation := operations[index]) is Query and index not in self.scripted and is_plain(operation)
        ]
        if not reads:
            return reads, indexes
        if len(reads) == len(indexes):
            return indexes, []
        left = set(indexes).difference(reads)
        written = {operations[index].context_id for index in left}
        left.update(index for index in reads if operations[index].context_id in written)
        return [index for index in reads if index not in left], [index for index in indexes if index in left]

    def _exchange(
        self,
        pool: Pool,
        reads: list[int],
        groups: Iterable[list[int]],
        end: float,
        patience: float,
        again: list[int],
    ) -> Iterator[Connection]:
        """Send everything to one server, read all answers, and settle what they settle. Yields the connection where it
        would wait for more of them. `patience`: until when to try to connect."""
        layout = self.layout
        try:
            connection = pool.acquire_idle(end)
            if connection is None:
                connection = pool.acquire(end, patience)
        except (LostConnectionError, ServerError, StateError) as error:
            for group in (reads, *groups):
                self._failed(error, group, again)
            return
        stamp = int(end * MICROSECONDS) + pool.offset
        unread = len(reads)
        sent: list[list[int]] = []
        answered = 0
        intact = False  # whether the connection may be used again
        rest = iter(groups)
        try:
            if reads:
                connection.send(b"".join([layout.pack_read(cast(Query, self.operations[index])) for index in reads]))
            for group in rest:
                sent.append(group)
                connection.send(self._packed(group, stamp))
            for start in range(0, len(reads), GROUP):
                yield from connection.reply()
                if True:
                    for index in reads[start : start + GROUP]:
                        query = cast(Query, self.operations[index])
                        outcome = outcome_of(query, connection.read_some(reply_count(query)))
                        unread -= 1
                        self.read(index, outcome, again)
            replies: list[Any] = []
            confirmed = layout.min_replicas
            if confirmed and sent:
                connection.send(command("WAIT", confirmed, max(1, int((end - monotonic()) * 800))))
                for group in sent:
                    yield from connection.reply()
                    replies.append(self._reply(connection, group))
                yield from connection.reply()
                confirmed = connection.read()
            unloaded = False
            for group in sent:
                if replies:
                    reply = replies[answered]
                else:
                    yield from connection.reply()
                    reply = self._reply(connection, group)
                answered += 1
                if not isinstance(reply, ServerError):
                    if True:
                        self.answered(pool, group, reply, again, confirmed)
                else:
                    self._failed(reply, group, again)
                    unloaded = unloaded or reply.code == "NOSCRIPT"
            if unloaded:
                connection.ask(layout.load_script)
            # One that was a primary when it was connected to is looked for anew.
            intact = not (isinstance(self.problem, ServerError) and self.problem.code == "READONLY")
        except LostConnectionError as error:
            self._failed(error, reads[len(reads) - unread :], again)
            for group in sent[answered:]:
                for index in group:
                    self.unknown[index] = max(self.unknown.get(index, 0), stamp, self.floors.get(index, 0))
                self._failed(error, group, again)
            for group in rest:
                self._failed(error, group, again)
        finally:
            if intact:
                pool.release(connection)
            else:
                pool.discard(connection)

    def _packed(self, group: list[int], stamp: int) -> bytes:
        if not self.unknown and not self.floors and not self.asking:
            return self.layout.pack(self.operations, group, stamp, 0)
        not_after = max(stamp, *(self.floors.get(index, 0) for index in group))
        earlier = max(0, *(self.unknown.get(index, 0) for index in group))
        packed = self.layout.pack(self.operations, group, not_after, earlier)
        return ASKING + packed if group[0] in self.asking else packed

    def _reply(self, connection: Connection, group: list[int]) -> Any:
        if self.asking and self.asking.pop(group[0], None) is not None:
            connection.read()
        return connection.read()

    # --- answers ---

    def read(self, index: int, outcome: Outcome | StateError | ServerError, again: list[int]) -> None:
        """What came of a plain read."""
        if not isinstance(outcome, ServerError):
            self.settle(index, outcome)
        elif outcome.code in ("WRONGTYPE", "ASK"):
            self.scripted.add(index)
            again.append(index)
        else:
            self._failed(outcome, [index], again)

    def answered(
        self, pool: Pool, group: list[int], reply: bytes | list[Any], again: list[int], confirmed: Any
    ) -> None:
        """The answer to a call of the script."""
        header, *details = (reply,) if isinstance(reply, bytes) else reply
        self.now = int(header[:16])
        pool.offset = self.now - int(monotonic() * MICROSECONDS)
        settle = self.settle
        codes = header[16:]
        short = not isinstance(confirmed, int) or confirmed < self.layout.min_replicas
        if not details and not short and codes == b"k" * len(group):
            for index in group:
                settle(index, b"")
            return
        more = iter(details)
        for index, code in zip(group, codes, strict=True):
            detail = next(more) if code in _DETAILED else None
            operation: Any = self.operations[index]
            outcome: Outcome | StateError
            try:
                outcome = _MEANINGS[code](self, index, operation, detail)
            except StateError as error:
                outcome = error
            if outcome is _AGAIN:
                again.append(index)
            elif short and code in b"ka" and type(operation) in (Commit, Conversion):
                problem = f"{confirmed} of {self.layout.min_replicas} replicas confirmed in time (min_replicas)"
                settle(index, self._unknown(index, ServerError(f"the primary has the change, but only {problem}")))
            else:
                settle(index, outcome)

    def _done(self, index: int, operation: Any, detail: Any) -> Outcome:
        return b""

    def _answer(self, index: int, operation: Any, detail: Any) -> Outcome:
        answer: Answer = detail
        return answer

    def _too_large(self, index: int, operation: Any, detail: Any) -> Outcome:
        already_applied(cast(Commit, self.given[index]))

    def _fields(self, index: int, query: Any, detail: Any) -> Outcome:
        return snapshot_of(query, detail, None, None)

    def _snapshot(self, index: int, query: Any, detail: Any) -> Outcome:
        stored, first, messages, everything = detail
        return snapshot_of(query, everything or stored, messages, int(first))

    def _nothing(self, index: int, operation: Any, detail: Any) -> Outcome:
        return None

    def _true(self, index: int, operation: Any, detail: Any) -> Outcome:
        return True

    def _false(self, index: int, operation: Any, detail: Any) -> Outcome:
        return False

    def _not_owner(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise access_error(operation.context_id)

    def _turn_lost(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise TurnLostError(
            f"the turn on {operation.context_id!r} lost its lease; nothing was changed", context_id=operation.context_id
        )

    def _exists(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise StateConflictError(
            f"the context {operation.context_id!r} exists already", context_id=operation.context_id
        )

    def _foreign(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise foreign(detail, operation.context_id)

    def _wrong_type(self, index: int, operation: Any, detail: Any) -> Outcome:
        key, kind = (part.decode(errors="replace") for part in detail)
        raise StateConflictError(
            f"the key {key!r} holds a {kind}, which is not ours; not touched",
            context_id=operation.context_id,
        )

    def _overwritten(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise StateConflictError(
            f"an AgentUp document was written over the converted context {operation.context_id!r}; neither is touched",
            context_id=operation.context_id,
        )

    def _corrupted(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise torn_history(operation.context_id)

    def _too_late(self, index: int, operation: Any, detail: Any) -> Outcome:
        if detail:
            self.floors[index] = int(detail) + 1
        return cast(Outcome, _AGAIN)

    def _begin_again(self, index: int, operation: Any, detail: Any) -> Outcome:
        self._replace(index, self.given[index])
        return cast(Outcome, _AGAIN)

    def _refused(self, index: int, operation: Any, detail: Any) -> Outcome:
        error = ServerError(detail.decode(errors="replace"))
        if passes(error):
            self.problem = error
            return cast(Outcome, _AGAIN)
        raise self._failure(index, error)

    def _broke(self, index: int, operation: Any, detail: Any) -> Outcome:
        raise self._unknown(index, ServerError(detail.decode(errors="replace")))

    def _not_summed(self, index: int, commit: Any, detail: Any) -> Outcome:
        """Numbers that the script does not add: Python does, and the script compares."""
        place = change_at(commit, int(detail[0]))
        increment: Any = cast(Commit, self.given[index]).changes[place]
        total = added(detail[1], increment.by, increment.key, commit.context_id)
        changes = list(commit.changes)
        changes[place] = Summed(increment.key, detail[1], total)
        self._replace(index, commit._replace(changes=tuple(changes)))
        return cast(Outcome, _AGAIN)

    def _document(self, index: int, operation: Any, detail: Any) -> Outcome:
        """Under the key is AgentUp's document: read it here; the first commit that changes it converts it."""
        data, milliseconds = detail
        document = parse_document(data, operation.context_id)
        if milliseconds > 0:  # the key's own expiry, which is how AgentUp's documents end
            document.expires = self.now + milliseconds * 1000
        document.expire(self.now)
        if type(operation) is Query:
            return document.answer(operation) if document.exists else None
        if type(operation) is Lease:
            check_owner(document, operation.user, operation.context_id)
            self._replace(index, operation._replace(user=None))
            return cast(Outcome, _AGAIN)
        commit = cast(Commit, self.given[index])
        # That the fence is the current lease is for the script to see.
        effects = resolve(document, commit, now=self.now, ttl=self.layout.ttl, lease=commit.fence, read=document.read)
        if not isinstance(effects, Effects):
            return effects
        remembered = tuple((name.encode(), answer) for name, answer in document.commits.items())
        document.apply(effects)
        self._replace(index, _conversion(commit, data, effects.answer, document, remembered))
        return cast(Outcome, _AGAIN)

    def _replace(self, index: int, operation: OnContext) -> None:
        """Send `operation` from now on instead of the one given."""
        if self.operations is self.given:
            self.operations = list(self.given)
        cast(list[OnContext], self.operations)[index] = operation

    # --- failures ---

    def _failed(self, error: Exception, group: list[int], again: list[int]) -> None:
        """A call was not carried out at all."""
        if passes(error):
            self.problem = error
            self.layout.servers.changed(error)
            if isinstance(error, ServerError) and (target := takes_over(error)) is not None:
                self.asking[group[0]] = target
            again.extend(group)
            return
        for index in group:
            self.settle(index, self._failure(index, error))

    def _failure(self, index: int, error: Exception) -> StateError:
        """What is said of an operation that `error` ended."""
        if index in self.unknown:
            return self._unknown(index, error)
        return failure(error, self.given[index].context_id)

    def _timed_out(self, index: int, problem: Exception | None) -> StateError:
        if index in self.unknown:
            return self._unknown(index, problem)
        context_id = self.given[index].context_id
        if problem is not None:
            return failure(problem, context_id)
        return StateTimeoutError("the deadline passed before anything was done", context_id=context_id)

    def _unknown(self, index: int, problem: Exception | None) -> StateError:
        operation = self.given[index]
        error: StateError
        if type(operation) is Query:
            return failure(problem, operation.context_id)
        error = StateOutcomeUnknownError(
            f"sent, but not confirmed: {problem}",
            context_id=operation.context_id,
            commit_id=operation.commit_id if isinstance(operation, Commit) else None,
        )
        error.__cause__ = problem
        return error


def _side_by_side(exchanges: Sequence[Iterator[Connection]], connected: int) -> Iterator[Connection | Several]:
    """Exchanges with several servers: all is sent, and then each goes on when its server has answered.

    `connected`: to how many of them, the first ones, there is a connection. To connect to the others may take its time,
    so what these answer meanwhile is taken before.
    """
    waiting: dict[Connection, Iterator[Connection]] = {}
    several = Several()

    def go_on(until: float) -> None:
        for connection in several.ready(until):
            if next(waiting[connection], None) is None:
                several.leave_out(connection)
                del waiting[connection]

    try:
        for number, exchange in enumerate(exchanges):
            if number == connected:
                until = monotonic() + PATIENCE
                while waiting and monotonic() < until:
                    go_on(until)
            connection = next(exchange, None)
            if connection is not None:
                waiting[connection] = exchange
                several.add(connection)
        while len(waiting) > 1:
            yield several
            go_on(NEVER)
        for connection, exchange in waiting.items():
            yield connection
            yield from exchange
    finally:
        several.close()


_MEANINGS: Final = {
    ord(code): meaning
    for code, meaning in {
        "k": Execution._done,
        "a": Execution._answer,
        "A": Execution._too_large,
        "s": Execution._fields,
        "S": Execution._snapshot,
        "n": Execution._nothing,
        "t": Execution._true,
        "f": Execution._false,
        "o": Execution._not_owner,
        "l": Execution._turn_lost,
        "x": Execution._exists,
        "i": Execution._foreign,
        "w": Execution._wrong_type,
        "y": Execution._overwritten,
        "b": Execution._corrupted,
        "L": Execution._too_late,
        "z": Execution._begin_again,
        "u": Execution._not_summed,
        "d": Execution._document,
        "e": Execution._refused,
        "E": Execution._broke,
    }.items()
}
"""What each code letter of an answer means (the Lua script has the other half of this table)."""

_DETAILED: Final = b"asSiwLudeE"
"""The codes with an element of their own in the answer."""


def _conversion(
    commit: Commit, data: bytes, answer: Answer, document: Document, remembered: tuple[tuple[bytes, Answer], ...]
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
