"""A proxy that breaks connections to Valkey where a test wants it."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any


class CuttingProxy:
    """Forwards to a server, and breaks connections at the moment that a test chooses.

    `plan` is called with every request (a chunk that begins with EVALSHA's array, or HMGET, ...) and answers what to do
    with it: ``pass``, ``drop`` (cut before the server sees it), ``lose`` (cut when the server has answered), ``hold``
    (cut towards the client; the server gets it when `release` is called), or a number: so many bytes of the answer
    arrive before the cut.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.plan: Callable[[bytes], str | int] = lambda request: "pass"
        self._held: list[tuple[socket.socket, bytes]] = []
        self._open = True
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        self._open = False
        self._listener.close()
        for upstream, _ in self._held:
            upstream.close()
        for thread in self._threads:
            thread.join(10)

    def release(self) -> int:
        """Let the held requests arrive, and return how many they were."""
        held, self._held = self._held, []
        for upstream, request in held:
            upstream.sendall(request)
            upstream.settimeout(5)
            upstream.recv(65536)
            upstream.close()
        return len(held)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while self._open:
            try:
                downstream, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._start(self._serve, downstream)

    def _serve(self, downstream: socket.socket) -> None:
        upstream = socket.create_connection(("127.0.0.1", self._target))
        keep = False
        with downstream:
            try:
                keep = self._forward(downstream, upstream)
            except OSError:
                pass
            finally:
                if not keep:
                    upstream.close()

    def _forward(self, downstream: socket.socket, upstream: socket.socket) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(downstream, selectors.EVENT_READ)
            selector.register(upstream, selectors.EVENT_READ)
            allowed: int | None = None
            while self._open:
                for key, _ in selector.select(0.05):
                    if key.fileobj is upstream:
                        answer = upstream.recv(65536)
                        if not answer:
                            return False
                        if allowed is None:
                            downstream.sendall(answer)
                        else:
                            downstream.sendall(answer[:allowed])
                            return False
                        continue
                    request = downstream.recv(1 << 20)
                    if not request:
                        return False
                    action = self.plan(request)
                    if action == "drop":
                        return False
                    if action == "hold":
                        self._held.append((upstream, request))
                        return True
                    upstream.sendall(request)
                    if action != "pass":
                        allowed = 0 if action == "lose" else int(action)
        return False
