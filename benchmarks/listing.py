"""Listing and cleaning up many conversations."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from agentstate import ConversationContext, FileStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .measure import Run, benchmark
from .servers import start_server

GAP = 20.0
"""Seconds between the old contexts and the others: more than a cleanup takes, as what is old moves on with time."""


@benchmark("listing")
def listing(run: Run) -> None:
    """List 100,000 contexts, and clean up the tenth of them that is old."""
    count = run.size(100_000, 2_000)
    server = start_server(run)
    _one_backend(run, "Valkey", ValkeyStorage(server.url), count, server)
    _one_backend(run, "file", FileStorage(run.folder(), fsync="no"), count, None)


def _one_backend(run: Run, backend: str, storage: StateStorage, count: int, server: Any) -> None:
    run.stack.callback(storage.close)
    run.say(f"{backend}: making {count:,} contexts")
    old = count // 10
    asyncio.run(_make(storage, range(old)))
    made_old = time.time()
    time.sleep(GAP)
    asyncio.run(_make(storage, range(old, count)))
    context = SyncConversationContext(storage)
    before = _resident()
    with Watch(server) as watch:
        began = time.perf_counter()
        found = sum(1 for _ in context.list_contexts())
        listed = (time.perf_counter() - began) / count * 1e6
        assert found >= count, (found, count)
        age = time.time() - made_old - 1.0
        began = time.perf_counter()
        cleaned = context.cleanup_old_contexts(max_age_hours=age / 3600)
        cleaned_in = (time.perf_counter() - began) / count * 1e6
    assert cleaned == old, (cleaned, old)
    work = f"{backend}, {count:,} contexts"
    run.figure(f"{work}: list, per context", listed, "nothing", 0, "µs")
    run.figure(f"{work}: cleanup of {old:,}, per context looked at", cleaned_in, "nothing", 0, "µs")
    run.figure(f"{work}: memory added by both", _resident() - before, "nothing", 0, "MB")
    if server is not None:
        run.figure(f"{work}: longest a PING of another client took meanwhile", watch.longest * 1e3, "nothing", 0, "ms")
        stats: Any = server.client().info("commandstats")
        assert "cmdstat_keys" not in stats
        slowest: Any = server.client().slowlog_get(1)
        run.report.facts["Valkey: commands slower than 10 ms (slowlog)"] = len(slowest)


async def _make(storage: StateStorage, numbers: range) -> None:
    context = ConversationContext(storage)
    for begin in range(numbers.start, numbers.stop, 1000):
        names = [f"conversation-{number}" for number in range(begin, min(begin + 1000, numbers.stop))]
        await asyncio.gather(*(context.set_variable(name, "theme", "dark") for name in names))


def _resident() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


class Watch:
    """Asks the server again and again, from another thread, and notes the longest answer."""

    def __init__(self, server: Any) -> None:
        self.longest = 0.0
        self._client = None if server is None else server.client()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while self._client is not None and not self._stop.wait(0.002):
            began = time.perf_counter()
            self._client.ping()
            self.longest = max(self.longest, time.perf_counter() - began)
