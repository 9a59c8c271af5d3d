"""The command stats: how many conversations there are, how old and how long."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from typing import Any, Final

import click

from ..errors import StateError
from . import console, exits
from .console import Column
from .rows import Row, iso, rows_of
from .store import Place, json_option, store_options

_AGES: Final = (("last hour", 1.0), ("last day", 24.0), ("last week", 168.0), ("last 30 days", 720.0))
_LENGTHS: Final = (10, 100, 1_000, 10_000, 100_000)


class _Statistics:
    """Figures over all conversations, gathered one by one."""

    def __init__(self) -> None:
        self.now = time.time()
        self.contexts = self.messages = self.owned = self.expiring = self.size = 0
        self.unreadable: list[StateError] = []
        self.owners: set[str] = set()
        self.ages = Counter[str]()
        self.lengths = Counter[int]()
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
        for values in (found.variables.values(), found.metadata.values(), found.messages):
            self.size += sum(map(len, values))
        heapq.heappush(self.largest, (row.messages, row.context_id))
        if len(self.largest) > 5:
            heapq.heappop(self.largest)

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
            "longest": [{"context_id": name, "messages": count} for count, name in sorted(self.largest, reverse=True)],
        }
        if sizes:
            figures["bytes"] = self.size
        return figures

    def age_bars(self) -> list[tuple[str, int]]:
        return [(label, self.ages[label]) for label in [*(label for label, _ in _AGES), "older"]]

    def length_bars(self) -> list[tuple[str, int]]:
        labels = [(f"up to {limit:,}", self.lengths[limit]) for limit in _LENGTHS]
        return [*labels, (f"over {_LENGTHS[-1]:,}", self.lengths[0])]


@click.command()
@store_options
@click.option("--sizes", is_flag=True, help="Add up the bytes of everything stored; reads all of it.")
@json_option
def stats(place: Place, sizes: bool, as_json: bool) -> int:
    """Count conversations and messages, and show how old and how long they are.

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
    if as_json:
        console.json_document({"storage": place.backend, "where": place.name, **figures.as_json(sizes)})
    else:
        _print_statistics(place, figures, sizes)
    return exits.code_of_all(figures.unreadable)


def _print_statistics(place: Place, figures: _Statistics, sizes: bool) -> None:
    mean = figures.messages / figures.contexts if figures.contexts else 0
    pairs = [
        ("storage", place.backend),
        ("where", place.name),
        ("conversations", f"{figures.contexts:,}"),
        ("messages", f"{figures.messages:,}, {mean:,.1f} in a conversation"),
        ("owners", f"{len(figures.owners):,}, of {figures.owned:,} conversations"),
        ("expiring", f"{figures.expiring:,}"),
    ]
    if figures.newest is not None and figures.oldest is not None:
        pairs.append(("last update", f"{console.ago(figures.newest)}; the oldest {console.ago(figures.oldest)}"))
    if sizes:
        pairs.append(("values", console.size_text(figures.size)))
    if figures.unreadable:
        pairs.append(("unreadable", f"{len(figures.unreadable):,} (see agentstate verify)"))
    console.facts(pairs)
    if figures.contexts:
        console.line()
        console.bars("last updated", figures.age_bars())
        console.bars("messages in a conversation", figures.length_bars())
        longest = ((name, f"{count:,}") for count, name in sorted(figures.largest, reverse=True))
        console.table((Column("longest conversations", style="bold"), Column("messages", right=True)), longest)


COMMANDS = (stats,)
