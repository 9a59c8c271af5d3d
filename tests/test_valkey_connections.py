"""How the Valkey backend uses the network, and what it says of servers and users."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import valkey
from servers import ValkeyServer
from tls import TlsProxy
from valkey_support import (
    EVERYTHING,
    HI,
    Open,
    commit,
    existing,
    ids,
    perform,
    put,
    state,
)  # fmt: skip

from agentstate import SyncConversationContext
from agentstate.errors import (
    StateAccessError,
    StateConfigError,
    StateError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.operations import (
    Append,
    Commit,
    Create,
    Delete,
    Increment,
    Lease,
    Listing,
    Operation,
    Page,
    Pop,
    Query,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

pytest_plugins = "valkey_fixtures"


class TestTrips:
    """Every documented operation is one command (or transaction) for the server, counted there."""

    @pytest.mark.parametrize(
        ("operations", "calls"),
        [
            ((Commit("a", (Append((HI,)),), "t1"),), {"evalsha": 1}),
            ((Commit("new", (Append((HI,)),), "t2"),), {"evalsha": 1}),
            ((Commit("a", (Increment("n", b"1"), put("x", b"1"), Pop(1)), "t3"),), {"evalsha": 1}),
            ((Commit("a", (Delete(),), "t4"),), {"evalsha": 1}),
            ((Commit("a", (Create("u"),), "t5"), Query("a", **EVERYTHING)), {"evalsha": 1}),
            ((Query("a", variables=("x",)),), {"hmget": 1, "exists": 1}),
            ((Query("a", variables=None),), {"hgetall": 1, "exists": 1}),
            ((Query("a", history=Window(limit=5)),), {"multi": 1, "hmget": 1, "exists": 1, "lrange": 1, "exec": 1}),
            ((Query("a", history=Window(limit=5, before=3)),), {"evalsha": 1}),
            ((Lease("a", "take", "token", 1.0),), {"evalsha": 1}),
            (tuple(Commit(f"many{n}", (Append((HI,)),), f"t{n}") for n in range(64)), {"evalsha": 1}),
        ],
    )
    def test_operations_that_travel_together_are_one_call(
        self, start_valkey: Any, operations: tuple[Operation, ...], calls: dict[str, int]
    ) -> None:
        server = start_valkey()
        with closing(ValkeyStorage(server.url)) as storage, server.client() as client:
            commit(storage, "a", Append((HI,)))
            client.config_resetstat()
            before = client.info("stats")["total_reads_processed"]
            perform(storage, *operations)
            reads = client.info("stats")["total_reads_processed"] - before
            stats: Any = client.info("commandstats")
        inside = {"evalsha"} & set(calls)
        counted = {
            name.removeprefix("cmdstat_"): row["calls"]
            for name, row in stats.items()
            if not name.startswith(("cmdstat_config", "cmdstat_info")) and (not inside or name == "cmdstat_evalsha")
        }
        assert counted == calls
        assert reads == 2  # what was measured, and the second INFO

    def test_get_or_create_is_a_read_for_a_context_that_was_there_before(
        self, open_storage: Open, client: valkey.Valkey
    ) -> None:
        context = SyncConversationContext(open_storage())

        def scripts_of(call: Callable[[], object]) -> int:
            """How many scripts the call has the server run."""
            client.config_resetstat()
            call()
            stats: Any = client.info("commandstats")
            return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])

        assert context.exists("a") is False  # connects
        assert scripts_of(lambda: context.get_or_create("a")) == 1
        assert scripts_of(lambda: context.get_or_create("a")) == 0
        assert scripts_of(lambda: context.get_or_create("a", user_id="alice")) == 1, "it is claimed"
        assert scripts_of(lambda: context.get_or_create("a", user_id="alice")) == 0
        assert scripts_of(lambda: context.get_or_create("a")) == 0
        with pytest.raises(StateAccessError):
            context.get_or_create("a", user_id="bob")
        SyncConversationContext(open_storage()).clear_context("a")
        created = context.get_or_create("a", user_id="bob")
        assert (created.user_id, created.revision) == ("bob", 1)
        before = context.get_or_create("a").revision
        for number in range(5000):
            context.storage.expects(f"other {number}")
        assert context.get_or_create("a").revision == before, "forgotten or not"


class TestConnections:
    def test_nothing_of_the_client_is_imported_before_it_is_needed(self) -> None:
        code = (
            "import sys; from agentstate.storage.valkey import ValkeyStorage; ValkeyStorage('valkey://localhost:1');"
            "print([name for name in ('valkey', 'asyncio', 'ssl') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_a_unix_socket_serves_as_well(self, open_storage: Open, valkey_server: ValkeyServer) -> None:
        storage = open_storage(valkey_server.unix_url)
        commit(storage, "a", Append((HI,)))
        assert existing(storage, "a").messages == [HI]

    def test_tls_is_checked_with_its_host_name(self, open_storage: Open, valkey_tls: TlsProxy) -> None:
        url = f"valkeys://127.0.0.1:{valkey_tls.port}"
        storage = open_storage(url, ssl_ca_certs=str(valkey_tls.ca_file))
        commit(storage, "a", Append((b'"' + b"x" * 300_000 + b'"',)))
        assert len(existing(storage, "a").messages[0]) == 300_002
        with pytest.raises(StateConfigError, match="certificate"):
            open_storage(url, deadline=1.5).call(Query("a"))

    def test_a_password_lets_in_and_is_never_shown(self, valkey_password: ValkeyServer, key_prefix: str) -> None:
        secret = valkey_password.password
        assert secret is not None
        address = f"127.0.0.1:{valkey_password.port}"
        with closing(ValkeyStorage(valkey_password.url, key_prefix=key_prefix)) as storage:
            commit(storage, "a", Append((HI,)))
            assert secret not in repr(storage)
            assert valkey_password.credentials not in repr(storage)
        options = {"key_prefix": key_prefix, "password": secret, "username": "default"}
        with closing(ValkeyStorage(f"valkey://{address}", **options)) as storage:
            assert existing(storage, "a").end == 1
        without = ValkeyStorage(f"valkey://{address}", key_prefix=key_prefix)
        with closing(without), pytest.raises(StateConfigError, match="password="):
            state(without, "a")
        with closing(ValkeyStorage(f"valkey://:wrong-{'x'}@{address}", key_prefix=key_prefix)) as storage:
            with pytest.raises(StateConfigError) as caught:
                state(storage, "a")
            assert "wrong-x" not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_connections_go_by_the_name_they_are_given(self, open_storage: Open, client: valkey.Valkey) -> None:
        commit(open_storage(client_name="sentry-7"), "a", Append((HI,)))
        assert "sentry-7" in {each["name"] for each in client.client_list()}

    def test_any_number_of_contexts_can_be_named(self, open_storage: Open) -> None:
        calls: Any = open_storage()._layout._calls  # type: ignore[union-attr]
        first = calls.names("c0")
        for number in range(5000):
            calls.names(f"c{number}")
        assert len(calls._names) <= 4096
        assert calls.names("c0") == first

    def test_a_listing_goes_to_an_end_where_its_server_is_gone(self, storage: ValkeyStorage) -> None:
        commit(storage, "a", Append((HI,)))
        assert storage.call(Listing("9000::0:0")) == Page((), None)  # of a cluster whose last primaries left it

    def test_another_database_is_another_store(self, open_storage: Open) -> None:
        one, two = open_storage(), open_storage(db=1)
        commit(one, "a", Append((HI,)))
        assert state(two, "a") is None
        with pytest.raises(StateError):
            open_storage(db=99).call(Query("a"))

    def test_nobody_there_is_unavailable_within_the_deadline(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            with closing(ValkeyStorage(f"valkey://127.0.0.1:{free.getsockname()[1]}", deadline=0.3)) as storage:
                for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Listing()):
                    said = "nothing was changed" if type(operation) is Commit else "could not read"
                    with pytest.raises(StateUnavailableError, match=said) as caught:
                        storage.call(operation)
                    assert type(caught.value) is StateUnavailableError

    def test_a_deadline_that_has_passed_is_not_attempted(self, storage: ValkeyStorage) -> None:
        past = time.monotonic() - 1
        late = Commit("a", (Append((HI,)),), "c", deadline=past)
        for operation in (Query("a", deadline=past), late, Listing(deadline=past)):
            with pytest.raises(StateTimeoutError):
                storage.call(operation)
        assert state(storage, "a") is None

    def test_more_threads_than_connections_take_turns(self, open_storage: Open, client: valkey.Valkey) -> None:
        storage = open_storage(max_connections=2)
        state(storage, "a")
        before = client.info("stats")["total_connections_received"]

        def work() -> None:
            for _ in range(25):
                commit(storage, "a", Increment("n", b"1"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert existing(storage, "a").variables == {"n": b"200"}
        assert client.info("stats")["total_connections_received"] - before <= 1

    def test_a_closed_storage_says_so(self, storage: ValkeyStorage) -> None:
        state(storage, "a")
        storage.close()
        storage.close()
        for operation in (Query("a"), Listing()):
            with pytest.raises(StateUnavailableError, match="closed"):
                storage.call(operation)


class TestServerSettings:
    def test_a_server_that_may_lose_data_is_warned_of_once_or_refused(
        self, start_valkey: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = start_valkey("appendonly no", "maxmemory-policy allkeys-lru", "maxmemory 50mb")
        caplog.set_level(logging.WARNING, "agentstate.storage.valkey")
        with closing(ValkeyStorage(server.url)) as storage:
            for _ in range(3):
                state(storage, "a")
        assert len(caplog.records) == 2
        assert "allkeys-lru" in caplog.text
        assert "appendonly" in caplog.text
        with closing(ValkeyStorage(server.url, strict=True)) as storage:
            for operation in (Query("a"), Commit("a", (Append((HI,)),), "c"), Listing()):
                with pytest.raises(StateConfigError, match="strict"):
                    storage.call(operation)

    def test_a_good_server_is_not_warned_of(self, start_valkey: Any, caplog: pytest.LogCaptureFixture) -> None:
        server = start_valkey("maxmemory-policy volatile-lru")
        with closing(ValkeyStorage(server.url, strict=True)) as storage:
            state(storage, "a")
        assert not caplog.records
        expiring = ValkeyStorage(server.url, strict=True, ttl=5)
        with closing(expiring), pytest.raises(StateConfigError, match="volatile"):
            state(expiring, "a")

    @pytest.mark.parametrize(
        ("config", "forbidden", "granted"),
        [
            ("maxmemory-policy allkeys-lru", "info", r"\+info"),
            ("appendonly no", "config|get", r"\+config\|get"),
            ("appendonly no", "info", r"\+info"),
        ],
    )
    def test_strict_refuses_what_it_cannot_see(
        self, start_valkey: Any, config: str, forbidden: str, granted: str
    ) -> None:
        server = start_valkey(config)
        with server.client() as client:
            client.execute_command(f"ACL SETUSER alice on >pw ~* &* +@all -{forbidden}")
        url = f"valkey://alice:pw@127.0.0.1:{server.port}"
        with closing(ValkeyStorage(url, strict=True)) as storage, pytest.raises(StateConfigError, match=granted):
            state(storage, "a")
        with closing(ValkeyStorage(url)) as storage:
            assert state(storage, "a") is None

    def test_a_listing_of_several_pages_needs_to_know_its_server(self, start_valkey: Any) -> None:
        """After a failover in between, contexts would be missed."""
        server = start_valkey()
        with server.client() as client:
            client.execute_command("ACL SETUSER alice on >pw ~* &* +@all -info")
        url = f"valkey://alice:pw@127.0.0.1:{server.port}"
        for layout in ("log", "document"):
            with closing(ValkeyStorage(url, layout=layout, key_prefix=f"{layout}:")) as storage:
                for number in range(50):
                    commit(storage, f"c{number}", Append((HI,)))
                assert len(ids(storage, size=1000)) == 50
                with pytest.raises(StateConfigError, match=r"\+info"):
                    ids(storage, size=5)

    @pytest.mark.parametrize(("layout", "command"), [("log", "hmget"), ("document", "get")])
    def test_a_listing_that_is_refused_is_told(self, start_valkey: Any, layout: str, command: str) -> None:
        server = start_valkey()
        with closing(ValkeyStorage(server.url, layout=layout)) as storage:
            commit(storage, "a", Append((HI,)))
            assert ids(storage) == ["a"]
        with server.client() as client:
            client.execute_command(f"ACL SETUSER alice on >pw ~* +@all -{command}")
        limited = ValkeyStorage(f"valkey://alice:pw@127.0.0.1:{server.port}", layout=layout)
        with closing(limited), pytest.raises(StateUnavailableError, match="permission"):
            ids(limited)

    def test_a_user_with_few_permissions_can_use_it_and_one_with_fewer_is_told(self, start_valkey: Any) -> None:
        server = start_valkey()
        with server.client() as client:
            client.execute_command(
                "ACL SETUSER alice on >pw ~agentup:* ~{agentup:* +@read +@write +@scripting +@transaction"
            )
            client.execute_command("ACL SETUSER bob on >pw ~agentup:* ~{agentup:* +@read +time +info")
        address = f"127.0.0.1:{server.port}"
        alice, bob = (ValkeyStorage(f"valkey://{user}:pw@{address}") for user in ("alice", "bob"))
        with closing(alice), pytest.raises(StateUnavailableError, match="permission"):
            commit(alice, "a", Append((HI,)))
        with server.client() as client:
            client.execute_command("ACL SETUSER alice +time")
        with closing(ValkeyStorage(f"valkey://alice:pw@{address}")) as storage:
            commit(storage, "a", Append((HI,)))
            assert existing(storage, "a").messages == [HI]
            assert ids(storage) == ["a"]
        with closing(bob), pytest.raises(StateUnavailableError, match="permission"):
            commit(bob, "a", Append((HI,)))
