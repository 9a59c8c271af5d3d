"""The floors: the same work written by hand, as directly as possible."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import queue
import sqlite3
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from .messages import TEXT

_to_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make a new encoder for each message


def message(content: str = TEXT) -> bytes:
    """A message as JSON: content, role, timestamp and metadata."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    return _to_json({"role": "user", "content": content, "timestamp": now, "metadata": {}}).encode()


class LockedLog:
    """A file held open; each append takes a filelock, writes and flushes."""

    def __init__(self, folder: Path, *, flush: bool = True) -> None:
        self._flush = flush
        self._fd = os.open(folder / "log", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._lock = FileLock(folder / "lock")

    def append(self, *contents: str) -> None:
        """One line with a message for each of the contents."""
        line = b"".join(map(message, contents)) + b"\n"
        with self._lock:
            os.write(self._fd, line)
            if self._flush:
                os.fdatasync(self._fd)  # as ours; fsync would be a little slower

    def close(self) -> None:
        os.close(self._fd)


def open_database(path: Path, synchronous: str, *, exclusive: bool = False) -> sqlite3.Connection:
    """A database of messages in WAL mode, in autocommit."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    if exclusive:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA synchronous={synchronous}")
    database.execute(
        "CREATE TABLE messages (context TEXT, position INTEGER, body TEXT, PRIMARY KEY (context, position))"
    )
    return database


_INSERT = "INSERT INTO messages VALUES (?, ?, ?)"
_LAST = "SELECT body FROM messages WHERE context = ? ORDER BY position DESC LIMIT ?"


class Table:
    """A table of messages. Each append is a transaction of its own."""

    def __init__(self, folder: Path, synchronous: str, *, exclusive: bool = False) -> None:
        self._database = open_database(folder / "messages.db", synchronous, exclusive=exclusive)
        self._positions = itertools.count()

    def append(self, context: str, content: str) -> None:
        self._database.execute(_INSERT, (context, next(self._positions), message(content)))

    def last(self, context: str, limit: int) -> list[Any]:
        """The last messages, oldest first."""
        rows = self._database.execute(_LAST, (context, limit)).fetchall()
        return [json.loads(body) for (body,) in reversed(rows)]

    def close(self) -> None:
        self._database.close()


class GroupCommit:
    """One thread that writes the messages of many tasks to a database: all that are waiting, up to 1,000, in one
    transaction."""

    def __init__(self, folder: Path) -> None:
        self._database = open_database(folder / "messages.db", "FULL")
        self._positions = itertools.count()
        self._queue: queue.SimpleQueue[tuple[Any, asyncio.Future[None] | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    async def append(self, context: str, content: str) -> None:
        future = asyncio.get_running_loop().create_future()
        self._queue.put(((context, next(self._positions), message(content)), future))
        await future

    def close(self) -> None:
        self._queue.put((None, None))
        self._thread.join()
        self._database.close()

    def _write(self) -> None:
        while True:
            waiting = [self._queue.get()]
            while len(waiting) < 1000:
                try:
                    waiting.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            if waiting[-1][1] is None:
                return
            database = self._database
            database.execute("BEGIN")
            database.executemany(_INSERT, [row for row, _ in waiting])
            database.execute("COMMIT")
            futures = [future for _, future in waiting if future is not None]
            futures[0].get_loop().call_soon_threadsafe(_finish, futures)


def _finish(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        future.set_result(None)


class Pipeline(asyncio.Protocol):
    """A connection that sends all commands of one iteration of the event loop in one write.

    It knows one command and one kind of reply, retries nothing and checks nothing.
    """

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._rest = b""

    @classmethod
    async def connect(cls, host: str, port: int) -> Pipeline:
        _, protocol = await asyncio.get_running_loop().create_connection(cls, host, port)
        return protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def rpush(self, key: bytes, value: bytes) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        if not self._out:
            loop.call_soon(self._flush)
        self._out.append(b"*3\r\n$5\r\nRPUSH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value))
        future = loop.create_future()
        self._waiting.append(future)
        return future

    def _flush(self) -> None:
        out, self._out = self._out, []
        self._transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        *replies, self._rest = (self._rest + data).split(b"\r\n")
        for reply in replies:
            self._waiting.popleft().set_result(int(reply[1:]))

    def close(self) -> None:
        self._transport.close()
