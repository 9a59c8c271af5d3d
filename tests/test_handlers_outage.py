"""`@stateful(on_unavailable="ephemeral")`: handlers that keep answering while the store is out of reach."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import ValkeyServer

from agentstate import (
    InMemoryStorage,
    StateAccessError,
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
    for part in ("assistant()", "'alice'", "from memory, and forgets", "Valkey cannot be used"):
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
