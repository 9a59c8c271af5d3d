"""Listing and cleaning up many conversations."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from agentstate import ConversationContext, FileStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .counting import resident_megabytes
from .measure import Run
from .servers import start_server

GAP = 20.0
"""Seconds between the old contexts and the others: more than a cleanup takes, since contexts age during it."""


def listing(run: Run) -> None:
    """List 100,000 contexts, and clean up the tenth of them that is old. Measured once, at rest."""
    count = run.amount(100_000, 2_000)
    server = start_server(run)
    _one_backend(run, "Valkey", run.closing(ValkeyStorage(server.url)), count, server)
    _one_backend(run, "files, fsync: no", run.closing(FileStorage(run.folder(), fsync="no")), count, None)


def _one_backend(run: Run, backend: str, storage: StateStorage, count: int, server: Any) -> None:
    run.say(f"{backend}: making {count:,} contexts")
    old = count // 10
    asyncio.run(_make(storage, range(old)))
    made_old = time.time()
    time.sleep(GAP)
    asyncio.run(_make(storage, range(old, count)))
    context = SyncConversationContext(storage)
    before = resident_megabytes()
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
    where = f"{backend}, {count:,} contexts"
    run.counted(f"{where}: list, for each context", listed, "µs")
    run.counted(f"{where}: cleanup of {old:,}, for each context looked at", cleaned_in, "µs")
    run.counted(f"{where}: memory added by both", resident_megabytes() - before, "MB")
    if server is not None:
        run.counted(f"{where}: longest PING of another client meanwhile", watch.longest * 1e3, "ms")
        slow: Any = server.client().slowlog_len()
        run.counted(f"{where}: commands that took the server more than 10 ms", slow, "commands")


async def _make(storage: StateStorage, numbers: range) -> None:
    context = ConversationContext(storage)
    for begin in range(numbers.start, numbers.stop, 1000):
        names = [f"conversation-{number}" for number in range(begin, min(begin + 1000, numbers.stop))]
        await asyncio.gather(*(context.set_variable(name, "theme", "dark") for name in names))


class Watch:
    """Sends PING to the server every 2 ms from another thread, and keeps the longest time of an answer."""

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
