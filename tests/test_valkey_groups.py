"""Groups of operations in flight: over connections that break, stop and are forked."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from servers import ValkeyServer, wait_until
from tls import TlsProxy

from agentstate import ConversationContext, StateUnavailableError
from agentstate.engine import CallBack, engine_of
from agentstate.operations import Append, Commit, Query, Window
from agentstate.storage.valkey import ValkeyStorage
from agentstate.storage.valkey.wire import Reader
from agentstate.testing.faults import FaultProxy


def used(storage: ValkeyStorage) -> int:
    """How many connections are in use."""
    return int(getattr(storage.statistics().connections, "used", 0))


def warm(storage: ValkeyStorage, connections: int) -> None:
    """Open so many connections."""
    pool: Any = storage._servers.pool(0, 0)
    opened = [pool.acquire(time.monotonic() + 5) for _ in range(connections)]
    for connection in opened:
        pool.release(connection)


def submit(storage: ValkeyStorage, name: str, told: Callable[[Any], None]) -> None:
    commit = Commit(name, (Append((b'"hi"',)),), f"{name}-1", deadline=time.monotonic() + 10, fresh=True)
    engine_of(storage).submit(CallBack((commit,), lambda job: told(job.outcomes)))


@pytest.fixture
def paused(start_valkey: Any) -> Iterator[tuple[ValkeyServer, ValkeyStorage]]:
    """A server that is paused, and a storage with three connections to it."""
    server: ValkeyServer = start_valkey()
    with closing(ValkeyStorage(server.url)) as storage:
        warm(storage, 3)
        with server.paused():
            yield server, storage


def test_a_server_that_stands_still_ends_all_calls_at_their_deadlines(
    paused: tuple[ValkeyServer, ValkeyStorage],
) -> None:
    _, storage = paused
    context = ConversationContext(storage)

    async def read_all() -> list[Any]:
        storage.deadline = 0.3
        calls = []
        for number in range(12):
            calls.append(asyncio.ensure_future(context.get_variable(f"c{number}", "x")))
            await asyncio.sleep(0.005)
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(read_all())
    assert all(isinstance(outcome, StateUnavailableError | TimeoutError) for outcome in outcomes), outcomes


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_meanwhile_leaves_them_alone(paused: tuple[ValkeyServer, ValkeyStorage]) -> None:
    server, storage = paused
    told: list[Any] = []
    for number in range(2):
        submit(storage, f"c{number}", told.append)
        wait_until(
            lambda expected=number + 1: engine_of(storage).look_after() and used(storage) == expected,  # type: ignore[misc]
            "a group of its own in flight",
        )
    before = len(os.listdir("/dev/fd"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert len(os.listdir("/dev/fd")) <= before - 2  # the two connections
            submitted: list[Any] = []
            submit(storage, "child", submitted.append)
            wait_until(lambda: submitted == [[b""]], "what the child asks for")
            status = 0
        finally:
            os._exit(status)
    server.resume()
    wait_until(lambda: len(told) == 2, "all to be told")
    assert told == [[b""]] * 2
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("parser", ["quick", "plain"])
def test_appends_of_many_tasks_take_effect_once_and_in_order_whatever_breaks(
    parser: str, valkey_server: ValkeyServer, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parser == "plain":
        monkeypatch.setattr("agentstate.storage.valkey.wire._new_reader", Reader)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)

    async def converse(context: ConversationContext, name: str, proxy: FaultProxy) -> None:
        for number in range(40):
            await context.add_to_history(name, "user", str(number))
            if chance.random() < 0.02:
                fault = chance.choice([proxy.cut_reply, proxy.cut_request])
                fault(chance.randrange(500))
            if chance.random() < 0.005:
                proxy.delay_reply(0.05)

    async def main(port: int, proxy: FaultProxy) -> dict[str, list[str]]:
        options: Any = {"key_prefix": key_prefix, "deadline": 20.0}
        async with ConversationContext(ValkeyStorage(f"valkey://127.0.0.1:{port}", **options)) as context:
            names = [f"c{number}" for number in range(30)]
            await asyncio.gather(*(converse(context, name, proxy) for name in names))
            proxy.calm()
            return {name: [message["content"] for message in await context.get_history(name)] for name in names}

    with FaultProxy("127.0.0.1", valkey_server.port) as proxy:
        histories = asyncio.run(main(proxy.port, proxy))
    assert proxy.fired > 3
    for name, history in histories.items():
        assert history == [str(number) for number in range(40)], (name, seed)


def test_large_answers_come_through_tls(valkey_tls: TlsProxy, key_prefix: str) -> None:
    options = {"ssl_ca_certs": str(valkey_tls.ca_file), "key_prefix": key_prefix}
    url = f"valkeys://localhost:{valkey_tls.port}"

    async def main() -> None:
        async with ConversationContext(ValkeyStorage(url, **options)) as context:
            text = "x" * 300_000
            names = [f"c{number}" for number in range(20)]
            for _ in range(3):
                await asyncio.gather(*(context.add_to_history(name, "user", text) for name in names))
                histories = await asyncio.gather(*(context.get_history(name, limit=1) for name in names))
                assert [[message["content"] for message in history] for history in histories] == [[text]] * 20

    asyncio.run(main())


@pytest.mark.parametrize("connections", [1, 2, 32])
def test_reads_and_writes_of_many_tasks_see_each_other(
    connections: int, valkey_server: ValkeyServer, key_prefix: str
) -> None:
    async def converse(context: ConversationContext, name: str) -> None:
        for number in range(20):
            await context.add_to_history(name, "user", str(number))
            await context.set_variable(name, "n", number)
            state = await context.get_state(name, history_limit=2)
            assert state is not None
            assert (state.history[-1]["content"], state.variables["n"]) == (str(number), number)

    async def main() -> None:
        storage = ValkeyStorage(valkey_server.url, key_prefix=key_prefix, max_connections=connections)
        async with ConversationContext(storage) as context:
            await asyncio.gather(*(converse(context, f"c{number}") for number in range(40)))

    asyncio.run(main())


def test_without_libvalkey_half_an_answer_is_waited_for(start_valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.storage.valkey.wire._new_reader", Reader)
    server: ValkeyServer = start_valkey()
    with FaultProxy("127.0.0.1", server.port) as proxy, closing(ValkeyStorage(server.url)) as direct:
        direct.call(Commit("a", (Append((b'"hi"',) * 5000),), "a-1"))
        with closing(ValkeyStorage(f"valkey://127.0.0.1:{proxy.port}")) as storage:
            warm(storage, 2)
            told: list[Any] = []
            query = Query("a", history=Window(), deadline=time.monotonic() + 10)
            engine_of(storage).submit(CallBack((query,), lambda job: told.append(job.outcomes)))
            wait_until(lambda: told, "the answer")
            assert len(told[0][0].messages) == 5000
