"""Flushing once a second what was written with fsync "everysec"."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from typing import Final

from ...errors import StateError
from ...operations import NEVER
from .logfile import LogFile

_INTERVAL: Final = 1.0  # seconds
_LONGEST_AT_EXIT: Final = 5.0  # seconds

_logger = logging.getLogger("agentstate.storage.file")


class LazyFlush:
    """The logs that wait for their flush, and the thread that does it."""

    def __init__(self) -> None:
        self._waiting: set[LogFile] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, log: LogFile) -> None:
        """Flush this log within a second or two."""
        log.unflushed = True
        self._waiting.add(log)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    this = weakref.ref(self)
                    thread = threading.Thread(
                        target=_flush_regularly, args=(this, self._stop), name="agentstate-fsync", daemon=True
                    )
                    thread.start()  # where that fails, the next commit tries again
                    self._thread = thread
                    atexit.register(_flush_now, this, _LONGEST_AT_EXIT)

    def flush(self, deadline: float = NEVER) -> None:
        """Flush what was written since the last time, but for what another thread still works on at `deadline`."""
        while self._waiting:
            try:
                log = self._waiting.pop()
            except KeyError:  # another thread took the last one
                return
            if not lock_until(log, deadline):
                _logger.error("%s is still being written, and may not survive a power cut", log.path)
                continue
            try:
                if log.in_use:
                    log.forget()
                log.in_use = True
                log.unflushed = False
                log.flush_lazily()
                log.in_use = False
            except StateError as error:
                _logger.error("the newest commits may not survive a power cut: %s", error)
            finally:
                log.lock.release()

    def close(self, deadline: float) -> None:
        self._stop.set()
        self.flush(deadline)


def lock_until(log: LogFile, deadline: float) -> bool:
    """Lock a log, unless another thread holds it until `deadline`."""
    if deadline == NEVER:
        return log.lock.acquire()
    return log.lock.acquire(timeout=max(0.0, deadline - time.monotonic()))


def _flush_regularly(this: weakref.ref[LazyFlush], stop: threading.Event) -> None:
    while not stop.wait(_INTERVAL) and _flush_now(this):
        pass


def _flush_now(this: weakref.ref[LazyFlush], longest: float = NEVER) -> bool:
    """False if there is nothing to flush for any more. Called at the exit too: not everybody closes storages."""
    alive = this()
    if alive is not None:
        alive.flush(time.monotonic() + longest)
    return alive is not None
