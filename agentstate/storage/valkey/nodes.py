"""The servers behind a target, and pools of connections to them: one server, a sentinel's primary, or a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any, Final

from ...errors import StateConfigError, StateTimeoutError
from ..tally import Tally
from .risks import info_field
from .url import Address, Target
from .wire import Connection, LostConnectionError, ServerError, command, open_connection

SLOTS: Final = 16384


class Pool:
    """Connections to one server, each used by one caller at a time. Thread-safe.

    `offset` turns a reading of this process's monotonic clock (microseconds) into the server's time.

    Idle connections are taken and given back without the lock: popping from a list and appending to it are one step
    each. So the list itself is never replaced, and who waits says so before looking for an idle one.
    """

    def __init__(self, connect: Callable[[Pool, float], Connection], limit: int) -> None:
        self._connect = connect
        self._limit = limit
        self.offset = 0
        self._closed = False
        self._start()

    def forget(self) -> None:
        """In the child of a fork: close this process's copies of the parent's sockets, without a word to the server."""
        connections = [*self._open]
        self._start()
        for connection in connections:
            connection.close()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._connecting = 0
        self._waiting = 0
        self._sent = self._received = 0  # bytes, on connections that are closed

    def acquire(self, deadline: float) -> Connection:
        """A connection that waits for answers until `deadline`.

        Raises LostConnectionError, ServerError, or StateTimeoutError where all are in use until then.
        """
        connection = self._idle_one() or self._wait_for_one(deadline)
        connection.deadline = deadline
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
            connection = self._connect(self, deadline)
        except BaseException:
            with self._lock:
                self._connecting -= 1
                self._freed.notify()
            raise
        with self._lock:
            self._connecting -= 1
            self._open.add(connection)
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
        self._idle.append(connection)
        if self._closed:
            self._close(())
        elif self._waiting:
            with self._lock:
                self._freed.notify()

    def discard(self, connection: Connection) -> None:
        """Close a connection that is in an unknown state, and the idle ones, which are likely to be as dead."""
        self._close((connection,))

    def close(self) -> None:
        self._closed = True
        self._close(())

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

    def _close(self, some: Iterable[Connection]) -> None:
        """Close these connections and the idle ones."""
        with self._lock:
            broken = [*some, *iter(self._idle_one, None)]
            for connection in broken:
                self._open.discard(connection)
                self._sent += connection.sent
                self._received += connection.received
            self._freed.notify(len(broken))
        for connection in broken:
            connection.close()


class Servers:
    """Finds the server that has a key, and connects to it.

    `prepare` is called with the first connection to every server.
    """

    def __init__(
        self, target: Target, max_connections: int, prepare: Callable[[Connection, Address], None], tally: Tally
    ) -> None:
        self.target = target
        self.tally = tally
        self.is_cluster = target.kind == "cluster"
        self.max_connections = max_connections
        self._prepare = prepare
        self._prepared: set[Address] = set()
        self._pools: dict[Address, Pool] = {}
        self._lock = threading.Lock()
        self._slots: list[Address] = []  # of a cluster: which primary has which slot; empty where that is not known
        connect = self._connect_to_primary if target.kind == "sentinel" else partial(self._connect, target.addresses[0])
        self._single = Pool(connect, max_connections)

    def pool(self, slot: int, deadline: float) -> Pool:
        """The pool of the server that has this slot (of a cluster; otherwise there is but one)."""
        if not self.is_cluster:
            return self._single
        slots = self._slots or self._read_slots(deadline)
        return self.pool_at(slots[slot])

    def address(self, slot: int) -> Address | None:
        """Of a cluster: the server that has this slot, as far as is known without asking."""
        slots = self._slots
        return slots[slot] if slots else None

    def ask(self, key: bytes, deadline: float, *commands: bytes) -> list[Any]:
        """The replies to packed commands, errors among them as values, of the server that has this key."""
        replies = self.pool(self.slot(key), deadline).ask(deadline, *commands)
        for reply in replies:
            if isinstance(reply, ServerError):
                target = takes_over(reply)
                if target is not None:
                    asked = (part for one in commands for part in (ASKING, one))
                    return self.pool_at(target).ask(deadline, *asked)[1::2]
                self.changed(reply)
        return replies

    def slot(self, key: bytes) -> int:
        """The slot of a key in a cluster; 0 elsewhere."""
        if not self.is_cluster:
            return 0
        from valkey.crc import key_slot

        return key_slot(key)

    def primaries(self, deadline: float) -> list[tuple[int, Pool]]:
        """All servers that have keys, in the order of the first slot that each has, which is given too."""
        if not self.is_cluster:
            return [(0, self._single)]
        firsts: dict[Address, int] = {}
        for slot, address in enumerate(self._slots or self._read_slots(deadline)):
            firsts.setdefault(address, slot)
        return [(slot, self.pool_at(address)) for address, slot in firsts.items()]

    def pool_at(self, address: Address) -> Pool:
        """The pool of a server of the cluster."""
        pool = self._pools.get(address)
        if pool is None:
            with self._lock:
                new = Pool(partial(self._connect, address), self.max_connections)
                pool = self._pools.setdefault(address, new)
        return pool

    def changed(self, error: Exception) -> None:
        """After this error: look anew where the slots and the primary are."""
        if isinstance(error, LostConnectionError) or (
            isinstance(error, ServerError) and error.code in ("MOVED", "READONLY", "CLUSTERDOWN")
        ):
            self._slots = []

    def forget(self) -> None:
        """In the child of a fork: let go of the parent's connections without touching them."""
        self._lock = threading.Lock()
        for pool in self.pools():
            pool.forget()

    def close(self) -> None:
        for pool in self.pools():
            pool.close()

    def pools(self) -> list[Pool]:
        """The pools of all servers that were connected to."""
        return [self._single, *self._pools.values()]

    def _connect(self, address: Address, pool: Pool, deadline: float) -> Connection:
        options = self.target.options
        greeting = [*_authentication(options.get("username"), options.get("password"))]
        if options.get("db"):
            greeting.append(command("SELECT", options["db"]))
        if options.get("client_name"):
            greeting.append(command("CLIENT", "SETNAME", options["client_name"]))
        connection, replies = self._open(address, deadline, [*greeting, command("TIME"), command("INFO", "server")])
        try:
            for reply in replies[:-1]:
                if isinstance(reply, ServerError):
                    raise reply
            seconds, microseconds = replies[-2]
            pool.offset = int(seconds) * 1_000_000 + int(microseconds) - int(monotonic() * 1_000_000)
            connection.run_id = info_field(replies[-1], b"run_id")
            if address not in self._prepared:
                self._prepare(connection, address)
                self._prepared.add(address)
        except BaseException:
            connection.close()
            raise
        self.tally.add(connections_opened=1)
        return connection

    def _connect_to_primary(self, pool: Pool, deadline: float) -> Connection:
        """To the server that the sentinels call the primary, if it agrees: during a failover it may not."""
        options = self.target.options
        service = self.target.service
        greeting = _authentication(options.get("sentinel_username"), options.get("sentinel_password"))
        problem: Exception = LostConnectionError("no sentinel answers")
        for address in self.target.addresses:
            try:
                # A sentinel that does not answer must not use up the time of those that would.
                patience = min(deadline, monotonic() + max(0.1, (deadline - monotonic()) / len(self.target.addresses)))
                sentinel, replies = self._open(
                    address, patience, [*greeting, command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)]
                )
            except LostConnectionError as error:
                problem = error
                continue
            sentinel.close()
            reply = replies[-1]
            if isinstance(reply, ServerError):
                problem = reply
            elif reply is None:
                problem = StateConfigError(f"the sentinels of {self.target.shown} know no service {service!r}")
            else:
                primary = Address(reply[0].decode(), int(reply[1]))
                connection = self._connect(primary, pool, deadline)
                try:
                    role = connection.ask(command("ROLE"))[0]
                    if not isinstance(role, ServerError) and role[0] != b"master":
                        raise LostConnectionError(f"{primary} is no primary (any more); waiting for the sentinels")
                except BaseException:
                    connection.close()
                    raise
                return connection
        raise problem

    def _read_slots(self, deadline: float) -> list[Address]:
        """Ask the servers of the cluster in turn, those known so far included."""
        problem: Exception = LostConnectionError("no server of the cluster answers")
        known = {*self.target.addresses, *self._pools}
        pools = [(address, self.pool_at(address)) for address in known]
        for address, pool in sorted(pools, key=lambda one: not one[1].has_idle()):  # who has just answered, first
            try:
                patience = min(deadline, monotonic() + max(0.1, (deadline - monotonic()) / len(known)))
                reply = pool.ask(patience, command("CLUSTER", "SLOTS"))[0]
            except (LostConnectionError, ServerError) as error:
                problem = error
                continue
            if isinstance(reply, ServerError):
                problem = reply
                continue
            slots = _slots(reply, address)
            if len(slots) < SLOTS:
                problem = ServerError("CLUSTERDOWN not all hash slots are covered")
                continue
            self._slots = slots
            return slots
        raise problem

    def _open(self, address: Address, deadline: float, greeting: list[bytes]) -> tuple[Connection, list[Any]]:
        try:
            from valkey import connection as classes
        except ImportError as error:
            raise StateConfigError("the valkey backend needs the package valkey: pip install valkey") from error
        options = {name: value for name, value in self.target.options.items() if name.startswith(("ssl_", "socket_"))}
        if address.path:
            return open_connection(partial(classes.UnixDomainSocketConnection, path=address.path), deadline, greeting)
        make: Callable[..., Any] = classes.SSLConnection if self.target.tls else classes.Connection
        if self.target.tls:
            # Without it any certificate that some authority signed for anybody would do.
            options.setdefault("ssl_check_hostname", options.get("ssl_cert_reqs") != "none")
        return open_connection(partial(make, host=address.host, port=address.port, **options), deadline, greeting)


ASKING: Final = command("ASKING")
"""Goes before a command for a server that is taking over a slot."""


def takes_over(error: ServerError) -> Address | None:
    """The server that has to be asked, with ASKING, for a key of a slot that it is taking over; None elsewhere."""
    if error.code != "ASK":
        return None
    host, _, port = str(error).split(" ")[2].rpartition(":")
    return Address(host, int(port))


def _authentication(username: str | None, password: str | None) -> list[bytes]:
    if password is None:
        return []
    return [command("AUTH", *([] if username is None else [username]), password)]


def _slots(reply: Any, asked: Address) -> list[Address]:
    """Who has each slot, from the answer to CLUSTER SLOTS; shorter than SLOTS where some are not covered."""
    slots: list[Address] = []
    for first, last, primary, *_ in sorted(reply, key=lambda part: int(part[0])):
        if first != len(slots):
            break
        # A server that does not know its own name answers "", and means the one by which it was asked.
        address = Address(primary[0].decode() if primary[0] else asked.host, primary[1])
        slots.extend([address] * (last - first + 1))
    return slots
