"""The file backend as its users see it: options, folders, ttl, leases, cleanup, the cache."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filetools import Between, append, clear, commit, logs, look, message, put, texts, together

from agentstate import FileStorage
from agentstate.errors import (
    StateConfigError,
    StateError,
    StateUnavailableError,
    TurnLostError,
)
from agentstate.operations import Append, Create, Increment, Lease, Listing, Page, Pop, Put, Query, Space, Window
from agentstate.storage.file import leases, locks, logoperations
from agentstate.testing.harness import eventually

ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    with_folder = FileStorage(tmp_path / "states")
    yield with_folder
    with_folder.close()


# --- options and folders


@pytest.mark.parametrize(
    "options",
    [
        {"fsync": "sometimes"}, {"fsync": True}, {"layout": "tree"}, {"exclusive": "yes"}, {"cache_bytes": 0},
        {"storage_dir": ""}, {"storage_dir": "a\0b"}, {"storage_dir": b"bytes"}, {"ttl": 0}, {"deadline": -1},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StateConfigError):
        FileStorage(**{"storage_dir": tmp_path, **options})


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, agentstate.storage.file; "
        "heavy = 'asyncio', 'valkey', 'yaml', 'filelock', 'dataclasses_json', 'ctypes', 'ssl'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_and_folders_are_for_their_owner_alone(tmp_path: Path, storage: FileStorage) -> None:
    storage.call(append("alice", 1))
    storage.call(append("bob", 1))
    storage.call(clear("bob"))
    storage.call(Lease("alice", "take", "t", 30))
    for folder, folders, files in os.walk(storage.storage_dir):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in files:
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
        del folders


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "a" / "b" / "c")
    assert look(storage, "alice") is None
    assert storage.call(Listing()) == Page((), None)
    assert not (tmp_path / "a").exists()  # reading makes nothing
    storage.call(append("alice", 1))
    assert texts(storage, "alice") == ["1"]
    storage.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_folder_that_cannot_be_made_is_an_error_that_says_so() -> None:
    storage = FileStorage("/proc/agentstate/states")
    with pytest.raises(StateUnavailableError, match="/proc/agentstate") as caught:
        storage.call(append("alice", 1))
    assert type(caught.value) is StateUnavailableError
    assert isinstance(caught.value.__cause__, OSError)
    storage.close()


def test_a_relative_folder_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = FileStorage("./states")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.call(append("alice", 1))
    assert logs(tmp_path / "states") == {"alice.jsonl"}
    storage.close()


def test_a_folder_that_is_a_file_is_an_error_and_never_an_absent_context(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file")
    storage = FileStorage(tmp_path / "states")
    for operation in (Query("alice"), append("alice", 1), Listing(), Lease("alice", "take", "t", 1)):
        with pytest.raises(StateUnavailableError, match=r"storage_dir|folder"):
            storage.call(operation)
    assert (tmp_path / "states").read_text() == "a file"
    storage.close()


def test_a_symbolic_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage = FileStorage(tmp_path / "link")
    storage.call(append("alice", 1))
    assert logs(tmp_path / "real") == {"alice.jsonl"}
    storage.close()


def test_a_symbolic_link_in_place_of_a_file_is_not_followed(tmp_path: Path, storage: FileStorage) -> None:
    storage.call(append("bob", 1))
    target = tmp_path / "target.jsonl"
    target.write_bytes(b"")
    (Path(storage.storage_dir) / "alice.jsonl").symlink_to(target)
    for operation in (Query("alice"), append("alice", 1), clear("alice")):
        with pytest.raises(StateUnavailableError, match="symbolic link"):
            storage.call(operation)
    assert target.read_bytes() == b""


def test_something_else_in_place_of_a_file_is_left_alone(tmp_path: Path, storage: FileStorage) -> None:
    storage.call(append("bob", 1))
    (Path(storage.storage_dir) / "alice.jsonl").mkdir()
    os.mkfifo(Path(storage.storage_dir) / "carol.jsonl")
    for name in ("alice", "carol"):
        for operation in (Query(name), append(name, 1)):
            with pytest.raises(StateError):
                storage.call(operation)


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    writer = FileStorage(tmp_path / "states")
    writer.call(append("alice", 1))
    writer.close()
    (tmp_path / "states").chmod(0o500)
    (tmp_path / "states" / "alice.jsonl").chmod(0o400)
    try:
        storage = FileStorage(tmp_path / "states")
        assert texts(storage, "alice") == ["1"]
        with pytest.raises(StateUnavailableError, match="let this user"):
            storage.call(append("alice", 2))
        with pytest.raises(StateUnavailableError):
            storage.call(append("bob", 2))
    finally:
        (tmp_path / "states").chmod(0o700)


def test_a_folder_that_disappears_is_an_error_until_it_is_back(tmp_path: Path, storage: FileStorage) -> None:
    storage.call(append("alice", 1))
    folder = Path(storage.storage_dir)
    folder.rename(tmp_path / "gone")
    for operation in (Query("alice"), append("alice", 2), Query("bob"), append("bob", 1), Listing()):
        with pytest.raises(StateUnavailableError, match="disappeared"):
            storage.call(operation)
    assert not folder.exists()
    (tmp_path / "gone").rename(folder)
    storage.call(append("alice", 3))
    assert texts(storage, "alice") == ["1", "3"]


@pytest.mark.parametrize("layout", ["log", "document"])
@pytest.mark.parametrize("first", ["read", "write", "list"])
def test_another_folder_in_the_place_of_the_first_is_an_error_until_a_storage_is_made_anew(
    tmp_path: Path, layout: str, first: str
) -> None:
    """So it is when a disk is unmounted: the folder below it is there, and empty, or has what was kept before."""
    folder = tmp_path / "states"
    FileStorage(folder, layout=layout).call(append("alice", "old"))
    other = FileStorage(tmp_path / "other", layout=layout)
    other.call(append("alice", "of another store"))
    other.close()
    storage = FileStorage(folder, layout=layout)
    if first == "read":
        assert texts(storage, "alice") == ["old"]
    elif first == "write":
        storage.call(append("bob", 1))
    else:
        assert storage.call(Listing()) == Page(("alice",), None)
    folder.rename(tmp_path / "gone")
    (tmp_path / "other").rename(folder)
    for refused in (
        lambda: look(storage, "alice"),
        lambda: look(storage, "nobody"),
        lambda: storage.call(append("alice", "lost")),
        lambda: storage.call(append("carol", "lost")),
        lambda: storage.call(Listing()),
    ):
        with pytest.raises(StateUnavailableError, match=r"not the one that it was.*mounted"):
            refused()
    results = together(storage, append("alice", "lost"), append("carol", "lost"))
    assert [type(result) for result in results] == [StateUnavailableError] * 2
    again = FileStorage(folder, layout=layout)
    assert texts(again, "alice") == ["of another store"]
    again.close()
    folder.rename(tmp_path / "other")
    (tmp_path / "gone").rename(folder)
    storage.call(append("alice", "new"))
    assert texts(storage, "alice") == ["old", "new"]
    storage.close()


def test_lock_files_that_somebody_removed_are_made_again(storage: FileStorage) -> None:
    storage.call(append("alice", 1))
    locks = Path(storage.storage_dir) / ".locks"
    for lock in locks.iterdir():
        lock.unlink()
    storage.call(append("alice", 2))
    for lock in locks.iterdir():
        lock.unlink()
    locks.rmdir()
    storage.call(append("alice", 3))
    assert texts(storage, "alice") == ["1", "2", "3"]


def test_a_closed_storage_is_unavailable(storage: FileStorage) -> None:
    storage.call(append("alice", 1))
    storage.close()
    storage.close()
    for operation in (Query("alice"), append("alice", 1), Listing()):
        with pytest.raises(StateUnavailableError, match="closed"):
            storage.call(operation)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    def no_lock(fd: int, **options: Any) -> bool:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks, "_functions", (no_lock, no_lock))
    storage = FileStorage(tmp_path, exclusive=exclusive)
    for operations in ([append("alice", 1)], [append("alice", 1), append("bob", 1)]):
        for outcome in together(storage, *operations):
            assert isinstance(outcome, StateUnavailableError)
            assert "put storage_dir on a local disk" in str(outcome)
    assert logs(tmp_path) == set()
    storage.close()


# --- several storages on one folder


def test_each_storage_sees_what_the_others_wrote(tmp_path: Path) -> None:
    storages = [FileStorage(tmp_path) for _ in range(3)]
    for number in range(30):
        storages[number % 3].call(append("alice", number))
        assert len(texts(storages[(number + 1) % 3], "alice")) == number + 1
    storages[0].call(clear("alice"))
    assert look(storages[1], "alice") is None
    storages[1].call(append("alice", "new"))
    assert texts(storages[2], "alice") == ["new"]
    for storage in storages:
        storage.close()


def test_a_log_that_is_restored_from_a_backup_is_read_anew(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "a"))
    path = tmp_path / "alice.jsonl"
    backup = path.read_bytes()
    for number in range(3):
        storage.call(append("alice", number))
    newer = path.read_bytes()
    path.write_bytes(backup)
    assert texts(storage, "alice") == ["a"]
    path.write_bytes(newer)
    assert texts(storage, "alice") == ["a", "0", "1", "2"]
    other = FileStorage(tmp_path / "other")
    for number in range(9):
        other.call(append("alice", f"other {number}"))
    path.write_bytes((tmp_path / "other" / "alice.jsonl").read_bytes())
    assert texts(storage, "alice") == [f"other {number}" for number in range(9)]
    storage.close()
    other.close()


def test_an_exclusive_store_is_for_one_storage(tmp_path: Path) -> None:
    first = FileStorage(tmp_path, exclusive=True)
    first.call(append("alice", 1))
    for options in ({"exclusive": True}, {}):
        other = FileStorage(tmp_path, deadline=0.2, **options)  # type: ignore[arg-type]
        with pytest.raises(StateUnavailableError, match="exclusive"):
            other.call(append("alice", 2, deadline=time.monotonic() + 0.2))
        other.close()
    for number in range(2, 5):
        first.call(append("alice", number))
    assert first.call(commit("alice", Pop(1))) == b"[" + message(4) + b"]"
    assert texts(first, "alice") == ["1", "2", "3"]
    assert texts(FileStorage(tmp_path), "alice") == ["1", "2", "3"]  # who only reads disturbs nobody
    first.close()
    shared = [FileStorage(tmp_path), FileStorage(tmp_path)]
    for storage in shared:
        storage.call(append("alice", "shared"))
    exclusive = FileStorage(tmp_path, exclusive=True)
    with pytest.raises(StateUnavailableError, match="cannot be had exclusively"):
        exclusive.call(Query("alice", deadline=time.monotonic() + 0.1))
    for storage in shared:
        storage.close()
    assert len(texts(exclusive, "alice")) == 5
    exclusive.close()


def test_an_exclusive_storage_looks_nothing_up_twice(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, exclusive=True, fsync="no", file_system=between)
    storage.call(append("alice", 1))
    between.forget()
    for number in range(5):
        storage.call(append("alice", number))
        assert look(storage, "alice", Window(limit=3)) is not None
    assert between.calls == ["write"] * 5
    storage.close()


def test_a_commit_is_one_write_and_one_flush(storage: FileStorage, tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("alice", 1))
    between.forget()
    storage.call(
        commit("alice", Append((message(2), message(3))), Put(Space.VARIABLES, (("a", b"1"),)), Increment("n", b"1"))
    )
    assert between.calls.count("write") == between.calls.count("sync") == 1
    assert "sync_folder" not in between.calls
    storage.close()


def test_a_new_file_is_flushed_with_its_name(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("alice", 1))
    assert between.calls[-2:] == ["sync", "sync_folder"]
    between.forget()
    storage.call(clear("alice"))
    assert [call for call in between.calls if call in ("write", "sync", "replace", "sync_folder")] == [
        "write", "sync", "replace", "sync_folder",
    ]  # fmt: skip
    storage.close()


def test_a_commit_that_changes_nothing_is_not_answered_from_what_is_not_on_disk(tmp_path: Path) -> None:
    writer = FileStorage(tmp_path, fsync="no")
    writer.call(commit("alice", Create(), commit_id="mine"))
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    for operation in (commit("alice", Create()), commit("alice", Create(), commit_id="mine")):
        between.forget()
        storage.call(operation)
        assert "write" not in between.calls
    assert between.calls.count("sync") == 0  # once was enough
    writer.call(append("alice", 1))
    storage.call(commit("alice", Create()))
    assert between.calls.count("sync") == 1
    writer.close()
    storage.close()


# --- time


def test_a_context_expires_and_its_file_goes_with_the_cleanup(tmp_path: Path) -> None:
    storage, longer = FileStorage(tmp_path, ttl=0.2), FileStorage(tmp_path, ttl=3600)
    storage.call(append("alice", "SECRET", commit_id="remember me"))
    storage.call(append("bob", 1))
    longer.call(append("bob", 2))
    assert eventually(lambda: look(storage, "alice") is None)
    assert texts(storage, "bob")[-1:] == ["2"]
    assert storage.call(Listing()) == Page(("bob",), None)
    assert storage.call(Listing(idle_for=60.0)) == Page(("alice",), None)
    assert storage.call(clear("alice", idle_for=0.2)) == b"false"
    assert b"SECRET" not in (tmp_path / "alice.jsonl").read_bytes()
    storage.call(append("alice", "again", commit_id="remember me"))
    assert look(storage, "alice") is None
    longer.call(append("alice", "a new life"))
    assert texts(FileStorage(tmp_path), "alice") == ["a new life"]
    longer.close()
    storage.close()


def test_commit_ids_of_what_is_long_gone_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    storage.call(clear("alice"))
    assert storage.call(Listing(idle_for=1)) == Page((), None)
    later = time.time_ns() // 1000 + 601_000_000
    monkeypatch.setattr(logoperations, "now_microseconds", lambda: later)
    monkeypatch.setattr("agentstate.storage.file.loglisting.now_microseconds", lambda: later)
    assert storage.call(Listing(idle_for=1)) == Page(("alice",), None)
    assert storage.call(clear("alice", idle_for=1)) == b"false"
    assert logs(tmp_path) == set()
    storage.close()


def test_cleanup_removes_what_killed_processes_left(tmp_path: Path, storage: FileStorage) -> None:
    storage.call(append("alice", 1))
    folder = Path(storage.storage_dir)
    (folder / "alice.jsonl.new").write_text("half a fi")
    storage.call(Lease("alice", "take", "holder", 0.01))
    storage.call(Lease("bob", "take", "holder", 30))
    time.sleep(0.02)
    assert storage.call(Listing(idle_for=100)) == Page((), None)
    assert logs(folder) == {"alice.jsonl"}
    assert {entry.name for entry in (folder / ".leases").iterdir()} == {"bob"}


# --- leases


def test_one_token_holds_a_lease_at_a_time(tmp_path: Path) -> None:
    first, second = FileStorage(tmp_path), FileStorage(tmp_path)
    assert first.call(Lease("alice", "take", "one", 30)) is True
    assert first.call(Lease("alice", "take", "one", 30)) is True
    assert second.call(Lease("alice", "take", "two", 30)) is False
    assert second.call(Lease("alice", "renew", "two", 30)) is False
    assert second.call(Lease("alice", "release", "two", 30)) is False
    assert look(first, "alice") is None
    first.call(append("alice", 1, fence="one"))
    with pytest.raises(TurnLostError):
        second.call(append("alice", 2, fence="two"))
    assert second.call(append("alice", "outside")) == b""
    assert first.call(Lease("alice", "release", "one", 30)) is True
    with pytest.raises(TurnLostError):
        first.call(append("alice", 3, fence="one"))
    assert list((tmp_path / ".leases").iterdir()) == []
    assert logs(tmp_path) == {"alice.jsonl"}
    first.close()
    second.close()


def test_a_lease_ends_by_itself_and_with_the_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(tmp_path)
    assert storage.call(Lease("alice", "take", "one", 0.1)) is True
    time.sleep(0.12)
    with pytest.raises(TurnLostError):
        storage.call(append("alice", 1, fence="one"))
    assert storage.call(Lease("alice", "renew", "one", 30)) is False
    assert storage.call(Lease("alice", "take", "two", 1000)) is True
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_boot", lambda: "another boot")
        assert storage.call(Lease("alice", "take", "three", 30)) is True
    assert storage.call(Lease("alice", "take", "two", 1000)) is True
    with monkeypatch.context() as patch:  # a system that does not number its boots
        patch.setattr(leases, "_now", lambda: 5)
        assert storage.call(Lease("alice", "take", "three", 30)) is True
    (tmp_path / ".leases" / "alice").write_text('{"token": "half')
    assert storage.call(Lease("alice", "take", "four", 30)) is True
    storage.close()


# --- listing


def test_a_listing_comes_in_pages_that_miss_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.storage.file.names._NAMES_AT_A_TIME", 7)
    storage = FileStorage(tmp_path, fsync="no")
    ids = {f"user:{number}" if number % 3 else f"u{number}" for number in range(40)}
    together(storage, *(append(context_id, 1) for context_id in ids))
    storage.call(clear("u0"))
    for size in (1, 3, 7, 500):
        found: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            page = storage.call(Listing(cursor, size))
            assert isinstance(page, Page)
            found += page.context_ids
            cursor = page.cursor
        assert sorted(found) == sorted(ids - {"u0"})
    storage.close()


def test_a_damaged_file_is_listed_but_never_idle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = FileStorage(tmp_path)
    together(storage, append("alice", 1), append("bob", 1), append("Carol", 1))
    for name in logs(tmp_path):
        if not name.startswith("bob"):
            data = bytearray((tmp_path / name).read_bytes())
            data[-5] ^= 1
            (tmp_path / name).write_bytes(data)
    assert set(storage.call(Listing()).context_ids) == {"alice", "bob", "Carol"}  # type: ignore[union-attr]
    time.sleep(0.01)
    assert storage.call(Listing(idle_for=0.001)) == Page(("bob",), None)
    assert "skipped" in caplog.text
    storage.close()


def test_names_that_are_none_of_ours_are_passed_over(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    for name in (b"\xff.jsonl", b"\xff.json", b"Alice.jsonl", b"x~1.jsonl", b".jsonl", b"notes.txt", b"a~.json"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"{}\n")
    (tmp_path / "bob.jsonl").mkdir()
    (tmp_path / "carol.jsonl").symlink_to(tmp_path / "alice.jsonl")
    assert set(storage.call(Listing()).context_ids) == {"alice", "bob", "carol", "a~"}  # type: ignore[union-attr]
    time.sleep(0.01)
    assert storage.call(Listing(idle_for=0.001)) == Page(("alice",), None)
    assert {problem.context_id for problem in storage.verify()} == {"bob", "carol", "a~", None}
    storage.close()


# --- the cache


def test_the_cache_keeps_within_its_bounds(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, fsync="no", cache_bytes=100_000)
    together(storage, *(append(f"c{number}", "x" * 500) for number in range(300)))
    for number in range(300):
        storage.call(put(f"c{number}", a=b"1"))
        assert texts(storage, f"c{number}") == ["x" * 500]
    layout: Any = storage._layout
    assert sum(log.image.weight() for log in layout.cache.logs() if log.image is not None) < 110_000
    assert 5 < len(layout.cache.logs()) < 100
    storage.close()


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    between = Between()
    between.most_open_files = lambda: 20  # type: ignore[method-assign]
    storage = FileStorage(tmp_path, fsync="no", file_system=between)
    for _ in range(3):
        together(storage, *(append(f"c{number}", 1) for number in range(100)))
        for number in range(100):
            storage.call(append(f"c{number}", 2))
    layout: Any = storage._layout
    assert layout.folder.open_files <= 25
    assert sum(log.reader.fd >= 0 for log in layout.cache.logs()) == layout.folder.open_files
    for number in range(100):
        assert texts(storage, f"c{number}") == ["1", "2"] * 3
    storage.close()


def test_what_is_absent_is_not_kept(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    for number in range(50):
        assert look(storage, f"nobody{number}") is None
        assert storage.call(clear(f"nobody{number}")) == b"false"
    layout: Any = storage._layout
    assert [log.context_id for log in layout.cache.logs()] == ["alice"]
    storage.close()
