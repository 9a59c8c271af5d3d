"""Bytes written for each byte of a message."""

from __future__ import annotations

from typing import Any

from agentstate import SyncConversationContext, ValkeyStorage

from . import floors
from .counting import CountingFileSystem, written
from .files import sync_context
from .measure import SIZES, Run
from .messages import TEXT
from .peers import FILE_PEERS, opened
from .servers import start_server


def bytes_written(run: Run) -> None:
    """What an append writes: to files, to the disk, and to the server's append-only file."""
    message = len(floors.message())
    run.counted(f"a message of {SIZES[0]} bytes as JSON", message, "bytes")
    count = run.amount(10_000, 200)
    for fsync, total in (("no", count), ("always", count // 10)):
        system = CountingFileSystem()
        context = sync_context(run, run.folder("ours"), file_system=system, fsync=fsync)
        with written() as io:
            for _ in range(total):
                context.add_to_history("one", "user", TEXT)
        where = f"files, fsync: {fsync}: written by an append"
        target = 1.6 * message if fsync == "no" else None
        run.counted(where, system.bytes / total, "bytes", at_most=target, note=f"of {total:,} in one conversation")
        run.counted(f"{where}, locks included", io["wchar"] / total, "bytes")
        run.counted(f"{where}, at the disk", io["write_bytes"] / total, "bytes")
    _variables(run)
    _server(run, run.amount(2000, 100))
    _growing(run)


def _variables(run: Run) -> None:
    system = CountingFileSystem()
    context = sync_context(run, run.folder("ours"), file_system=system, fsync="no")
    for number in range(1000):
        context.add_to_history("one", "user", TEXT)
        context.set_variable("one", f"key-{number % 20}", TEXT)
    system.reset()
    count = run.amount(5000, 100)
    for number in range(count):
        context.set_variable("one", f"key-{number % 20}", TEXT)
    run.counted(f"files: written by a set_variable of {SIZES[0]} bytes", system.bytes / count, "bytes")


def _server(run: Run, count: int) -> None:
    server = start_server(run)
    client: Any = server.client()
    context = run.closing(SyncConversationContext(ValkeyStorage(server.url)))
    context.add_to_history("one", "user", TEXT)

    def grown(work: Any) -> float:
        before = client.info("persistence")["aof_current_size"]
        for _ in range(count):
            work()
        return float(client.info("persistence")["aof_current_size"] - before) / count

    ours = grown(lambda: context.add_to_history("one", "user", TEXT))
    theirs = grown(lambda: client.rpush("list", floors.message()))
    run.counted(
        "Valkey: written to the append-only file by an append", ours, "bytes", note=f"{theirs:.0f} bytes by an RPUSH"
    )


def _growing(run: Run) -> None:
    """Bytes written for each message, after so many appends."""
    lengths = [length for length in (1, 10, 30, 100, 300, 1000) if length <= run.amount(1000, 30)]
    for make in FILE_PEERS:
        with opened(run, make) as peer:
            if peer is None:
                continue
            points: dict[float, float] = {}
            total = done = 0
            for length in lengths:
                with written() as io:
                    for _ in range(length - done):
                        peer.append()
                done = length
                total += io["wchar"]
                points[length] = total / length
            run.line("bytes", peer.name, points)
