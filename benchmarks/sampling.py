"""Calls that are made for a while and timed one by one: in sequence, in tasks of an event loop, or in threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self


@dataclass(frozen=True)
class Limit:
    """When a round ends: after so many seconds or so many calls, whichever is first. At least one call is made."""

    seconds: float
    calls: int = 1_000_000


@dataclass(frozen=True)
class Sample:
    """The calls of one round."""

    latencies: list[float]
    """Seconds that each call took."""
    elapsed: float
    """Seconds that all calls took; less than the sum of the latencies where calls overlap."""

    @property
    def cost(self) -> float:
        """Seconds for each call."""
        return self.elapsed / len(self.latencies)


@dataclass(frozen=True)
class Figures:
    """Latencies in seconds, and calls a second."""

    median: float
    p99: float
    maximum: float
    throughput: float

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Self:
        """Of all calls of the samples together; the throughput is the median of the samples' ones."""
        samples = list(samples)
        ordered = sorted(latency for sample in samples for latency in sample.latencies)
        return cls(
            median(ordered),
            ordered[int(len(ordered) * 0.99)],
            ordered[-1],
            median(1 / sample.cost for sample in samples),
        )


def in_sequence(call: Callable[[], object], limit: Limit, prepare: Callable[[], object] | None = None) -> Sample:
    """One call after another. `prepare` is called before each of them and is not timed."""
    latencies: list[float] = []
    end = time.perf_counter() + limit.seconds
    while True:
        if prepare is not None:
            prepare()
        began = time.perf_counter()
        call()
        now = time.perf_counter()
        latencies.append(now - began)
        if now >= end or len(latencies) >= limit.calls:
            return Sample(latencies, sum(latencies))


async def in_tasks(call: Callable[[str], Awaitable[Any]], names: Sequence[str], limit: Limit) -> Sample:
    """One task for each name, which awaits one call with this name after another."""
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + limit.seconds

    async def converse(name: str) -> None:
        now = time.perf_counter()
        while True:
            called = now
            await call(name)
            now = time.perf_counter()
            latencies.append(now - called)
            if now >= end or len(latencies) >= limit.calls:
                return

    await asyncio.gather(*map(converse, names))
    return Sample(latencies, time.perf_counter() - began)


def in_threads(call: Callable[[str], object], names: Sequence[str], limit: Limit) -> Sample:
    """One thread for each name, which makes one call with this name after another."""
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + limit.seconds

    def converse(name: str) -> None:
        now = time.perf_counter()
        while True:
            called = now
            call(name)
            now = time.perf_counter()
            latencies.append(now - called)
            if now >= end or len(latencies) >= limit.calls:
                return

    threads = [threading.Thread(target=converse, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Sample(latencies, time.perf_counter() - began)
