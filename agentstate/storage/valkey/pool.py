"""A pool of connections to one Valkey server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Final

from ...errors import StateTimeoutError
from .wire import Connection, NoTimeLeftError

_TRUSTED: Final = 10.0
"""Seconds for which an idle connection is trusted: load balancers and firewalls drop idle ones without notice."""

_DOUBTFUL: Final = 0.5
"""Seconds without an answer after which a connection that is not trusted is given up."""


class Pool:
    """Connections to one server, each used by one caller at a time. Thread-safe.

    `offset` turns a reading of this process's monotonic clock (microseconds) into the server's time. `silence` is how
    many seconds a connection may be silent before an attempt on it is given up.

    Idle connections are taken and given back without the lock: popping from a list and appending to it are one step
    each. So the list itself is never replaced, and who waits says so before looking for an idle one.
    """

    def __init__(self, connect: Callable[[Pool, float], Connection], limit: int, silence: float) -> None:
        self._connect = connect
        self._limit = limit
        self._silence = silence
        self.offset = 0
        self.run_id = b""  # of the server, as of the newest connection; b"" where that may not be known
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._retired: set[Connection] = set()  # open ones, to be closed when they are given back
        self._connecting = 0
        self._waiting = 0
        self._sent = self._received = 0  # bytes, on connections that are closed

    def forget(self) -> None:
        """In the child of a fork: close this process's copies of the parent's sockets, without a word to the server."""
        connections = [*self._open]
        self._start()
        for connection in connections:
            connection.close()

    def acquire(self, deadline: float) -> Connection:
        """A connection that waits for answers until `deadline`.

        Raises LostConnectionError, ServerError, or StateTimeoutError where all are in use until then.
        """
        now = monotonic()
        if deadline <= now:
            raise NoTimeLeftError("no time was left to send anything")
        connection = self._idle_one() or self._wait_for_one(deadline)
        connection.deadline = deadline
        trusted = now - connection.used < _TRUSTED
        connection.silence = self._silence if trusted else min(_DOUBTFUL, self._silence)
        return connection

    def _wait_for_one(self, deadline: float) -> Connection:
        with self._lock:
            self._waiting += 1
            try:
                while (connection := self._idle_one()) is None and len(self._open) + self._connecting >= self._limit:
                    left = deadline - monotonic()
                    if left <= 0 or not self._freed.wait(left):
                        raise StateTimeoutError(
                            f"all {self._limit} connections (max_connections) were in use until the deadline; not done"
                        )
            finally:
                self._waiting -= 1
            if connection is not None:
                return connection
            self._connecting += 1
        try:
            connection = self._connect(self, min(deadline, monotonic() + self._silence))
        except BaseException:
            with self._lock:
                self._connecting -= 1
                self._freed.notify()
            raise
        with self._lock:
            self._connecting -= 1
            self._open.add(connection)
        if connection.run_id != self.run_id:
            if self.run_id:
                self.retire(connection)  # the address belongs to another server now
            self.run_id = connection.run_id
        connection.used = monotonic()
        return connection

    def has_idle(self) -> bool:
        """Whether there is a connection that nobody uses."""
        return bool(self._idle)

    def ask(self, deadline: float, *commands: bytes) -> list[Any]:
        """The replies to packed commands, errors among them as values, over some connection."""
        connection = self.acquire(deadline)
        try:
            replies = connection.ask(*commands)
        except BaseException:
            self.discard(connection)
            raise
        self.release(connection)
        return replies

    def release(self, connection: Connection) -> None:
        """Give back a connection on which every reply was read."""
        if connection in self._retired:
            self._close((connection,))
            return
        connection.used = monotonic()
        self._idle.append(connection)
        if self._closed:
            self._close(self._all_idle())
        elif self._waiting:
            with self._lock:
                self._freed.notify()

    def discard(self, connection: Connection) -> None:
        """Close a connection that is in an unknown state, and the idle ones, which are likely to be as dead."""
        self._close([connection, *self._all_idle()])

    def retire(self, spared: Connection | None = None) -> None:
        """Close all connections but one: those that are idle now, and the others when they are given back."""
        with self._lock:
            self._retired |= self._open
            if spared is not None:
                self._retired.discard(spared)
        self._close(self._all_idle())

    def close(self) -> None:
        self._closed = True
        self._close(self._all_idle())

    def figures(self) -> tuple[int, int, int, int]:
        """Connections that are idle, those that are used, and bytes that were sent and received."""
        with self._lock:
            idle = len(self._idle)
            sent = self._sent + sum(connection.sent for connection in self._open)
            received = self._received + sum(connection.received for connection in self._open)
            return idle, len(self._open) + self._connecting - idle, sent, received

    def _idle_one(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _all_idle(self) -> list[Connection]:
        return [*iter(self._idle_one, None)]

    def _close(self, connections: Iterable[Connection]) -> None:
        with self._lock:
            closed = [*connections]
            for connection in closed:
                self._open.discard(connection)
                self._retired.discard(connection)
                self._sent += connection.sent
                self._received += connection.received
            self._freed.notify(len(closed))
        for connection in closed:
            connection.close()
