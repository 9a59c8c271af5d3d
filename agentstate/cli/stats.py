"""The command stats: number, age, length and size of conversations, and the cost of reading them."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from typing import Any, Final

import click

from ..errors import StateError
from ..storage.statistics import StorageStatistics
from . import console, exits
from .console import Column
from .rows import Row, iso, rows_of
from .store import Place, json_option, store_options

_AGES: Final = (("last hour", 1.0), ("last day", 24.0), ("last week", 168.0), ("last 30 days", 720.0))
_LENGTHS: Final = (10, 100, 1_000, 10_000, 100_000)
_TIMES: Final = ("count", "mean", "median below", "p99 below")
_SIZES: Final = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)


class _Statistics:
    """Statistics over all conversations, added one by one."""

    def __init__(self) -> None:
        self.now = time.time()
        self.contexts = self.messages = self.owned = self.expiring = self.size = 0
        self.unreadable: list[StateError] = []
        self.owners: set[str] = set()
        self.ages = Counter[str]()
        self.lengths = Counter[int]()
        self.sizes = Counter[int]()
        self.longest: list[tuple[int, str]] = []
        self.largest: list[tuple[int, str]] = []
        self.oldest: int | None = None
        self.newest: int | None = None

    def add(self, row: Row) -> None:
        found = row.snapshot
        if isinstance(found, StateError):
            self.unreadable.append(found)
            return
        self.contexts += 1
        self.messages += row.messages
        self.owned += found.user_id is not None
        if found.user_id is not None and len(self.owners) < 100_000:
            self.owners.add(found.user_id)
        self.expiring += found.expires is not None
        hours = (self.now - found.updated / 1_000_000) / 3600
        self.ages[next((label for label, limit in _AGES if hours <= limit), "older")] += 1
        self.lengths[next((limit for limit in _LENGTHS if row.messages <= limit), 0)] += 1
        self.oldest = min(found.updated, found.updated if self.oldest is None else self.oldest)
        self.newest = max(found.updated, found.updated if self.newest is None else self.newest)
        size = sum(sum(map(len, part)) for part in (found.variables.values(), found.metadata.values(), found.messages))
        self.size += size
        self.sizes[next((limit for limit in _SIZES if size <= limit), 0)] += 1
        _keep_first(self.longest, row.messages, row.context_id)
        _keep_first(self.largest, size, row.context_id)

    def as_json(self, sizes: bool) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "contexts": self.contexts,
            "unreadable": len(self.unreadable),
            "messages": self.messages,
            "owners": len(self.owners),
            "owned": self.owned,
            "expiring": self.expiring,
            "oldest_update": None if self.oldest is None else iso(self.oldest),
            "newest_update": None if self.newest is None else iso(self.newest),
            "by_age": dict(self.age_bars()),
            "by_messages": dict(self.length_bars()),
            "longest": [{"context_id": name, "messages": count} for count, name in sorted(self.longest, reverse=True)],
        }
        if sizes:
            figures["bytes"] = self.size
            figures["by_bytes"] = dict(self.size_bars())
            figures["largest"] = [{"context_id": name, "bytes": n} for n, name in sorted(self.largest, reverse=True)]
        return figures

    def age_bars(self) -> list[tuple[str, int]]:
        return [(label, self.ages[label]) for label in [*(label for label, _ in _AGES), "older"]]

    def length_bars(self) -> list[tuple[str, int]]:
        labels = [(f"up to {limit:,}", self.lengths[limit]) for limit in _LENGTHS]
        return [*labels, (f"over {_LENGTHS[-1]:,}", self.lengths[0])]

    def size_bars(self) -> list[tuple[str, int]]:
        labels = [(f"up to {console.size_text(limit)}", self.sizes[limit]) for limit in _SIZES]
        return [*labels, (f"over {console.size_text(_SIZES[-1])}", self.sizes[0])]


def _keep_first(heap: list[tuple[int, str]], value: int, context_id: str) -> None:
    """Add a conversation, and keep the five with the highest values."""
    heapq.heappush(heap, (value, context_id))
    if len(heap) > 5:
        heapq.heappop(heap)


@click.command()
@store_options
@click.option("--sizes", is_flag=True, help="Include sizes, which reads everything that is stored.")
@json_option
def stats(place: Place, sizes: bool, as_json: bool) -> int:
    """Show the number, age and length of conversations.

    The last part is about this command itself: its operations on the storage, their latency, and the bytes read. Other
    processes are not included: each has its own `storage.statistics()`.

    \b
    Examples:
      agentstate stats
      agentstate stats --sizes --json | jq .bytes
    """
    figures = _Statistics()
    with place.open() as storage, console.progress("reading") as advance:
        for row in rows_of(storage, everything=sizes):
            figures.add(row)
            advance()
        work = storage.statistics()
    if as_json:
        found = {"storage": place.backend, "where": place.name, **figures.as_json(sizes)}
        console.json_document({**found, "this_command": work.to_dict()})
    else:
        _print_statistics(place, figures, sizes)
        _print_work(work)
    return exits.code_of_all(figures.unreadable)


def _print_statistics(place: Place, figures: _Statistics, sizes: bool) -> None:
    mean = figures.messages / figures.contexts if figures.contexts else 0
    pairs = [
        ("storage", place.backend),
        ("where", place.name),
        ("conversations", f"{figures.contexts:,}"),
        ("messages", f"{figures.messages:,}, {mean:,.1f} per conversation"),
        ("owners", f"{len(figures.owners):,}, with {console.counted(figures.owned, 'conversation')}"),
        ("with expiry", f"{figures.expiring:,}"),
    ]
    if figures.newest is not None and figures.oldest is not None:
        pairs.append(("last update", f"newest {console.ago(figures.newest)}, oldest {console.ago(figures.oldest)}"))
    if sizes:
        pairs.append(("size", console.size_text(figures.size)))
    if figures.unreadable:
        pairs.append(("unreadable", f"{len(figures.unreadable):,} (see `agentstate verify`)"))
    console.facts(pairs)
    if figures.contexts:
        console.line()
        console.bars("last updated", figures.age_bars())
        console.bars("messages per conversation", figures.length_bars())
        if sizes:
            console.bars("size per conversation", figures.size_bars())
        longest = ((name, f"{count:,}") for count, name in sorted(figures.longest, reverse=True))
        console.table((Column("longest conversations", style="bold"), Column("messages", right=True)), longest)
        if sizes:
            largest = ((name, console.size_text(size)) for size, name in sorted(figures.largest, reverse=True))
            console.table((Column("largest conversations", style="bold"), Column("size", right=True)), largest)


def _print_work(work: StorageStatistics) -> None:
    """Print what the storage did for this command."""
    columns = [Column(name, right=bool(place)) for place, name in enumerate(("operations of this command", *_TIMES))]
    console.table(columns, [_times(kind, count, work) for kind, count in work.operations.items() if count])
    groups = work.group_sizes
    pairs = [
        ("groups", f"{groups.count:,}, {groups.mean:,.1f} operations per group"),
        ("read", console.size_text(work.bytes_read)),
        ("written", console.size_text(work.bytes_written)),
        ("retries", f"{work.attempts_repeated:,}"),
    ]
    if work.errors:
        pairs.append(("errors", ", ".join(f"{count:,} {name}" for name, count in work.errors.items())))
    if work.cache is not None:
        cache = work.cache
        pairs.append(("cache", f"hits {cache.hits:,}, misses {cache.misses:,}, {console.size_text(cache.size_bytes)}"))
    if work.connections is not None:
        pairs.append(("connections", f"{work.connections.opened:,} opened"))
    console.facts(pairs)


def _times(kind: str, count: int, work: StorageStatistics) -> tuple[str, ...]:
    taken = work.latency_nanoseconds[kind]
    shown = (taken.mean, taken.quantile(0.5), taken.quantile(0.99))
    return (kind, f"{count:,}", *(f"{nanoseconds / 1e6:,.3f} ms" for nanoseconds in shown))


COMMANDS = (stats,)
