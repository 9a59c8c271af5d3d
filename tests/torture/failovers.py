"""A primary that is killed, and its replica that takes over."""

from __future__ import annotations

import threading
import time
from random import Random
from typing import Any

from servers import HOST, ValkeyServer, find_server, wait_until

from agentstate import SyncConversationContext, ValkeyStorage
from agentstate.errors import StateError, StateOutcomeUnknownError

from .figures import Figures
from .model import Step, Steps
from .witness import Witness

_PREFIX = "failovers:"


def failovers(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """`rounds` primaries killed at any moment. With `min_replicas`, what was acknowledged is on the replica."""
    binary = find_server("9.1")
    immediate = "repl-diskless-sync-delay 0"
    with ValkeyServer(binary, immediate) as one, ValkeyServer(binary, immediate) as two:
        primary, replica = one, two
        for number in range(rounds):
            _follow(replica, primary)
            witness = Witness(figures, f"failover-{number}-{random.getrandbits(32)}")
            unknown = _until_it_dies(primary, layout, witness, Steps(random, large=False), random)
            figures.faults += 1
            with replica.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            with _context(replica, layout) as context:
                error = witness.retry(context, *unknown) if unknown is not None else None
                error = error or witness.look(context, "on the replica")
                error = error or witness.call(context, Step("add_to_history", ("user", "afterwards")))
                error = error or witness.look(context, "on the new primary")
                if error is not None:
                    figures.lose(f"on the new primary: {error!r}")
                context.clear_context(witness.context_id)
            primary.start()
            primary, replica = replica, primary


def _context(server: ValkeyServer, layout: str, **options: Any) -> SyncConversationContext:
    return SyncConversationContext(ValkeyStorage(server.url, key_prefix=_PREFIX, layout=layout, **options))


def _follow(replica: ValkeyServer, primary: ValkeyServer) -> None:
    with replica.client() as client:
        client.execute_command("REPLICAOF", HOST, primary.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica")


def _until_it_dies(
    primary: ValkeyServer, layout: str, witness: Witness, steps: Steps, random: Random
) -> tuple[Step, StateOutcomeUnknownError] | None:
    """Make calls until the primary is killed under one. Returns that one, if its outcome is unknown."""
    with _context(primary, layout, min_replicas=1, deadline=0.5) as context:
        killer = threading.Timer(0.02 + random.random() * 0.1, primary.kill)
        error: StateError | None = witness.call(context, next(steps))
        killer.start()
        end = time.monotonic() + 10.0
        while error is None and time.monotonic() < end:
            step = next(steps)
            error = witness.call(context, step)
        killer.join()
    return (step, error) if isinstance(error, StateOutcomeUnknownError) else None
