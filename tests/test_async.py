"""The awaitable context: many loops, many threads, cancellation at every moment, contextvars, a clean close."""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from agentstate import (
    ConversationContext,
    InMemoryStorage,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.engine import Engine, engine_of
from agentstate.engine.loops import _Mailbox
from agentstate.operations import Commit, Operation
from agentstate.storage.base import Settle


class Threaded(InMemoryStorage):
    """The memory backend behind worker threads, as if it had to wait for a disk or a network."""

    blocking = True

    def __init__(self, delay: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.delay = delay
        self.started = threading.Semaphore(0)
        self.sizes: list[int] = []

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self.sizes.append(len(operations))
        self.started.release()
        if self.delay:
            time.sleep(self.delay)
        super().execute(operations, settle)


def contents(messages: Sequence[Any]) -> list[Any]:
    return [message["content"] for message in messages]


async def wait_for(semaphore: threading.Semaphore) -> None:
    assert await asyncio.to_thread(semaphore.acquire, True, 20)


def test_operations_awaited_together_are_executed_together() -> None:
    storage = Threaded(delay=0.005)

    async def main() -> None:
        context = ConversationContext(storage)
        await asyncio.gather(*(context.add_to_history(f"c{number}", "user", "hi") for number in range(200)))

    asyncio.run(main())
    assert sum(storage.sizes) == 200
    assert len(storage.sizes) < 20, "they hardly waited for one another"


def test_operations_on_one_context_keep_the_order_in_which_they_were_awaited() -> None:
    async def main() -> list[Any]:
        context = ConversationContext(Threaded())
        await asyncio.gather(*(context.add_to_history("a", "user", number) for number in range(300)))
        return contents(await context.get_history("a"))

    assert asyncio.run(main()) == list(range(300))


def test_the_memory_backend_answers_without_a_thread() -> None:
    async def main() -> None:
        context = ConversationContext(InMemoryStorage())
        before = threading.active_count()
        await asyncio.gather(*(context.increment_variable("a", "n") for _ in range(50)))
        assert threading.active_count() == before
        assert await context.get_variable("a", "n") == 50

    asyncio.run(main())


def test_one_context_object_serves_many_runs_of_asyncio() -> None:
    context = ConversationContext(Threaded())
    for number in range(20):
        asyncio.run(context.add_to_history("a", "user", number))
    assert contents(asyncio.run(context.get_history("a"))) == list(range(20))


def test_one_context_object_serves_loops_in_many_threads_at_a_time() -> None:
    context = ConversationContext(Threaded(delay=0.0005, deadline=60.0))

    async def write(writer: int) -> None:
        await asyncio.gather(*(context.increment_variable(f"c{number % 5}", "n") for number in range(100)))
        for number in range(20):
            await context.add_to_history("log", "user", [writer, number])

    threads = [threading.Thread(target=lambda writer=writer: asyncio.run(write(writer))) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def check() -> None:
        assert [await context.get_variable(f"c{number}", "n") for number in range(5)] == [120] * 5
        log = contents(await context.get_history("log"))
        for writer in range(6):
            assert [number for who, number in log if who == writer] == list(range(20))

    asyncio.run(check())


def test_the_event_loop_goes_on_while_a_storage_waits() -> None:
    async def main() -> None:
        context = ConversationContext(Threaded(delay=0.2))
        ticks = 0
        task = asyncio.create_task(context.set_variable("a", "k", 1))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert ticks > 20

    asyncio.run(main())


def test_a_cancelled_operation_that_has_not_begun_never_happens() -> None:
    async def main() -> None:
        storage = Threaded(delay=0.05)
        context = ConversationContext(storage)
        first = asyncio.create_task(context.add_to_history("a", "user", "first"))
        await wait_for(storage.started)
        second = asyncio.create_task(context.add_to_history("a", "user", "second"))
        third = asyncio.create_task(context.add_to_history("a", "user", "third"))
        await asyncio.sleep(0.01)  # both are queued now, behind the first
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.gather(first, third)
        assert contents(await context.get_history("a")) == ["first", "third"]

    asyncio.run(main())


def test_cancelled_in_the_very_pass_of_the_loop_that_began_it_a_call_leaves_nothing_waiting() -> None:
    async def main() -> None:
        storage = Threaded(delay=0.05)
        context = ConversationContext(storage)
        first = asyncio.create_task(context.add_to_history("a", "user", "first"))
        await wait_for(storage.started)
        task = asyncio.create_task(context.add_to_history("a", "user", "never"))
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        await first
        assert contents(await context.get_history("a")) == ["first"]

    asyncio.run(main())


def test_a_cancelled_operation_that_is_being_carried_out_is_waited_for() -> None:
    async def main() -> None:
        storage = Threaded(delay=0.1)
        context = ConversationContext(storage)
        task = asyncio.create_task(context.add_to_history("a", "user", "kept"))
        await wait_for(storage.started)
        began = time.monotonic()
        for _ in range(3):  # however often
            task.cancel()
            await asyncio.sleep(0.005)
        assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began > 0.05, "it did not wait for what was under way"
        storage.delay = 0.0
        assert contents(await context.get_history("a")) == ["kept"]

    asyncio.run(main())


@pytest.mark.parametrize("place", [(Engine, "submit"), (Engine, "_request"), (_Mailbox, "open")])
def test_an_interrupt_while_calls_are_queued_or_answered_leaves_none_of_them_waiting(
    place: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ConversationContext(Threaded())

    def interrupted(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.undo()
            raise KeyboardInterrupt

    async def main() -> None:
        await context.add_to_history("a", "user", "before")
        monkeypatch.setattr(*place, interrupted)
        await asyncio.gather(*(context.add_to_history(name, "user", 1) for name in "abc"))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert asyncio.run(context.get_history("a"))[0]["content"] == "before"
    asyncio.run(context.aclose())


def test_a_cancelled_operation_of_unknown_outcome_says_so() -> None:
    class Lost(Threaded):
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            self.started.release()
            time.sleep(0.05)
            for index, operation in enumerate(operations):
                assert isinstance(operation, Commit)
                settle(index, StateOutcomeUnknownError("who knows", commit_id=operation.commit_id))

    async def main() -> None:
        storage = Lost()
        task = asyncio.create_task(ConversationContext(storage).set_variable("a", "k", 1, commit_id="mine"))
        await wait_for(storage.started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__cause__, StateOutcomeUnknownError)
        assert caught.value.__cause__.commit_id == "mine"

    asyncio.run(main())


def test_cancelled_at_any_moment_a_batch_is_there_whole_or_not_at_all() -> None:
    async def main() -> None:
        storage = Threaded(delay=0.0002)
        context = ConversationContext(storage)
        chance = random.Random(1)
        finished = 0

        async def write(number: int) -> None:
            nonlocal finished
            async with context.batch("a") as batch:
                batch.add_to_history("user", number)
                batch.set_variable(f"k{number}", number)
            finished += 1

        for number in range(300):
            task = asyncio.create_task(write(number))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(chance.choice((0, 0, 0.0002)))
            task.cancel()
            await asyncio.wait([task])
        stored = contents(await context.get_history("a"))
        assert sorted(stored) == stored == sorted((await context.get_variables("a")).values())
        assert finished <= len(stored) < 300

    asyncio.run(main())


def test_a_cancelled_turn_gives_its_lease_back() -> None:
    async def main() -> None:
        context = ConversationContext(Threaded())
        entered = asyncio.Event()

        async def hold() -> None:
            async with context.turn("a", lease=30) as turn:
                turn.set_variable("k", "never")
                entered.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(hold())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with context.turn("a", timeout=1) as turn:
            turn.set_variable("k", "next")
        assert await context.get_variables("a") == {"k": "next"}

    asyncio.run(main())


def test_waiting_for_a_turn_can_be_cancelled() -> None:
    async def main() -> None:
        context = ConversationContext(Threaded())
        async with context.turn("a"):

            async def wait() -> None:
                async with context.holding("other", "x").turn("a"):
                    raise AssertionError("two turns at a time")

            task = asyncio.create_task(wait())
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with context.turn("a", timeout=1):
            pass

    asyncio.run(main())


def test_tasks_inside_a_turn_carry_its_fence_and_others_are_not_blocked() -> None:
    async def main() -> None:
        context = ConversationContext(Threaded())
        outside = asyncio.create_task(asyncio.sleep(0.02, "started before the turn"))
        async with context.turn("a", lease=0.2, timeout=1) as turn:
            assert context._fence("a") == turn.token
            assert await asyncio.create_task(_fence_of(context)) == turn.token
            assert context._fence("b") is None
            await asyncio.to_thread(lambda: None)
        assert context._fence("a") is None
        await outside

    asyncio.run(main())


async def _fence_of(context: ConversationContext) -> str | None:
    return context._fence("a")


def test_contextvars_follow_the_callers_function() -> None:
    request = contextvars.ContextVar("request", default="none")

    async def main() -> None:
        context = ConversationContext(Threaded())
        request.set("mine")
        thread = threading.get_ident()
        seen: list[Any] = []
        await context.update_variable("a", "k", lambda old: seen.append((request.get(), threading.get_ident())) or 1)
        assert seen == [("mine", thread)]

    asyncio.run(main())


def test_closing_waits_for_what_was_awaited_and_then_refuses() -> None:
    async def main() -> None:
        context = ConversationContext(Threaded(delay=0.05))
        async with context:
            tasks = [asyncio.create_task(context.add_to_history("a", "user", number)) for number in range(3)]
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        await context.aclose()
        with pytest.raises(StateUnavailableError, match="closed"):
            await context.get_history("a")

    asyncio.run(main())


def test_a_loop_that_was_closed_with_calls_pending_harms_nobody() -> None:
    storage = Threaded(delay=0.05)
    context = ConversationContext(storage)
    loop = asyncio.new_event_loop()
    task = loop.create_task(context.add_to_history("a", "user", "orphan"))
    loop.run_until_complete(asyncio.sleep(0.01))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert engine_of(storage).wait_until_empty(20)
    asyncio.run(context.add_to_history("a", "user", "next"))
    assert contents(asyncio.run(context.get_history("a"))) == ["orphan", "next"]
    task.get_coro().close()  # type: ignore[union-attr]


def test_a_call_that_waited_past_its_deadline_is_not_attempted() -> None:
    async def main() -> None:
        storage = Threaded(delay=0.2, deadline=0.1)
        context = ConversationContext(storage)
        first = asyncio.create_task(context.add_to_history("a", "user", "slow"))
        await wait_for(storage.started)
        with pytest.raises(StateTimeoutError):
            await context.add_to_history("a", "user", "late")
        with pytest.raises(StateError):  # it was slower than its own deadline: memory checks it at the last moment
            await first
        storage.delay = 0.0
        assert await context.get_history("a") == []

    asyncio.run(main())


def test_calls_of_several_storages_are_handed_over_in_one_pass_of_the_loop() -> None:
    async def main() -> None:
        contexts = [ConversationContext(Threaded()) for _ in range(3)]
        await asyncio.gather(*(context.add_to_history("a", "user", n) for n, context in enumerate(contexts)))
        for number, context in enumerate(contexts):
            assert contents(await context.get_history("a")) == [number]
            await context.aclose()

    asyncio.run(main())


def run_on(loop_factory: Callable[[], asyncio.AbstractEventLoop] | None, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_every_event_loop_that_is_one_of_asyncio_will_do(kind: str) -> None:
    factory = pytest.importorskip("uvloop").new_event_loop if kind == "uvloop" else None

    async def main() -> None:
        storage = Threaded(delay=0.001)
        async with ConversationContext(storage) as context:
            await asyncio.gather(*(context.increment_variable(f"c{number % 7}", "n") for number in range(70)))
            assert [await context.get_variable(f"c{number}", "n") for number in range(7)] == [10] * 7
            storage.delay = 0.05
            task = asyncio.create_task(context.set_variable("a", "k", 1))
            while storage.started.acquire(blocking=False):
                pass
            await wait_for(storage.started)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await context.get_variable("a", "k") == 1

    run_on(factory, main())


def test_a_task_may_run_the_loop_itself_while_it_makes_a_call() -> None:
    """As notebooks do, with nest_asyncio. In a process of its own, since that changes asyncio for good."""
    pytest.importorskip("nest_asyncio")
    done = subprocess.run(
        [sys.executable, "-c", NESTED],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert done.stdout == "1 [2, 2, 2]\n", done.stderr


NESTED = """
import asyncio, tempfile
import nest_asyncio
from agentstate import ConversationContext, FileStorage

async def increment(context, name):
    loop = asyncio.get_running_loop()
    await context.increment_variable(name, "n")
    loop.run_until_complete(context.increment_variable(name, "n"))
    return loop.run_until_complete(context.get_variable(name, "n"))

async def main():
    context = ConversationContext(FileStorage(tempfile.mkdtemp()))
    await context.set_variable("a", "k", 1)
    first = asyncio.get_running_loop().run_until_complete(context.get_variable("a", "k"))
    print(first, await asyncio.gather(*(increment(context, name) for name in "abc")))
    await context.aclose()

nest_asyncio.apply()
asyncio.run(asyncio.wait_for(main(), 20))
"""


def test_a_call_cancelled_by_anyio_is_waited_for_without_keeping_the_loop_busy() -> None:
    """anyio cancels a task again in every pass of the loop until it ends."""
    anyio = pytest.importorskip("anyio")

    async def main() -> None:
        storage = Threaded(delay=0.3)
        context = ConversationContext(storage)
        loop = asyncio.get_running_loop()

        select = loop._selector.select  # type: ignore[attr-defined]
        looks = 0

        def counted(timeout: float | None = None) -> Any:
            nonlocal looks
            looks += 1
            return select(timeout)

        with anyio.move_on_after(0.05) as scope:
            loop._selector.select = counted  # type: ignore[attr-defined]
            await context.set_variable("a", "k", 1)
        loop._selector.select = select  # type: ignore[attr-defined]
        assert scope.cancelled_caught
        assert looks < 100, "the loop never slept"
        storage.delay = 0
        assert await context.get_variable("a", "k") == 1

    asyncio.run(main())
