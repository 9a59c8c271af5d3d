"""One operation by itself, or a commit and the read behind it: what calls of blocking code are.

It does what `Execution.run` does in its first attempt, without what many operations need, so that a lone call takes
hardly longer than its round trip. Where anything is unusual, an `Execution` takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ...operations import NEVER, Commit, Query
from .execution import Execution
from .reads import is_plain, outcome_of, reply_count
from .script import ATTEMPT, MICROSECONDS, OnContext
from .wire import LostConnectionError, ServerError

if TYPE_CHECKING:
    from ..base import Settle
    from .loglayout import LogLayout


def is_lone(operations: Sequence[Any]) -> bool:
    """Whether `carry_out` can do them: one operation, or a commit and a plain read of its context (`get_or_create`)."""
    if len(operations) == 1:
        return True
    if len(operations) != 2:
        return False
    first, second = operations
    return (
        type(first) is Commit and type(second) is Query and first.context_id == second.context_id and is_plain(second)
    )


def carry_out(layout: LogLayout, operations: Sequence[OnContext], settle: Settle, *, looks: bool) -> None:
    """Carry out operations that are `is_lone`, and settle them.

    `looks`: look for the answer before sleeping, where that helps. It is of no use to an event loop that waits: that
    sleeps anyway.
    """
    pool = layout.servers.only
    last: Any = operations[-1]
    deadline = min(operations[0].deadline, last.deadline)
    end = min(deadline, monotonic() + ATTEMPT)
    if pool is None or layout.min_replicas or deadline == NEVER or (connection := pool.acquire_idle(end)) is None:
        Execution(layout, operations, settle).run([*range(len(operations))])
        return
    stamp = int(end * MICROSECONDS) + pool.offset
    plain = type(last) is Query and is_plain(last)
    scripted = not plain or len(operations) == 2
    reply: Any = None
    read: list[Any] = []
    try:
        if not plain:
            reply = connection.ask_one(layout.pack(operations, _FIRST, stamp, 0), looks)
        elif scripted:
            packed = layout.pack(operations, _FIRST, stamp, 0) + layout.pack_read(last)
            reply, *read = connection.ask_some(packed, 1 + reply_count(last), looks)
        else:
            read = connection.ask_some(layout.pack_read(last), reply_count(last), looks)
    except LostConnectionError as error:
        pool.discard(connection)
        execution = Execution(layout, operations, settle)
        execution.problem = error
        if scripted:
            execution.unknown[0] = stamp
        execution.run([*range(len(operations))])
        return
    except BaseException:
        pool.discard(connection)
        raise
    pool.release(connection)

    takes_over: Execution | None = None
    again: list[int] = []
    if scripted:
        header = reply if type(reply) is bytes else reply[0] if type(reply) is list else b""
        if header[16:] == b"k":
            pool.hear(header)
            settle(0, b"")
        elif header[16:] == b"a":
            pool.hear(header)
            settle(0, reply[1])
        else:
            takes_over = Execution(layout, operations, settle)
            if header:
                takes_over.answered(pool, _FIRST, reply, again, 0)
            else:
                again.append(0)  # an error of the server, which the next attempt meets with again
    if plain:
        index = len(operations) - 1
        outcome = outcome_of(last, read)
        if again:
            again.append(index)  # it read what was there before the commit
        elif not isinstance(outcome, ServerError):
            settle(index, outcome)
        else:
            takes_over = takes_over or Execution(layout, operations, settle)
            takes_over.read(index, outcome, again)
    if again and takes_over is not None:
        takes_over.run(again)


_FIRST: Final = [0]
