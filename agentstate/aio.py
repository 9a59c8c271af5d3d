"""`ConversationContext`: the documented operations, awaitable.

A thread-pool adapter over the blocking storages: calls are queued in the storage's engine, whose worker threads carry
out all that waits as one group (one pipeline, one flush). A context is not tied to an event loop: it works across
threads and across many `asyncio.run` calls.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from . import calls
from .batches import Batch, Turn
from .caller import Caller, Calls, Each, Emit, Emits, InOrder, Sleep, Step
from .calllog import observed
from .engine.loops import awaited, carry_out, leave
from .errors import StateError
from .operations import Commit, Outcome, Query

P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[Concatenate["ConversationContext", P], R]


def _awaitable(call: Callable[Concatenate[Caller, P], Calls[R]]) -> Call[P, Coroutine[Any, Any, R]]:
    return calls.describe(_driven(call), call, "{}")


def _driven(call: Callable[Concatenate[Any, P], Calls[R]]) -> Call[P, Coroutine[Any, Any, R]]:
    """A coroutine function that runs a call to its end."""

    async def method(self: ConversationContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        storage, engine = self.storage, self._engine
        steps = observed(call(self, *args, **kwargs), storage)
        try:
            step = next(steps)
            while True:
                try:
                    kind = type(step)
                    if storage.blocking and (kind is Commit or kind is Query):  # for speed alone: nearly all steps are
                        job = awaited(engine, (step,))  # type: ignore[arg-type]
                        try:
                            await job.future
                        except BaseException as error:
                            await leave(engine, job, error)
                            raise
                        outcome = job.outcomes[0]
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
        if self.storage.blocking:
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
            return [_raised(outcome) for outcome in await self._outcomes(step.operations)]
        return await self._outcome(step)

    async def _outcome(self, operation: Any) -> Outcome:
        return _raised((await self._outcomes((operation,)))[0])

    async def _outcomes(self, operations: tuple[Any, ...]) -> list[Outcome | StateError]:
        if self.storage.blocking:
            return await carry_out(self._engine, operations)
        return self.storage.carry_out(operations)


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
