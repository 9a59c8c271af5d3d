"""A backend that somebody else wrote: conversations in SQLite, from the three hooks of `DocumentStorage`."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentstate import (
    ConversationContext,
    SyncConversationContext,
    get_context_manager,
    register_storage,
    registry,
    stateful,
)
from agentstate.errors import StateOutcomeUnknownError, StateUnavailableError
from agentstate.operations import Page
from agentstate.storage.base import StateStorage
from agentstate.storage.document import DocumentStorage, DocumentUpdate
from agentstate.testing import StorageContract


class SqliteStorage(DocumentStorage):
    """One table of documents. SQLite's own lock makes a replacement atomic, across processes too."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(**options)
        self._path = path
        with self._connection(time.monotonic() + self.deadline) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS documents (id TEXT PRIMARY KEY, document BLOB) STRICT")

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        with self._connection(deadline) as connection:
            return select(connection, context_id)

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        with self._connection(deadline) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = select(connection, context_id)
                after = update(before)
                if after is None:
                    connection.execute("DELETE FROM documents WHERE id = ?", (context_id,))
                elif after is not before:
                    connection.execute("INSERT OR REPLACE INTO documents VALUES (?, ?)", (context_id, after))
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            try:
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise StateOutcomeUnknownError(str(error), context_id=context_id) from error

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        with self._connection(deadline) as connection:
            rows = connection.execute(
                "SELECT id FROM documents WHERE id > ? ORDER BY id LIMIT ?", (cursor, size)
            ).fetchall()
        return Page(tuple(row[0] for row in rows), rows[-1][0] if len(rows) == size else None)

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[sqlite3.Connection]:
        timeout = min(max(0.0, deadline - time.monotonic()), 3600.0)
        try:
            with closing(sqlite3.connect(self._path, timeout=timeout, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = OFF")  # no power is cut here, and the flushes took minutes
                yield connection
        except sqlite3.Error as error:
            raise StateUnavailableError(f"SQLite: {error}") from error


def select(connection: sqlite3.Connection, context_id: str) -> bytes | None:
    row = connection.execute("SELECT document FROM documents WHERE id = ?", (context_id,)).fetchone()
    return None if row is None else row[0]


class TestSqlite(StorageContract):
    @pytest.fixture(autouse=True)
    def empty_store(self, tmp_path: Path) -> None:
        self.path = tmp_path / "conversations.db"

    def make_storage(self, **options: Any) -> StateStorage:
        return SqliteStorage(self.path, **options)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The storage under the name ``sqlite``, in a directory without a configuration file. The path of its database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)
    monkeypatch.setattr(registry, "_registered", {})
    register_storage("sqlite", SqliteStorage)
    return tmp_path / "agents.db"


def test_it_is_used_from_the_configuration_file(registered: Path) -> None:
    lines = ("state:", "  backend: sqlite", "  ttl: 3600", "  config:", f"    path: {registered}")
    Path("agent_config.yaml").write_text("\n".join(lines))
    with get_context_manager(force_new=True, blocking=True) as context:
        assert isinstance(context.storage, SqliteStorage)
        assert context.storage.ttl == 3600
        context.add_to_history("a", "user", "hi")
        with closing(sqlite3.connect(registered)) as connection:
            assert select(connection, "a") is not None


def test_it_is_used_by_a_handler(registered: Path) -> None:
    @stateful("sqlite", path=str(registered))
    def count(task: Any, context: SyncConversationContext, context_id: str) -> int:
        total: int = context.increment_variable(context_id, "calls")
        return total

    @stateful("sqlite", path=str(registered))
    async def count_too(task: Any, context: ConversationContext, context_id: str) -> int:
        total: int = await context.increment_variable(context_id, "calls")
        return total

    assert count({"id": "a"}) == 1
    assert asyncio.run(count_too({"id": "a"})) == 2
    assert count({"id": "a"}) == 3
    assert count({"id": "b"}) == 1
    get_context_manager("sqlite", path=str(registered)).close()


def test_an_error_that_a_hook_forgets_to_wrap_is_raised_as_it_is_or_is_one_of_ours_to_whoever_waits(
    tmp_path: Path,
) -> None:
    class Careless(SqliteStorage):
        def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
            raise sqlite3.OperationalError("no such table")

    with SyncConversationContext(Careless(tmp_path / "x.db")) as context, pytest.raises(sqlite3.OperationalError):
        context.get_state("a")

    async def main() -> None:
        async with ConversationContext(Careless(tmp_path / "x.db")) as context:
            with pytest.raises(StateUnavailableError) as caught:
                await context.get_state("a")
            assert isinstance(caught.value.__cause__, sqlite3.OperationalError)

    asyncio.run(main())
