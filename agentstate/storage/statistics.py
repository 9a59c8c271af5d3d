"""The result of `StateStorage.statistics`: counts and histograms of one storage object, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from .tally import TOTAL, Tally


@dataclass(frozen=True)
class Histogram:
    """The distribution of values.

    `below` are the upper limits of the buckets: powers of two, without gaps, from the smallest to the largest value
    seen. `counts` are the numbers of values in the buckets, that is, below the limit and not below the one before it.
    `total` is the sum of all values.
    """

    below: list[int]
    counts: list[int]
    total: int

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The mean of the values; 0 without values."""
        return self.total / (self.count or 1)

    def quantile(self, share: float) -> int:
        """The quantile of this share of the values, rounded up to the limit of its bucket; 0 without values."""
        wanted = share * self.count
        seen = 0
        for limit, count in zip(self.below, self.counts, strict=True):
            seen += count
            if seen >= wanted:
                return limit
        return 0


@dataclass(frozen=True)
class CacheStatistics:
    """The cache of a storage.

    `hits`: operations on a cached context. `misses`: contexts that had to be read. `evictions`: contexts removed to
    make room. `contexts`: cached now, of about `size_bytes`, at most `limit_bytes`. `open_files`: of these contexts.
    """

    hits: int
    misses: int
    evictions: int
    contexts: int
    size_bytes: int
    limit_bytes: int
    open_files: int


@dataclass(frozen=True)
class ConnectionStatistics:
    """Connections to servers: `opened` so far, `idle` and `used` now. `limit` is the maximum for each server."""

    opened: int
    idle: int
    used: int
    limit: int


@dataclass(frozen=True)
class StorageStatistics:
    """The activity of one storage object in the last `seconds`.

    - `operations`: the number by kind: ``query`` (a read), ``commit`` (a change), ``lease`` (of a turn), ``listing``
    - `errors`: the number of failed operations, by the name of the error's class
    - `latency_nanoseconds`: the durations of operations by kind, without the time in the queue. All operations of a
      group have the same duration. In memory, one call in 16 is timed.
    - `group_sizes`: the numbers of operations that were executed together
    - `attempts_repeated`: operations that were retried because of the server or another writer
    - `bytes_written`, `bytes_read`: of files and documents, or on connections to servers
    - `degraded_calls`: handlers that ran on memory instead (``on_unavailable="ephemeral"``)
    - `cache`, `connections`: None if the storage has none
    """

    seconds: float
    operations: dict[str, int]
    errors: dict[str, int]
    latency_nanoseconds: dict[str, Histogram]
    group_sizes: Histogram
    attempts_repeated: int
    bytes_written: int
    bytes_read: int
    degraded_calls: int
    cache: CacheStatistics | None = None
    connections: ConnectionStatistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values: dictionaries, lists and numbers."""
        return asdict(self)


def statistics_of(tally: Tally) -> StorageStatistics:
    """The statistics in a tally."""
    with tally.lock:
        tally.add_up()
        operations, alone = tally.operations()
        groups = list(tally.groups)
        groups[1] += alone
        groups[TOTAL] += alone
        return StorageStatistics(
            seconds=monotonic() - tally.since,
            operations={kind.__name__.lower(): count for kind, count in operations.items()},
            errors=dict(tally.errors),
            latency_nanoseconds={kind.__name__.lower(): _histogram(row) for kind, row in tally.latency.items()},
            group_sizes=_histogram(groups),
            attempts_repeated=tally.attempts_repeated,
            bytes_written=tally.bytes_written,
            bytes_read=tally.bytes_read,
            degraded_calls=tally.degraded_calls,
        )


def _histogram(row: Sequence[int]) -> Histogram:
    seen = [bits for bits in range(TOTAL) if row[bits]]
    buckets = range(seen[0], seen[-1] + 1) if seen else range(0)
    return Histogram([1 << bits for bits in buckets], [row[bits] for bits in buckets], row[TOTAL])
