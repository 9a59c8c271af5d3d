"""Conversations in Valkey: shared by any number of processes and machines."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...errors import StateConfigError, StateError
from ...keys import KeySpace
from ...operations import Listing, Operation
from ..base import Settle, StateStorage, one_of, positive_integer
from .documents import ValkeyDocuments
from .loglayout import LogLayout
from .nodes import Servers
from .risks import risks
from .url import Address, check_options, read_url
from .wire import Connection, ServerError

if TYPE_CHECKING:
    from ..statistics import StorageStatistics

_logger = logging.getLogger("agentstate.storage.valkey")

_STORAGE_OPTIONS: Final = {"ttl", "max_history", "max_value_bytes", "deadline"}
_OWN_OPTIONS: Final = {"url", "key_prefix", "layout", "max_connections", "min_replicas", "strict"}

_MOST_MET: Final = 4096
"""Context ids that are remembered for `expects`."""

_LONGEST_SILENCE: Final = 2.0
"""Seconds without an answer after which an attempt is given up; at most a third of the deadline."""


class ValkeyStorage(StateStorage):
    """Keeps conversations in Valkey (or Redis 7.2 or a compatible server): one server, behind sentinels, or a cluster.

    - `url`: ``valkey://[[user]:password@]host[:port][/db]``, ``valkeys://`` with TLS, ``unix:///path/to/valkey.sock``,
      ``valkey+sentinel://host:26379,host2:26379/service``, ``valkey+cluster://host:6379,host2:6379``
    - `key_prefix`: all keys begin with it
    - `layout`: ``log``, whose writes cost the same however long a conversation is; or ``document``, one JSON text per
      context exactly as AgentUp writes it, for running side by side with AgentUp
    - `max_connections`: the maximum number of connections to each server
    - `min_replicas`: the number of replicas that must confirm a write before it returns
    - `strict`: refuse a server that may evict keys or does not persist its data, or that does not let this user see it;
      the default is to log a warning of what is seen
    - `username`, `password`, `db`, `client_name`, `socket_keepalive`, `sentinel_username`, `sentinel_password`, and
      `ssl_...` as in valkey-py; the options in the url mean the same

    Times, `ttl` and cleanup use the clock of the server. An attempt is given up when the server is silent for 2 seconds
    or a third of the `deadline`, and repeated until the deadline. Connects at the first operation. Raises
    StateConfigError.
    """

    largest_group = 512

    def __init__(
        self,
        url: str | None = None,
        *,
        key_prefix: str = "agentup:state:",
        layout: str = "log",
        max_connections: int = 32,
        min_replicas: int = 0,
        strict: bool = False,
        **options: Any,
    ) -> None:
        # Whatever can be refused is, before there is a storage that somebody would have to close.
        check_options(options, _STORAGE_OPTIONS, _OWN_OPTIONS)
        shared = {name: options.pop(name) for name in _STORAGE_OPTIONS & set(options)}
        target = read_url(url, options)
        if min_replicas:
            positive_integer("min_replicas", min_replicas)
        limit = positive_integer("max_connections", max_connections)
        one_of("layout", layout, ("log", "document"))
        keys = KeySpace(key_prefix)
        super().__init__(**shared)
        self.key_prefix = key_prefix
        self._met: set[str] = set()  # contexts that exist, or did
        self._strict = strict
        self._url = target.shown
        self._warnings: set[str] = set()  # that were logged
        silence = min(_LONGEST_SILENCE, self.deadline / 3)
        self._servers = Servers(target, limit, silence, self._prepare, self.tally)
        self._layout: LogLayout | ValkeyDocuments
        if layout == "log":
            self._layout = LogLayout(
                self._servers, keys, ttl=self.ttl, min_replicas=min_replicas, deadline=self.deadline
            )
        else:
            self._layout = ValkeyDocuments(
                self._servers, keys, ttl=self.ttl, min_replicas=min_replicas, deadline=self.deadline
            )
            self._layout.tally = self.tally

    def __repr__(self) -> str:
        return f"ValkeyStorage({self._url!r}, key_prefix={self.key_prefix!r})"

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        if self.closed:
            try:
                self.check_open()
            except StateError as error:
                for index in range(len(operations)):
                    settle(index, error)
            return
        self._layout.execute(operations, settle)

    def lane(self, operation: Operation) -> Hashable:
        """Listings have a lane of their own, and so has each server of a cluster, as far as the slots are known."""
        if isinstance(operation, Listing):
            return Listing
        return self._servers.address(self._layout.slot(operation.context_id)) if self._servers.is_cluster else None

    def expects(self, context_id: str) -> bool:
        # Those that are asked for again. If such a context is gone, reading it first costs one more round trip.
        met = self._met
        if context_id in met:
            return True
        if len(met) >= _MOST_MET:
            met.clear()
        met.add(context_id)
        return False

    def telemetry_attributes(self) -> dict[str, str | int]:
        target = self._servers.target
        address = target.addresses[0]
        attributes: dict[str, str | int] = {
            "db.system.name": "valkey",
            "db.namespace": str(target.options.get("db") or 0),
            "db.collection.name": self.key_prefix,
            "server.address": address.path or address.host,
        }
        if not address.path:
            attributes["server.port"] = address.port
        return attributes

    def statistics(self) -> StorageStatistics:
        from dataclasses import replace

        from ..statistics import ConnectionStatistics

        servers = self._servers
        idle, used, sent, received = map(sum, zip(*(pool.figures() for pool in servers.pools()), strict=True))
        opened = self.tally.connections_opened
        connections = ConnectionStatistics(opened=opened, idle=idle, used=used, limit=servers.max_connections)
        # What went over the connections, be it of documents or not.
        return replace(super().statistics(), bytes_written=sent, bytes_read=received, connections=connections)

    def has_resources(self) -> bool:
        return any(any(pool.figures()[:2]) for pool in self._servers.pools())

    def close(self) -> None:
        super().close()
        self._servers.close()

    def _after_fork(self) -> None:
        self._servers.forget()

    def _prepare(self, connection: Connection, address: Address) -> str:
        loaded = connection.ask(self._layout.load_script)[0]
        if isinstance(loaded, ServerError):
            raise loaded
        found, unknown = risks(connection, expiring=self.ttl is not None)
        if self._strict and (found or unknown):
            problems = "; ".join(found + unknown)
            raise StateConfigError(f"Valkey at {address} may lose what it acknowledged (strict): {problems}")
        for risk in found:
            warning = f"Valkey at {address} may lose what it acknowledged: {risk}"
            if warning not in self._warnings:
                self._warnings.add(warning)
                _logger.warning(warning)
        return self._layout.missing_permissions(connection)
