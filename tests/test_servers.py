"""The servers of the fixtures are what they claim to be, seen with the plain client."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
import valkey
from servers import (
    HOST,
    ServerMissingError,
    ValkeyCluster,
    ValkeySentinel,
    ValkeyServer,
    find_server,
    require_server,
    wait_until,
)
from tls import CertificateAuthority, TlsProxy
from valkey.cluster import ValkeyCluster as ClusterClient
from valkey.exceptions import ValkeyClusterException
from valkey.sentinel import Sentinel as SentinelClient

StartValkey = Callable[..., ValkeyServer]


def process_exists(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestVersions:
    def test_valkey_9_is_9_1(self, valkey_9: ValkeyServer) -> None:
        with valkey_9.client() as client:
            assert client.info("server")["valkey_version"].startswith("9.1.")

    def test_valkey_8_is_8_1(self, valkey_8: ValkeyServer) -> None:
        with valkey_8.client() as client:
            assert client.info("server")["valkey_version"].startswith("8.1.")

    def test_valkey_server_is_each_version(self, valkey_server: ValkeyServer, request: pytest.FixtureRequest) -> None:
        with valkey_server.client() as client:
            version = client.info("server")["valkey_version"]
        assert version.startswith(request.node.callspec.params["valkey_server"] + ".")

    def test_valkey_url_takes_reads_and_writes(self, valkey_url: str, key_prefix: str) -> None:
        with valkey.Valkey.from_url(valkey_url) as client:
            assert client.set(key_prefix + "x", "1") is True
            assert client.get(key_prefix + "x") == b"1"

    def test_the_server_has_lua(self, valkey_server: ValkeyServer) -> None:
        with valkey_server.client() as client:
            assert client.eval("return redis.call('PING')", 0) == b"PONG"


class TestIsolation:
    seen: list[str] = []  # noqa: RUF012

    @pytest.mark.parametrize("turn", [1, 2])
    def test_each_test_has_a_prefix_of_its_own(self, key_prefix: str, turn: int) -> None:
        assert key_prefix not in self.seen
        self.seen.append(key_prefix)

    def test_a_given_server_is_used_alone_and_left_as_it_was(self, tmp_path: Path, start_valkey: StartValkey) -> None:
        given = start_valkey()
        test = tmp_path / "test_given.py"
        test.write_text(
            textwrap.dedent("""
            import valkey

            def test_writes(valkey_url, key_prefix):
                with valkey.Valkey.from_url(valkey_url) as client:
                    client.set(key_prefix + "x", "1")
                    client.set(key_prefix + "{" + key_prefix + "x}:history", "1")
                    client.set("seen", client.dbsize())
            """)
        )
        run_pytest(test, AGENTSTATE_TEST_VALKEY_URL=given.url)
        with given.client() as client:
            assert client.keys() == [b"seen"]
            assert client.get("seen") == b"2"


class TestMissingServer:
    @pytest.fixture(autouse=True)
    def no_package_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(servers._PACKAGES, "7.2", ("valkey_of_old", "valkey-server"))

    def test_the_error_names_the_package(self) -> None:
        with pytest.raises(ServerMissingError, match=r"Valkey 7\.2: the package valkey-of-old is not installed"):
            find_server("7.2")

    def test_it_skips_on_a_desk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="valkey-of-old"):
            require_server("7.2")

    def test_it_fails_in_ci(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CI", "true")
        with pytest.raises(ServerMissingError):
            require_server("7.2")


class TestOneServer:
    def test_what_was_answered_survives_kill_and_start(self, start_valkey: StartValkey) -> None:
        server = start_valkey()
        port = server.port
        with server.client() as client:
            for number in range(100):
                client.rpush("list", number)
            server.kill()
            with pytest.raises(valkey.ConnectionError):
                client.ping()
            server.start()
            assert client.llen("list") == 100
        assert server.port == port

    def test_what_was_answered_survives_a_restart(self, start_valkey: StartValkey) -> None:
        server = start_valkey()
        with server.client() as client:
            client.set("x", "1")
            server.restart()
            assert client.get("x") == b"1"

    def test_its_port_is_nobody_elses_while_it_is_down(self, start_valkey: StartValkey) -> None:
        server = start_valkey()
        server.kill()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, server.port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, server.port))

    def test_a_paused_one_answers_when_it_resumes(self, start_valkey: StartValkey) -> None:
        server = start_valkey()
        with server.client(socket_timeout=0.2) as impatient, server.client() as patient:
            server.pause()
            with pytest.raises(valkey.TimeoutError):
                impatient.ping()
            # The kernel accepts and buffers for the frozen process: the command is in flight, not refused.
            with concurrent.futures.ThreadPoolExecutor() as pool:
                pending = pool.submit(patient.incr, "x")
                time.sleep(0.1)
                assert not pending.done()
                server.resume()
                assert pending.result() == 1

    def test_a_paused_one_can_be_stopped_and_killed(self, start_valkey: StartValkey) -> None:
        for end in (ValkeyServer.stop, ValkeyServer.kill):
            server = start_valkey()
            pid = server.pid
            server.pause()
            end(server)
            assert not process_exists(pid)

    def test_config_lines_reach_it(self, start_valkey: StartValkey) -> None:
        server = start_valkey("maxmemory 32mb", "maxmemory-policy allkeys-lru", version="8.1")
        with server.client() as client:
            assert client.config_get("maxmemory*")["maxmemory-policy"] == "allkeys-lru"

    def test_a_config_it_refuses_is_reported_with_its_log(self) -> None:
        with (
            pytest.raises(RuntimeError, match="ended with 1 before it answered") as raised,
            ValkeyServer(require_server("9.1"), "no-such-option yes"),
        ):
            pytest.fail("it started")
        assert "no-such-option" in "".join(raised.value.__notes__)

    def test_nothing_is_left_of_a_closed_one(self) -> None:
        with ValkeyServer(require_server("9.1")) as server:
            pid = server.pid
            assert process_exists(pid)
            assert server.socket_path.exists()
        assert not process_exists(pid)
        assert not server.directory.exists()

    def test_a_forked_child_that_exits_leaves_it_running(self, start_valkey: StartValkey) -> None:
        server = start_valkey()
        child = os.fork()
        if child == 0:
            try:
                server.close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with server.client() as client:
            assert client.ping()

    @pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to do it")
    def test_it_dies_with_a_session_that_is_killed(self) -> None:
        script = """
            import servers, time
            server = servers.ValkeyServer(servers.find_server("9.1"))
            server.start()
            server.pause()  # even a frozen one
            print(server.pid, server.directory, flush=True)
            time.sleep(60)
        """
        session = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=Path(servers.__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        with session:
            assert session.stdout is not None
            pid, _, directory = session.stdout.readline().strip().partition(" ")
            assert process_exists(int(pid))
            session.send_signal(signal.SIGKILL)
        wait_until(lambda: not process_exists(int(pid)), "the end of the server")
        shutil.rmtree(directory)


class TestUnixSocket:
    def test_it_is_the_same_server(self, valkey_9: ValkeyServer, valkey_unix_url: str, key_prefix: str) -> None:
        with valkey.Valkey.from_url(valkey_unix_url) as by_socket, valkey_9.client() as by_port:
            by_socket.set(key_prefix + "x", "1")
            assert by_port.get(key_prefix + "x") == b"1"


class TestPassword:
    def test_the_url_holds_it(self, valkey_password: ValkeyServer) -> None:
        with valkey.Valkey.from_url(valkey_password.url) as client:
            assert client.ping()

    def test_the_unix_url_holds_it(self, valkey_password: ValkeyServer) -> None:
        with valkey.Valkey.from_url(valkey_password.unix_url) as client:
            assert client.ping()

    @pytest.mark.parametrize("password", [None, "wrong"])
    def test_nobody_else_is_let_in(self, valkey_password: ValkeyServer, password: str | None) -> None:
        with (
            valkey.Valkey(port=valkey_password.port, password=password) as client,
            pytest.raises(valkey.AuthenticationError),
        ):
            client.ping()


class TestTls:
    def test_a_client_that_trusts_the_authority_is_served(self, valkey_tls: TlsProxy, key_prefix: str) -> None:
        with valkey.Valkey.from_url(valkey_tls.url, ssl_ca_certs=str(valkey_tls.ca_file)) as client:
            client.set(key_prefix + "x", "1")
            assert client.get(key_prefix + "x") == b"1"

    def test_the_address_is_in_the_certificate_too(self, valkey_tls: TlsProxy) -> None:
        with valkey.Valkey(
            host=HOST, port=valkey_tls.port, ssl=True, ssl_ca_certs=str(valkey_tls.ca_file), ssl_check_hostname=True
        ) as client:
            assert client.ping()

    def test_a_client_that_does_not_trust_it_hangs_up(self, valkey_tls: TlsProxy) -> None:
        with (
            valkey.Valkey.from_url(valkey_tls.url) as client,
            pytest.raises(valkey.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.ping()

    def test_a_client_without_tls_gets_nothing(self, valkey_tls: TlsProxy) -> None:
        with valkey.Valkey(port=valkey_tls.port) as client, pytest.raises(valkey.ConnectionError):
            client.ping()

    def test_a_certificate_of_another_name_is_refused(
        self, valkey_9: ValkeyServer, certificate_authority: CertificateAuthority
    ) -> None:
        certificate = certificate_authority.issue("valkey.invalid")
        context = ssl.create_default_context(cafile=str(certificate_authority.ca_file))
        with (
            TlsProxy(valkey_9, certificate, certificate_authority.ca_file) as proxy,
            socket.create_connection((HOST, proxy.port)) as connection,
            pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
        ):
            context.wrap_socket(connection, server_hostname="localhost")

    def test_megabytes_pass_both_ways_at_once(self, valkey_tls: TlsProxy, key_prefix: str) -> None:
        value = os.urandom(1 << 20)
        with valkey.Valkey.from_url(valkey_tls.url, ssl_ca_certs=str(valkey_tls.ca_file)) as client:
            pipeline = client.pipeline(transaction=False)
            for _ in range(16):
                pipeline.set(key_prefix + "x", value, get=True)
            assert pipeline.execute()[1:] == [value] * 15

    def test_when_the_server_dies_the_client_is_told(
        self, start_valkey: StartValkey, certificate_authority: CertificateAuthority
    ) -> None:
        server = start_valkey()
        certificate = certificate_authority.issue("localhost")
        with (
            TlsProxy(server, certificate, certificate_authority.ca_file) as proxy,
            valkey.Valkey.from_url(proxy.url, ssl_ca_certs=str(proxy.ca_file), socket_timeout=5) as client,
        ):
            assert client.ping()
            server.kill()
            with pytest.raises(valkey.ConnectionError):
                client.ping()
            server.start()
            assert client.ping()

    def test_it_ends_with_clients_connected(
        self, valkey_9: ValkeyServer, certificate_authority: CertificateAuthority
    ) -> None:
        certificate = certificate_authority.issue("localhost")
        proxy = TlsProxy(valkey_9, certificate, certificate_authority.ca_file)
        with proxy:
            client = valkey.Valkey.from_url(proxy.url, ssl_ca_certs=str(proxy.ca_file))
            assert client.ping()
        with client, pytest.raises(valkey.ConnectionError):
            client.ping()


class TestSentinel:
    def test_a_client_is_led_to_primary_and_replica(self, valkey_sentinel: ValkeySentinel) -> None:
        finder = SentinelClient([(HOST, valkey_sentinel.sentinel.port)])
        name = valkey_sentinel.service_name
        assert finder.discover_master(name) == (HOST, valkey_sentinel.primary.port)
        assert finder.discover_slaves(name) == [(HOST, valkey_sentinel.replica.port)]
        for sentinel in finder.sentinels:
            sentinel.close()

    def test_the_replica_confirms_writes(self, valkey_sentinel: ValkeySentinel, key_prefix: str) -> None:
        with valkey_sentinel.primary.client() as primary, valkey_sentinel.replica.client() as replica:
            primary.set(key_prefix + "x", "1")
            assert primary.wait(1, 5000) == 1
            assert replica.get(key_prefix + "x") == b"1"
            with pytest.raises(valkey.ReadOnlyError):
                replica.set(key_prefix + "x", "2")

    def test_the_replica_takes_over_from_a_killed_primary(self) -> None:
        with ValkeySentinel(require_server("9.1")) as group:
            with group.primary.client() as primary:
                primary.set("x", "1")
                primary.wait(1, 5000)
            group.primary.kill()
            wait_until(lambda: group.primary_port() == group.replica.port, "the failover")
            with group.replica.client() as promoted:
                assert promoted.set("x", "2") is True


class TestCluster:
    def test_each_node_holds_a_share_of_the_keys(self, valkey_cluster: ValkeyCluster, key_prefix: str) -> None:
        with ClusterClient(host=HOST, port=valkey_cluster.nodes[0].port) as client:
            for number in range(100):
                client.set(f"{key_prefix}{number}", number)
            assert sorted(int(client.get(f"{key_prefix}{number}")) for number in range(100)) == list(range(100))
            assert {node.port for node in client.get_primaries()} == {node.port for node in valkey_cluster.nodes}
        for node in valkey_cluster.nodes:
            with node.client() as single:
                assert single.dbsize() > 0

    def test_a_node_sends_a_client_to_the_right_one(self, valkey_cluster: ValkeyCluster) -> None:
        with valkey_cluster.nodes[0].client() as single:
            assert single.execute_command("CLUSTER KEYSLOT", "foo") == 12182  # in the last third
            with pytest.raises(valkey.ResponseError, match=f"12182 {HOST}:{valkey_cluster.nodes[2].port}"):
                single.set("foo", "1")

    def test_two_keys_of_one_tag_are_one_slot(self, valkey_cluster: ValkeyCluster, key_prefix: str) -> None:
        with ClusterClient.from_url(valkey_cluster.url.replace("+cluster", "")) as client:
            keys = (key_prefix + "x", key_prefix + "{" + key_prefix + "x}:history")
            assert client.eval("return #KEYS", 2, *keys) == 2
            with pytest.raises(ValkeyClusterException):
                client.eval("return #KEYS", 2, "a", "b")


def run_pytest(test: Path, **environment: str) -> None:
    """Run a test file with the fixtures of this folder, in a process of its own."""
    here = Path(servers.__file__).parent
    options = ["-p", "conftest", "-c", str(here.parent / "pyproject.toml"), f"--rootdir={test.parent}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(test)],
        cwd=test.parent,
        env={**os.environ, "PYTHONPATH": str(here), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
