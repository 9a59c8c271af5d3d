"""A disk that is full, broken or read-only: each call says which of three holds, and nothing unverified is believed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filetools import Between, append, clear, commit, fail, logs, look, message, put, texts, together

from agentstate import FileStorage
from agentstate.errors import (
    ContextNotFoundError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)
from agentstate.operations import (
    NEVER,
    Append,
    Create,
    Delete,
    Increment,
    Lease,
    Listing,
    Pop,
    Put,
    Query,
    Space,
    Trim,
    Window,
)
from agentstate.storage.file import filesystem, loggroup

Around = Callable[..., Any]


def on_a_full_disk(room: int) -> Around:
    """An `around` that writes so many bytes more, in as many writes as it likes, and then no more."""
    left = [room]

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name != "write":
            return call(*arguments)
        descriptor, data = arguments
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = call(descriptor, data[: left[0]])
        left[0] -= written
        return written

    return around


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES])
def test_what_the_system_refuses_is_not_done_and_said_so(tmp_path: Path, error: int) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("alice", 1))
    between.around = fail(error, "write", "open", times=1000)
    for operation in (append("alice", 2), append("bob", 1), clear("alice")):
        with pytest.raises(StateUnavailableError, match="nothing was done") as caught:
            storage.call(operation)
        assert type(caught.value) is StateUnavailableError
        assert caught.value.context_id == operation.context_id
        assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StateUnavailableError):
        look(FileStorage(tmp_path, file_system=between), "alice")  # not absent: not read
    between.around = fail(error, "read_at", times=1000)
    with pytest.raises(StateUnavailableError):
        look(FileStorage(tmp_path, file_system=between), "alice")
    between.around = fail(0)
    storage.call(append("alice", 3))
    assert texts(storage, "alice") == ["1", "3"] == texts(FileStorage(tmp_path), "alice")
    assert logs(tmp_path) == {"alice.jsonl"}
    storage.close()


@pytest.mark.parametrize("fixable", [True, False])
def test_a_short_write_leaves_whole_commits_or_nothing(tmp_path: Path, fixable: bool) -> None:
    base = FileStorage(tmp_path / "base")
    base.call(append("alice", "before", commit_id="before"))
    begin = (tmp_path / "base" / "alice.jsonl").stat().st_size
    together(base, *(append("alice", number, commit_id=f"n{number}") for number in range(3)))
    content = (tmp_path / "base" / "alice.jsonl").read_bytes()
    end = len(content)
    base.close()
    for room in range(0, end - begin + 20, 7):
        folder = tmp_path / f"{room}"
        between = Between()
        storage = FileStorage(folder, file_system=between)
        storage.call(append("alice", "before", commit_id="before"))
        full = on_a_full_disk(room)
        broken = fail(errno.EIO, "truncate")

        def around(name: str, call: Any, arguments: Any, full: Around = full, broken: Around = broken) -> Any:
            return (broken if name == "truncate" and not fixable else full)(name, call, arguments)

        between.around = around
        commits = [append("alice", number, commit_id=f"n{number}") for number in range(3)]
        outcomes = together(storage, *commits, Query("alice"))
        between.around = fail(0)
        done = [str(number) for number in range(3) if outcomes[number] == b""]
        assert all(type(outcome) is StateUnavailableError for outcome in outcomes[:3] if outcome != b"")
        assert len(done) == content[begin : begin + room].count(b"\n")
        for reader in (storage, FileStorage(folder)):
            assert texts(reader, "alice") == ["before", *done]
        storage.call(append("alice", "after"))
        assert texts(FileStorage(folder), "alice") == ["before", *done, "after"]
        storage.close()


def up_to_a_checkpoint(folder: Path) -> tuple[FileStorage, Between, int, int]:
    """A storage whose next append of the number returned writes a checkpoint too, at the offset returned."""
    base = FileStorage(folder / "base")
    path = folder / "base" / "alice.jsonl"
    number = 0
    while number == 0 or b"checkpoint" not in path.read_bytes():
        base.call(append("alice", "x" * 300, commit_id=f"n{number}"))
        number += 1
    base.close()
    between = Between()
    storage = FileStorage(folder / "other", file_system=between)
    for earlier in range(number - 1):
        storage.call(append("alice", "x" * 300, commit_id=f"n{earlier}"))
    written = (folder / "other" / "alice.jsonl").stat().st_size
    return storage, between, number - 1, path.read_bytes().index(b'{"checkpoint"') - written


def test_a_commit_whose_checkpoint_did_not_fit_is_done(tmp_path: Path) -> None:
    storage, between, number, room = up_to_a_checkpoint(tmp_path)
    between.around = on_a_full_disk(room + 50)
    storage.call(append("alice", "x" * 300, commit_id=f"n{number}"))
    between.around = fail(0)
    assert len(texts(FileStorage(tmp_path / "other"), "alice")) == number + 1
    storage.call(append("alice", "after"))
    assert len(texts(FileStorage(tmp_path / "other"), "alice")) == number + 2
    storage.close()


def test_a_commit_whose_checkpoint_did_not_fit_is_unknown_where_nobody_can_look(tmp_path: Path) -> None:
    storage, between, number, room = up_to_a_checkpoint(tmp_path)
    full = on_a_full_disk(room + 50)
    failed: list[str] = []

    def around(name: str, call: Any, arguments: tuple[Any, ...]) -> Any:
        if failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if name != "write":
            return call(*arguments)
        try:
            return full(name, call, arguments)
        except OSError:
            failed.append(name)
            raise

    between.around = around
    last = append("alice", "x" * 300, commit_id=f"n{number}")
    with pytest.raises(StateOutcomeUnknownError) as caught:
        storage.call(last)
    assert caught.value.commit_id == f"n{number}"
    between.around = fail(0)
    assert len(texts(FileStorage(tmp_path / "other"), "alice")) == number + 1
    storage.call(last)
    assert len(texts(storage, "alice")) == number + 1
    storage.close()


def test_a_new_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    for room in (0, 10, 70, 120):
        between.around = on_a_full_disk(room)
        with pytest.raises(StateUnavailableError, match="free some space"):
            storage.call(append("alice", 1))
        between.around = fail(0)
        assert look(storage, "alice") is None
        assert look(FileStorage(tmp_path), "alice") is None
    storage.call(append("alice", 1))
    assert texts(storage, "alice") == ["1"]
    storage.close()


@pytest.mark.parametrize("healing", [True, False], ids=["healed at once", "healed by the next writer"])
def test_a_failed_flush_is_an_unknown_outcome_and_the_file_is_written_again(
    tmp_path: Path, healing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    between = Between()
    storage, other = FileStorage(tmp_path, file_system=between), FileStorage(tmp_path)
    storage.call(append("alice", 1))
    assert texts(other, "alice") == ["1"]
    before = (tmp_path / "alice.jsonl").stat()
    between.around = fail(errno.EIO, "sync", times=1 if healing else 2)
    failing = append("alice", 2)
    with pytest.raises(StateOutcomeUnknownError, match="at most once") as caught:
        storage.call(failing)
    assert caught.value.commit_id == failing.commit_id
    now = (tmp_path / "alice.jsonl").stat()
    assert (now.st_ino != before.st_ino) == healing
    assert bool(now.st_mode & 0o1000) != healing
    assert texts(other, "alice") == ["1", "2"]
    other.call(append("alice", 3))
    now = (tmp_path / "alice.jsonl").stat()
    assert now.st_ino != before.st_ino
    assert now.st_mode & 0o7777 == 0o600
    storage.call(failing)
    assert texts(storage, "alice") == ["1", "2", "3"] == texts(FileStorage(tmp_path), "alice")
    assert logs(tmp_path) == {"alice.jsonl"}
    storage.close()
    other.close()


@pytest.mark.parametrize("call", ["sync", "sync_folder"])
def test_a_new_file_whose_flush_fails_is_unknown(tmp_path: Path, call: str) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("bob", 1))
    between.around = fail(errno.EIO, call)
    with pytest.raises(StateOutcomeUnknownError):
        storage.call(append("alice", 1, commit_id="mine"))
    storage.call(append("alice", 1, commit_id="mine"))
    assert texts(storage, "alice") == ["1"]
    storage.close()


def test_a_failed_flush_of_the_whole_file_system_makes_the_whole_group_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggroup.Flushing, "everything", lambda self, files: True)
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    together(storage, *(append(f"c{number}", 1) for number in range(20)))
    inodes = {name: (tmp_path / name).stat().st_ino for name in logs(tmp_path)}
    between.around = fail(errno.EIO, "sync_all")
    operations = [append(f"c{number}", 2) for number in range(20)]
    outcomes = together(storage, *operations, Query("c0"), Query("nobody"))
    for operation, outcome in zip(operations, outcomes, strict=False):
        assert isinstance(outcome, StateOutcomeUnknownError)
        assert (outcome.commit_id, outcome.context_id) == (operation.commit_id, operation.context_id)
    assert not isinstance(outcomes[-2], StateError)
    assert outcomes[-1] is None
    assert all((tmp_path / name).stat().st_ino != inode for name, inode in inodes.items())
    assert together(storage, *operations) == [b""] * 20
    assert all(texts(storage, f"c{number}") == ["1", "2"] for number in range(20))
    storage.close()


def test_a_failed_flush_of_one_file_makes_the_outcomes_of_that_file_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggroup.Flushing, "everything", lambda self, files: False)
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    together(storage, *(append(f"c{number}", 1) for number in range(5)))
    between.around = fail(errno.EIO, "sync", after=2)
    operations = [append(f"c{number}", 2) for number in range(5)]
    outcomes = together(storage, *operations)
    assert [isinstance(outcome, StateOutcomeUnknownError) for outcome in outcomes].count(True) == 1
    assert outcomes.count(b"") == 4
    assert together(storage, *operations) == [b""] * 5
    assert all(texts(storage, f"c{number}") == ["1", "2"] for number in range(5))
    storage.close()


def test_sync_all_is_only_for_systems_that_tell_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, answer in (("5.8.0-arch", True), ("5.7.19", False), ("6.1", True), ("4.19.0", False), ("odd", False)):
        with monkeypatch.context() as patch:
            patch.setattr(filesystem.sys, "platform", "linux")
            patch.setattr(os, "uname", lambda release=release: os.uname_result(("", "", release, "", "")))
            filesystem.can_sync_all.cache_clear()
            assert filesystem.can_sync_all() == answer
    filesystem.can_sync_all.cache_clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        filesystem.FileSystem().sync_all(-1)


def test_a_lazy_flush_that_fails_is_logged_and_healed_by_the_next_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for exclusive in (False, True):
        folder = tmp_path / str(exclusive)
        between = Between()
        storage = FileStorage(folder, fsync="everysec", exclusive=exclusive, file_system=between)
        storage.call(append("alice", 1))
        inode = (folder / "alice.jsonl").stat().st_ino
        between.around = fail(errno.EIO, "sync")
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            storage._layout._operations.lazy.flush()  # type: ignore[union-attr]
        assert "may not survive a power cut" in caplog.text
        between.around = fail(0)
        storage.call(append("alice", 2))
        assert (folder / "alice.jsonl").stat().st_ino != inode
        assert texts(storage, "alice") == ["1", "2"]
        storage.close()


STEPS = (
    append("alice", 1, commit_id="a"),
    commit("alice", Put(Space.VARIABLES, (("large", b'"%s"' % (b"x" * 70_000)),)), commit_id="b"),
    commit("alice", Increment("n", b"1"), commit_id="c"),
    append("alice", 2, 3, commit_id="d"),
    commit("alice", Put(Space.VARIABLES, (("large", b'"%s"' % (b"y" * 70_000)),)), commit_id="e"),
    commit("alice", Pop(1), commit_id="f"),
    commit("alice", Put(Space.VARIABLES, (("large", b'"z"'),), replace=True), commit_id="g"),
    commit("alice", Append((message(4),)), Trim(2), commit_id="h"),
    commit("alice", Put(Space.METADATA, (("m", b'"%s"' % (b"m" * 90_000)),)), commit_id="i"),
    commit("alice", Put(Space.METADATA, (("m", b'"m"'),)), commit_id="j"),
    commit("alice", Delete(), commit_id="k"),
    append("alice", "new", commit_id="l"),
    commit("alice", Create("owner"), commit_id="m"),
)


def test_whichever_call_fails_every_answer_is_true(tmp_path: Path) -> None:
    """The nth call of the file system fails, for every n; errors say which of three holds, and a retry acts once."""
    reference = FileStorage(tmp_path / "reference")
    expected = []
    for step in STEPS:
        outcome = reference.call(step)
        expected.append((outcome, look(reference, "alice")))
    reference.close()
    for error, times in ((errno.EIO, 1), (errno.ENOSPC, 3)):
        nth = 0
        failed = True
        while failed:
            folder = tmp_path / f"{error}-{times}-{nth}"
            names = [name for name in Between.NAMES if name != "close"]
            failing = fail(error, *names, after=nth, times=times)
            failures: list[str] = []

            def around(
                name: str, call: Any, arguments: Any, failing: Around = failing, failures: Any = failures
            ) -> Any:
                try:
                    return failing(name, call, arguments)
                except OSError as caught:
                    if caught.filename is None:  # one of ours
                        failures.append(name)
                    raise

            storage = FileStorage(folder, file_system=Between(around))
            previous: Any = None
            for step, (outcome, state) in zip(STEPS, expected, strict=True):
                unknown = False
                for _ in range(5):
                    try:
                        assert storage.call(step) == outcome
                        break
                    except StateOutcomeUnknownError:
                        unknown = True
                    except StateUnavailableError:
                        seen = _without_times(look(FileStorage(folder), "alice"))
                        assert seen == previous or (unknown and seen == _without_times(state))  # it was not done
                else:
                    pytest.fail(f"{failures} was not got over")
                previous = _without_times(state)
                assert _without_times(look(FileStorage(folder), "alice")) == previous
            storage.close()
            assert logs(folder) <= {"alice.jsonl", "alice.jsonl.new"}
            failed = bool(failures)
            nth += 2 * times - 1


def _without_times(snapshot: Any) -> Any:
    return None if snapshot is None else snapshot._replace(created=0, updated=0)


def test_leases_and_listings_on_a_broken_disk_are_errors(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("alice", 1))
    between.around = fail(errno.EIO, "open", "names", times=100)
    for operation in (Lease("alice", "take", "t", 1), append("alice", 2, fence="t"), Listing()):
        with pytest.raises(StateUnavailableError):
            storage.call(operation)
    between.around = fail(0)
    assert storage.call(Lease("alice", "take", "t", 1)) is True
    storage.close()


# --- damage


def damage(path: Path, place: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(place)] ^= 4
    path.write_bytes(data)


def test_a_damaged_file_is_left_as_it_is_until_it_is_repaired(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    for number in range(10):
        storage.call(append("alice", f"message {number}"))
        storage.call(put("alice", n=b"%d" % number))
    storage.call(append("bob", 1))
    path = tmp_path / "alice.jsonl"
    damage(path, b"message 4")
    before = path.read_bytes()
    for operation in (Query("alice"), append("alice", "x"), clear("alice"), commit("alice", Create())):
        with pytest.raises(StateCorruptedError, match="verify --repair"):
            storage.call(operation)
    outcomes = together(storage, append("alice", "x"), append("bob", 2), Query("alice"))
    assert isinstance(outcomes[0], StateCorruptedError)
    assert outcomes[1] == b""
    assert isinstance(outcomes[2], StateCorruptedError)
    assert path.read_bytes() == before
    (problem,) = storage.verify()
    assert (problem.context_id, problem.path) == ("alice", str(path))
    repaired = storage.repair("alice")
    assert repaired.messages == 9
    assert 100 < repaired.lost_bytes < 300
    assert Path(repaired.original or "").read_bytes() == before
    for reader in (storage, FileStorage(tmp_path)):
        assert texts(reader, "alice") == [f"message {number}" for number in range(10) if number != 4]
        assert look(reader, "alice").variables == {"n": b"9"}  # type: ignore[union-attr]
    storage.call(append("alice", "after"))
    assert list(storage.verify()) == []
    assert storage.repair("alice").original is None
    with pytest.raises(ContextNotFoundError):
        storage.repair("nobody")
    storage.close()


def test_messages_after_the_damage_keep_their_positions(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, fsync="no")
    for number in range(300):
        storage.call(append("alice", f"message {number} " + "x" * 100))
    path = tmp_path / "alice.jsonl"
    for number in (3, 50, 51):
        damage(path, b"message %d " % number)
    storage.repair("alice")
    snapshot = look(storage, "alice")
    assert snapshot is not None
    assert (snapshot.start, snapshot.end, snapshot.revision) == (3, 300, 300)
    assert texts(storage, "alice")[-200:] == [f"message {number} " + "x" * 100 for number in range(100, 300)]
    assert list(storage.verify()) == []
    storage.close()


@pytest.mark.parametrize(
    "place", [b'{"agentstate"', b'\n{"rev":2', b'"created"', b"message 9", b'{"checkpoint"', b'"runs"']
)
def test_repair_copes_with_damage_anywhere(tmp_path: Path, place: bytes) -> None:
    storage = FileStorage(tmp_path, fsync="no")
    for number in range(100):
        storage.call(append("alice", f"message {number} " + "x" * 100))
    path = tmp_path / "alice.jsonl"
    damage(path, place)
    assert [problem.context_id for problem in storage.verify()] == ["alice"]
    repaired = storage.repair("alice")
    assert repaired.messages >= 98
    assert len(texts(FileStorage(tmp_path), "alice")) == repaired.messages
    storage.call(append("alice", "after"))
    assert list(storage.verify()) == []
    storage.close()


def test_what_was_damaged_first_is_kept_when_it_is_damaged_again(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, fsync="no")
    path = tmp_path / "alice.jsonl"
    originals = []
    for name in ("first", "second"):
        storage.call(append("alice", name))
        storage.call(append("alice", "and another"))
        damage(path, name.encode())
        originals.append(path.read_bytes())
        kept = storage.repair("alice").original
    assert kept == str(tmp_path / "alice.jsonl.damaged2")
    assert [(tmp_path / f"alice.jsonl.damaged{number}").read_bytes() for number in ("", 2)] == originals
    storage.close()


def test_a_repair_whose_name_may_not_be_on_disk_says_so_and_can_be_repeated(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("alice", 1))
    storage.call(append("alice", 2))
    damage(tmp_path / "alice.jsonl", b'"content":"1"')
    between.around = fail(errno.EIO, "sync_folder", after=1)
    with pytest.raises(StateOutcomeUnknownError, match="repair again"):
        storage.repair("alice")
    assert storage.repair("alice").original is None
    assert between.calls[-1] == "sync_folder"
    storage.close()


def test_what_never_reached_the_disk_before_a_checkpoint_is_cut_when_it_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FileStorage(tmp_path, fsync="no")
    for number in range(200):
        storage.call(append("alice", f"message {number} " + "x" * 100))
    storage.close()
    path = tmp_path / "alice.jsonl"
    content = path.read_bytes()
    hole = content.index(b"message 20 ") // 512 * 512
    path.write_bytes(content[:hole] + bytes(4096) + content[hole + 4096 :])
    storage = FileStorage(tmp_path, fsync="no")
    found = texts(storage, "alice")
    assert 15 < len(found) <= 20
    assert found == [f"message {number} " + "x" * 100 for number in range(len(found))]
    storage.call(append("alice", "after"))
    assert "never acknowledged" in caplog.text
    assert texts(FileStorage(tmp_path), "alice") == [*found, "after"]
    storage.close()


def test_waiting_for_a_stopped_disk_is_not_our_doing_but_the_deadline_is(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    with pytest.raises(StateError, match="deadline"):
        storage.call(append("alice", 1, deadline=time.monotonic() - 1))
    outcomes = together(storage, append("alice", 1, deadline=time.monotonic() - 1), append("alice", 2))
    assert isinstance(outcomes[0], StateError)
    assert texts(storage, "alice") == ["2"]
    storage.close()


def _torn(folder: Path) -> None:
    with open(folder / "alice.jsonl", "ab") as file:
        file.write(b'{"rev":')


def _suspect(folder: Path) -> None:
    (folder / "alice.jsonl").chmod(0o1600)


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "operation"),
    [
        (_nothing, Query("alice", None, None, Window(first=3, limit=2))),
        (_nothing, commit("alice", Pop(9), commit_id="x")),
        (_nothing, commit("alice", Trim(3), commit_id="x")),
        (_nothing, clear("alice", idle_for=0.0, commit_id="x")),
        (_torn, append("alice", "x", commit_id="x")),
        (_suspect, append("alice", "x", commit_id="x")),
        (_nothing, Listing()),
        (_nothing, Listing(idle_for=0.0)),
        (_nothing, Lease("alice", "take", "t", 30)),
        (_nothing, append("alice", "x", commit_id="x", fence="nobody's")),
    ],
    ids=["page", "pop", "trim", "cleanup", "torn", "suspect", "list", "idle", "lease", "fence"],
)
def test_whichever_call_fails_the_store_is_as_before_or_as_after(tmp_path: Path, prepare: Any, operation: Any) -> None:
    base = FileStorage(tmp_path / "base", fsync="no")
    for number in range(120):
        base.call(append("alice", f"{number} " + "x" * 200, commit_id=f"n{number}"))
    base.close()
    before = look(FileStorage(tmp_path / "base"), "alice")
    prepare(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "after")
    reference = FileStorage(tmp_path / "after")
    outcome = together(reference, operation)[0]
    after = look(reference, "alice")
    reference.close()
    nth = 0
    failures = [True]
    while failures:
        failures = []
        folder = tmp_path / str(nth)
        shutil.copytree(tmp_path / "base", folder)
        failing = fail(errno.EIO, *[name for name in Between.NAMES if name != "close"], after=nth)

        def around(name: str, call: Any, arguments: Any, failing: Around = failing, failures: Any = failures) -> Any:
            try:
                return failing(name, call, arguments)
            except OSError as caught:
                if caught.filename is None:
                    failures.append(name)
                raise

        between = Between(around)
        storage = FileStorage(folder, file_system=between)
        found = together(storage, operation)[0]
        between.around = fail(0)
        if isinstance(found, StateUnavailableError):
            assert failures
            states = [before, after] if isinstance(found, StateOutcomeUnknownError) else [before]
        else:
            assert type(found) is type(outcome)
            states = [after]
        for reader in (storage, FileStorage(folder)):
            assert _without_times(look(reader, "alice")) in [_without_times(state) for state in states]
        if isinstance(found, StateOutcomeUnknownError):
            assert together(storage, operation)[0] == outcome
        storage.call(append("alice", "life goes on"))
        assert list(storage.verify()) == []
        storage.close()
        shutil.rmtree(folder)
        nth += 1
    assert nth > 3


@pytest.mark.parametrize("options", [{}, {"fsync": "everysec"}, {"layout": "document"}])
def test_closing_leaves_to_a_thread_what_that_does_not_end(tmp_path: Path, options: dict[str, Any]) -> None:
    stuck, go_on = threading.Event(), threading.Event()

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "write" and threading.current_thread() is not threading.main_thread():
            stuck.set()
            assert go_on.wait(60)
        return call(*arguments)

    storage = FileStorage(tmp_path, file_system=Between(around), deadline=0.2, **options)
    storage.call(append("alice", "before"))
    late = append("alice", "late", deadline=NEVER)
    thread = threading.Thread(target=storage.execute, args=([late], lambda *_: None))
    thread.start()
    assert stuck.wait(60)
    storage.close()
    with pytest.raises(StateUnavailableError, match="closed"):
        storage.call(append("alice", "after"))
    go_on.set()
    thread.join()
    assert texts(FileStorage(tmp_path, layout=options.get("layout", "log")), "alice") == ["before", "late"]
