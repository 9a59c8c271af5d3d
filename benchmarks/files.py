"""The file backend, against an open file that is appended to and flushed, and against sqlite3."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentstate import ConversationContext, FileStorage, SyncConversationContext
from agentstate.storage.file.filesystem import FileSystem

from . import floors
from .measure import TEXT, Round, Run, benchmark, repeated
from .valkey_sync import one_turn, prepare_turn

OURS, RAW, GROUPED = "agentstate", "append + fsync + filelock", "sqlite3 WAL FULL, group commit"
FULL, NORMAL = "sqlite3 WAL FULL", "sqlite3 WAL NORMAL, exclusive locking"


class CountingFileSystem(FileSystem):
    """Counts what is written, and how often it is flushed."""

    def __init__(self) -> None:
        self.bytes = 0
        self.writes = 0
        self.flushes = 0

    def write(self, fd: int, data: Any) -> int:
        count = os.write(fd, data)
        self.bytes += count
        self.writes += 1
        return count

    def sync(self, fd: int) -> None:  # type: ignore[override]
        self.flushes += 1
        FileSystem.sync(fd)

    def sync_all(self, fd: int) -> None:
        self.flushes += 1
        super().sync_all(fd)


def sync_context(run: Run, folder: Path, **options: Any) -> SyncConversationContext:
    """A context on files, closed at the end of the run."""
    context = SyncConversationContext(FileStorage(folder, **options))
    run.stack.callback(context.close)
    return context


@benchmark("file-sync")
def appends(run: Run) -> None:
    """One thread, one conversation, `fsync: always`: each append waits for the disk."""
    context = sync_context(run, run.folder("ours"))
    log = floors.LockedLog(run.folder("log"))
    database = floors.open_database(run.folder("sqlite") / "messages.db", "FULL")
    run.stack.callback(log.close)
    run.stack.callback(database.close)
    positions = iter(range(10**9))
    count = run.size(60, 5)
    samples = run.compare(
        {
            OURS: repeated(lambda: context.add_to_history("one", "user", TEXT), count),
            RAW: repeated(lambda: log.append(floors.message() + b"\n"), count),
            FULL: repeated(lambda: database.execute(floors.INSERT, ("one", next(positions), floors.message())), count),
        },
        21,
    )
    run.row("file, fsync: always, sync: append", samples, OURS, RAW, at_most=1.3)
    run.row("file, fsync: always, sync: append", samples, OURS, FULL, at_least=1.0)
    _without_disk(run)


def _without_disk(run: Run) -> None:
    context = sync_context(run, run.folder("ours"), fsync="no")
    log = floors.LockedLog(run.folder("log"), flush=False)
    run.stack.callback(log.close)
    count = run.size(500, 20)
    samples = run.compare(
        {
            OURS: repeated(lambda: context.add_to_history("one", "user", TEXT), count),
            "append + filelock": repeated(lambda: log.append(floors.message() + b"\n"), count),
        }
    )
    run.row("file, fsync: no, sync: append", samples, OURS, "append + filelock")


@benchmark("file-async")
def many(run: Run) -> None:
    """1,000 conversations at a time, `fsync: always`: each append waits for the disk, with all others that wait."""
    runner = run.stack.enter_context(asyncio.Runner())
    storage = FileStorage(run.folder("ours"))
    run.stack.callback(storage.close)
    context = ConversationContext(storage)
    grouped = floors.GroupCommit(run.folder("sqlite") / "messages.db")
    run.stack.callback(grouped.close)
    offsets = itertools.count(step=100)  # positions that no round had before
    for tasks in (1000, 50):
        names = [f"conversation-{number}" for number in range(tasks)]
        each = 3 if tasks == 1000 else run.size(20, 3)
        cases = {
            OURS: _round(runner, lambda name, _: context.add_to_history(name, "user", TEXT), names, each, offsets),
            GROUPED: _round(
                runner, lambda name, position: grouped.append(name, position, floors.message()), names, each, offsets
            ),
        }
        samples = run.compare(cases, 11)
        work = f"file, fsync: always, async, {tasks:,} conversations: append"
        run.row(work, samples, OURS, GROUPED, at_least=1.0 if tasks == 1000 else 0.0)


def _round(runner: asyncio.Runner, append: Any, names: list[str], each: int, offsets: Iterator[int]) -> Round:
    async def converse(name: str, offset: int) -> None:
        for number in range(each):
            await append(name, offset + number)

    async def all_of_them() -> float:
        offset = next(offsets)
        began = time.perf_counter()
        await asyncio.gather(*(converse(name, offset) for name in names))
        return (time.perf_counter() - began) / (each * len(names)) * 1e6

    return lambda: runner.run(all_of_them())


@benchmark("file-threads")
def threads(run: Run) -> None:
    """Threads with a blocking context each on a conversation of its own, `fsync: always`."""
    context = sync_context(run, run.folder("ours"))
    workers = run.stack.enter_context(ThreadPoolExecutor(64))
    each = run.size(10, 2)

    def round_of(count: int) -> Round:
        def converse(name: str) -> None:
            for _ in range(each):
                context.add_to_history(name, "user", TEXT)

        def once() -> float:
            began = time.perf_counter()
            list(workers.map(converse, [f"conversation-{number}" for number in range(count)]))
            return (time.perf_counter() - began) / (each * count) * 1e6

        return once

    cases = {f"{count} threads": round_of(count) for count in (1, 8, 64)}
    samples = run.compare(cases, 7)
    for count in (8, 64):
        work = f"file, fsync: always, {count} threads: append"
        run.row(work, samples, f"{count} threads", "1 threads", at_least=0.0, against="itself, one thread")


@benchmark("file-exclusive")
def exclusive(run: Run) -> None:
    """`exclusive: true`, `fsync: no`: the store of one process, written when the system likes."""
    context = sync_context(run, run.folder("ours"), exclusive=True, fsync="no")
    database = floors.open_database(run.folder("sqlite") / "messages.db", "NORMAL", exclusive=True)
    run.stack.callback(database.close)
    positions = iter(range(10**9))
    count = run.size(1000, 50)
    samples = run.compare(
        {
            OURS: repeated(lambda: context.add_to_history("one", "user", TEXT), count),
            NORMAL: repeated(
                lambda: database.execute(floors.INSERT, ("one", next(positions), floors.message())), count
            ),
        },
        15,
    )
    run.row("file, exclusive, fsync: no: append", samples, OURS, NORMAL, at_least=2.0)


@benchmark("turn-file")
def turn(run: Run) -> None:
    """The reference's agent turn on files, against one append of as many bytes and its flush."""
    counts = CountingFileSystem()
    context = sync_context(run, run.folder("ours"))
    counted = sync_context(run, run.folder("counted"), file_system=counts)
    prepare_turn(context)
    prepare_turn(counted)
    counts.bytes = counts.flushes = counts.writes = 0
    for _ in range(20):
        one_turn(counted)
    run.figure("file: agent turn: flushes", counts.flushes / 20, "1", 1, "calls", at_most=1.0)
    run.figure("file: agent turn: writes", counts.writes / 20, "1", 1, "calls")
    log = floors.LockedLog(run.folder("log"))
    run.stack.callback(log.close)
    count = run.size(40, 3)
    samples = run.compare(
        {
            OURS: repeated(lambda: one_turn(context), count),
            RAW: repeated(lambda: log.append(floors.message() + floors.message() + b"\n"), count),
        },
        21,
    )
    run.row("file: agent turn", samples, OURS, RAW, at_most=1.3)
