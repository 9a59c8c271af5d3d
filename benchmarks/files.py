"""The file backend, against an open file that is appended to and flushed, and against sqlite3."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from agentstate import ConversationContext, FileStorage, SyncConversationContext

from . import floors
from .counting import CountingFileSystem
from .measure import SIZES, Round, Run, repeated
from .messages import TEXT, content_of, one_turn, prepare_turn
from .sampling import Limit, Sample, in_tasks, in_threads

OURS, FLUSHED, UNFLUSHED = "agentstate", "append + fsync + filelock", "append + filelock"
FULL, NORMAL, GROUPED = "sqlite3 WAL FULL", "sqlite3 WAL NORMAL, exclusive locking", "sqlite3 WAL FULL, group commit"


def sync_context(run: Run, folder: Path, **options: Any) -> SyncConversationContext:
    """A context on files, closed at the end of the run."""
    return run.closing(SyncConversationContext(FileStorage(folder, **options)))


def one_thread(run: Run) -> None:
    """One thread and one conversation: appends that wait for the disk, appends that do not, and reads."""
    for compare in (_flushed_append, _unflushed_append, _read):
        for size in SIZES:
            compare(run, size)


def _flushed_append(run: Run, size: int) -> None:
    content = content_of(size)
    context = sync_context(run, run.folder("ours"))
    log = run.closing(floors.LockedLog(run.folder("log")))
    table = run.closing(floors.Table(run.folder("sqlite"), "FULL"))
    cases = {
        OURS: repeated(lambda: context.add_to_history("one", "user", content)),
        FLUSHED: repeated(lambda: log.append(content)),
        FULL: repeated(lambda: table.append("one", content)),
    }
    measured = run.compare(cases, size=size, rounds=11)
    first = size == SIZES[0]
    run.row(
        "files, fsync: always", "append", measured, OURS, FLUSHED, size=size, at_most=1.3 if first else None,
        why="a commit also carries the times, a revision, a commit id and a checksum",
    )  # fmt: skip
    run.row(
        "files, fsync: always", "append", measured, OURS, FULL, size=size, at_most=1.0 if first else None,
        why="a file that grows has its new size flushed too, where sqlite3 overwrites its log",
    )  # fmt: skip


def _unflushed_append(run: Run, size: int) -> None:
    content = content_of(size)
    context = sync_context(run, run.folder("ours"), fsync="no")
    log = run.closing(floors.LockedLog(run.folder("log"), flush=False))
    cases = {
        OURS: repeated(lambda: context.add_to_history("one", "user", content)),
        UNFLUSHED: repeated(lambda: log.append(content)),
    }
    run.row("files, fsync: no", "append", run.compare(cases, size=size), OURS, UNFLUSHED, size=size)


def _read(run: Run, size: int) -> None:
    content = content_of(size)
    context = sync_context(run, run.folder("ours"))
    table = run.closing(floors.Table(run.folder("sqlite"), "FULL"))
    for _ in range(10):
        context.add_to_history("one", "user", content)
        table.append("one", content)
    cases = {
        OURS: repeated(lambda: context.get_history("one", limit=10)),
        FULL: repeated(lambda: table.last("one", 10)),
    }
    run.row("files", "read of the last 10", run.compare(cases), OURS, FULL, size=size)


def many_tasks(run: Run) -> None:
    """Many conversations at a time over asyncio, `fsync: always`: all appends that are waiting share a flush."""
    runner = run.stack.enter_context(asyncio.Runner())
    context = ConversationContext(run.closing(FileStorage(run.folder("ours"))))
    grouped = run.closing(floors.GroupCommit(run.folder("sqlite")))
    for conversations, size in ((1000, SIZES[0]), *((50, size) for size in SIZES)):
        names = [f"conversation-{number}" for number in range(conversations)]
        calls = {
            OURS: partial(_append, context, content_of(size)),
            GROUPED: partial(_append_grouped, grouped, content_of(size)),
        }
        cases = {name: partial(_in_tasks, runner, call, names) for name, call in calls.items()}
        run.row(
            "files, fsync: always, asyncio", f"append, {conversations:,} conversations",
            run.compare(cases, seconds=0.25, size=size), OURS, GROUPED, size=size, concurrent=True,
            at_most=1.0 if conversations == 1000 else None,
            why="each conversation has a file of its own, where sqlite3 appends to the one file that it flushes",
        )  # fmt: skip


async def _append(context: ConversationContext, content: str, name: str) -> None:
    await context.add_to_history(name, "user", content)


async def _append_grouped(grouped: floors.GroupCommit, content: str, name: str) -> None:
    await grouped.append(name, content)


def _in_tasks(runner: asyncio.Runner, call: Callable[[str], Awaitable[None]], names: list[str], limit: Limit) -> Sample:
    return runner.run(in_tasks(call, names, limit))


def many_threads(run: Run) -> None:
    """Threads that append to a conversation each, `fsync: always`, against one thread."""
    context = sync_context(run, run.folder("ours"))

    def rounds_of(count: int) -> Round:
        names = [f"conversation-{number}" for number in range(count)]
        return lambda limit: in_threads(lambda name: context.add_to_history(name, "user", TEXT), names, limit)

    cases = {f"{count} threads": rounds_of(count) for count in (1, 8, 64)}
    measured = run.compare(cases, seconds=0.15)
    for count in (8, 64):
        run.row(
            "files, fsync: always, threads", f"append, {count} threads", measured, f"{count} threads", "1 threads",
            concurrent=True, against="one thread",
        )  # fmt: skip


def exclusive(run: Run) -> None:
    """`exclusive: true`, `fsync: no`: the store of one process, written when the system decides to."""
    for size in SIZES:
        _exclusive_append(run, size)


def _exclusive_append(run: Run, size: int) -> None:
    content = content_of(size)
    context = sync_context(run, run.folder("ours"), exclusive=True, fsync="no")
    table = run.closing(floors.Table(run.folder("sqlite"), "NORMAL", exclusive=True))
    cases = {
        OURS: repeated(lambda: context.add_to_history("one", "user", content)),
        NORMAL: repeated(lambda: table.append("one", content)),
    }
    run.row(
        "files, exclusive, fsync: no", "append", run.compare(cases, size=size), OURS, NORMAL, size=size,
        at_most=0.5 if size == SIZES[0] else None,
        why="nearly all of the time is Python's, on both sides; the write itself takes less than a microsecond",
    )  # fmt: skip


def turn(run: Run) -> None:
    """The agent turn on files, against one append of as many bytes and its flush."""
    system = CountingFileSystem()
    counted = sync_context(run, run.folder("counted"), file_system=system)
    prepare_turn(counted)
    system.reset()
    for _ in range(20):
        one_turn(counted)
    run.counted("files: flushes of an agent turn", system.flushes / 20, "calls", at_most=1.0)
    run.counted("files: writes of an agent turn", system.writes / 20, "calls")
    context = sync_context(run, run.folder("ours"))
    prepare_turn(context)
    log = run.closing(floors.LockedLog(run.folder("log")))
    cases = {
        OURS: repeated(lambda: one_turn(context)),
        FLUSHED: repeated(lambda: log.append(TEXT, TEXT)),
    }
    run.row(
        "files, fsync: always", "agent turn", run.compare(cases, rounds=11), OURS, FLUSHED, at_most=1.3,
        why="a turn also reads the conversation, and its commit carries variables, metadata and a checksum",
    )  # fmt: skip
