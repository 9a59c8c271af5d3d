"""What may happen to the engine at any moment: exceptions in its workers, calls of signal handlers, no resources."""

from __future__ import annotations

import asyncio
import linecache
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateConflictError,
    StateError,
    StateStorage,
    SyncConversationContext,
    ValkeyStorage,
)
from agentstate.engine import engine_of, queue
from agentstate.operations import Operation, Query
from agentstate.storage import tally
from agentstate.storage.base import Settle


class Blocking(InMemoryStorage):
    """The memory backend behind worker threads, as if it had to wait for something."""

    blocking = True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_at_any_line_of_a_worker_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """Such as a MemoryError. Each call ends, with its outcome or an error of ours, and later calls work."""
    counting = threading.Lock()
    lines = 0
    raised_at = "the beginning"
    while raised_at:
        lines += 1
        left = lines
        raised_at = ""

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left, raised_at
            if frame.f_code.co_filename != queue.__file__:
                return None
            line = linecache.getline(queue.__file__, frame.f_lineno).split()
            if event == "line" and line[0] not in ("try:", "with"):  # where nothing can raise, but for a debugger
                with counting:
                    left -= 1
                    if not left:
                        raised_at = f"line {frame.f_lineno}"
                        raise MemoryError(raised_at)
            return trace

        storage = Blocking(deadline=20.0)
        tracing = threading.gettrace()  # coverage
        threading.settrace(trace)
        try:
            asyncio.run(_use(storage, lambda: raised_at))  # noqa: B023 - while it is this one
        finally:
            threading.settrace(tracing)  # type: ignore[arg-type]
        storage.close()
        caplog.clear()
    assert lines > 100


async def _use(storage: StateStorage, where: Callable[[], str]) -> None:
    context = ConversationContext(storage)
    calls: list[Any] = [context.increment_variable(f"c{number % 3}", "n") for number in range(6)]
    calls += [context.get_or_create(f"c{number}") for number in range(2)]
    done, waiting = await asyncio.wait(map(asyncio.ensure_future, calls), timeout=20)
    if waiting:
        pytest.exit(f"somebody waits for ever after an exception at {where()}")  # nor would they be cancelled
    for task in done:
        error = task.exception()
        assert error is None or isinstance(error, StateError), (where(), error)


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], list[Any]]]:
    """Sets what SIGUSR1 calls; what that returned or raised is put into the list."""
    before = signal.getsignal(signal.SIGUSR1)

    def install(function: Callable[[], object]) -> list[Any]:
        seen: list[Any] = []

        def handle(number: int, frame: FrameType | None) -> None:
            try:
                seen.append(function())
            except BaseException as error:  # noqa: BLE001 - it is what is looked at
                seen.append(error)

        signal.signal(signal.SIGUSR1, handle)
        return seen

    yield install
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture(params=["memory", "file", "exclusive", "documents", "valkey", "valkey documents"])
def each_storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StateStorage]:
    """A storage of each kind, which counts what it does at once and not later for many calls."""
    monkeypatch.setattr(tally, "_BUFFERED", 1)
    storage: StateStorage
    if request.param.startswith("valkey"):
        server = request.getfixturevalue("valkey_9")
        prefix = request.getfixturevalue("key_prefix")
        storage = ValkeyStorage(server.url, key_prefix=prefix, layout="document" if "doc" in request.param else "log")
    elif request.param == "memory":
        storage = InMemoryStorage()
    else:
        storage = FileStorage(
            tmp_path,
            exclusive=request.param == "exclusive",
            layout="document" if "doc" in request.param else "log",
        )
    yield storage
    storage.close()


def test_a_signal_handler_that_calls_the_storage_never_waits_for_the_code_that_it_interrupted(
    each_storage: StateStorage, on_signal: Callable[[Callable[[], object]], list[Any]]
) -> None:
    """At every line of a call: it works, or is a StateConflictError at once."""
    context = SyncConversationContext(each_storage)
    context.set_variable("a", "k", 0)
    seen = on_signal(lambda: context.increment_variable("a", "signals"))
    interrupted = True
    lines = 0
    while interrupted:
        lines += 7  # every line would take minutes
        left = lines
        interrupted = False

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left, interrupted
            if "agentstate" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    interrupted = True
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGUSR1)
            return trace

        tracing = sys.gettrace()  # coverage
        sys.settrace(trace)
        try:
            context.set_variable("a", "k", lines)
        finally:
            sys.settrace(tracing)
        assert context.get_variable("a", "k") == lines
    assert seen
    refused = [outcome for outcome in seen if isinstance(outcome, BaseException)]
    assert all(isinstance(error, StateConflictError) and "signal handler" in str(error) for error in refused), refused
    assert context.get_variable("a", "signals", 0) == len(seen) - len(refused)


