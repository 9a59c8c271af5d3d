"""Appends to Valkey and reads from it by many conversations at a time, over asyncio."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from agentstate import ConversationContext, ValkeyStorage

from . import floors
from .measure import SIZES, Measured, Round, Run
from .messages import content_of
from .results import AT_REST
from .sampling import Figures, Limit, Sample, in_tasks
from .servers import start_server

OURS, NATIVE, GLIDE, PIPELINE = "agentstate", "valkey.asyncio", "GLIDE", "hand-written RESP pipelining"
CONCURRENCY: Final = (1, 10, 50, 200, 1000)

_WHERE = "Valkey, asyncio"
_WHY_LONE = (
    "a call goes through a worker thread, so that two threads and the server wake up one after another, where a native "
    "client waits for the loop and the server only"
)
_WHY_SERVER = "the floor sends bare RPUSHes; ours runs a script, which checks each commit and remembers its id"


class Client(NamedTuple):
    """What a client does to a conversation: append a message of this content, and read the last ten."""

    append: Callable[[str, str], Awaitable[Any]]
    read: Callable[[str], Awaitable[Any]]


def many_tasks(run: Run) -> None:
    """Calls by N conversations at a time, each of which waits for its last call, against one command a call."""
    server = start_server(run)
    clients = {name: _Process(run, name, server.port) for name in CLIENTS}
    for name in [name for name, client in clients.items() if not client.is_installed()]:
        run.report.facts[f"not installed: {name}"] = "yes"
        del clients[name]
    throughput: dict[str, dict[float, float]] = {name: {} for name in clients}
    for conversations in CONCURRENCY:
        measured = _compare(run, server, clients, "append", conversations, SIZES[0])
        for name, samples in measured[AT_REST].items():
            throughput[name][conversations] = Figures.of(samples).throughput
    for name, points in throughput.items():
        run.line("throughput", name, points)
    for size in SIZES[1:]:
        for conversations in (1, 50):
            _compare(run, server, clients, "append", conversations, size)
    del clients[PIPELINE]  # it does not read
    for size in SIZES:
        for conversations in (1, 50):
            _compare(run, server, clients, "read", conversations, size)


def _compare(
    run: Run, server: Any, clients: dict[str, _Process], operation: str, conversations: int, size: int
) -> Measured:
    server.client().flushall()
    names = [f"conversation-{number}" for number in range(conversations)]
    if operation == "read":
        for client in clients.values():
            client.round("append", names * 10, size)(Limit(0))
    cases = {name: client.round(operation, names, size) for name, client in clients.items()}
    measured = run.compare(cases, seconds=0.15 if conversations < 200 else 0.25, size=size, rounds=11)
    shown = {"append": "append", "read": "read of the last 10"}[operation]
    if conversations > 1:
        shown += f", {conversations:,} conversations"
    for name in clients:
        if name != OURS:
            target, why = _TARGETS.get((operation, conversations, size, name), (None, ""))
            run.row(
                _WHERE, shown, measured, OURS, name, size=size, concurrent=conversations > 1, at_most=target, why=why
            )
    return measured


_TARGETS: Final = {
    ("append", 1, SIZES[0], NATIVE): (1.6, _WHY_LONE),
    ("append", 50, SIZES[0], NATIVE): (1 / 3, _WHY_SERVER),
    ("append", 1000, SIZES[0], NATIVE): (1 / 3, _WHY_SERVER),
    ("append", 1000, SIZES[0], GLIDE): (1.0, _WHY_SERVER),
    ("append", 1000, SIZES[0], PIPELINE): (1 / 0.7, _WHY_SERVER),
}
"""The largest ratio of our cost to theirs, and why it is missed, where it is."""


class _Process:
    """A client in a process of its own, so that neither its threads nor its memory affect the others."""

    def __init__(self, run: Run, name: str, port: int) -> None:
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        process = processes.Process(target=_serve, args=(theirs, name, port), daemon=True)
        process.start()
        run.stack.callback(process.join)
        run.stack.callback(self._pipe.send, None)

    def is_installed(self) -> bool:
        """Whether the client is installed here. To be called once, first."""
        return bool(self._pipe.recv())

    def round(self, operation: str, names: list[str], size: int) -> Round:
        """Rounds of one operation, by one task for each of the names."""

        def once(limit: Limit) -> Sample:
            self._pipe.send((operation, names, size, limit))
            sample: Sample = self._pipe.recv()
            return sample

        return once


def _serve(pipe: Any, name: str, port: int) -> None:
    """In the process of a client: make rounds until None is received."""
    with asyncio.Runner() as runner:
        client = CLIENTS[name](port, runner)
        pipe.send(client is not None)
        while (asked := pipe.recv()) is not None:
            assert client is not None
            operation, names, size, limit = asked
            call = client.read if operation == "read" else partial(client.append, content_of(size))
            gc.collect()
            pipe.send(runner.run(in_tasks(call, names, limit)))


def _ours(port: int, _: asyncio.Runner) -> Client:
    context = ConversationContext(ValkeyStorage(f"valkey://127.0.0.1:{port}"))
    return Client(
        lambda content, name: context.add_to_history(name, "user", content),
        lambda name: context.get_history(name, limit=10),
    )


def _native(port: int, _: asyncio.Runner) -> Client:
    """With libvalkey, as its documentation recommends, and up to 100 connections: with 1,000 it is slower."""
    import valkey.asyncio

    pool = valkey.asyncio.BlockingConnectionPool(host="127.0.0.1", port=port, max_connections=100, timeout=60)
    client: Any = valkey.asyncio.Valkey(connection_pool=pool)
    return Client(
        lambda content, name: client.rpush(f"native:{name}", floors.message(content)),
        lambda name: client.lrange(f"native:{name}", -10, -1),
    )


def _glide(port: int, runner: asyncio.Runner) -> Client | None:
    try:
        from glide import GlideClient, GlideClientConfiguration, NodeAddress
    except ImportError:
        return None
    configuration = GlideClientConfiguration(
        [NodeAddress("127.0.0.1", port)], inflight_requests_limit=5000, request_timeout=60_000
    )
    client = runner.run(GlideClient.create(configuration))
    return Client(
        lambda content, name: client.rpush(f"glide:{name}", [floors.message(content)]),
        lambda name: client.lrange(f"glide:{name}", -10, -1),
    )


def _pipeline(port: int, runner: asyncio.Runner) -> Client:
    pipeline = runner.run(floors.Pipeline.connect("127.0.0.1", port))

    def read(name: str) -> Awaitable[Any]:
        raise NotImplementedError("the hand-written client knows RPUSH only")

    return Client(lambda content, name: pipeline.rpush(b"pipeline:" + name.encode(), floors.message(content)), read)


CLIENTS: Final[dict[str, Callable[[int, asyncio.Runner], Client | None]]] = {
    OURS: _ours,
    NATIVE: _native,
    GLIDE: _glide,
    PIPELINE: _pipeline,
}
"""Each connects to the server at a port, in the process that it is for. None: it is not installed."""
