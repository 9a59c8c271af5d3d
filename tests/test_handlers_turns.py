"""`@stateful(serialize_turns=True)`: one handler at a time per conversation, and its writes are fenced."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import wait_until
from turntaking import take_turns

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateConflictError,
    StateStorage,
    StateTimeoutError,
    SyncConversationContext,
    TurnLostError,
    ValkeyStorage,
    batches,
    caller,
    stateful,
)
from agentstate.operations import Lease

TASK = {"id": "alice"}
Opened = Callable[[], StateStorage]


@pytest.fixture(params=["memory", "file", "valkey"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Opens one store, of each backend in turn."""
    storages: list[StateStorage] = []

    def opened() -> StateStorage:
        if request.param == "memory":
            storages.append(storages[0] if storages else InMemoryStorage())
        elif request.param == "file":
            storages.append(FileStorage(tmp_path / "states"))
        else:
            prefix = request.getfixturevalue("key_prefix") if not storages else storages[0].key_prefix  # type: ignore[attr-defined]
            storages.append(ValkeyStorage(request.getfixturevalue("valkey_9").url, key_prefix=prefix))
        return storages[-1]

    yield opened
    for storage in storages:
        storage.close()


@pytest.fixture
def storage() -> Iterator[InMemoryStorage]:
    storage = InMemoryStorage()
    yield storage
    storage.close()


def is_free(storage: StateStorage, context_id: str = "alice") -> bool:
    """Whether nobody holds the turn on the conversation."""
    taken = storage.call(Lease(context_id, "take", "mine", 5.0)) is True
    if taken:
        storage.call(Lease(context_id, "release", "mine", 5.0))
    return taken


