"""AgentUp's documents: read as they are, converted by the first write; and the layout that keeps to them."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filetools import (
    Between,
    append,
    clear,
    commit,
    fail,
    lines,
    logs,
    look,
    message,
    put,
    texts,
    together,
)

from agentstate import FileStorage
from agentstate.errors import (
    StateConflictError,
    StateCorruptedError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)
from agentstate.operations import Append, Create, Increment, Lease, Listing, Page, Pop, Query, Window


def left_by_agentup(folder: Path, context_id: str, messages: int = 3, **changes: Any) -> Path:
    """A document as AgentUp writes it."""
    document = {
        "context_id": context_id,
        "user_id": "user_1",
        "created_at": "2025-07-01T10:00:00.000001",
        "updated_at": "2025-07-02T10:00:00",
        "history": [
            {"role": "user", "content": f"Grüße {number}", "timestamp": "2025-07-01T10:00:00", "metadata": {}}
            for number in range(messages)
        ],
        "variables": {"count": 7, "pi": 3.10, "nested": {"a": [1, None]}},
        "metadata": {"lang": "de"},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{context_id}.json"
    path.write_text(json.dumps(document, indent=2))
    return path


def test_a_document_is_read_as_it_is(tmp_path: Path) -> None:
    path = left_by_agentup(tmp_path, "Alice:1", 200)
    before = path.read_bytes()
    storage = FileStorage(tmp_path)
    snapshot = look(storage, "Alice:1")
    assert snapshot is not None
    assert (snapshot.user_id, snapshot.start, snapshot.end, snapshot.revision) == ("user_1", 0, 200, 1)
    assert snapshot.created == 1751364000000001
    assert snapshot.variables == {"count": b"7", "pi": b"3.1", "nested": b'{"a":[1,null]}'}
    assert texts(storage, "Alice:1", Window(limit=2)) == ["Grüße 198", "Grüße 199"]
    assert storage.call(commit("Alice:1", Create())) == b""  # there is nothing to change
    assert storage.call(Listing()) == Page(("Alice:1",), None)
    assert storage.call(Listing(user="user_1", idle_for=3600)) == Page(("Alice:1",), None)
    assert storage.call(Listing(user="user_2")) == Page((), None)
    assert path.read_bytes() == before
    assert logs(tmp_path) == {"Alice:1.json"}
    storage.close()


@pytest.mark.parametrize(
    "change",
    [
        append("alice", "new"),
        put("alice", new=b"1"),
        commit("alice", Increment("count", b"1")),
        commit("alice", Pop(2)),
    ],
    ids=["append", "put", "increment", "pop"],
)
def test_the_first_write_makes_a_log_of_it(tmp_path: Path, change: Any) -> None:
    before = left_by_agentup(tmp_path, "alice", 100).read_bytes()
    storage = FileStorage(tmp_path)
    expected = look(storage, "alice")
    assert expected is not None
    storage.call(change)
    assert logs(tmp_path) == {"alice.jsonl", "alice.json.adopted"}
    assert (tmp_path / "alice.json.adopted").read_bytes() == before
    for reader in (storage, FileStorage(tmp_path)):
        snapshot = look(reader, "alice")
        assert snapshot is not None
        assert (snapshot.user_id, snapshot.created, snapshot.revision) == ("user_1", expected.created, 2)
        assert list(snapshot.messages[:98]) == list(expected.messages[:98])
    assert lines(tmp_path / "alice.jsonl")[0]["adopted"][0] == len(before)
    assert list(storage.verify()) == []
    storage.close()


def test_clearing_leaves_nothing_of_the_document(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "alice")
    left_by_agentup(tmp_path, "bob")
    storage = FileStorage(tmp_path)
    storage.call(append("bob", 1))
    assert storage.call(clear("alice")) == b"true"
    assert storage.call(clear("bob")) == b"true"
    assert logs(tmp_path) == {"alice.jsonl", "bob.jsonl"}
    assert look(FileStorage(tmp_path), "alice") is None
    assert storage.call(Listing()) == Page((), None)
    for name in logs(tmp_path):
        assert "Gr" not in (tmp_path / name).read_text()
    storage.close()


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_adoption_that_was_cut_short_is_finished_by_the_next_write(tmp_path: Path, exclusive: bool) -> None:
    left_by_agentup(tmp_path, "alice")
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "new"))
    storage.close()
    (tmp_path / "alice.json.adopted").rename(tmp_path / "alice.json")  # as a crash before that step leaves it
    storage = FileStorage(tmp_path, exclusive=exclusive)
    storage.call(append("alice", "newer"))
    assert logs(tmp_path) == {"alice.jsonl", "alice.json.adopted"}
    storage.call(clear("alice"))
    assert logs(tmp_path) == {"alice.jsonl"}
    storage.close()


def test_a_document_that_appears_over_its_log_is_a_conflict(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "alice")
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "new"))
    path = left_by_agentup(tmp_path, "alice", 4)
    before = {name: (tmp_path / name).read_bytes() for name in logs(tmp_path)}
    for reader in (FileStorage(tmp_path), storage):
        for operation in (append("alice", "x"), clear("alice"), Query("alice")):
            with pytest.raises(StateConflictError, match="another program writes documents"):
                reader.call(operation)
    assert storage.call(Listing()) == Page(("alice",), None)
    assert [problem.context_id for problem in storage.verify()] == ["alice"]
    assert {name: (tmp_path / name).read_bytes() for name in logs(tmp_path)} == before
    path.unlink()
    storage.call(append("alice", "newer"))
    assert texts(storage, "alice")[-2:] == ["new", "newer"]
    storage.close()


@pytest.mark.parametrize("first", [append("alice", "new"), clear("alice")], ids=["append", "clear"])
def test_a_conversion_that_is_cut_anywhere_is_finished_by_the_next_writer(tmp_path: Path, first: Any) -> None:
    nth = 0
    while True:
        folder = tmp_path / str(nth)
        left_by_agentup(folder, "alice", 40)
        storage = FileStorage(folder, file_system=Between(fail(errno.EIO, *Between.NAMES, after=nth, times=1000)))
        try:
            storage.call(first)
            storage.close()
            break
        except (StateUnavailableError, StateOutcomeUnknownError):
            pass
        cold = FileStorage(folder)
        state = look(cold, "alice")
        assert state is None or len(state.messages) in (40, 41)
        cold.call(first)
        expected = 41 if first.changes[0].__class__ is Append else 0
        assert len(texts(cold, "alice")) == expected
        assert len(texts(FileStorage(folder), "alice")) == expected
        assert "alice.json" not in logs(folder)
        cold.close()
        nth += 1
    assert nth > 10


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"context_id": "alice"}', b"\xff\xfe", b'{"context_id": "alice", "history": [1]}', b"null"],
)
def test_what_is_no_document_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "alice.json").write_bytes(content)
    for layout in ("log", "document"):
        storage = FileStorage(tmp_path, layout=layout)
        for operation in (Query("alice"), append("alice", 1), clear("alice")):
            with pytest.raises(StateCorruptedError):
                storage.call(operation)
        assert storage.call(Listing()) == Page(("alice",), None)
        assert [problem.context_id for problem in storage.verify()] == ["alice"]
        storage.close()
    assert logs(tmp_path) == {"alice.json"}
    assert (tmp_path / "alice.json").read_bytes() == content


def test_the_document_of_another_context_is_a_conflict(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "bob").rename(tmp_path / "alice.json")
    storage = FileStorage(tmp_path)
    with pytest.raises(StateConflictError):
        look(storage, "alice")
    with pytest.raises(StateConflictError):
        storage.call(append("alice", 1))
    storage.close()


def test_a_group_adopts_each_document_once(tmp_path: Path) -> None:
    for number in range(5):
        left_by_agentup(tmp_path, f"c{number}")
    storage = FileStorage(tmp_path)
    outcomes = together(
        storage, *(append(f"c{number % 5}", number) for number in range(10)), Query("c0", history=Window(limit=1))
    )
    assert outcomes[:10] == [b""] * 10
    assert outcomes[10].end == 5  # type: ignore[union-attr]
    assert texts(storage, "c4")[-2:] == ["4", "9"]
    storage.close()


def test_an_old_document_is_cleaned_up(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "alice")
    storage = FileStorage(tmp_path)
    assert storage.call(clear("alice", idle_for=3600)) == b"true"
    assert look(storage, "alice") is None
    storage.close()


# --- the document layout


def test_the_document_layout_keeps_one_document_per_context(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "alice")
    storage = FileStorage(tmp_path, layout="document")
    storage.call(append("alice", "new"))
    storage.call(append("a/b", 1))
    document = json.loads((tmp_path / "alice.json").read_text())
    assert [entry["content"] for entry in document["history"]] == ["Grüße 0", "Grüße 1", "Grüße 2", "new"]
    assert document["variables"] == {"count": 7, "pi": 3.1, "nested": {"a": [1, None]}}
    assert document["user_id"] == "user_1"
    assert (tmp_path / "alice.json").stat().st_mode & 0o777 == 0o600
    for reader in (storage, FileStorage(tmp_path, layout="document")):
        assert texts(reader, "alice")[-1] == "new"
        assert set(reader.call(Listing()).context_ids) == {"alice", "a/b"}  # type: ignore[union-attr]
    assert storage.call(clear("alice")) == b"true"
    assert look(storage, "alice") is None
    with pytest.raises(StateCorruptedError):
        storage.repair("alice")
    storage.close()


def test_a_document_is_replaced_flushed_and_at_once(tmp_path: Path) -> None:
    for fsync, folder_calls in (("always", 1), ("everysec", 1), ("no", 0)):
        between = Between()
        storage = FileStorage(tmp_path / fsync, layout="document", fsync=fsync, file_system=between)
        storage.call(append("alice", 1))
        between.forget()
        storage.call(append("alice", 2))
        changes = [call for call in between.calls if call in ("write", "sync", "replace", "sync_folder")]
        assert changes == ["write", "sync", "replace"] + ["sync_folder"] * folder_calls
        for call in ("write", "sync", "replace"):
            between.around = fail(errno.ENOSPC, call)
            with pytest.raises(StateUnavailableError, match="nothing was done"):
                storage.call(append("alice", 3))
        assert texts(storage, "alice") == ["1", "2"]
        assert logs(tmp_path / fsync) == {"alice.json"}
        between.around = fail(errno.EIO, "sync_folder")
        if folder_calls:
            with pytest.raises(StateOutcomeUnknownError):
                storage.call(append("alice", 3, commit_id="mine"))
        storage.call(append("alice", 3, commit_id="mine"))
        assert texts(storage, "alice") == ["1", "2", "3"]
        storage.close()


def test_a_context_that_has_a_log_is_not_kept_as_a_document_too(tmp_path: Path) -> None:
    log = FileStorage(tmp_path)
    log.call(append("alice", 1))
    storage = FileStorage(tmp_path, layout="document")
    for operation in (Query("alice"), append("alice", 2)):
        with pytest.raises(StateConflictError, match="layout='log'"):
            storage.call(operation)
    storage.call(append("bob", 1))
    assert storage.call(Listing()) == Page(("bob",), None)
    assert texts(log, "alice") == ["1"]
    log.close()
    storage.close()


def test_documents_lose_nothing_to_many_threads_and_storages(tmp_path: Path) -> None:
    storages = [FileStorage(tmp_path, layout="document", fsync="no") for _ in range(3)]

    def write(number: int) -> None:
        for _ in range(20):
            storages[number % 3].call(append("alice", number))
            storages[number % 3].call(commit("alice", Increment("n", b"1")))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts(storages[0], "alice")) == 120
    assert look(storages[1], "alice").variables == {"n": b"120"}  # type: ignore[union-attr]
    for storage in storages:
        storage.close()


def test_the_document_layout_knows_leases_exclusiveness_and_debris(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, layout="document", exclusive=True)
    assert storage.call(Lease("alice", "take", "one", 30)) is True
    assert storage.call(Lease("alice", "take", "two", 30)) is False
    storage.call(append("alice", 1, fence="one"))
    other = FileStorage(tmp_path, layout="document")
    with pytest.raises(StateUnavailableError, match="exclusively"):
        other.call(append("alice", 2, deadline=time.monotonic() + 0.1))
    (tmp_path / "alice.json.new").write_text("half")
    assert storage.call(Listing()) == Page(("alice",), None)
    assert storage.call(Listing(idle_for=3600.0)) == Page((), None)
    assert logs(tmp_path) == {"alice.json"}
    storage.close()
    storage.close()
    with pytest.raises(StateUnavailableError):
        look(storage, "alice")
    other.close()


def test_documents_of_ours_become_logs_as_well(tmp_path: Path) -> None:
    documents = FileStorage(tmp_path, layout="document")
    for number in range(5):
        documents.call(append("alice", number, commit_id=f"n{number}"))
    documents.call(commit("alice", Append((message(5),)), commit_id="last"))
    documents.close()
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 4, commit_id="n4"))  # remembered
    storage.call(append("alice", 6))
    snapshot = look(FileStorage(tmp_path), "alice")
    assert snapshot is not None
    assert (snapshot.revision, snapshot.end) == (7, 7)
    storage.close()


def test_a_large_document_is_converted_as_a_whole(tmp_path: Path) -> None:
    left_by_agentup(tmp_path, "large", 40_000)
    storage = FileStorage(tmp_path)
    storage.call(append("large", "last"))
    assert (tmp_path / "large.jsonl").stat().st_size > 2 << 20
    found = texts(FileStorage(tmp_path), "large")
    assert (len(found), found[0], found[-2:]) == (40_001, "Grüße 0", ["Grüße 39999", "last"])
    storage.close()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_many_listings_go_on_side_by_side(tmp_path: Path, layout: str) -> None:
    storage = FileStorage(tmp_path, layout=layout)
    names = [f"c{number:02}" for number in range(30)]
    together(storage, *(append(name, 1) for name in names))
    pages = [storage.call(Listing(size=size)) for size in range(1, 20)]
    for size, page in enumerate(pages, 1):
        assert isinstance(page, Page)
        following = storage.call(Listing(page.cursor or "", size=100))
        assert isinstance(following, Page)
        assert [*page.context_ids, *following.context_ids] == names
        assert len(page.context_ids) == size
    storage.close()


def test_a_folder_whose_own_folder_became_a_file_is_unavailable(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "parent" / "store")
    storage.call(append("a", 1))
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    (tmp_path / "parent").write_text("")
    for operation in (Query("nobody"), Listing()):
        with pytest.raises(StateUnavailableError, match="folder"):
            storage.call(operation)
    storage.close()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_closing_twice_is_closing(tmp_path: Path, layout: str) -> None:
    storage = FileStorage(tmp_path, layout=layout)
    assert storage.call(append("a", 1)) == b""
    storage.close()
    storage.close()
    with pytest.raises(StateUnavailableError, match="closed"):
        storage.call(Query("a"))
