"""The Valkey backend beside servers that fall silent, fail over, move or refuse commands: what recovers, and what is
said at once."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import valkey
from servers import HOST, ValkeyCluster, ValkeySentinel, ValkeyServer, require_server, reserve_port, wait_until
from tls import TlsProxy

from agentstate.errors import StateConfigError, StateOutcomeUnknownError, StateUnavailableError
from agentstate.operations import (
    Append,
    Change,
    Commit,
    Delete,
    Drop,
    Increment,
    Lease,
    Listing,
    Pop,
    Put,
    Query,
    Snapshot,
    Space,
    Trim,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage
from agentstate.testing.faults import FaultProxy

HI = b'{"content":"hi"}'
_number = iter(range(1, 1 << 60))


def commit(storage: ValkeyStorage, context_id: str, *changes: Change, **options: Any) -> bytes:
    options.setdefault("commit_id", f"test-{next(_number)}")
    answer = storage.call(Commit(context_id, changes, **options))
    assert isinstance(answer, bytes)
    return answer


def existing(storage: ValkeyStorage, context_id: str) -> Snapshot:
    snapshot = storage.call(Query(context_id, None, None, Window()))
    assert isinstance(snapshot, Snapshot)
    return snapshot


def put(key: str, value: bytes) -> Put:
    return Put(Space.VARIABLES, ((key, value),))


def ids(storage: ValkeyStorage) -> set[str]:
    found: set[str] = set()
    cursor: str | None = ""
    while cursor is not None:
        page: Any = storage.call(Listing(cursor))
        found.update(page.context_ids)
        cursor = page.cursor
    return found


COMMANDS = (
    "hset", "hdel", "hget", "hmget", "hkeys", "exists", "type", "lindex", "llen", "lpos", "lrange", "lset", "ltrim",
    "persist", "pexpire", "pexpireat", "rpop", "rpush", "unlink", "rename", "time",
)  # fmt: skip
CHANGES: tuple[tuple[Change, ...], ...] = (
    (Append((HI,)),),
    (put("x", b"2"),),
    (Append((HI, HI)), put("y", b"1"), Drop(Space.VARIABLES, "x")),
    (Put(Space.VARIABLES, (("z", b"1"),), True),),
    (Increment("n", b"1"),),
    (Pop(1),),
    (Trim(1),),
    (Delete(),),
    (Delete(), Append((HI,))),
)


class TestPermissions:
    @pytest.mark.parametrize("forbidden", COMMANDS)
    def test_a_missing_permission_leaves_nothing_half_done(
        self, valkey_9: ValkeyServer, key_prefix: str, forbidden: str
    ) -> None:
        user = f"without-{forbidden}"
        with valkey_9.client() as client:
            client.execute_command("ACL", "SETUSER", user, "on", ">secret", "~*", "&*", "+@all", f"-{forbidden}")
        url = f"valkey://{user}:secret@{HOST}:{valkey_9.port}"
        options: Any = {"key_prefix": key_prefix, "ttl": 1000}
        full, limited = ValkeyStorage(valkey_9.url, **options), ValkeyStorage(url, **options)
        with closing(full), closing(limited):
            for number, changes in enumerate(CHANGES):
                for name in (f"there-{number}", f"new-{number}"):
                    if name.startswith("there"):
                        commit(full, name, Append((HI, HI)), put("x", b"1"))
                    before = full.call(Query(name, None, None, Window()))
                    try:
                        commit(limited, name, *changes)
                    except StateUnavailableError as error:
                        assert not isinstance(error, StateOutcomeUnknownError), error  # noqa: PT017
                        assert forbidden in str(error).lower()  # noqa: PT017
                        assert full.call(Query(name, None, None, Window())) == before
                    commit(full, name, Append((HI,)))
                    existing(full, name)

    def test_one_that_only_writing_needs_does_not_keep_from_reading_and_may_be_given_meanwhile(
        self, valkey_server: ValkeyServer, key_prefix: str
    ) -> None:
        with valkey_server.client() as client, closing(ValkeyStorage(valkey_server.url, key_prefix=key_prefix)) as full:
            commit(full, "a", Append((HI,)))
            client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@all", "-hset")
            url = f"valkey://reader:secret@{HOST}:{valkey_server.port}"
            with closing(ValkeyStorage(url, key_prefix=key_prefix)) as storage:
                assert existing(storage, "a").messages == [HI]
                assert storage.call(Query("a", history=Window(before=1))).messages == [HI]  # type: ignore[union-attr]
                with pytest.raises(StateUnavailableError, match="HSET"):
                    commit(storage, "a", Append((HI,)))
                client.execute_command("ACL", "SETUSER", "reader", "+hset")
                commit(storage, "a", Append((HI,)))
                assert existing(storage, "a").messages == [HI, HI]


class TestSilence:
    @pytest.mark.parametrize("layout", ["log", "document"])
    @pytest.mark.parametrize("fault", ["drop_request", "drop_reply"])
    def test_connections_that_fall_silent_are_replaced_within_the_deadline(
        self, valkey_9: ValkeyServer, key_prefix: str, layout: str, fault: str
    ) -> None:
        with FaultProxy("127.0.0.1", valkey_9.port) as proxy:
            url = f"valkey://127.0.0.1:{proxy.port}"
            options: Any = {"key_prefix": key_prefix, "layout": layout, "deadline": 3.0}
            with closing(ValkeyStorage(url, **options)) as storage:
                commit(storage, "a", put("x", b"1"))
                for number in range(1, 3):
                    getattr(proxy, fault)()
                    assert commit(storage, "a", Increment("n", b"1")) == b"%d" % number
                getattr(proxy, fault)()
                assert existing(storage, "a").variables == {"x": b"1", "n": b"2"}
                getattr(proxy, fault)()
                assert ids(storage) == {"a"}
                assert proxy.fired == 4

    def test_a_large_value_may_take_longer_than_a_silence(self, valkey_9: ValkeyServer, key_prefix: str) -> None:
        with closing(_SlowProxy(valkey_9.port)) as proxy:
            url = f"valkey://127.0.0.1:{proxy.port}"
            with closing(ValkeyStorage(url, key_prefix=key_prefix, deadline=30.0)) as storage:
                storage._servers._single._silence = 0.3
                value = b'"' + b"x" * 600_000 + b'"'
                commit(storage, "a", put("x", value))
                before = storage.statistics().attempts_repeated
                assert existing(storage, "a").variables == {"x": value}
                assert storage.statistics().attempts_repeated == before


class _SlowProxy:
    """Passes replies on in small pieces, with a pause between them."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def close(self) -> None:
        for end in (self._listener, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing it would not wake the thread that reads from it
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += (client, server)
            self._start(self._pass_on, client, server, 0.0)
            self._start(self._pass_on, server, client, 0.05)

    def _pass_on(self, source: socket.socket, target: socket.socket, pause: float) -> None:
        with suppress(OSError):
            while data := source.recv(32768):
                time.sleep(pause if len(data) > 8192 else 0)
                target.sendall(data)


class TestFailover:
    def test_a_primary_that_stands_still_is_replaced_before_the_deadline(self, key_prefix: str) -> None:
        with (
            ValkeySentinel(require_server("9.1")) as group,
            closing(ValkeyStorage(group.url, key_prefix=key_prefix, deadline=20)) as storage,
        ):
            commit(storage, "a", Append((HI,)))
            with group.primary.client() as client:
                client.execute_command("WAIT 1 5000")
            with group.primary.paused():
                commit(storage, "a", Append((HI,)))
                assert len(existing(storage, "a").messages) == 2
            assert group.primary_port() == group.replica.port

    def test_a_primary_that_was_replaced_and_does_not_know_it_is_left(self, key_prefix: str) -> None:
        """Behind a partition it goes on serving the connections that it has."""
        with ExitStack() as stack:
            group = stack.enter_context(ValkeySentinel(require_server("9.1")))
            storage = stack.enter_context(closing(ValkeyStorage(group.url, key_prefix=key_prefix, deadline=20)))
            commit(storage, "a", put("x", b"1"))
            with group.primary.client() as client:
                client.execute_command("WAIT 1 5000")
            with group.sentinel.client() as sentinel:
                sentinel.execute_command("SENTINEL REMOVE", group.service_name)
                with group.replica.client() as client:
                    client.execute_command("REPLICAOF NO ONE")
                sentinel.execute_command("SENTINEL MONITOR", group.service_name, HOST, group.replica.port, 1)
            with closing(ValkeyStorage(group.replica.url, key_prefix=key_prefix)) as other:
                commit(other, "a", put("x", b"2"))
                wait_until(lambda: existing(storage, "a").variables == {"x": b"2"}, "the new primary to be read")

    @pytest.mark.parametrize("layout", ["log", "document"])
    def test_a_server_behind_one_name_that_became_a_replica_is_looked_for_again(
        self, start_valkey: Any, key_prefix: str, layout: str
    ) -> None:
        old, new = start_valkey(), start_valkey()
        with _Name(old.port) as name:
            url = f"valkey://127.0.0.1:{name.port}"
            with closing(ValkeyStorage(url, key_prefix=key_prefix, layout=layout, deadline=10)) as storage:
                commit(storage, "a", put("x", b"1"))
                with old.client() as client:
                    client.execute_command("REPLICAOF", HOST, new.port)
                name.target = new.port
                commit(storage, "a", put("x", b"2"))
                assert existing(storage, "a").variables == {"x": b"2"}

    def test_connections_to_another_server_behind_the_same_address_are_retired(
        self, start_valkey: Any, key_prefix: str
    ) -> None:
        old, new = start_valkey(), start_valkey()
        with (
            _Name(old.port) as name,
            closing(ValkeyStorage(f"valkey://127.0.0.1:{name.port}", key_prefix=key_prefix)) as storage,
        ):
            pool: Any = storage._servers.pool(0, 0)
            first = [pool.acquire(time.monotonic() + 5) for _ in range(3)]
            for connection in first[1:]:
                pool.release(connection)
            name.target = new.port
            held = [pool.acquire(time.monotonic() + 5) for _ in range(3)]
            assert held[2].run_id != first[0].run_id
            for connection in (*held, first[0]):
                pool.release(connection)
            left = [pool.acquire(time.monotonic() + 5) for _ in range(2)]
            assert {connection.run_id for connection in left} == {held[2].run_id}
            for connection in left:
                pool.release(connection)

    @pytest.mark.parametrize("layout", ["log", "document"])
    def test_every_way_to_a_cluster_finds_the_new_primary(self, key_prefix: str, layout: str) -> None:
        with ExitStack() as stack:
            cluster = stack.enter_context(ValkeyCluster(require_server("9.1")))
            bus, reservation = reserve_port()
            stack.enter_context(reservation)
            config = ("cluster-enabled yes", f"cluster-port {bus}", f"cluster-announce-ip {HOST}")
            replica = ValkeyServer(require_server("9.1"), *config, "repl-diskless-sync-delay 0")
            stack.enter_context(replica)
            primary = cluster.nodes[1]
            self._replicate(cluster, primary, replica, bus)
            url = f"valkey+cluster://{HOST}:{cluster.nodes[0].port}"
            options: Any = {"key_prefix": key_prefix, "layout": layout, "deadline": 20}
            storages = [stack.enter_context(closing(ValkeyStorage(url, **options))) for _ in range(3)]
            names = {f"c{number}" for number in range(30)}
            for name in names:
                commit(storages[0], name, put("x", b"1"))
            for storage in storages:
                assert ids(storage) == names
            with primary.client() as client:
                client.execute_command("WAIT 1 5000")
            primary.kill()
            with replica.client() as client:
                client.execute_command("CLUSTER FAILOVER TAKEOVER")
            for name in names:  # each storage in its own way, knowing nothing of what the others met
                assert existing(storages[0], name).variables == {"x": b"1"}
                commit(storages[1], name, put("x", b"1"))
            assert ids(storages[2]) == names

    def _replicate(self, cluster: ValkeyCluster, primary: ValkeyServer, replica: ValkeyServer, bus: int) -> None:
        with cluster.nodes[0].client() as client:
            client.execute_command("CLUSTER MEET", HOST, replica.port, bus)
        with primary.client() as client:
            primary_id = client.execute_command("CLUSTER MYID").decode()
        with replica.client() as client:

            def replicates() -> bool:
                try:
                    client.execute_command("CLUSTER REPLICATE", primary_id)
                except valkey.ResponseError:
                    return False  # it does not know the primary yet
                return True

            wait_until(replicates, "the replica to know its primary")
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica's first copy")  # type: ignore[index]
        for node in cluster.nodes:
            with node.client() as client:
                wait_until(lambda client=client: len(client.execute_command("CLUSTER SLOTS")[1]) == 4, "the replica")  # type: ignore[misc]


class _Name:
    """An address behind which now this server is, and now that one: new connections go to `target`."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __enter__(self) -> _Name:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing it would not wake the thread that reads from it
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            self._sockets += (client, server)
            for ends in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pass_on, args=ends)
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class TestWrongServers:
    def refusal(self, url: str, **options: Any) -> str:
        """What every kind of call is refused with, without being tried again."""
        messages = set()
        for operation in (Query("a"), Commit("a", (Append((HI,)),), "one"), Lease("a", "take", "t", 5.0), Listing()):
            with closing(ValkeyStorage(url, deadline=60, **options)) as storage:
                with pytest.raises(StateConfigError) as caught:
                    storage.call(operation)
                assert storage.statistics().attempts_repeated == 0
            messages.add(str(caught.value))
        (message,) = messages
        return message

    def test_a_replica_is_refused_at_once(self, start_valkey: Any) -> None:
        primary = start_valkey()
        replica = start_valkey(f"replicaof {HOST} {primary.port}")
        assert "is a replica" in self.refusal(replica.url)
        assert "is a replica" in self.refusal(replica.url, layout="document")

    def test_a_node_of_a_cluster_is_refused_at_once(self, valkey_cluster: ValkeyCluster) -> None:
        for layout in ("log", "document"):
            message = self.refusal(f"valkey://{HOST}:{valkey_cluster.nodes[1].port}", layout=layout)
            assert "valkey+cluster://" in message


class TestTls:
    @pytest.fixture
    def url(self, valkey_tls: TlsProxy) -> str:
        return f"valkeys://localhost:{valkey_tls.port}"

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"ssl_ca_certs": "/nowhere/ca.pem"}, "ssl_ca_certs='/nowhere/ca.pem'"),
            ({"ssl_ca_path": "\0"}, "ssl_ca_path"),
            ({"ssl_ca_data": "no certificate"}, "ssl_ca_data"),
            ({"ssl_certfile": "/nowhere/c.pem"}, "ssl_certfile='/nowhere/c.pem'"),
            ({"ssl_keyfile": "/nowhere/k.pem"}, "ssl_keyfile='/nowhere/k.pem'"),
            ({"ssl_ciphers": "NO-SUCH"}, "ssl_ciphers='NO-SUCH'"),
            ({}, "certificate of localhost"),
        ],
    )
    def test_what_never_works_is_said_at_once_with_its_option(
        self, url: str, options: dict[str, Any], named: str
    ) -> None:
        with closing(ValkeyStorage(url, deadline=60, **options)) as storage:
            with pytest.raises(StateConfigError) as caught:
                commit(storage, "a", Append((HI,)))
            assert named in str(caught.value)

    def test_a_file_that_is_no_key_is_named(self, url: str, valkey_tls: TlsProxy, tmp_path: Path) -> None:
        wrong = tmp_path / "key.pem"
        wrong.write_text("no key")
        options: Any = {"ssl_certfile": str(valkey_tls.ca_file), "ssl_keyfile": str(wrong)}
        with (
            closing(ValkeyStorage(url, deadline=60, **options)) as storage,
            pytest.raises(StateConfigError, match=r"key\.pem"),
        ):
            storage.call(Query("a"))

    def test_a_host_that_the_certificate_does_not_name_is_said_at_once(self, valkey_tls: TlsProxy) -> None:
        url = f"valkeys://127.1:{valkey_tls.port}"  # another name of 127.0.0.1
        with (
            closing(ValkeyStorage(url, deadline=60, ssl_ca_certs=str(valkey_tls.ca_file))) as storage,
            pytest.raises(StateConfigError, match=r"certificate of 127\.1"),
        ):
            storage.call(Query("a"))

    @pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3", ssl.TLSVersion.TLSv1_2])
    def test_the_oldest_version_may_be_named(
        self, url: str, valkey_tls: TlsProxy, key_prefix: str, version: Any
    ) -> None:
        options: Any = {"ssl_ca_certs": str(valkey_tls.ca_file), "key_prefix": key_prefix}
        with closing(ValkeyStorage(url, ssl_min_version=version, **options)) as storage:
            commit(storage, "a", Append((HI,)))
        if isinstance(version, str):
            with closing(ValkeyStorage(f"{url}?ssl_min_version={version}", **options)) as storage:
                assert existing(storage, "a").messages == [HI]
        with pytest.raises(StateConfigError, match="ssl_min_version must be"):
            ValkeyStorage(url, ssl_min_version="TLSv9")