class Overlaps:
    """Counts how many are inside at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self.most = 0
        self.total = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self.total += 1
            self.most = max(self.most, self._inside)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1


# --- one at a time --------------------------------------------------------------------------------------------------


def test_functions_take_turns_across_threads(opened: Opened) -> None:
    overlaps = Overlaps()

    def run(storage: StateStorage) -> None:
        @stateful(storage, serialize_turns=True)
        def handler(task: Any, context: SyncConversationContext, context_id: str) -> None:
            with overlaps:
                number = context.get_variable(context_id, "n", 0)
                time.sleep(0.005)
                context.set_variable(context_id, "n", number + 1)

        for _ in range(5):
            handler(TASK)

    storages = [opened() for _ in range(3)]
    threads = [threading.Thread(target=run, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SyncConversationContext(storages[0]).get_variable("alice", "n") == 15
    assert (overlaps.most, overlaps.total) == (1, 15)
    assert is_free(storages[0])


def test_coroutines_take_turns_in_one_loop_and_in_several(opened: Opened) -> None:
    storage = opened()
    overlaps = Overlaps()

    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context: ConversationContext, context_id: str) -> None:
        with overlaps:
            number = await context.get_variable(context_id, "n", 0)
            await asyncio.sleep(0.005)
            await context.set_variable(context_id, "n", number + 1)

    async def many() -> None:
        await asyncio.gather(*(handler(TASK) for _ in range(5)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SyncConversationContext(storage).get_variable("alice", "n") == 10
    assert overlaps.most == 1
    assert is_free(storage)


def test_processes_take_turns(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=take_turns, args=(str(tmp_path), 5)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with SyncConversationContext(FileStorage(tmp_path)) as context:
        assert context.get_variable("alice", "n") == 15


def test_other_conversations_do_not_wait(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context: Any, context_id: str) -> None:
        await barrier.wait()

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(handler({"id": str(n)}) for n in range(3))), 5)

    barrier = asyncio.Barrier(3)
    asyncio.run(main())


# --- fencing --------------------------------------------------------------------------------------------------------


def steal(storage: StateStorage, context_id: str = "alice") -> None:
    """Another takes the turn, as if its lease had run out."""
    storage._leases[context_id] = ("thief", time.monotonic() + 60)  # type: ignore[attr-defined]


def test_writes_commit_one_by_one(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> Any:
        context.add_to_history(context_id, "user", "hi")
        return SyncConversationContext(storage).count_history(context_id)

    assert handler(TASK) == 1


def test_a_handler_that_lost_its_turn_writes_nothing_more(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> None:
        context.set_variable(context_id, "k", "before")
        steal(storage)
        context.set_variable(context_id, "k", "after")

    with pytest.raises(TurnLostError):
        handler(TASK)
    assert SyncConversationContext(storage).get_variable("alice", "k") == "before"


def test_the_fence_goes_with_the_context_into_threads_and_tasks(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context: ConversationContext, context_id: str) -> None:
        steal(storage)
        for write in (
            asyncio.create_task(context.set_variable(context_id, "k", 1)),
            asyncio.to_thread(asyncio.run, context.set_variable(context_id, "k", 1)),
            context.set_variable(context_id, "k", 1),
        ):
            with pytest.raises(TurnLostError):
                await write

    asyncio.run(handler(TASK))
    assert not SyncConversationContext(storage).exists("alice")


def test_a_turn_inside_the_handler_is_nested(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> None:
        with context.turn("another"):
            pass
        with pytest.raises(StateConflictError, match="turns do not nest"), context.turn(context_id):
            pass

    handler(TASK)


# --- handlers inside handlers ---------------------------------------------------------------------------------------


def nested_handlers(storage: StateStorage) -> tuple[Any, Any]:
    @stateful(storage, serialize_turns=True)
    def blocking(task: Any, context: Any, context_id: str) -> str:
        return context_id

    @stateful(storage, serialize_turns=True)
    async def awaitable(task: Any, context: Any, context_id: str) -> str:
        return context_id

    return blocking, awaitable


def test_a_handler_inside_another_on_the_same_conversation_is_an_error_and_not_a_wait(storage: InMemoryStorage) -> None:
    blocking, awaitable = nested_handlers(storage)

    @stateful(storage, serialize_turns=True)
    def outer(task: Any, context_id: str) -> None:
        assert blocking({"id": "another"}) == "another"
        with pytest.raises(StateConflictError, match="this code runs inside a turn on 'alice' already"):
            blocking(task)
        with pytest.raises(StateConflictError, match="turns do not nest"):
            asyncio.run(awaitable(task))

    @stateful(storage, serialize_turns=True)
    async def async_outer(task: Any, context_id: str) -> None:
        assert await awaitable({"id": "another"}) == "another"
        with pytest.raises(StateConflictError, match="turns do not nest"):
            await awaitable(task)
        with pytest.raises(StateConflictError, match="turns do not nest"):
            blocking(task)

    outer(TASK)
    asyncio.run(async_outer(TASK))
    assert blocking(TASK) == "alice"
    assert is_free(storage)


def test_a_task_that_a_handler_starts_waits_for_its_turn(storage: InMemoryStorage) -> None:
    _, awaitable = nested_handlers(storage)
    started: list[asyncio.Task[str]] = []

    @stateful(storage, serialize_turns=True)
    async def outer(task: Any, context_id: str) -> None:
        started.append(asyncio.create_task(awaitable(task)))
        await asyncio.sleep(0.02)
        assert not started[0].done()

    async def main() -> None:
        await outer(TASK)
        assert await started[0] == "alice"

    asyncio.run(main())


# --- generators -----------------------------------------------------------------------------------------------------


def test_a_generator_holds_the_turn_until_it_ends(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> Iterator[int]:
        yield 1
        context.set_variable(context_id, "k", 1)
        yield 2

    generator = handler(TASK)
    assert is_free(storage)
    next(generator)
    assert not is_free(storage)
    assert list(generator) == [2]
    assert is_free(storage)


@pytest.mark.parametrize("end", ["close", "throw", "garbage"])
def test_a_generator_that_is_given_up_gives_the_turn_back(storage: InMemoryStorage, end: str) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context_id: str) -> Iterator[int]:
        yield 1

    generator = handler(TASK)
    next(generator)
    assert not is_free(storage)
    if end == "close":
        generator.close()  # type: ignore[attr-defined]
    elif end == "throw":
        with pytest.raises(KeyError):
            generator.throw(KeyError())  # type: ignore[attr-defined]
    del generator
    assert is_free(storage)


@pytest.mark.parametrize("end", ["exhausted", "aclose", "athrow", "cancel", "garbage"])
def test_an_async_generator_holds_the_turn_until_it_ends(opened: Opened, end: str) -> None:
    storage = opened()

    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context: ConversationContext, context_id: str) -> AsyncIterator[int]:
        yield 1
        await context.set_variable(context_id, "k", 1)
        yield 2

    async def consume(generator: Any) -> None:
        async for _ in generator:
            await asyncio.sleep(0 if end == "exhausted" else 10)

    async def main() -> None:
        generator: Any = handler(TASK)
        if end in ("exhausted", "cancel"):
            consumer = asyncio.create_task(consume(generator))
            await asyncio.sleep(0.05)
            consumer.cancel()
            await asyncio.wait([consumer])
            await generator.aclose()
        else:
            await anext(generator)
            assert not await asyncio.to_thread(is_free, storage)
        if end == "aclose":
            await generator.aclose()
        elif end == "athrow":
            with pytest.raises(KeyError):
                await generator.athrow(KeyError())
        elif end == "garbage":
            del generator
            await asyncio.sleep(0.1)  # the loop closes it
        assert await asyncio.to_thread(is_free, storage)

    asyncio.run(main())


def test_the_consumer_of_a_generator_is_not_inside_the_turn(storage: InMemoryStorage) -> None:
    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> Iterator[Any]:
        yield context

    @stateful(storage, serialize_turns=True)
    async def stream(task: Any, context: ConversationContext, context_id: str) -> AsyncIterator[int]:
        yield 1

    async def consume() -> None:
        async for _ in stream(TASK):
            assert caller.held_turns.get() == ()
            await ConversationContext(storage).set_variable("alice", "k", "outside")

    before = caller.held_turns.get()
    for _ in handler(TASK):
        assert caller.held_turns.get() == before
        steal(storage)
        SyncConversationContext(storage).set_variable("alice", "k", "outside")
    storage._leases.clear()
    asyncio.run(consume())


def test_a_stream_that_was_left_does_not_keep_the_same_task_out(opened: Opened) -> None:
    @stateful(opened(), serialize_turns=True)
    async def stream(task: Any, context: ConversationContext, context_id: str) -> AsyncIterator[int]:
        yield await context.increment_variable(context_id, "n")
        yield 0

    async def main() -> None:
        for expected in range(1, 6):
            async for number in stream(TASK):
                assert number == expected
                break

    asyncio.run(main())


def test_a_stream_that_was_left_open_keeps_others_waiting_until_it_is_closed(storage: InMemoryStorage) -> None:
    blocking, awaitable = nested_handlers(storage)

    @stateful(storage, serialize_turns=True)
    async def stream(task: Any, context_id: str) -> AsyncIterator[int]:
        yield 1
        with pytest.raises(StateConflictError, match="turns do not nest"):
            await awaitable(task)
        with pytest.raises(StateConflictError, match="turns do not nest"):
            blocking(task)
        yield 2

    async def main() -> None:
        left: Any = stream(TASK)
        assert await anext(left) == 1
        waiting = asyncio.create_task(awaitable(TASK))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert await anext(left) == 2
        await left.aclose()
        assert await waiting == "alice"

    asyncio.run(main())


def test_a_generator_of_ones_own_that_holds_a_turn_may_be_left_too(opened: Opened) -> None:
    context, awaitable = SyncConversationContext(opened()), ConversationContext(opened())

    def steps() -> Iterator[int]:
        with context.turn("alice"):
            yield 1

    async def stream() -> AsyncIterator[int]:
        async with awaitable.turn("alice"):
            yield 1

    async def main() -> None:
        for _ in range(2):
            async for _ in stream():
                break
            async with awaitable.turn("alice") as turn:
                turn.increment_variable("n")
            await awaitable.increment_variable("alice", "n")

    def inherited() -> None:
        left = steps()
        next(left)
        left.close()
        with context.turn("alice") as turn:
            turn.increment_variable("n")
        context.increment_variable("alice", "n")

    asyncio.run(main())
    contextvars.copy_context().run(inherited)
    assert context.get_variable("alice", "n") == 6


def test_a_turn_through_another_context_object_is_nested_too(opened: Opened) -> None:
    storage = opened()

    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context_id: str) -> None:
        with (
            pytest.raises(StateConflictError, match="turns do not nest"),
            SyncConversationContext(storage).turn("alice"),
        ):
            pass

    handler(TASK)
    with SyncConversationContext(storage).turn("alice"), pytest.raises(StateConflictError, match="turns do not nest"):
        handler(TASK)
    assert is_free(storage)


# --- getting and giving back ----------------------------------------------------------------------------------------


def test_a_failed_handler_gives_the_turn_back(opened: Opened) -> None:
    storage = opened()

    @stateful(storage, serialize_turns=True)
    def handler(task: Any, context_id: str) -> None:
        raise KeyError

    @stateful(storage, serialize_turns=True)
    async def async_handler(task: Any, context_id: str) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        handler(TASK)
    assert is_free(storage)
    with pytest.raises(KeyError):
        asyncio.run(async_handler(TASK))
    assert is_free(storage)


def test_a_cancelled_handler_gives_the_turn_back(opened: Opened) -> None:
    storage = opened()
    entered = asyncio.Event()

    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context_id: str) -> None:
        entered.set()
        await asyncio.sleep(60)

    async def main() -> None:
        running = asyncio.create_task(handler(TASK))
        await entered.wait()
        assert not await asyncio.to_thread(is_free, storage)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.to_thread(is_free, storage)

    asyncio.run(main())


class SlowStorage(InMemoryStorage):
    """Takes its time to answer, as a server does: until somebody lets it go on."""

    blocking = True

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def execute(self, operations: Any, settle: Any) -> None:
        self.asked.set()
        assert self.go_on.wait(60)
        super().execute(operations, settle)


def test_a_call_that_is_cancelled_while_it_takes_the_turn_does_not_keep_it() -> None:
    storage = SlowStorage()
    runs: list[int] = []

    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context_id: str) -> None:
        runs.append(1)

    async def main() -> None:
        running = asyncio.create_task(handler(TASK))
        assert await asyncio.to_thread(storage.asked.wait, 60)
        running.cancel()
        await asyncio.sleep(0.01)
        storage.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert not runs
    wait_until(lambda: is_free(storage), "the turn is given back")
    storage.close()


def test_a_call_that_is_cancelled_while_it_gives_the_turn_back_gives_it_back() -> None:
    storage = SlowStorage()

    @stateful(storage, serialize_turns=True)
    async def handler(task: Any, context_id: str) -> None:
        storage.asked.clear()
        storage.go_on.clear()

    async def main() -> None:
        storage.go_on.set()
        running = asyncio.create_task(handler(TASK))
        await asyncio.to_thread(wait_until, lambda: not storage.go_on.is_set(), "the handler")
        assert await asyncio.to_thread(storage.asked.wait, 60)
        running.cancel()
        await asyncio.sleep(0.01)
        storage.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    wait_until(lambda: is_free(storage), "the turn is given back")
    storage.close()


def test_an_interrupt_while_the_turn_is_taken_does_not_keep_it() -> None:
    class Interrupted(InMemoryStorage):
        def execute(self, operations: Any, settle: Any) -> None:
            super().execute(operations, settle)
            if operations[0].action == "take" and operations[0].token != "mine":
                raise KeyboardInterrupt

    storage = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        stateful(storage, serialize_turns=True)(lambda task, context_id: None)(TASK)
    wait_until(lambda: is_free(storage), "the turn is given back")


@pytest.mark.parametrize(("timeout", "seconds"), [(0, 1.0), (0.1, 1.0), (2, 2.0), (60, 5.0), (None, 5.0)])
def test_the_store_is_asked_no_longer_than_the_turn_is_waited_for(timeout: float | None, seconds: float) -> None:
    class Asked(InMemoryStorage):
        def execute(self, operations: Any, settle: Any) -> None:
            deadlines.extend(each.deadline for each in operations if isinstance(each, Lease) and each.action == "take")
            super().execute(operations, settle)

    deadlines: list[float] = []
    context = SyncConversationContext(Asked(deadline=5.0))
    before = time.monotonic()
    with context.turn("a", timeout=timeout):
        after = time.monotonic()
    assert before + seconds <= deadlines[0] <= after + seconds


def test_waiting_in_vain_is_an_error_and_the_handler_has_not_run(
    storage: InMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    monkeypatch.setattr(batches.Turn, "__init__", impatient(batches.Turn.__init__))
    steal(storage)
    with pytest.raises(StateTimeoutError, match=r"the turn on 'alice' was not available within 0\.1 s"):
        stateful(storage, serialize_turns=True)(lambda task, context_id: runs.append(1))(TASK)
    assert not runs


def impatient(init: Any) -> Any:
    return lambda self, caller, context_id, lease, timeout, commit_id: init(
        self, caller, context_id, lease, 0.1, commit_id
    )
