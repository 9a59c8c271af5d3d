"""A turn whose holder is cancelled gives its lease back, wherever the cancellation strikes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from agentstate.aio import ConversationContext
from agentstate.context import SyncConversationContext
from agentstate.engine import engine_of
from agentstate.errors import StateError, StateOutcomeUnknownError
from agentstate.operations import Commit, Lease, Operation
from agentstate.storage.base import Settle, StateStorage
from agentstate.storage.memory import InMemoryStorage


class Waiting(StateStorage):
    """Memory that answers late: what `stop_at` picks is carried out, and then waits for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = InMemoryStorage()
        self.stop_at: Any = lambda operation: False
        self.stopped = threading.Event()
        self.go = threading.Event()
        self.unknown = False

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        for index, operation in enumerate(operations):
            try:
                outcome: Any = self.inner.call(operation)
            except StateError as error:
                outcome = error
            if self.stop_at(operation):
                self.stop_at = lambda operation: False
                self.stopped.set()
                assert self.go.wait(30)
                if self.unknown:
                    outcome = StateOutcomeUnknownError("no answer")
            settle(index, outcome)

    def free(self) -> bool:
        """Whether nobody holds the turn."""
        taken = self.inner.call(Lease("a", "take", "probe", 30.0))
        if taken:
            self.inner.call(Lease("a", "release", "probe", 30.0))
        return taken is True


@pytest.fixture
def storage() -> Any:
    storage = Waiting()
    yield storage
    storage.go.set()
    storage.close()


def is_lease(action: str) -> Any:
    return lambda operation: isinstance(operation, Lease) and operation.action == action


PLACES = {
    "while the lease is taken": is_lease("take"),
    "while the turn is committed": lambda operation: isinstance(operation, Commit),
    "while the lease is given back": is_lease("release"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_cancelled_turn_gives_its_lease_back(storage: Waiting, place: str) -> None:
    async def handler(context: ConversationContext) -> None:
        async with context.turn("a", lease=30.0) as turn:
            turn.set_variable("x", 1)

    async def main() -> None:
        context = ConversationContext(storage)
        storage.stop_at = PLACES[place]
        task = asyncio.create_task(handler(context))
        await asyncio.to_thread(storage.stopped.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        storage.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await context.get_variable("a", "x") == (None if "taken" in place else 1)
        async with context.turn("a", timeout=5.0) as turn:
            turn.set_variable("y", 1)
        async with asyncio.timeout(5):
            while not storage.free():
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_turn_cancelled_in_its_body_gives_its_lease_back_and_commits_nothing(storage: Waiting) -> None:
    async def main() -> None:
        context = ConversationContext(storage)

        async def handler() -> None:
            async with asyncio.timeout(0.05), context.turn("a") as turn:
                turn.set_variable("x", 1)
                await asyncio.sleep(30)

        with pytest.raises(TimeoutError):
            await handler()
        assert storage.free()
        assert not await context.exists("a")

    asyncio.run(main())


def test_a_turn_cancelled_in_the_queue_leaves_the_holder_alone(storage: Waiting) -> None:
    async def main() -> None:
        context = ConversationContext(storage)
        other = ConversationContext(storage)
        async with context.turn("a") as turn:

            async def wait() -> None:
                async with other.turn("a"):
                    pytest.fail("the turn is held by another")

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.create_task(wait()), 0.05)
            turn.set_variable("x", 1)
        assert await context.get_variables("a") == {"x": 1}
        assert storage.free()

    asyncio.run(main())


def test_a_lease_whose_answer_was_lost_is_given_back(storage: Waiting) -> None:
    storage.stop_at = is_lease("take")
    storage.unknown = True
    storage.go.set()
    context = SyncConversationContext(storage)
    with pytest.raises(StateOutcomeUnknownError), context.turn("a"):
        pytest.fail("nobody knows whether the turn is held")
    end = time.monotonic() + 5
    while not storage.free() and time.monotonic() < end:
        time.sleep(0.01)
    assert storage.free()


def test_an_interrupted_thread_gives_its_lease_back(storage: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SyncConversationContext(storage)
    call = engine_of(storage).call

    def interrupted(operation: Any) -> Any:
        outcome = call(operation)
        if isinstance(operation, Commit):
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(engine_of(storage), "call", interrupted)
    with pytest.raises(KeyboardInterrupt), context.turn("a") as turn:
        turn.set_variable("x", 1)
    end = time.monotonic() + 5
    while not storage.free() and time.monotonic() < end:
        time.sleep(0.01)
    assert storage.free()
