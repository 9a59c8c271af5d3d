"""A connection to a server, as it looks for answers: awake for a moment, and asleep where that does not pay."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from agentstate.storage.valkey.wire import Connection, LostConnectionError, QuickConnection, Several


class Peer:
    """The other end: it answers each request with `answer`, after `pause` seconds."""

    def __init__(self, kind: type[Connection]) -> None:
        ours, self._theirs = socket.socketpair()
        self.connection = kind(self, ours)
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


@pytest.fixture(params=[Connection, QuickConnection])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if request.param is QuickConnection:
        pytest.importorskip("libvalkey")
    peer = Peer(request.param)
    yield peer
    peer.connection.close()


@pytest.mark.parametrize("looks", [True, False])
def test_every_answer_comes_however_long_it_takes(peer: Peer, looks: bool) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for number in range(300):
        peer.pause = chance.choice([0, 0, 0, 0, 0.0001, 0.003])
        peer.answer = chance.choice([b":%d\r\n" % number, b"$17\r\n%017d\r\n" % number])
        assert int(peer.connection.ask_one(b"request", looks)) == number, f"seed {seed}"
        peer.answer = b":%d\r\n$-1\r\n*2\r\n:1\r\n$3\r\nabc\r\n" % number
        assert peer.connection.ask_some(b"request", 3, looks) == [number, None, [1, b"abc"]], f"seed {seed}"


@pytest.mark.parametrize("before", [0, 1, 200])
@pytest.mark.parametrize("pause", [0, 0.01])
@pytest.mark.parametrize("looks", [True, False])
def test_a_peer_that_closes_is_a_lost_connection(peer: Peer, before: int, pause: float, looks: bool) -> None:
    for _ in range(before):
        assert peer.connection.ask_one(b"request", looks) == b"OK"
    peer.answer, peer.pause = b"", pause
    with pytest.raises(LostConnectionError, match="closed"):
        peer.connection.ask_one(b"request", looks)


@pytest.mark.parametrize("before", [0, 200])
@pytest.mark.parametrize("looks", [True, False])
def test_no_answer_before_the_deadline_is_a_lost_connection(peer: Peer, before: int, looks: bool) -> None:
    for _ in range(before):
        assert peer.connection.ask_one(b"request", looks) == b"OK"
    peer.pause = 0.3
    peer.connection.deadline = time.monotonic() + 0.05
    with pytest.raises(LostConnectionError, match="deadline"):
        peer.connection.ask_one(b"request", looks)


def test_of_several_connections_those_with_an_answer_go_on_and_all_at_the_deadline() -> None:
    peers = [Peer(Connection) for _ in range(3)]
    several = Several()
    try:
        for peer in peers:
            peer.connection.deadline = time.monotonic() + 0.5
            several.add(peer.connection)
        assert several.ready(time.monotonic() + 0.01) == []
        peers[1].connection.send(b"request")
        assert several.ready(time.monotonic() + 20) == [peers[1].connection]
        assert [*peers[1].connection.reply()], "it waits for its answer"
        assert peers[1].connection.read() == b"OK"
        several.leave_out(peers[1].connection)
        assert set(several.ready(time.monotonic() + 20)) == {peers[0].connection, peers[2].connection}
        with pytest.raises(LostConnectionError, match="deadline"):
            for _ in peers[0].connection.reply():
                pass
    finally:
        several.close()
        for peer in peers:
            peer.connection.close()
