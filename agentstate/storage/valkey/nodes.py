"""The servers behind a target: one server, a sentinel's primary, or a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final
from zlib import crc32

from ...errors import StateConfigError
from ..tally import Tally
from .pool import Pool
from .risks import info_field
from .tls import check_files, explained
from .url import Address, Target
from .wire import Connection, LostConnectionError, ServerError, command, open_connection

SLOTS: Final = 16384


_FAILOVER_CHECK: Final = 1.0
"""Seconds after which the sentinels are asked again who the primary is."""

_FAILOVER_CHECK_AFTER_FAILURE: Final = 10.0
"""The same, if none of them answered."""


class Servers:
    """Finds the server that has a key, and connects to it.

    `silence`: how many seconds a server may be silent before an attempt is given up. `prepare` is called with the first
    connection to every server, and returns the commands that writing needs and the user may not run.
    """

    def __init__(
        self,
        target: Target,
        max_connections: int,
        silence: float,
        prepare: Callable[[Connection, Address], str],
        tally: Tally,
    ) -> None:
        self.target = target
        self.tally = tally
        self.is_cluster = target.kind == "cluster"
        self.max_connections = max_connections
        self._silence = silence
        self._prepare = prepare
        self._prepared: set[tuple[Address, bytes]] = set()  # with the server's run_id
        self._pools: dict[Address, Pool] = {}
        self._lock = threading.Lock()
        self._slots: list[Address] = []  # of a cluster: which primary has which slot; empty where that is not known
        self._topology = 0  # a checksum of that
        self._sentinels = list(target.addresses)  # the one that answered last comes first
        self._primary: Address | None = None  # that the sentinels named last
        self._next_check = 0.0  # when they are asked again
        self._had_primary = False
        connect = self._connect_to_primary if target.kind == "sentinel" else partial(self._connect, target.addresses[0])
        self._single = Pool(connect, max_connections, silence)

    def pool(self, slot: int, deadline: float) -> Pool:
        """The pool of the server that has this slot (of a cluster; otherwise there is but one)."""
        if self.is_cluster:
            slots = self._slots or self._read_slots(deadline)
            return self.pool_at(slots[slot])
        if self.target.kind == "sentinel" and self._single.has_idle() and monotonic() >= self._next_check:
            self._check_for_failover(deadline)
        return self._single

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

    def primaries(self, deadline: float) -> tuple[int, list[tuple[int, Pool]]]:
        """All servers that have keys, each behind the first slot that it has, in that order.

        Before them a checksum of which server has which slot; 0 if this is not a cluster.
        """
        if not self.is_cluster:
            return 0, [(0, self.pool(0, deadline))]
        firsts: dict[Address, int] = {}
        slots = self._slots or self._read_slots(deadline)
        for slot, address in enumerate(slots):
            firsts.setdefault(address, slot)
        return self._topology, [(slot, self.pool_at(address)) for address, slot in firsts.items()]

    def check_topology(self, connection: Connection, checksum: int) -> None:
        """Raise ServerError if this server does not have the slots that `primaries` found, or is moving some away."""
        if not self.is_cluster:
            return
        rows, nodes = connection.ask(command("CLUSTER", "SLOTS"), command("CLUSTER", "NODES"))
        for reply in (rows, nodes):
            if isinstance(reply, ServerError):
                raise reply
        if _checksum(rows) != checksum:
            raise ServerError("CLUSTERDOWN the slots of the cluster have moved")
        if b"->-" in nodes:  # shown of the slots of the server that is asked only
            raise ServerError("TRYAGAIN slots of the cluster are being moved; list again when that is done")

    def pool_at(self, address: Address) -> Pool:
        """The pool of a server of the cluster."""
        pool = self._pools.get(address)
        if pool is None:
            with self._lock:
                new = Pool(partial(self._connect, address), self.max_connections, self._silence)
                pool = self._pools.setdefault(address, new)
        return pool

    def changed(self, error: Exception) -> None:
        """After any error of a server: find out again where the slots and the primary are."""
        code = error.code if isinstance(error, ServerError) else ""
        if isinstance(error, LostConnectionError) or code in ("MOVED", "READONLY", "CLUSTERDOWN"):
            self._slots = []
        if code == "READONLY":  # what was a primary when it was connected to is a replica now
            for pool in self.pools():
                pool.retire()
        self.doubt()

    def doubt(self) -> None:
        """Ask the sentinels again before the next operation."""
        self._next_check = 0.0

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
        greeting += (command("TIME"), command("HELLO"), command("INFO", "server"))
        connection, replies = self._open(address, deadline, greeting)
        try:
            *others, time, hello, info = replies
            for reply in (*others, time):
                if isinstance(reply, ServerError):
                    raise reply
            pool.offset = int(time[0]) * 1_000_000 + int(time[1]) - int(monotonic() * 1_000_000)
            self._check_role(address, dict(zip(hello[::2], hello[1::2], strict=False)) if type(hello) is list else {})
            connection.run_id = info_field(info, b"run_id")
            if (address, connection.run_id) not in self._prepared:
                connection.lacks = self._prepare(connection, address)
                if not connection.lacks:
                    self._prepared.add((address, connection.run_id))
        except BaseException:
            connection.close()
            raise
        self.tally.add(connections_opened=1)
        return connection

    def _check_role(self, address: Address, hello: dict[bytes, Any]) -> None:
        """Raise StateConfigError if this server can never be the right one, LostConnectionError if it may become so."""
        kind = self.target.kind
        if kind in ("server", "unix") and hello.get(b"mode") == b"cluster":
            shown = self.target.shown
            raise StateConfigError(f"{address} is a node of a cluster: write valkey+cluster:// in the url {shown!r}")
        if hello.get(b"role", b"master") == b"master":
            self._had_primary = True
        elif kind in ("server", "unix") and not self._had_primary:
            raise StateConfigError(
                f"{address} is a replica, which takes no writes: use the url of its primary, or of its sentinels "
                "(valkey+sentinel://host:26379/service)"
            )
        else:
            raise LostConnectionError(f"{address} is a replica now; waiting for a primary")

    def _connect_to_primary(self, pool: Pool, deadline: float) -> Connection:
        self._primary = self._ask_sentinels(deadline)
        return self._connect(self._primary, pool, deadline)

    def _check_for_failover(self, deadline: float) -> None:
        """Let go of the connections to a server that is not the primary any more: it may not know that yet."""
        self._next_check = monotonic() + _FAILOVER_CHECK
        try:
            primary = self._ask_sentinels(min(deadline, monotonic() + self._silence / 4))
        except (LostConnectionError, ServerError, StateConfigError):
            self._next_check = monotonic() + _FAILOVER_CHECK_AFTER_FAILURE
            return
        if primary != self._primary:
            self._single.retire()

    def _ask_sentinels(self, deadline: float) -> Address:
        """Who the primary is. Raises LostConnectionError, ServerError or StateConfigError."""
        options = self.target.options
        service = self.target.service
        greeting = _authentication(options.get("sentinel_username"), options.get("sentinel_password"))
        problem: Exception = LostConnectionError("no sentinel answers")
        for address in list(self._sentinels):
            try:
                # A sentinel that does not answer must not use up the time of those that would.
                end = min(deadline, monotonic() + max(0.1, (deadline - monotonic()) / len(self._sentinels)))
                sentinel, replies = self._open(
                    address, end, [*greeting, command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)]
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
                self._sentinels.sort(key=lambda one: one != address)
                return Address(reply[0].decode(), int(reply[1]))
        raise problem

    def _read_slots(self, deadline: float) -> list[Address]:
        """Ask the servers of the cluster in turn, those known so far included."""
        problem: Exception = LostConnectionError("no server of the cluster answers")
        known = {*self.target.addresses, *self._pools}
        pools = [(address, self.pool_at(address)) for address in known]
        for address, pool in sorted(pools, key=lambda one: not one[1].has_idle()):  # who has just answered, first
            try:
                end = min(deadline, monotonic() + max(0.1, (deadline - monotonic()) / len(known)))
                reply = pool.ask(end, command("CLUSTER", "SLOTS"))[0]
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
            self._topology = _checksum(reply)
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
        make: Any
        if not self.target.tls:
            make = partial(classes.Connection, host=address.host, port=address.port, **options)
            return open_connection(make, deadline, greeting)
        check_files(options)
        # Without it any certificate that some authority signed for anybody would do.
        options.setdefault("ssl_check_hostname", options.get("ssl_cert_reqs") != "none")
        try:
            make = partial(classes.SSLConnection, host=address.host, port=address.port, **options)
            return open_connection(make, deadline, greeting)
        except LostConnectionError as error:
            raise explained(error, address) from error


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


def _checksum(reply: Any) -> int:
    """Of an answer to CLUSTER SLOTS; the same whichever server is asked."""
    return crc32(repr(sorted((first, last, *primary[:2]) for first, last, primary, *_ in reply)).encode())


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