def test_a_signal_handler_may_call_the_storage_while_its_thread_waits_for_a_worker(
    on_signal: Callable[[Callable[[], object]], list[Any]],
) -> None:
    begun, gate = threading.Event(), threading.Event()

    class Gated(Blocking):
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            if any(getattr(operation, "context_id", "") == "slow" for operation in operations):
                begun.set()
                assert gate.wait(20)
            super().execute(operations, settle)

    storage = Gated()
    context = SyncConversationContext(storage)
    seen = on_signal(lambda: [context.increment_variable("b", "n"), gate.set()][0])
    first = threading.Thread(target=context.set_variable, args=("slow", "k", 1))
    first.start()
    assert begun.wait(20)
    threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)).start()
    context.set_variable("slow", "k", 2)  # waits behind the first, in the queue
    first.join()
    assert seen == [1]


@contextmanager
def _no_descriptor_left() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 1024), before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)


def test_without_a_descriptor_left_awaited_calls_end_and_work_again_afterwards(valkey_9: Any, key_prefix: str) -> None:
    async def main() -> None:
        context = ConversationContext(ValkeyStorage(valkey_9.url, key_prefix=key_prefix, deadline=1.0))
        calls = [context.increment_variable(f"c{number}", "n") for number in range(20)]
        with _no_descriptor_left():
            outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        assert all(isinstance(outcome, StateError) for outcome in outcomes), outcomes
        again = await asyncio.gather(*(context.increment_variable(f"c{number}", "n") for number in range(20)))
        assert again == [1] * 20
        await context.aclose()

    asyncio.run(main())


def test_a_stalled_lane_does_not_use_up_the_workers_of_the_others() -> None:
    gate = threading.Event()
    stalled = threading.Semaphore(0)

    class TwoServers(Blocking):
        concurrency = 2

        def lane(self, operation: Operation) -> Hashable:
            return getattr(operation, "context_id", "")[:4]

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            assert len({self.lane(operation) for operation in operations}) == 1
            if self.lane(operations[0]) == "sick":
                stalled.release()
                assert gate.wait(20)
            super().execute(operations, settle)

    async def main() -> None:
        context = ConversationContext(TwoServers())
        sick = [asyncio.create_task(context.set_variable(f"sick{number}", "k", 1)) for number in range(20)]
        for number in range(2):
            assert await asyncio.to_thread(stalled.acquire, timeout=20), number
            sick += [asyncio.create_task(context.set_variable(f"sick{number} later", "k", 1)) for number in range(20)]
        for number in range(20):
            await asyncio.wait_for(context.set_variable(f"well{number}", "k", 1), 20)
        assert not any(task.done() for task in sick)
        gate.set()
        await asyncio.gather(*sick)

    asyncio.run(main())


def test_a_lane_that_changes_does_not_change_the_order_within_a_context() -> None:
    class Moving(Blocking):
        now = 0
        seen: list[str]

        def lane(self, operation: Operation) -> Hashable:
            self.now += 1
            return self.now % 2

    async def main() -> list[Any]:
        context = ConversationContext(Moving())
        await asyncio.gather(*(context.add_to_history("a", "user", number) for number in range(100)))
        return [message["content"] for message in await context.get_history("a")]

    assert asyncio.run(main()) == list(range(100))


def test_a_callback_that_fails_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    storage = Blocking()
    engine = engine_of(storage)

    def fail(job: queue.Job) -> None:
        raise ZeroDivisionError("in a callback")

    engine.submit(queue.CallBack((Query("a"),), fail))
    assert engine.wait_until_empty(20)
    assert asyncio.run(ConversationContext(storage).exists("a")) is False
    assert "could not be delivered" in caplog.text
    storage.close()


def test_closing_ends_the_worker_threads() -> None:
    storage = Blocking()
    asyncio.run(ConversationContext(storage).exists("a"))
    workers = set(engine_of(storage)._threads)
    assert workers
    storage.close()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
