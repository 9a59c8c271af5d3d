"""Removing what has expired while a store is in use, so that nobody has to run a cleanup for it."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from contextlib import suppress
from math import inf
from typing import Final, cast

from ...errors import StateError
from ...operations import LONGEST, Commit, Delete, Listing, Page
from ..base import StateStorage

_SHORTEST_INTERVAL: Final = 1.0  # seconds
_LONGEST_INTERVAL: Final = 60.0
_REST: Final = 50
"""A pass looks at every file; so many times its own time passes before the next one, so that it costs 2 % at most."""

_STEP: Final = 10.0  # seconds; a clock that is slewed changes less between two passes
_SETTLED_AFTER: Final = 600.0

_logger = logging.getLogger("agentstate.storage.file")


class SettledClock:
    """Whether the clock of this host was set lately. If it is wrong for a while, nothing must be removed by it."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._set_at = -inf

    def is_settled(self) -> bool:
        """Whether the clock was not set in the last ten minutes, as far as it was watched. To be called regularly."""
        now = time.monotonic()
        offset = time.time() - now
        if abs(offset - self._offset) > _STEP:
            self._set_at = now
        self._offset = offset
        return now - self._set_at >= _SETTLED_AFTER


class ExpirySweep:
    """A thread that looks through a storage regularly: every half `ttl`, but at least every minute.

    It pauses for ten minutes whenever the clock was set.
    """

    def __init__(self, storage: StateStorage, ttl: float) -> None:
        self._storage = weakref.ref(storage)
        self._interval = min(max(ttl / 2, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        self.after_fork()

    def after_fork(self) -> None:
        """As at first. (In the child of a fork too, where the thread is not.)"""
        self.started = False
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        """Start the thread, unless it runs. Where no thread can be started, the next call tries again."""
        with self._lock:
            if not self.started and not self._stop.is_set():
                arguments = (self._storage, self._stop, self._interval)
                thread = threading.Thread(
                    target=_sweep_regularly, args=arguments, name="agentstate-expiry", daemon=True
                )
                with suppress(RuntimeError):  # no thread can be started
                    thread.start()
                    self.started = True

    def stop(self) -> None:
        self._stop.set()


def _sweep_regularly(reference: weakref.ref[StateStorage], stop: threading.Event, interval: float) -> None:
    pause = interval
    clock = SettledClock()
    while not stop.wait(pause):
        storage = reference()
        if storage is None or storage.closed:
            return
        began = time.monotonic()
        try:
            if clock.is_settled():
                remove_expired(storage, stop)
        except StateError as error:
            if stop.is_set():
                return
            _logger.warning("what has expired could not be removed, and will be tried again: %s", error)
        pause = max(interval, _REST * (time.monotonic() - began))
        del storage


def remove_expired(storage: StateStorage, stop: threading.Event) -> None:
    """Remove every context that has expired, and what was remembered of one for long enough. Raises StateError."""
    cursor: str | None = ""
    while cursor is not None and not stop.is_set():
        listing = Listing(cursor, idle_for=LONGEST, deadline=time.monotonic() + storage.deadline)
        page = cast("Page", storage.execute_one(listing))
        for context_id in page.context_ids:
            # The same as a cleanup does, with an age that only an expired context has.
            deadline = time.monotonic() + storage.deadline
            commit_id = f"expiry-{os.urandom(8).hex()}"
            storage.execute_one(Commit(context_id, (Delete(),), commit_id, idle_for=LONGEST, deadline=deadline))
        cursor = page.cursor
