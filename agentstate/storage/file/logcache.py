"""The logs that are known: kept in memory and open within bounds, those used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from .folder import Folder
from .logfile import LogFile

if TYPE_CHECKING:
    from ..statistics import CacheStatistics


class LogCache:
    """One LogFile per context. Thread-safe; `log.lock` guards what is known of a single log."""

    def __init__(self, folder: Folder, limit_bytes: int, *, trusted: bool) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._trusted = trusted
        self._logs: OrderedDict[str, LogFile] = OrderedDict()
        self._lock = threading.Lock()
        self._weight = 0
        self.most_open = folder.fs.most_open_files()

    def log_of(self, context_id: str) -> LogFile:
        logs = self._logs
        log = logs.get(context_id)
        if log is None or log.discarded:
            with self._lock:
                log = logs.get(context_id)
                if log is None or log.discarded:
                    log = logs[context_id] = LogFile(self._folder, context_id, trusted=self._trusted)
            return log
        try:  # noqa: SIM105 - suppress() takes longer than all of this
            logs.move_to_end(context_id)
        except KeyError:  # another thread dropped it meanwhile
            pass
        return log

    def grew(self, size: int) -> None:
        """Bytes were added to a log."""
        self._weight += size

    def is_full(self) -> bool:
        return self._weight > self._limit_bytes or self._folder.open_files > self.most_open

    def keep(self, log: LogFile) -> None:
        """After an operation, with the log's lock held: keep what is worth it, within bounds."""
        if log.identity is None:
            self.discard(log)
        elif not log.weight and log.image is not None:
            log.weight = log.image.weight()
            self._weight += log.weight
        if self._weight > self._limit_bytes or self._folder.open_files > self.most_open:
            self._shrink(log)

    def discard(self, log: LogFile) -> None:
        """Drop a log, with its lock held."""
        log.discarded = True
        with self._lock:
            if self._logs.get(log.context_id) is log:
                del self._logs[log.context_id]
        log.forget()

    def _shrink(self, current: LogFile) -> None:
        """Drop what was used longest ago, and close files."""
        if self._folder.open_files > self.most_open:
            goal = self.most_open * 3 // 4
            for log in self.logs():
                if self._folder.open_files <= goal:
                    break
                if log is not current and log.reader.fd >= 0 and log.lock.acquire(blocking=False):
                    log.reader.close()
                    log.lock.release()
        if self._weight > self._limit_bytes:
            logs = self.logs()
            total = 0
            for log in logs:
                image = log.image
                log.weight = 0 if image is None else image.weight()
                total += log.weight
            for log in logs:
                if total <= self._limit_bytes * 3 // 4:
                    break
                if log is not current and not log.unflushed and log.lock.acquire(blocking=False):
                    total -= log.weight
                    self.discard(log)
                    self._folder.tally.add(cache_evictions=1)
                    log.lock.release()
            self._weight = total

    def logs(self) -> list[LogFile]:
        return list(self._logs.values())

    def statistics(self, operations: int) -> CacheStatistics:
        """What the cache holds, and what it was good for in so many operations on contexts."""
        from ..statistics import CacheStatistics

        tally = self._folder.tally
        return CacheStatistics(
            hits=max(0, operations - tally.cache_misses),
            misses=tally.cache_misses,
            evictions=tally.cache_evictions,
            contexts=len(self._logs),
            size_bytes=self._weight,
            limit_bytes=self._limit_bytes,
            open_files=self._folder.open_files,
        )
