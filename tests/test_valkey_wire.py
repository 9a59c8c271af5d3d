"""A connection to a server: replies in whatever pieces they come, and peers that are slow, silent or gone."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from agentstate.storage.valkey import wire
from agentstate.storage.valkey.wire import Connection, LostConnectionError, Reader, ServerError


class Peer:
    """The other end: it answers each request with `answer`, after `pause` seconds."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self.connection = Connection(self, ours)
        self.connection.deadline = time.monotonic() + 20
        self._ours = ours
        self.answer = b"+OK\r\n"
        self.pause = 0.0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while self._theirs.recv(65536):
            time.sleep(self.pause)
            if not self.answer:
                self._theirs.close()
                return
            with suppress(OSError):  # nobody waits any more
                self._theirs.sendall(self.answer)

    def disconnect(self) -> None:
        self._ours.close()
        self._thread.join()
        self._theirs.close()


@pytest.fixture(params=["plain", "libvalkey"])
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    if request.param == "plain":
        monkeypatch.setattr(wire, "_new_reader", Reader)
    else:
        pytest.importorskip("libvalkey")
    peer = Peer()
    yield peer
    peer.connection.close()


def test_every_answer_comes_however_long_it_takes(peer: Peer) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for number in range(300):
        peer.pause = chance.choice([0, 0, 0, 0, 0.0001, 0.003])
        peer.answer = b":%d\r\n$-1\r\n*2\r\n:1\r\n$3\r\nabc\r\n" % number
        assert peer.connection.ask(b"", b"", b"request") == [number, None, [1, b"abc"]], f"seed {seed}"


@pytest.mark.parametrize("pause", [0, 0.01])
def test_a_peer_that_closes_is_a_lost_connection(peer: Peer, pause: float) -> None:
    assert peer.connection.ask(b"request") == [b"OK"]
    peer.answer, peer.pause = b"", pause
    with pytest.raises(LostConnectionError, match="closed"):
        peer.connection.ask(b"request")


def test_no_answer_before_the_deadline_is_a_lost_connection(peer: Peer) -> None:
    assert peer.connection.ask(b"request") == [b"OK"]
    peer.pause = 0.3
    peer.connection.deadline = time.monotonic() + 0.05
    with pytest.raises(LostConnectionError, match="no answer"):
        peer.connection.ask(b"request")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"?\r\n"])
def test_a_reply_that_is_none_is_a_lost_connection(peer: Peer, answer: bytes) -> None:
    peer.answer = answer
    with pytest.raises(LostConnectionError):
        peer.connection.ask(b"request")


REPLIES: list[tuple[bytes, Any]] = [
    (b"+OK\r\n", b"OK"),
    (b":-5\r\n", -5),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"$0\r\n\r\n", b""),
    (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
    (b"*0\r\n", []),
    (b"*3\r\n$1\r\nx\r\n*1\r\n:7\r\n$-1\r\n", [b"x", [7], None]),
]


def test_replies_may_come_in_any_pieces() -> None:
    packed = b"".join(reply for reply, _ in REPLIES)
    for size in range(1, 12):
        reader = Reader()
        found: list[Any] = []
        for start in range(0, len(packed), size):
            reader.feed(packed[start : start + size])
            while (reply := reader.gets()) is not False:
                found.append(reply)
        assert found == [reply for _, reply in REPLIES]
    reader = Reader()
    reader.feed(b"-MOVED 1 a:1\r\n")
    error = reader.gets()
    assert isinstance(error, ServerError)
    assert error.code == "MOVED"
