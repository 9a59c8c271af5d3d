"""Bytes written for bytes of messages."""

from __future__ import annotations

from typing import Any

from agentstate import SyncConversationContext, ValkeyStorage

from . import floors
from .files import CountingFileSystem, sync_context
from .measure import MESSAGE_BYTES, TEXT, Run, benchmark, written
from .peers import FILE_PEERS, opened
from .servers import start_server


@benchmark("bytes")
def bytes_written(run: Run) -> None:
    """What an append writes: at write(), to the disk, and to the server's append-only file."""
    count = run.size(10_000, 200)
    message = len(floors.message())
    run.report.facts["bytes of a message as JSON"] = message
    for fsync in ("no", "always"):
        total = count if fsync == "no" else count // 10
        system = CountingFileSystem()
        context = sync_context(run, run.folder("ours"), file_system=system, fsync=fsync)
        with written() as io:
            for _ in range(total):
                context.add_to_history("one", "user", TEXT)
        work = f"file, fsync: {fsync}: {total:,} appends, written per message"
        target = 1.6 if fsync == "no" else None
        run.figure(
            work, system.bytes / total, "the message as JSON", message, "bytes", at_most=target,
            note=f"{system.bytes / total / MESSAGE_BYTES:.2f} × the {MESSAGE_BYTES} bytes of its content",
        )  # fmt: skip
        run.report.facts[f"fsync: {fsync}: bytes per message at write(), locks included"] = io["wchar"] / total
        run.report.facts[f"fsync: {fsync}: bytes per message to the disk"] = io["write_bytes"] / total
    _variables(run)
    _server(run, run.size(2000, 100))
    _growing(run)


def _variables(run: Run) -> None:
    system = CountingFileSystem()
    context = sync_context(run, run.folder("ours"), file_system=system, fsync="no")
    for number in range(1000):
        context.add_to_history("one", "user", TEXT)
        context.set_variable("one", f"key-{number % 20}", TEXT)
    system.bytes = 0
    count = run.size(5000, 100)
    for number in range(count):
        context.set_variable("one", f"key-{number % 20}", TEXT)
    value = len(TEXT) + 2
    run.figure("file: set_variable, written per value", system.bytes / count, "the value as JSON", value, "bytes")


def _server(run: Run, count: int) -> None:
    server = start_server(run)
    client: Any = server.client()
    storage = ValkeyStorage(server.url)
    run.stack.callback(storage.close)
    context = SyncConversationContext(storage)
    context.add_to_history("one", "user", TEXT)

    def grown(work: Any) -> float:
        before = client.info("persistence")["aof_current_size"]
        for _ in range(count):
            work()
        return float(client.info("persistence")["aof_current_size"] - before) / count

    ours = grown(lambda: context.add_to_history("one", "user", TEXT))
    theirs = grown(lambda: client.rpush("list", floors.message()))
    run.figure("Valkey: append, written to the append-only file", ours, "RPUSH", theirs, "bytes")


def _growing(run: Run) -> None:
    """How much has been written after so many appends."""
    lengths = [length for length in (1, 10, 30, 100, 300, 1000) if length <= run.size(1000, 30)]
    for name, make in FILE_PEERS.items():
        with opened(run, name, make) as peer:
            if peer is None:
                continue
            totals, total, done = [], 0, 0
            for length in lengths:
                with written() as io:
                    for _ in range(length - done):
                        peer.append()
                done = length
                total += io["wchar"]
                totals.append(total / length)
            run.line("bytes", peer.name, lengths, totals)
