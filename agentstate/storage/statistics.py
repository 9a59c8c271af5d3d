"""What `StateStorage.statistics` returns: counts and histograms of one storage object, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from .tally import TOTAL, Tally


@dataclass(frozen=True)
class Histogram:
    """How often values of which size came.

    `below` are the upper limits of the buckets, powers of two, without gaps between the smallest and the largest value
    seen; `counts` says for each how many values were less, but not less than the limit before it. The sum of all
    values is `total`.
    """

    below: list[int]
    counts: list[int]
    total: int

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0 where there were none."""
        return self.total / (self.count or 1)

    def quantile(self, share: float) -> int:
        """A limit that this share of the values stays below, at most twice too high. 0 where there were none."""
        wanted = share * self.count
        seen = 0
        for limit, count in zip(self.below, self.counts, strict=True):
            seen += count
            if seen >= wanted:
                return limit
        return 0


@dataclass(frozen=True)
class CacheStatistics:
    """What a storage keeps in memory of what is stored elsewhere.

    `hits` are operations on a context that was known, `misses` contexts that had to be looked at from scratch, and
    `evictions` contexts let go of for want of room. `size_bytes`, about, is of `limit_bytes`. `contexts` are known now,
    and `open_files` are those of contexts.
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
    """Connections to servers: `opened` so far, `idle` and `used` now; `limit` holds for each server."""

    opened: int
    idle: int
    used: int
    limit: int


@dataclass(frozen=True)
class StorageStatistics:
    """What one storage object did in the last `seconds`.

    - `operations`: how many, by kind: ``query`` (a read), ``commit`` (a change), ``lease`` (of a turn), ``listing``
    - `errors`: how many of them failed, by the name of the error's class
    - `latency_nanoseconds`: of operations, by kind: how long the storage took, waiting in the queue not included.
      Those that were carried out together took equally long. In memory only one call in 16 is timed.
    - `group_sizes`: how many operations were carried out together
    - `attempts_repeated`: operations that were tried again, because of the server or another writer
    - `bytes_written`, `bytes_read`: of files and documents, or on connections to servers
    - `degraded_calls`: handlers that ran on memory instead (``on_unavailable="ephemeral"``)
    - `cache`, `connections`: None where a storage has no such thing
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
        """All of it as JSON has it: dictionaries, lists, numbers."""
        return asdict(self)


def statistics_of(tally: Tally) -> StorageStatistics:
    """What a tally says."""
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
