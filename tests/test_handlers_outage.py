"""`@stateful(on_unavailable="ephemeral")`: handlers that keep answering while the store is out of reach."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import ValkeyServer, wait_until

from agentstate import (
    ConversationContext,
    InMemoryStorage,
    StateAccessError,
    StateError,
    StateSerializationError,
    StateUnavailableError,
    SyncConversationContext,
    ValkeyStorage,
    get_context_manager,
    registry,
    stateful,
)
from agentstate.handlers import degraded_calls

TASK = {"id": "alice"}


@pytest.fixture
def server(start_valkey: Callable[..., ValkeyServer]) -> ValkeyServer:
    return start_valkey()


@pytest.fixture
def storage(server: ValkeyServer) -> Iterator[ValkeyStorage]:
    storage = ValkeyStorage(server.url, deadline=0.3, max_value_bytes=1000, max_history=2)
    yield storage
    storage.close()


def test_a_call_during_an_outage_gets_a_context_that_forgets(
    server: ValkeyServer, storage: ValkeyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    @stateful(storage, on_unavailable="ephemeral")
    async def assistant(task: Any, context: Any, context_id: str) -> Any:
        number = await context.increment_variable(context_id, "n")
        return context.degraded, number

    before = degraded_calls()
    assert [asyncio.run(assistant(TASK)), asyncio.run(assistant(TASK))] == [(False, 1), (False, 2)]
    assert degraded_calls() == before
    server.kill()
    with caplog.at_level(logging.WARNING, "agentstate.handlers"):
        assert [asyncio.run(assistant(TASK)), asyncio.run(assistant(TASK))] == [(True, 1), (True, 1)]
    assert degraded_calls() == before + 2
    assert [(record.name, record.levelname) for record in caplog.records] == [("agentstate.handlers", "WARNING")] * 2
    for part in ("assistant()", "'alice'", "from memory, and what it stores is lost", "could not read from Valkey"):
        assert part in caplog.text
    server.start()
    assert asyncio.run(assistant(TASK)) == (False, 3)
    assert degraded_calls() == before + 2


def test_a_paused_server_is_an_outage_too(server: ValkeyServer, storage: ValkeyStorage) -> None:
    handler = stateful(storage, on_unavailable="ephemeral")(lambda task, context: context.degraded)
    with server.paused():
        assert handler(TASK) is True
    assert handler(TASK) is False


def test_raising_is_the_default_and_the_handler_does_not_run_twice(
    server: ValkeyServer, storage: ValkeyStorage
) -> None:
    runs: list[int] = []

    def handler(task: Any, context: Any, context_id: str) -> None:
        runs.append(1)
        context.get_history(context_id)

    server.kill()
    for arguments in ({}, {"on_unavailable": "raise"}, {"on_unavailable": None}):
        with pytest.raises(StateUnavailableError):
            stateful(storage, **arguments)(handler)(TASK)
    assert len(runs) == 3


def test_what_fails_after_the_handler_began_raises(server: ValkeyServer, storage: ValkeyStorage) -> None:
    runs: list[int] = []

    @stateful(storage, on_unavailable="ephemeral")
    def handler(task: Any, context: Any, context_id: str) -> None:
        runs.append(1)
        server.kill()
        context.set_variable(context_id, "k", 1)

    with pytest.raises(StateUnavailableError):
        handler(TASK)
    assert runs == [1]


def test_all_kinds_of_handlers_and_turns(server: ValkeyServer, storage: ValkeyStorage) -> None:
    options: Any = {"on_unavailable": "ephemeral", "serialize_turns": True}

    @stateful(storage, **options)
    def function(task: Any, context: Any, context_id: str) -> Any:
        context.set_variable(context_id, "k", 1)
        return context.degraded

    @stateful(storage, **options)
    async def coroutine(task: Any, context: Any, context_id: str) -> Any:
        await context.set_variable(context_id, "k", 1)
        return context.degraded

    @stateful(storage, **options)
    def generator(task: Any, context: Any, context_id: str) -> Iterator[Any]:
        context.set_variable(context_id, "k", 1)
        yield context.degraded

    @stateful(storage, **options)
    async def stream(task: Any, context: Any, context_id: str) -> AsyncIterator[Any]:
        await context.set_variable(context_id, "k", 1)
        yield context.degraded

    async def first(items: Any) -> Any:
        return [item async for item in items][0]  # noqa: RUF015

    def answers() -> list[Any]:
        return [function(TASK), asyncio.run(coroutine(TASK)), next(generator(TASK)), asyncio.run(first(stream(TASK)))]

    assert answers() == [False] * 4
    server.kill()
    assert answers() == [True] * 4


def test_the_context_in_memory_has_the_limits_of_the_store(server: ValkeyServer, storage: ValkeyStorage) -> None:
    server.kill()

    @stateful(storage, on_unavailable="ephemeral")
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> int:
        for word in ("one", "two", "three"):
            context.add_to_history(context_id, "user", word)
        with pytest.raises(StateSerializationError):
            context.set_variable(context_id, "k", "x" * 1001)
        return context.count_history(context_id)

    assert handler(TASK) == 2


def test_an_error_that_is_no_outage_is_raised(storage: ValkeyStorage) -> None:
    memory = InMemoryStorage()
    SyncConversationContext(memory, user_id="bob").set_variable("alice", "k", 1)
    handler = stateful(memory, on_unavailable="ephemeral", user_id=lambda task: "alice")(lambda task, context: None)
    with pytest.raises(StateAccessError):
        handler(TASK)


class Dead(InMemoryStorage):
    """A store that is out of reach; what asks for it waits until it is let go."""

    blocking = True

    def __init__(self, error: StateError) -> None:
        super().__init__(deadline=30)
        self.error = error
        self.asked: list[str] = []
        self.go_on = threading.Event()

    def execute(self, operations: Any, settle: Any) -> None:
        self.asked += [operation.context_id for operation in operations]
        assert self.go_on.wait(30)
        for index, _ in enumerate(operations):
            settle(index, self.error)


@pytest.mark.parametrize("awaited", [False, True])
def test_calls_that_come_together_share_one_look_at_the_store(awaited: bool) -> None:
    storage = Dead(StateUnavailableError("out of reach"))

    @stateful(storage, on_unavailable="ephemeral")
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> Any:
        return context.degraded, context.increment_variable(context_id, "n")

    @stateful(storage, on_unavailable="ephemeral")
    async def async_handler(task: Any, context: ConversationContext, context_id: str) -> Any:
        return context.degraded, await context.increment_variable(context_id, "n")

    async def main() -> list[Any]:
        calls = asyncio.gather(*(async_handler({"id": str(number)}) for number in range(20)))
        await asyncio.to_thread(wait_until, lambda: bool(storage.asked), "the store is asked")
        await asyncio.sleep(0.05)
        storage.go_on.set()
        return await calls

    if awaited:
        answers = asyncio.run(main())
    else:
        with ThreadPoolExecutor(20) as pool:
            calls = [pool.submit(handler, {"id": str(number)}) for number in range(20)]
            wait_until(lambda: bool(storage.asked), "the store is asked")
            time.sleep(0.05)
            storage.go_on.set()
            answers = [call.result() for call in calls]
    assert answers == [(True, 1)] * 20
    assert len(storage.asked) < 20


def test_a_call_that_is_cancelled_in_its_look_leaves_it_to_the_others() -> None:
    storage = Dead(StateUnavailableError("out of reach"))
    handler = stateful(storage, on_unavailable="ephemeral")(answer_degraded)

    async def main() -> None:
        first = asyncio.create_task(handler({"id": "a"}))
        await asyncio.to_thread(wait_until, lambda: bool(storage.asked), "the store is asked")
        second = asyncio.create_task(handler({"id": "b"}))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        storage.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second is True

    asyncio.run(main())
    assert storage.asked == ["a", "b"]


async def answer_degraded(task: Any, context: Any) -> Any:
    return context.degraded


def test_what_is_wrong_with_one_conversation_is_no_outage_for_the_others(tmp_path: Path) -> None:
    def unreadable() -> StateUnavailableError:
        error = StateUnavailableError("is a directory")
        error.__cause__ = IsADirectoryError(errno.EISDIR, "is a directory")
        return error

    storage = Dead(unreadable())
    handler = stateful(storage, on_unavailable="ephemeral")(answer_degraded)

    async def main() -> None:
        calls = asyncio.gather(*(handler({"id": name}) for name in "abc"))
        storage.go_on.set()
        assert await calls == [True, True, True]

    asyncio.run(main())
    assert sorted(storage.asked) == ["a", "b", "c"]  # each has looked for itself


class SoftTimeLimitError(Exception):
    """As the handler of a signal raises it in the middle of anything."""


def test_an_exception_of_a_signal_handler_passes_and_the_next_call_looks_again() -> None:
    class Interrupted(InMemoryStorage):
        interrupts = 2

        def execute(self, operations: Any, settle: Any) -> None:
            if self.interrupts:
                self.interrupts -= 1
                raise SoftTimeLimitError
            super().execute(operations, settle)

    storage = Interrupted()
    options: Any = {"on_unavailable": "ephemeral", "serialize_turns": True}
    handler = stateful(storage, **options)(lambda task, context: context.degraded)
    async_handler = stateful(storage, **options)(answer_degraded)
    with pytest.raises(SoftTimeLimitError):
        handler(TASK)
    with pytest.raises(SoftTimeLimitError):
        asyncio.run(async_handler(TASK))
    assert handler(TASK) is False
    assert asyncio.run(async_handler(TASK)) is False


class TestConfigured:
    """By the file, for all handlers."""

    @pytest.fixture(autouse=True)
    def configuration(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: ValkeyServer) -> Iterator[None]:
        shared: dict[Any, Any] = {}
        monkeypatch.setattr(registry, "_shared", shared)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)
        section = f"{{backend: valkey, url: '{server.url}', deadline: 0.3, on_unavailable: ephemeral}}"
        Path("agent_config.yaml").write_text(f"state: {section}")
        yield
        for entry in shared.values():
            entry.storage.close()

    def test_the_file_may_ask_for_it(self, server: ValkeyServer) -> None:
        handler = stateful(lambda task, context: context.degraded)
        assert handler(TASK) is False
        server.kill()
        assert handler(TASK) is True

    def test_the_decorator_overrides_the_file(self, server: ValkeyServer) -> None:
        handler = stateful(on_unavailable="raise")(lambda task, context, context_id: context.exists(context_id))
        server.kill()
        with pytest.raises(StateUnavailableError):
            handler(TASK)

    def test_managers_have_no_stand_in(self, server: ValkeyServer) -> None:
        server.kill()
        manager = get_context_manager(blocking=True)
        assert not manager.degraded
        with pytest.raises(StateUnavailableError):
            manager.exists("alice")


def test_no_call_is_forgotten_in_the_count() -> None:
    storage = InMemoryStorage()
    storage.close()
    handler = stateful(storage, on_unavailable="ephemeral")(lambda task, context: context.degraded)
    before = degraded_calls()
    threads = [threading.Thread(target=lambda: [handler(TASK) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert degraded_calls() - before == 200
