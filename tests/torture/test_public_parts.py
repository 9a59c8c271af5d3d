"""What `agentstate.testing` gives to authors of backends, on the built-in ones and on a broken one."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import HOST, ValkeyServer

from agentstate import FileStorage, InMemoryStorage, StateStorage, SyncConversationContext, ValkeyStorage
from agentstate.testing.faults import FaultProxy
from agentstate.testing.kills import KillTests


class TestKilledFiles(KillTests):
    @pytest.fixture(autouse=True)
    def empty_store(self, tmp_path: Path) -> None:
        self.path = tmp_path / "states"

    def make_storage(self, **options: Any) -> StateStorage:
        return FileStorage(self.path, **options)


class TestKilledDocuments(TestKilledFiles):
    def make_storage(self, **options: Any) -> StateStorage:
        return FileStorage(self.path, layout="document", **options)


class TestKilledValkey(KillTests):
    @pytest.fixture(autouse=True)
    def empty_store(self, valkey_9: ValkeyServer, key_prefix: str) -> None:
        self.url, self.prefix = valkey_9.url, key_prefix

    def make_storage(self, **options: Any) -> StateStorage:
        return ValkeyStorage(self.url, key_prefix=self.prefix, **options)


class Forgetful(KillTests):
    def make_storage(self, **options: Any) -> StateStorage:
        return InMemoryStorage(**options)


def test_a_store_that_forgets_does_not_survive() -> None:
    with pytest.raises(AssertionError, match="lost"):
        Forgetful().test_what_was_acknowledged_survives_the_kill_of_its_writer()


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends everything back."""
    listener = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            while data := connection.recv(1000):
                connection.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def exchange(port: int, text: bytes, timeout: float = 5.0) -> bytes:
    """Everything that comes back until there was as much, or the connection was cut."""
    got = b""
    with socket.create_connection((HOST, port), timeout=timeout) as client:
        try:
            client.sendall(text)
            while len(got) < len(text) and (data := client.recv(1000)):
                got += data
        except ConnectionError:
            pass
    return got


def test_the_proxy_needs_no_pytest() -> None:
    program = "import sys; from agentstate.testing.faults import FaultProxy; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_proxy_passes_on_and_cuts_where_it_is_told(echo: int) -> None:
    with FaultProxy(HOST, echo) as proxy:
        assert exchange(proxy.port, b"hello") == b"hello"
        proxy.cut_reply(3)
        assert exchange(proxy.port, b"hello") == b"hel"
        assert exchange(proxy.port, b"hello") == b"hello"
        proxy.cut_request(2)
        assert len(exchange(proxy.port, b"hello")) <= 2
        proxy.deliver_late(0.0)
        assert exchange(proxy.port, b"hello") == b""
        begin = time.monotonic()
        proxy.delay_reply(0.1)
        assert exchange(proxy.port, b"hello") == b"hello"
        assert time.monotonic() - begin >= 0.1
        assert proxy.fired == 4
        for drop in (proxy.drop_request, proxy.drop_reply):
            drop()
            with pytest.raises(TimeoutError):
                exchange(proxy.port, b"hello", timeout=0.1)
        assert exchange(proxy.port, b"hello") == b"hello"
        assert proxy.fired == 6
        proxy.cut_reply(0)
        proxy.calm()
        assert exchange(proxy.port, b"hello") == b"hello"


def test_a_call_whose_reply_does_not_come_is_sent_again_in_time_and_applied_once(
    valkey_9: ValkeyServer, key_prefix: str
) -> None:
    with (
        FaultProxy(HOST, valkey_9.port) as proxy,
        SyncConversationContext(
            ValkeyStorage(f"valkey://{HOST}:{proxy.port}", key_prefix=key_prefix, deadline=2.0)
        ) as context,
    ):
        assert context.increment_variable("a", "n") == 1
        proxy.delay_reply(5.0)
        assert context.increment_variable("a", "n") == 2
        assert context.get_variables("a") == {"n": 2}
