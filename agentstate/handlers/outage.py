"""`on_unavailable="ephemeral"`: whether the store can be reached, and the context that stands in for it.

Calls that ask at the same time, about the same part of the store, share one read: a store that is out of reach costs
each of them one deadline, however many they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from ..errors import StateError, StateTimeoutError, StateUnavailableError
from ..operations import Query
from ..storage.base import StateStorage, concerns_one_context

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future


class _Finding:
    """What one read says to all that wait for it. Not `known`: it was broken off, or failed for its own context."""

    def __init__(self) -> None:
        self.known = False
        self.outage: StateUnavailableError | None = None

    def note(self, error: StateError | None) -> None:
        """The read ended with this error, or none."""
        if isinstance(error, StateUnavailableError):
            self.outage = error
            self.known = not concerns_one_context(error)
        else:
            self.known = not isinstance(error, StateTimeoutError)


class _Read:
    """A read that a thread makes for all threads that wait for it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.over = threading.Condition()
        self.finding: _Finding | None = None

    def wait(self, seconds: float) -> _Finding | None:
        if self.thread == threading.get_ident():
            return None  # this is a signal's handler in the middle of that read
        with self.over:
            self.over.wait_for(lambda: self.finding is not None, seconds)
        return self.finding

    def end(self, finding: _Finding) -> None:
        with self.over:
            self.finding = finding
            self.over.notify_all()


_reads: dict[Hashable, _Read] = {}
_awaited: dict[tuple[AbstractEventLoop, Hashable], Future[_Finding]] = {}

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reads.clear)  # their threads are the parent's


def find_outage(context: Any, context_id: str) -> StateUnavailableError | None:
    """The error of a store that cannot be reached, else None. Raises any other error of reading the context."""
    place = _place(context.storage, context_id)
    own = _Read()
    read = _reads.setdefault(place, own)
    if read is not own:
        found = read.wait(2 * context.storage.deadline)  # it ends by its own deadline
        if found is not None and found.known:
            return found.outage
    finding = _Finding()
    try:
        context.exists(context_id)
        finding.note(None)
    except StateError as error:
        finding.note(error)
        if finding.outage is None:
            raise
    finally:
        if read is own:
            del _reads[place]
            own.end(finding)
    return finding.outage


async def find_outage_async(context: Any, context_id: str) -> StateUnavailableError | None:
    """`find_outage` for the tasks of an event loop."""
    from asyncio import get_running_loop, shield  # late: blocking handlers do without

    loop = get_running_loop()
    place = loop, _place(context.storage, context_id)
    own: Future[_Finding] = loop.create_future()
    read = _awaited.setdefault(place, own)
    if read is not own:
        found = await shield(read)
        if found.known:
            return found.outage
    finding = _Finding()
    try:
        await context.exists(context_id)
        finding.note(None)
    except StateError as error:
        finding.note(error)
        if finding.outage is None:
            raise
    finally:
        if read is own:
            del _awaited[place]
            own.set_result(finding)
    return finding.outage


def _place(storage: StateStorage, context_id: str) -> Hashable:
    return id(storage), storage.lane(Query(context_id))


def stand_in(context: Any) -> Any:
    """A context of the same kind in memory, for one call, with the limits of the store out of reach."""
    from ..storage.memory import InMemoryStorage

    storage = context.storage
    memory = InMemoryStorage(
        ttl=storage.ttl,
        max_history=storage.max_history,
        max_value_bytes=storage.max_value_bytes,
        deadline=storage.deadline,
    )
    twin = type(context)(memory, user_id=context.user_id)
    twin.degraded = True
    storage.tally.add(degraded_calls=1)
    _count()
    return twin


_degraded = 0
_degraded_lock = threading.RLock()  # a signal's handler may call a handler


def degraded_calls() -> int:
    """How many calls of handlers this process answered without the store (`on_unavailable="ephemeral"`)."""
    return _degraded


def _count() -> None:
    global _degraded
    with _degraded_lock:
        _degraded += 1
