"""The bridge to asyncio: jobs that are awaited.

Worker threads put finished jobs into the mailbox of the event loop that waits for them, and wake the loop once for all
that come until it looks. Uses the public means of asyncio only, so any event loop that implements them will do.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from ..errors import StateOutcomeUnknownError
from .queue import PATIENCE, Engine, Job

if TYPE_CHECKING:
    from ..operations import Operation
    from .queue import Outcomes


class Awaited(Job):
    """A job that a task awaits by a future of its loop."""

    __slots__ = ("future", "mailbox")

    def __init__(self, operations: Sequence[Operation], mailbox: _Mailbox, future: asyncio.Future[None]) -> None:
        super().__init__(operations)
        self.mailbox = mailbox
        self.future = future

    def deliver(self) -> None:
        self.mailbox.put(self)


class _Mailbox:
    """Finished jobs on their way to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._jobs: deque[Awaited] = deque()
        self._woken = False  # the loop was asked to look, and has not looked yet
        self._awaited: set[Engine] = set()  # with jobs of this loop, perhaps

    def expect(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        """A job for this mailbox is in the queue: while that is so, see that it is not kept waiting by others."""
        if not self._awaited:
            loop.call_later(PATIENCE, self._look_after, loop)
        self._awaited.add(engine)

    def _look_after(self, loop: asyncio.AbstractEventLoop) -> None:
        self._awaited = {engine for engine in self._awaited if engine.look_after()}
        if self._awaited:
            loop.call_later(PATIENCE, self._look_after, loop)

    def put(self, job: Awaited) -> None:
        """Called by worker threads."""
        self._jobs.append(job)
        # No lock: `open` takes the flag down before it looks, so a job that was put in before is seen, and one that is
        # put in later wakes the loop again (at worst once too often).
        if not self._woken:
            self._wake()

    def _wake(self) -> None:
        loop = self._loop()
        if loop is not None:
            self._woken = True
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self.open)

    def open(self) -> None:
        """Let the tasks go on whose jobs are done. Called by the event loop."""
        self._woken = False
        jobs = self._jobs
        try:
            while jobs:
                future = jobs[0].future
                if not future.done():
                    future.set_result(None)
                jobs.popleft()
        finally:
            if jobs:  # interrupted by a signal handler
                self._wake()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


def awaited(engine: Engine, operations: Sequence[Operation]) -> Awaited:
    """A job that is queued. Its outcomes are there when its future is done; if awaiting that raises, `leave` it."""
    loop = asyncio.get_running_loop()
    mailbox = _mailboxes.get(loop) or _mailboxes.setdefault(loop, _Mailbox(loop))
    job = Awaited(operations, mailbox, loop.create_future())
    mailbox.expect(engine, loop)
    try:
        engine.submit(job)
    except BaseException:  # of a signal handler
        engine.withdraw(job)
        raise
    return job


async def leave(engine: Engine, job: Awaited, error: BaseException) -> None:
    """For a task that was cancelled (or interrupted) while it awaited a job, by `error`, which it raises afterwards.

    Takes the job back if it has not begun, and otherwise waits for it (the deadlines of its operations bound the wait).
    """
    if not engine.withdraw(job) and isinstance(error, asyncio.CancelledError):
        await _wait_until_done(job)
        for outcome in job.outcomes:
            if isinstance(outcome, StateOutcomeUnknownError):
                raise error from outcome


async def carry_out(engine: Engine, operations: Sequence[Operation]) -> Outcomes:
    """Carry out operations on one context, in order, without blocking the event loop. Returns their outcomes, errors
    as values."""
    job = awaited(engine, operations)
    try:
        await job.future
    except BaseException as error:
        await leave(engine, job, error)
        raise
    return job.outcomes


async def _wait_until_done(job: Awaited) -> None:
    """However often the task is cancelled meanwhile."""
    with _shielded_from_anyio():
        while not job.outcomes:
            job.future = asyncio.get_running_loop().create_future()
            # A signal handler may have made the loop forget to open the mailbox, which nothing else would do then.
            job.mailbox.open()
            with suppress(asyncio.CancelledError):
                await job.future


def _shielded_from_anyio() -> AbstractContextManager[Any]:
    """anyio cancels again in every pass of the loop, which would keep a processor busy until the job is done."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
