"""Appends to many conversations at a time, over asyncio."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from agentstate import ConversationContext, ValkeyStorage

from . import floors
from .measure import TEXT, Round, Run, benchmark
from .servers import start_server

Append = Callable[[str], Awaitable[Any]]

CONCURRENCY = (1, 10, 50, 200, 1000)
OURS, NATIVE, LIBVALKEY, GLIDE, PIPELINE = (
    "agentstate", "valkey.asyncio", "valkey.asyncio with libvalkey", "GLIDE", "hand-written RESP pipelining",
)  # fmt: skip


@benchmark("valkey-async")
def appends(run: Run) -> None:
    """Appends by N conversations at a time, each waiting for its last one, against one RPUSH an append."""
    server = start_server(run)
    clients = {name: _Client(run, name, server.port) for name in CLIENTS}
    for name in [name for name, client in clients.items() if not client.is_there()]:
        run.report.facts[f"not installed: {name}"] = True
        del clients[name]
    costs: dict[str, list[float]] = {name: [] for name in clients}
    for concurrency in CONCURRENCY:
        # Long enough that beginning and end, where nothing overlaps, do not matter.
        total = 600 if concurrency == 1 else 4000 if concurrency < 50 else 16_000
        each = max(2, run.size(total, 200) // concurrency)
        samples = run.compare({name: client.round(concurrency, each) for name, client in clients.items()}, 11)
        for name, line in costs.items():
            line.append(1e6 / samples.median(name))
        if concurrency == 1:
            run.row("Valkey, async, one conversation: append", samples, OURS, NATIVE, at_most=1.8, note="goal 1.25")
            for other in (LIBVALKEY, GLIDE, PIPELINE):
                if other in clients:
                    run.row("Valkey, async, one conversation: append", samples, OURS, other)
            continue
        work = f"Valkey, async, {concurrency:,} conversations: append"
        wanted = concurrency in (50, 1000)
        run.row(work, samples, OURS, NATIVE, at_least=3.0 if wanted else 0.0, note="goal 5" if wanted else "")
        for other, least in ((LIBVALKEY, 0.0), (GLIDE, 1.0), (PIPELINE, 0.7)):
            if other in clients:
                run.row(work, samples, OURS, other, at_least=least if concurrency == 1000 else 0.0)
        if concurrency == 1000:
            _processor_time(run, clients, server.client(), concurrency, each)
    for name, line in costs.items():
        run.line("throughput", name, CONCURRENCY, line)


def _processor_time(run: Run, clients: dict[str, _Client], server: Any, concurrency: int, each: int) -> None:
    """What an append takes of the processors, which is much the same on a busy machine as on a quiet one."""

    def server_time() -> float:
        used = server.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
    count = concurrency * each
    for _ in range(5):
        for name, client in clients.items():
            before = server_time()
            client.round(concurrency, each)()
            shares[name].append((client.processor_time / count * 1e6, (server_time() - before) / count * 1e6))
    for name, samples in shares.items():
        own, of_server = (sorted(part)[len(samples) // 2] for part in zip(*samples, strict=True))
        run.report.facts[f"processor time of an append at {concurrency:,}, {name}"] = (
            f"{own:.1f} µs in the client, {of_server:.1f} µs in the server"
        )


class _Client:
    """A client in a process of its own: neither its threads nor what it keeps in memory are in the way of others."""

    def __init__(self, run: Run, name: str, port: int) -> None:
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        process = processes.Process(target=_serve, args=(theirs, name, port), daemon=True)
        process.start()
        run.stack.callback(process.join)
        run.stack.callback(self._pipe.send, None)
        self.processor_time = 0.0  # seconds, of the last round

    def is_there(self) -> bool:
        """Whether it is installed."""
        return bool(self._pipe.recv())

    def round(self, concurrency: int, each: int) -> Round:
        """A round of so many conversations, with so many appends each; microseconds an append."""

        def once() -> float:
            self._pipe.send((concurrency, each))
            cost, self.processor_time = self._pipe.recv()
            return float(cost)

        return once


def _serve(pipe: Any, name: str, port: int) -> None:
    """The process of a client: carries out rounds until it is given None."""
    with asyncio.Runner() as runner:
        append = CLIENTS[name](port, runner)
        pipe.send(append is not None)
        while (asked := pipe.recv()) is not None:
            concurrency, each = asked
            assert append is not None
            gc.collect()
            used = time.process_time()
            cost = runner.run(_appends(append, [f"conversation-{number}" for number in range(concurrency)], each))
            pipe.send((cost, time.process_time() - used))


async def _appends(append: Append, names: list[str], each: int) -> float:
    async def converse(name: str) -> None:
        for _ in range(each):
            await append(name)

    began = time.perf_counter()
    await asyncio.gather(*map(converse, names))
    return (time.perf_counter() - began) / (each * len(names)) * 1e6


def _ours(port: int, _: asyncio.Runner) -> Append:
    context = ConversationContext(ValkeyStorage(f"valkey://127.0.0.1:{port}"))
    return lambda name: context.add_to_history(name, "user", TEXT)


def _native(port: int, _: asyncio.Runner) -> Append:
    from valkey._parsers import _AsyncRESP2Parser

    return _rpush(port, _AsyncRESP2Parser, "native")


def _libvalkey(port: int, _: asyncio.Runner) -> Append | None:
    from valkey.utils import LIBVALKEY_AVAILABLE

    if not LIBVALKEY_AVAILABLE:
        return None
    from valkey._parsers import _AsyncLibvalkeyParser

    return _rpush(port, _AsyncLibvalkeyParser, "libvalkey")


def _rpush(port: int, parser: Any, prefix: str) -> Append:
    """With up to 100 connections: with one for each of 1,000 tasks it is slower."""
    import valkey.asyncio

    pool = valkey.asyncio.BlockingConnectionPool(
        host="127.0.0.1", port=port, parser_class=parser, max_connections=100, timeout=60
    )
    client = valkey.asyncio.Valkey(connection_pool=pool)
    return lambda name: client.rpush(f"{prefix}:{name}", floors.message())


def _glide(port: int, runner: asyncio.Runner) -> Append | None:
    try:
        from glide import GlideClient, GlideClientConfiguration, NodeAddress
    except ImportError:
        return None
    configuration = GlideClientConfiguration([NodeAddress("127.0.0.1", port)], inflight_requests_limit=5000)
    client = runner.run(GlideClient.create(configuration))
    return lambda name: client.rpush(f"glide:{name}", [floors.message()])


def _pipeline(port: int, runner: asyncio.Runner) -> Append:
    pipeline = runner.run(floors.Pipeline.connect("127.0.0.1", port))
    return lambda name: pipeline.rpush(b"pipeline:" + name.encode(), floors.message())


CLIENTS: Final[dict[str, Callable[[int, asyncio.Runner], Append | None]]] = {
    OURS: _ours,
    NATIVE: _native,
    LIBVALKEY: _libvalkey,
    GLIDE: _glide,
    PIPELINE: _pipeline,
}
"""Each makes an append on a server at this port, in the process that it is for; None: it is not installed."""
