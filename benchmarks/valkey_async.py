"""Appends to many conversations at a time, over asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

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
    runner = run.stack.enter_context(asyncio.Runner())
    storage = ValkeyStorage(server.url)
    context = ConversationContext(storage)
    run.stack.callback(storage.close)
    clients: dict[str, Append] = {OURS: lambda name: context.add_to_history(name, "user", TEXT)}
    pools = {}
    for name, parser in _parsers().items():
        client, pools[name] = _native(server, parser)
        clients[name] = _rpush(client, name)
        run.stack.callback(lambda client=client: runner.run(client.aclose()))  # type: ignore[misc]
    glide = runner.run(_glide(server))
    if glide is None:
        run.report.facts["absent"] = "valkey-glide"
    else:
        clients[GLIDE] = lambda name: glide.rpush("glide:" + name, [floors.message()])
        run.stack.callback(lambda: runner.run(glide.close()))
    pipeline = runner.run(floors.Pipeline.connect("127.0.0.1", server.port))
    clients[PIPELINE] = lambda name: pipeline.rpush(b"pipeline:" + name.encode(), floors.message())
    run.stack.callback(lambda: runner.run(_stop(pipeline)))

    costs: dict[str, list[float]] = {name: [] for name in clients}
    for concurrency in CONCURRENCY:
        names = [f"conversation-{number}" for number in range(concurrency)]
        # Long enough that beginning and end, where nothing overlaps, do not matter.
        total = 600 if concurrency == 1 else 4000 if concurrency < 200 else 16_000
        each = max(2, run.size(total, 200) // concurrency)
        cases = {name: _round(runner, append, names, each) for name, append in clients.items()}
        samples = run.compare(cases, 11)
        for name, line in costs.items():
            line.append(1e6 / samples.median(name))
        if concurrency == 1:
            run.row("Valkey, async, one conversation: append", samples, OURS, NATIVE, at_most=1.8, note="goal 1.25")
            for other in (LIBVALKEY, GLIDE, PIPELINE):
                if other in cases:
                    run.row("Valkey, async, one conversation: append", samples, OURS, other)
            continue
        work = f"Valkey, async, {concurrency:,} conversations: append"
        wanted = concurrency in (50, 1000)
        run.row(work, samples, OURS, NATIVE, at_least=3.0 if wanted else 0.0, note="goal 5" if wanted else "")
        for other, least in ((LIBVALKEY, 0.0), (GLIDE, 1.0), (PIPELINE, 0.7)):
            if other in cases:
                run.row(work, samples, OURS, other, at_least=least if concurrency == 1000 else 0.0)
        if concurrency == 1000:
            _processor_time(run, cases, server.client(), each * concurrency)
    for name, line in costs.items():
        run.line("throughput", name, CONCURRENCY, line)


def _processor_time(run: Run, cases: dict[str, Round], client: Any, count: int) -> None:
    """What an append takes of the processors, which is much the same on a busy machine as on a quiet one."""

    def server_time() -> float:
        used = client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(5):
        for name, case in cases.items():
            own, server = time.process_time(), server_time()
            case()
            shares[name].append(((time.process_time() - own) / count * 1e6, (server_time() - server) / count * 1e6))
    for name, samples in shares.items():
        own, server = (sorted(part)[len(samples) // 2] for part in zip(*samples, strict=True))
        run.report.facts[f"processor time of an append at 1,000, {name}"] = (
            f"{own:.1f} µs in the client, {server:.1f} µs in the server"
        )


def _round(runner: asyncio.Runner, append: Append, names: list[str], each: int) -> Round:
    async def converse(name: str) -> None:
        for _ in range(each):
            await append(name)

    async def all_of_them() -> float:
        began = time.perf_counter()
        await asyncio.gather(*map(converse, names))
        return (time.perf_counter() - began) / (each * len(names)) * 1e6

    return lambda: runner.run(all_of_them())


def _parsers() -> dict[str, Any]:
    from valkey._parsers import _AsyncRESP2Parser
    from valkey.utils import LIBVALKEY_AVAILABLE

    parsers: dict[str, Any] = {NATIVE: _AsyncRESP2Parser}
    if LIBVALKEY_AVAILABLE:
        from valkey._parsers import _AsyncLibvalkeyParser

        parsers[LIBVALKEY] = _AsyncLibvalkeyParser
    return parsers


def _native(server: Any, parser: Any) -> tuple[Any, Any]:
    """A client with up to 100 connections: with one for each of 1,000 tasks it is slower."""
    import valkey.asyncio

    pool = valkey.asyncio.BlockingConnectionPool(
        host="127.0.0.1", port=server.port, parser_class=parser, max_connections=100, timeout=60
    )
    return valkey.asyncio.Valkey(connection_pool=pool), pool


def _rpush(client: Any, prefix: str) -> Append:
    return lambda name: client.rpush(f"{prefix}:{name}", floors.message())


async def _glide(server: Any) -> Any:
    try:
        from glide import GlideClient, GlideClientConfiguration, NodeAddress
    except ImportError:
        return None
    addresses = [NodeAddress("127.0.0.1", server.port)]
    return await GlideClient.create(GlideClientConfiguration(addresses, inflight_requests_limit=5000))


async def _stop(pipeline: floors.Pipeline) -> None:
    pipeline.close()
