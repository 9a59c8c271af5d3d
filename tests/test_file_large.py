"""Commits of many messages cost what many small ones do, for those who read them; and they are atomic as all are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filetools import Between, append, commit, lines, look, message, put, texts, together

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateConflictError, StateSerializationError
from agentstate.operations import Append, Delete, Increment, Pop, Put, Restore, Space, Trim, Window
from agentstate.storage.file import logimage

MANY = 20_000


def many(begin: int, count: int) -> Append:
    return Append(tuple(message(f"{number:06} " + "x" * 100) for number in range(begin, begin + count)))


def write(kind: str, storage: FileStorage) -> int:
    """A large commit of this kind; returns how many messages there are then."""
    if kind == "first":
        storage.call(commit("c", many(0, MANY)))
        return MANY
    storage.call(append("c", *(f"{number:06} " + "x" * 100 for number in range(10))))
    if kind == "append":
        storage.call(commit("c", many(10, MANY)))
    elif kind == "group":
        together(storage, put("c", x=b"1"), commit("c", many(10, MANY)), put("c", y=b"1"), append("d", 1))
    elif kind == "with more":
        changes = (Increment("n", b"1"), Put(Space.METADATA, (("m", b'"m"'),)), Pop(1), many(9, MANY + 1))
        assert json.loads(storage.call(commit("c", *changes)))[0]["content"][:6] == "000009"  # type: ignore[arg-type]
    else:
        storage.call(commit("c", Delete(), many(0, MANY)))
        return MANY
    return MANY + 10


@pytest.mark.parametrize("kind", ["first", "append", "group", "with more", "anew"])
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_reading_the_end_or_any_page_of_a_large_commit_reads_little(tmp_path: Path, kind: str, fsync: str) -> None:
    storage = FileStorage(tmp_path, fsync=fsync)
    count = write(kind, storage)
    size = (tmp_path / "c.jsonl").stat().st_size
    between = Between()
    reader = FileStorage(tmp_path, file_system=between)
    assert texts(reader, "c", Window(limit=10))[-1][:6] == f"{count - 1:06}"
    assert between.read_bytes < 100_000
    for before in (11, count // 3, count - 100):
        cold = FileStorage(tmp_path, file_system=between)
        between.forget()
        page = texts(cold, "c", Window(limit=5, before=before))
        assert [text[:6] for text in page] == [f"{number:06}" for number in range(before - 5, before)]
        assert between.read_bytes < size // 5, "all of the commit was read"
        cold.close()
    between.forget()
    with SyncConversationContext(reader) as context:
        numbers = [int(each["content"][:6]) for each in context.iter_history("c", page_size=500)]
    assert numbers == list(range(count))
    assert between.read_bytes < 2 * size
    assert list(storage.verify()) == []
    storage.call(append("c", "after"))
    assert texts(storage, "c", Window(limit=2))[-1] == "after"
    assert texts(FileStorage(tmp_path), "c", Window(limit=1)) == ["after"]
    storage.close()


def test_a_warm_reader_reads_little_of_what_others_appended(tmp_path: Path) -> None:
    between = Between()
    storage, reader = FileStorage(tmp_path, fsync="no"), FileStorage(tmp_path, file_system=between)
    storage.call(append("c", "first"))
    assert texts(reader, "c") == ["first"]
    for begin in range(0, 50_000, 5_000):
        storage.call(commit("c", many(begin, 5_000)))
    storage.call(append("c", "last"))
    between.forget()
    assert texts(reader, "c", Window(limit=1)) == ["last"]
    assert between.read_bytes < 100_000
    storage.close()
    reader.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logimage, "_LARGE", 600)
    monkeypatch.setattr(logimage, "_HISTORY_BYTES", 300)
    monkeypatch.setattr(logimage, "_RUN_BYTES", 300)
    monkeypatch.setattr(logimage, "_RUNS_IN_INDEX", 3)
    monkeypatch.setattr(logimage, "_RECENT_MESSAGES", 4)


@pytest.mark.usefixtures("small")
def test_a_large_commit_that_was_cut_anywhere_is_as_if_it_had_never_been(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("c", "before"))
    warm = FileStorage(tmp_path)
    path = tmp_path / "c.jsonl"
    before = path.read_bytes()
    storage.call(commit("c", Append(tuple(map(message, range(30)))), commit_id="large"))
    storage.close()
    after = path.read_bytes()
    record = after.index(b'{"rev":2')
    record_end = after.index(b"\n", record) + 1
    assert len([line for line in lines(path) if "history" in line]) > 5
    assert any("index" in line for line in lines(path))
    for cut in range(len(before), len(after) + 1, 7):
        for content in (after[:cut], after[:cut] + bytes(len(after) - cut)):
            path.write_bytes(before)
            assert texts(warm, "c") == ["before"]
            path.write_bytes(content)
            expected = ["before"] if cut < record_end else ["before", *map(str, range(30))]
            assert texts(FileStorage(tmp_path), "c") == texts(warm, "c") == expected
            assert list(FileStorage(tmp_path).verify()) == []
    path.write_bytes(after[: record - 1])
    assert texts(warm, "c") == ["before"]
    warm.call(append("c", "next", commit_id="next"))
    assert "never acknowledged" in caplog.text
    assert texts(warm, "c") == texts(FileStorage(tmp_path), "c") == ["before", "next"]
    warm.call(commit("c", Append(tuple(map(message, range(30)))), commit_id="large"))
    assert len(texts(FileStorage(tmp_path), "c")) == 32
    warm.close()


def _full_after(room: int) -> Callable[..., Any]:
    """An `around` of a disk on which so many bytes are free."""

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal room
        if name != "write":
            return call(*arguments)
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = call(arguments[0], arguments[1][:room])
        room -= written
        return written

    return around


@pytest.mark.usefixtures("small")
def test_a_large_commit_that_does_not_fit_on_the_disk_leaves_no_part_of_it(tmp_path: Path) -> None:
    for room in range(0, 3000, 150):
        folder = tmp_path / str(room)
        between = Between()
        storage = FileStorage(folder, file_system=between)
        storage.call(append("c", "before"))
        size = (folder / "c.jsonl").stat().st_size
        between.around = _full_after(room)
        outcomes = together(storage, put("c", x=b"1"), commit("c", Append(tuple(map(message, range(30))))))
        between.around = lambda name, call, arguments: call(*arguments)
        done = [outcome == b"" for outcome in outcomes]
        assert done in ([False, False], [True, False])
        assert texts(storage, "c") == texts(FileStorage(folder), "c") == ["before"]
        if not done[0]:
            assert (folder / "c.jsonl").stat().st_size == size
        assert list(storage.verify()) == []
        storage.close()


@pytest.mark.usefixtures("small")
def test_large_commits_do_what_small_ones_do(tmp_path: Path) -> None:
    """Trimmed, popped, restored, cleared, rewritten: as in memory."""
    from agentstate import InMemoryStorage

    storage, model = FileStorage(tmp_path, fsync="no"), InMemoryStorage()
    large = tuple(map(message, range(40)))
    steps = [
        commit("c", Restore("alice", start=1000, revision=7), Append(large)),
        commit("c", Append(large), Trim(50)),
        commit("c", Pop(45), Append(large)),
        commit("c", Trim(3), Append(large), Increment("n", b"2")),
        commit("c", Append(large), Pop(2), commit_id="again"),
        commit("c", Append(large), Pop(2), commit_id="again"),
        commit("c", Append(large), absent=True),
        commit("c", Append(large[:1])),
        commit("c", Delete(), Append(large), Trim(10)),
        commit("c", Delete()),
        commit("c", Append(large)),
    ]
    for step in steps:
        expected, found = (each.carry_out([step])[0] for each in (model, storage))
        assert type(found) is type(expected)
        if not isinstance(expected, StateConflictError):
            assert found == expected
        here, there, cold = look(storage, "c"), look(model, "c"), look(FileStorage(tmp_path), "c")
        assert here == cold
        assert (here is None) == (there is None)
        if here is not None and there is not None:
            assert list(here.messages) == list(there.messages)
            assert (here.start, here.end, here.revision) == (there.start, there.end, there.revision)
            assert (here.user_id, here.variables) == (there.user_id, there.variables)
        assert list(storage.verify()) == []
    storage.close()


@pytest.mark.usefixtures("small")
def test_a_line_break_in_a_large_commit_is_refused(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("c", "before"))
    bad = Append((*map(message, range(30)), b'{"role":"user",\n"content":"x"}'))
    for refused in (commit("c", bad), commit("c", bad, Increment("n", b"1"))):
        with pytest.raises(StateSerializationError, match="line break"):
            storage.call(refused)
    assert texts(storage, "c") == texts(FileStorage(tmp_path), "c") == ["before"]
    storage.call(append("c", "after"))
    assert texts(FileStorage(tmp_path), "c") == ["before", "after"]
    storage.close()
