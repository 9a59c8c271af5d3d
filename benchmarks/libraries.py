"""agentstate against other libraries that keep conversations."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from .measure import ALONE, SIZES, Round, Run, repeated
from .messages import content_of
from .peers import FILE_PEERS, VALKEY_PEERS, OurFiles, OurUnflushedFiles, OurValkey, Peer, opened
from .results import AT_REST
from .sampling import Figures
from .servers import start_server

LENGTH = 100
"""Messages in the conversation, where sizes are compared."""
_LENGTHS = (10, 100, 1000, 10_000, 100_000)
_OPERATIONS = {"read": "read of the last 10", "append": "append"}


def libraries(run: Run) -> None:
    """Appends, and reads of the last ten messages, as messages and conversations grow."""
    server = start_server(run)
    groups: dict[str, tuple[type[Peer], ...]] = {"files": FILE_PEERS, "Valkey": VALKEY_PEERS}
    for medium, group in groups.items():
        for size in SIZES:
            _sizes(run, server, medium, group, size)
        _lengths(run, server, medium, group)


def _sizes(run: Run, server: Any, medium: str, group: tuple[type[Peer], ...], size: int) -> None:
    with ExitStack() as stack:
        peers = _filled(run, server, group, LENGTH, content_of(size), stack)
        for work, shown in _OPERATIONS.items():
            # Few appends, so that the conversation remains about as long as it was.
            measured = run.compare(_cases(peers, work), seconds=0.05, size=size, calls=5 if work == "append" else None)
            for make in group:
                if make.name in peers and make not in _OURS:
                    remark = f" ({make.remark})" if make.remark else ""
                    run.row(
                        medium, shown, measured, _ours(medium, make).name, make.name, size=size,
                        against=f"{make.name}{remark}",
                    )  # fmt: skip


_OURS = (OurFiles, OurUnflushedFiles, OurValkey)


def _ours(medium: str, against: type[Peer]) -> type[Peer]:
    """The one of ours that waits for the disk if the other one does."""
    if medium == "Valkey":
        return OurValkey
    return OurFiles if against.flushes else OurUnflushedFiles


def _lengths(run: Run, server: Any, medium: str, group: tuple[type[Peer], ...]) -> None:
    points: dict[tuple[str, str], dict[float, float]] = {}
    for length in (length for length in _LENGTHS if length <= run.amount(_LENGTHS[-1], 100)):
        with ExitStack() as stack:
            peers = _filled(run, server, group, length, content_of(SIZES[0]), stack)
            for work in _OPERATIONS:
                measured = run.compare(_cases(peers, work), seconds=0.05, calls=10, conditions=ALONE, rounds=7)
                for name, samples in measured[AT_REST].items():
                    points.setdefault((work, name), {})[length] = Figures.of(samples).median * 1e6
    for (work, name), line in points.items():
        run.line(f"length-{medium.lower()}-{work}", name, line)


def _filled(
    run: Run, server: Any, group: tuple[type[Peer], ...], length: int, content: str, stack: ExitStack
) -> dict[str, Peer]:
    """Those that are installed, with a conversation of so many messages each."""
    server.client().flushall()
    peers = {}
    for make in group:
        if length <= make.most:
            peer = stack.enter_context(opened(run, make, server, content))
            if peer is not None:
                peer.fill(length)
                peers[make.name] = peer
    return peers


def _cases(peers: dict[str, Peer], work: str) -> dict[str, Round]:
    if work == "append":
        return {name: repeated(peer.append) for name, peer in peers.items()}
    return {name: repeated(partial(peer.last, 10)) for name, peer in peers.items()}
