"""A proxy that injects faults into connections, for tests of backends that use a server.

    from agentstate.testing.faults import FaultProxy

    with FaultProxy("127.0.0.1", server_port) as proxy:
        context = SyncConversationContext(MyStorage(f"my://127.0.0.1:{proxy.port}"))
        for after in range(200):
            proxy.cut_reply(after)  # the server executes the request; its reply does not arrive completely
            context.add_to_history("a", "user", str(after))
        assert [message["content"] for message in context.get_history("a")] == [str(n) for n in range(200)]

It forwards bytes, whatever the protocol. A correct backend has stored afterwards: every call that returned, exactly
once and in order; a call that raised StateOutcomeUnknownError at most once, and exactly once after the same call with
the error's ``commit_id``.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple, Self

_RECEIVE: Final = 65536


class Fault(NamedTuple):
    """What happens to the next bytes. See the methods of `FaultProxy`."""

    kind: Literal["request", "reply", "late", "slow", "drop request", "drop reply"]
    after: int = 0
    seconds: float = 0.0


class _Pair:
    """A client's connection, and the connection to the server that it is forwarded to."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client: socket.socket | None = client
        self.server = server
        self.dropping = False


class FaultProxy:
    """Listens on `port` of 127.0.0.1 and forwards everything to a server.

    Each of the methods for faults requests one fault. It affects the next bytes on any connection; afterwards the proxy
    forwards as before. `fired` counts the faults that happened. `sent` and `replied` count the bytes forwarded since
    the last request for a fault. Runs in a thread of its own during the ``with`` block.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.fired = 0
        self.sent = 0
        self.replied = 0
        self._fault: Fault | None = None
        self._pairs: dict[socket.socket, _Pair] = {}
        self._later: list[tuple[float, socket.socket, bytes]] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._wake.close()
        self._thread.join()

    # --- faults

    def cut_request(self, after: int) -> None:
        """Close the connection after `after` bytes of requests: the server gets an incomplete request."""
        self._ask(Fault("request", after))

    def cut_reply(self, after: int) -> None:
        """Close the client's connection after `after` bytes of replies: the server has executed the request."""
        self._ask(Fault("reply", after))

    def deliver_late(self, seconds: float) -> None:
        """Close the client's connection at its next request, and forward that request after a delay."""
        self._ask(Fault("late", 0, seconds))

    def delay_reply(self, seconds: float) -> None:
        """Forward the next reply after a delay."""
        self._ask(Fault("slow", 0, seconds))

    def drop_request(self, after: int = 0) -> None:
        """Leave the connection open but forward nothing after `after` bytes of requests, like a firewall."""
        self._ask(Fault("drop request", after))

    def drop_reply(self, after: int = 0) -> None:
        """The same after `after` bytes of replies: the server has executed the request."""
        self._ask(Fault("drop reply", after))

    def calm(self) -> None:
        """Cancel the requested fault."""
        self._ask(None)

    def _ask(self, fault: Fault | None) -> None:
        self._fault = None
        self.sent = self.replied = 0
        self._fault = fault

    def _fire(self) -> None:
        self._fault = None
        self.fired += 1

    # --- forwarding

    def _run(self) -> None:
        selector = self._selector
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        try:
            while True:
                timeout = min((moment for moment, _, _ in self._later), default=None)
                ready = selector.select(None if timeout is None else max(0.0, timeout - time.monotonic()))
                for key, _ in ready:
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._pairs:
                        self._pass_on(key.fileobj)
                self._deliver()
        finally:
            for one in [*self._pairs, self._listener, self._woken]:
                one.close()
            selector.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=5.0)
        except OSError:
            _reset(client)
            return
        pair = _Pair(client, server)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[one] = pair
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        pair = self._pairs[source]
        try:
            data = source.recv(_RECEIVE)
        except OSError:
            data = b""
        if not data:
            self._close(pair)
        elif pair.dropping or self._drops(data, source is pair.server):
            pair.dropping = True
        elif source is pair.server:
            self._to_client(pair, data)
        else:
            self._to_server(pair, data)

    def _drops(self, data: bytes, reply: bool) -> bool:
        fault = self._fault
        if fault is None or fault.kind != ("drop reply" if reply else "drop request"):
            return False
        if (self.replied if reply else self.sent) + len(data) <= fault.after:
            return False
        self._fire()
        return True

    def _to_server(self, pair: _Pair, data: bytes) -> None:
        fault = self._fault
        if fault is not None and fault.kind == "late":
            self._fire()
            self._later.append((time.monotonic() + fault.seconds, pair.server, data))
            self._cut_off(pair)
            return
        if fault is not None and fault.kind == "request" and self.sent + len(data) > fault.after:
            self._fire()
            with suppress(OSError):
                pair.server.sendall(data[: fault.after - self.sent])
            self._close(pair)
            return
        self.sent += len(data)
        self._send(pair, pair.server, data)

    def _to_client(self, pair: _Pair, data: bytes) -> None:
        client = pair.client
        if client is None:  # closed: the reply is discarded
            return
        fault = self._fault
        if fault is not None and fault.kind == "slow":
            self._fire()
            self._later.append((time.monotonic() + fault.seconds, client, data))
            return
        if fault is not None and fault.kind == "reply" and self.replied + len(data) > fault.after:
            self._fire()
            with suppress(OSError):
                client.sendall(data[: fault.after - self.replied])
            # An orderly close, so that the forwarded part arrives: a reset would discard it.
            self._close(pair)
            return
        self.replied += len(data)
        self._send(pair, client, data)

    def _send(self, pair: _Pair, target: socket.socket, data: bytes) -> None:
        try:
            target.sendall(data)
        except OSError:
            self._close(pair)

    def _deliver(self) -> None:
        now = time.monotonic()
        due = [entry for entry in self._later if entry[0] <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for _, target, data in due:
            with suppress(OSError):
                target.sendall(data)

    def _cut_off(self, pair: _Pair) -> None:
        """Close the client's connection, and keep the one to the server."""
        client, pair.client = pair.client, None
        if client is not None:
            self._forget(client)
            _reset(client)

    def _close(self, pair: _Pair) -> None:
        ends: list[Any] = [pair.client, pair.server]
        for one in ends:
            if one is not None:
                self._forget(one)
                one.close()

    def _forget(self, one: socket.socket) -> None:
        if self._pairs.pop(one, None) is not None:
            self._selector.unregister(one)


def _reset(one: socket.socket) -> None:
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
