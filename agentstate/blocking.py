"""`SyncConversationContext`: the documented operations, blocking."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from . import calls
from .batches import Batch, Turn
from .caller import Caller, Calls, Each, Emit, Emits, InOrder, Sleep, Step
from .calllog import observed
from .errors import StateError
from .operations import Commit, Outcome, Query

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Concatenate, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")
    Call = Callable[Concatenate["SyncConversationContext", P], R]

_ONE_OPERATION = (Commit, Query)


def _blocking(call: Callable[Concatenate[Caller, P], Calls[R]]) -> Call[P, R]:
    def method(self: SyncConversationContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(call(self, *args, **kwargs))

    return calls.describe(method, call, "{}")


def _iterating(call: Callable[Concatenate[Caller, P], Emits[R]]) -> Call[P, Iterator[R]]:
    def method(self: SyncConversationContext, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        steps = observed(call(self, *args, **kwargs), self.storage)
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration:
                return
            if isinstance(step, Emit):
                yield from step.items
                outcome = None
            else:
                outcome = self._perform(step)

    return calls.describe(method, call, "Iterator[{}]")


class SyncConversationContext(Caller):
    """Conversations, for code that blocks: scripts, threads, embedded devices.

    `storage` defaults to memory. With `user_id` the context is bound to that user: it owns what it creates, lists and
    cleans only its own, and raises StateAccessError on any context that is not that user's. Thread-safe; usable as a
    context manager, which closes the storage.
    """

    get_or_create = _blocking(calls.get_or_create)
    get_state = _blocking(calls.get_state)
    exists = _blocking(calls.exists)
    update_state = _blocking(calls.update_state)
    clear_context = _blocking(calls.clear_context)
    fork_context = _blocking(calls.fork_context)
    cleanup_old_contexts = _blocking(calls.cleanup_old_contexts)
    list_contexts = _iterating(calls.list_contexts)

    add_to_history = _blocking(calls.add_to_history)
    extend_history = _blocking(calls.extend_history)
    get_history = _blocking(calls.get_history)
    iter_history = _iterating(calls.iter_history)
    count_history = _blocking(calls.count_history)
    trim_history = _blocking(calls.trim_history)
    pop_history = _blocking(calls.pop_history)
    clear_history = _blocking(calls.clear_history)

    get_variable = _blocking(calls.get_variable)
    get_variables = _blocking(calls.get_variables)
    set_variable = _blocking(calls.set_variable)
    set_variables = _blocking(calls.set_variables)
    delete_variable = _blocking(calls.delete_variable)
    increment_variable = _blocking(calls.increment_variable)
    update_variable = _blocking(calls.update_variable)

    get_metadata = _blocking(calls.get_metadata)
    get_all_metadata = _blocking(calls.get_all_metadata)
    set_metadata = _blocking(calls.set_metadata)
    delete_metadata = _blocking(calls.delete_metadata)

    def batch(self, context_id: str, *, commit_id: str | None = None) -> SyncBatch:
        """Collect writes in a ``with`` block and commit them as one at its end; an exception inside commits nothing."""
        return SyncBatch(self, context_id, commit_id)

    def turn(
        self, context_id: str, *, lease: float = 30.0, timeout: float | None = None, commit_id: str | None = None
    ) -> SyncTurn:
        """A batch that holds the conversation's lease: one turn at a time across threads, processes and machines.

        `lease`: seconds until a holder that died loses it (it is renewed while held). `timeout`: seconds to wait for
        it, `lease` + 10 by default; then StateTimeoutError. Inside, every write through this context object to this
        conversation carries the fence: TurnLostError, and nothing changed, if the lease was lost.
        """
        return SyncTurn(self, context_id, lease, timeout, commit_id)

    def close(self) -> None:
        """Close the storage, after what is under way. Closing twice is fine."""
        self.storage.close()

    def __enter__(self) -> SyncConversationContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, steps: Calls[R]) -> R:
        """Run a call to its end."""
        storage = self.storage
        steps = observed(steps, storage)
        try:
            step = next(steps)
            while True:
                try:
                    # The last two branches are for speed alone: nearly all steps are one operation.
                    if not isinstance(step, _ONE_OPERATION):
                        outcome = self._perform(step)
                    elif storage.blocking:
                        outcome = self._engine.call(step)
                    else:
                        outcome = storage.call(step)
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

    def _perform(self, step: Step) -> Any:
        """Carry out one step and return its outcome, or raise its error."""
        if isinstance(step, Sleep):
            time.sleep(step.seconds)
            return None
        if isinstance(step, Each):
            if self.storage.blocking:
                return self._engine.perform_each(step.operations)
            return self.storage.carry_out(step.operations)
        if isinstance(step, InOrder):
            return [_raised(outcome) for outcome in self._outcomes(step.operations)]
        return _raised(self._outcomes((step,))[0])

    def _outcomes(self, operations: tuple[Any, ...]) -> list[Outcome | StateError]:
        if self.storage.blocking:
            return self._engine.perform(operations)
        return self.storage.carry_out(operations)


class SyncBatch(Batch):
    """Writes that are committed as one at the end of a ``with`` block."""

    _caller: SyncConversationContext

    def __enter__(self) -> SyncBatch:
        self._enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._caller._run(self._finish(error is not None))


class SyncTurn(Turn):
    """A batch that holds the conversation's lease during its ``with`` block."""

    _caller: SyncConversationContext

    def __enter__(self) -> SyncTurn:
        self._caller._run(self._take(sys._getframe(1)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._caller._run(self._end(error is not None))


def _raised(outcome: Outcome | StateError) -> Outcome:
    if isinstance(outcome, StateError):
        raise outcome
    return outcome
