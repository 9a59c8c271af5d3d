"""`ConversationContext`: the documented operations, awaitable.

A thread-pool adapter over the blocking storages. Calls made in one pass of the event loop are handed to the storage's
dispatcher together; its worker threads carry out all that waits as one group (one pipeline, one flush), and the
outcomes come back to the loop together. A context belongs to no event loop: it works across threads and across many
`asyncio.run` calls.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from . import calls
from .batches import Batch, Turn
from .caller import Caller, Calls, Each, Emit, Emits, InOrder, Sleep, Step
from .calllog import observed
from .errors import StateError, StateOutcomeUnknownError
from .operations import Commit, Outcome, Query
from .storage.base import StateStorage
from .storage.dispatch import Dispatcher
from .storage.jobs import Job, key_of
from .storage.processors import Home, find_processor

if TYPE_CHECKING:
    from .storage.jobs import Outcomes

P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[Concatenate["ConversationContext", P], R]


def _awaitable(call: Callable[Concatenate[Caller, P], Calls[R]]) -> Call[P, Coroutine[Any, Any, R]]:
    return calls.describe(_driven(call), call, "{}")


def _driven(call: Callable[Concatenate[Any, P], Calls[R]]) -> Call[P, Coroutine[Any, Any, R]]:
    """A coroutine function that runs a call to its end."""

    async def method(self: ConversationContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        storage = self.storage
        steps = observed(call(self, *args, **kwargs), storage)
        try:
            step = next(steps)
            while True:
                try:
                    kind = type(step)
                    if storage.waits and (kind is Commit or kind is Query):  # for speed alone: nearly all steps are
                        (outcome,) = await _Wait((step,), storage.dispatcher)
                        if isinstance(outcome, StateError):
                            raise outcome
                    else:
                        outcome = await self._perform(step)
                except StateError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as stop:
            result: R = stop.value
            return result
        except BaseException:  # cancelled or interrupted: the call is told, and cleans up
            steps.close()
            raise

    return method


def _given(_: ConversationContext, steps: Calls[R]) -> Calls[R]:
    """For calls that have begun."""
    return steps


def _iterating(call: Callable[Concatenate[Caller, P], Emits[R]]) -> Call[P, AsyncIterator[R]]:
    async def method(self: ConversationContext, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[R]:
        steps = observed(call(self, *args, **kwargs), self.storage)
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration:
                return
            if isinstance(step, Emit):
                for item in step.items:
                    yield item
                outcome = None
            else:
                outcome = await self._perform(step)

    return calls.describe(method, call, "AsyncIterator[{}]")


class ConversationContext(Caller):
    """Conversations, for asyncio: every operation is awaited, and the event loop is never blocked.

    `storage` defaults to memory. With `user_id` the context is bound to that user: it owns what it creates, lists and
    cleans only its own, and raises StateAccessError on any context that is not that user's. Usable from any number of
    event loops and threads; an async context manager, which closes the storage.

    Cancelling an `await`: an operation that has not begun is taken back; one that is being carried out is waited for,
    at most until its deadline, and then CancelledError is raised (from a StateOutcomeUnknownError if its outcome is
    not known).
    """

    get_or_create = _awaitable(calls.get_or_create)
    get_state = _awaitable(calls.get_state)
    exists = _awaitable(calls.exists)
    update_state = _awaitable(calls.update_state)
    clear_context = _awaitable(calls.clear_context)
    fork_context = _awaitable(calls.fork_context)
    cleanup_old_contexts = _awaitable(calls.cleanup_old_contexts)
    list_contexts = _iterating(calls.list_contexts)

    add_to_history = _awaitable(calls.add_to_history)
    extend_history = _awaitable(calls.extend_history)
    get_history = _awaitable(calls.get_history)
    iter_history = _iterating(calls.iter_history)
    count_history = _awaitable(calls.count_history)
    trim_history = _awaitable(calls.trim_history)
    pop_history = _awaitable(calls.pop_history)
    clear_history = _awaitable(calls.clear_history)

    get_variable = _awaitable(calls.get_variable)
    get_variables = _awaitable(calls.get_variables)
    set_variable = _awaitable(calls.set_variable)
    set_variables = _awaitable(calls.set_variables)
    delete_variable = _awaitable(calls.delete_variable)
    increment_variable = _awaitable(calls.increment_variable)
    update_variable = _awaitable(calls.update_variable)

    get_metadata = _awaitable(calls.get_metadata)
    get_all_metadata = _awaitable(calls.get_all_metadata)
    set_metadata = _awaitable(calls.set_metadata)
    delete_metadata = _awaitable(calls.delete_metadata)

    def batch(self, context_id: str, *, commit_id: str | None = None) -> AsyncBatch:
        """Collect writes in an ``async with`` block and commit them as one at its end; an exception inside commits
        nothing."""
        return AsyncBatch(self, context_id, commit_id)

    def turn(
        self, context_id: str, *, lease: float = 30.0, timeout: float | None = None, commit_id: str | None = None
    ) -> AsyncTurn:
        """A batch that holds the conversation's lease: one turn at a time across tasks, processes and machines.

        `lease`: seconds until a holder that died loses it (it is renewed while held). `timeout`: seconds to wait for
        it, `lease` + 10 by default; then StateTimeoutError. Inside, every write through this context object to this
        conversation carries the fence: TurnLostError, and nothing changed, if the lease was lost.
        """
        return AsyncTurn(self, context_id, lease, timeout, commit_id)

    async def aclose(self) -> None:
        """Close the storage, after what is under way. Closing twice is fine."""
        if self.storage.waits:
            await asyncio.to_thread(self.storage.close)
        else:
            self.storage.close()

    def close(self) -> None:
        """`aclose` for callers that may block."""
        self.storage.close()

    async def __aenter__(self) -> ConversationContext:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    _run = _driven(_given)

    async def _perform(self, step: Step) -> Any:
        """Carry out one step and return its outcome, or raise its error."""
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Each):
            return await asyncio.gather(*map(self._outcome, step.operations), return_exceptions=True)
        if isinstance(step, InOrder):
            return [_raised(outcome) for outcome in await _carry_out(self.storage, step.operations)]
        return await self._outcome(step)

    async def _outcome(self, operation: Any) -> Outcome:
        return _raised((await _carry_out(self.storage, (operation,)))[0])


class AsyncBatch(Batch):
    """Writes that are committed as one at the end of an ``async with`` block. Its methods are plain calls."""

    _caller: ConversationContext

    async def __aenter__(self) -> AsyncBatch:
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._caller._run(self._finish(error is not None))


class AsyncTurn(Turn):
    """A batch that holds the conversation's lease during its ``async with`` block. Its methods are plain calls."""

    _caller: ConversationContext

    async def __aenter__(self) -> AsyncTurn:
        await self._caller._run(self._take(sys._getframe(1)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._caller._run(self._end(error is not None))


def _raised(outcome: Outcome | StateError) -> Outcome:
    if isinstance(outcome, StateError):
        raise outcome
    return outcome


# --- between an event loop and the dispatchers ----------------------------------------------------------------------


_NO_OUTCOMES: Final[Any] = ()


class _Wait(Job):
    """A job that a task of an event loop awaits: ``outcomes = await _Wait(operations, dispatcher)``.

    It is what asyncio calls future-like, and not a future: when it is done, the task goes on in the same pass of the
    loop. (A future would put a callback for each task into the loop's queue, a tenth of what a call costs.)
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_dispatcher", "_go_on", "_port")

    def __init__(self, operations: tuple[Any, ...], dispatcher: Dispatcher) -> None:
        self.operations = operations  # what `Job` does, without a call and a list: there is one of these for each await
        self.outcomes: Outcomes = _NO_OUTCOMES
        first = operations[0]
        self.key = first.context_id if type(first) is Commit else key_of(first)
        self._dispatcher = dispatcher
        self.mailbox = self._port = _port_of_this_loop()
        self._go_on: Callable[[_Wait], object] | None = None  # lets the task go on, if it waits
        self._cancelled: asyncio.CancelledError | None = None

    def __await__(self) -> Generator[_Wait, None, Outcomes]:
        self._port.send(self._dispatcher, self)
        self._asyncio_future_blocking = True
        try:
            yield self
        except asyncio.CancelledError as cancelled:
            # A task is woken for its cancellation one pass of the loop later at the soonest: the job was handed over,
            # if no handler of a signal has raised in between.
            if not self._port.take_back(self._dispatcher, self) and not self._dispatcher.withdraw(self):
                # Waits on, however often the task is cancelled. The deadlines of the operations bound the wait.
                while not self.outcomes:
                    self._asyncio_future_blocking = True
                    with suppress(asyncio.CancelledError):
                        yield self
                for outcome in self.outcomes:
                    if isinstance(outcome, StateOutcomeUnknownError):
                        raise cancelled from outcome
            raise
        return self.outcomes

    def go_on(self) -> None:
        """Let the task go on. Called by the event loop, as is all that follows, which asyncio wants of a future."""
        go_on, self._go_on = self._go_on, None
        if go_on is not None:
            self._context.run(go_on, self)

    def get_loop(self) -> asyncio.AbstractEventLoop | None:
        return self._port.loop()

    def add_done_callback(self, function: Callable[[_Wait], object], *, context: Context) -> None:
        self._go_on = function
        self._context = context

    def cancel(self, msg: Any = None) -> bool:
        loop = self._port.loop()
        if self._cancelled is not None or self._go_on is None or loop is None:
            return False
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        loop.call_soon(self.go_on)
        return True

    def result(self) -> None:
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled


_this_processor = find_processor()


class _Port:
    """One event loop's two mailboxes: jobs on their way to the dispatchers, and finished ones on their way back."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.inbox: deque[_Wait] = deque()
        self._woken = False
        self._is_opening = False  # `_open_inbox` sends what is sent meanwhile at its end
        self._outbox: dict[Dispatcher, list[Job]] = {}
        self._home = Home(_this_processor)

    def send(self, dispatcher: Dispatcher, job: Job) -> None:
        """Hand a job over at the end of this pass of the loop, together with all others of the pass."""
        outbox = self._outbox
        jobs = outbox.get(dispatcher)
        if jobs is not None:
            jobs.append(job)
            return
        if not outbox and not self._is_opening:
            asyncio.get_running_loop().call_soon(self._send_all)
        outbox[dispatcher] = [job]

    def take_back(self, dispatcher: Dispatcher, job: _Wait) -> bool:
        """For a job that is cancelled: whether it is still here.

        KeyboardInterrupt and SystemExit, raised by the handler of a signal while the loop is about to make a callback,
        make it forget that one. It may have been `_send_all`, or `_open_inbox`: the next job that is done has to wake
        the loop again.
        """
        self._woken = False
        jobs = self._outbox.get(dispatcher, ())
        if job not in jobs:
            return False
        del self._outbox[dispatcher]
        dispatcher.submit_jobs([other for other in jobs if other is not job])
        return True

    def _send_all(self) -> None:
        outbox, self._outbox = self._outbox, {}
        try:
            for dispatcher, jobs in outbox.items():
                dispatcher.submit_jobs(jobs, self._home.processor())
        except BaseException:  # KeyboardInterrupt, SystemExit: without this, tasks would wait for ever
            for dispatcher, jobs in outbox.items():
                dispatcher.submit_jobs(jobs)
            raise

    def deliver(self, jobs: Sequence[_Wait]) -> None:
        """Called by worker threads."""
        self.inbox.extend(jobs)
        self._wake()

    def _wake(self) -> None:
        """Called after jobs were put into the inbox. Wakes the loop once while it is busy."""
        # No lock: the box is emptied after `_woken` is taken down, so a job that was put in before is seen, and one
        # that is put in after wakes the loop again (at worst once too often).
        if self._woken:
            return
        self._woken = True
        loop = self.loop()
        if loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._open_inbox)

    def _open_inbox(self) -> None:
        self._woken = False
        self._is_opening = True
        inbox = self.inbox
        try:
            while inbox:
                job = inbox[0]
                go_on, job._go_on = job._go_on, None
                if go_on is not None:
                    job._context.run(go_on, job)
                inbox.popleft()
        finally:
            self._is_opening = False
            if self._outbox:  # what these tasks wait for next: now, not after the loop has looked what else there is
                self._send_all()
            if inbox:  # a task was interrupted (KeyboardInterrupt, SystemExit); telling it again does nothing
                self._wake()


_ports: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Port] = weakref.WeakKeyDictionary()
_last_port: _Port | None = None  # most programs have one loop: found without a look into the dictionary


def _port_of_this_loop() -> _Port:
    global _last_port
    loop = asyncio.get_running_loop()
    port = _last_port
    if port is None or port.loop() is not loop:
        port = _ports.get(loop)
        if port is None:
            port = _ports[loop] = _Port(loop)
        _last_port = port
    return port


async def _carry_out(storage: StateStorage, operations: tuple[Any, ...]) -> Outcomes:
    """Carry out operations on one context, in order."""
    if not storage.waits:
        return storage.carry_out(operations)
    return await _Wait(operations, storage.dispatcher)
