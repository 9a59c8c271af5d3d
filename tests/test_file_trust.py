"""What a storage knows of files stays true, whatever happens to them: replaced, restored, renamed, planted."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filetools import Between, append, clear, commit, look, message, texts

from agentstate import FileStorage
from agentstate.errors import StateTimeoutError, StateUnavailableError
from agentstate.operations import Append, Delete, Lease, Listing, Page, Pop
from agentstate.storage.file import logoperations


class OldFileSystem(Between):
    """Gives the number of a file that was removed last to the next one, unless it is open; and counts no times."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # by the real number
        self._open: dict[int, int] = {}  # real numbers, by descriptor
        self._last = 0
        self.around = self._through

    def _through(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "close":
            self._open.pop(arguments[0], None)
        result = call(*arguments)
        if name == "open":
            self._open[result] = os.fstat(result).st_ino
        if name in ("stat", "descriptor_stat") and stat.S_ISREG(result.st_mode):
            return self._aged(result, new=name == "descriptor_stat")
        return result

    def _aged(self, status: os.stat_result, *, new: bool) -> Any:
        real = status.st_ino
        if real not in self._numbers:
            is_open = any(self._numbers.get(other) == self._last for other in self._open.values())
            self._numbers[real] = max(self._numbers.values(), default=0) + 1 if new or is_open else self._last
        self._last = self._numbers[real]
        return _Aged(status, self._last)


class _Aged:
    def __init__(self, status: os.stat_result, number: int) -> None:
        self.st_ino = number
        self.st_mtime_ns = self.st_ctime_ns = 1_000_000_000
        self.st_dev, self.st_size, self.st_mode = status.st_dev, status.st_size, status.st_mode


def test_a_replaced_file_is_noticed_though_its_number_size_and_times_are_the_same(tmp_path: Path) -> None:
    reader = FileStorage(tmp_path, file_system=OldFileSystem())
    writer = FileStorage(tmp_path)
    for number in range(70):  # from the 64th on the same number of commit ids is remembered
        for storage, who in ((reader, "r"), (writer, "w")):
            text = f"{who}{number:03}"
            storage.call(commit("c", Delete(), Append((message(text),)), commit_id=f"id-{text}"))
    assert texts(reader, "c") == ["w069"]
    reader.close()
    writer.close()


def test_what_is_known_of_a_closed_file_is_looked_up_in_it_again(tmp_path: Path) -> None:
    reader, writer = FileStorage(tmp_path), FileStorage(tmp_path)
    writer.call(append("c", "old", commit_id="one"))
    layout: Any = reader._layout
    assert texts(reader, "c") == ["old"]
    log = layout.cache.log_of("c")
    log.reader.close()  # as the cache does where many are open
    path = tmp_path / "c.jsonl"
    content = path.read_bytes()
    other = FileStorage(tmp_path / "other")
    other.call(append("c", "new", commit_id="two"))
    other.close()
    path.write_bytes((tmp_path / "other" / "c.jsonl").read_bytes())  # the same number, and the same size
    assert path.stat().st_size == len(content)
    assert texts(reader, "c") == ["new"]
    reader.close()
    writer.close()


def test_a_log_that_is_restored_in_place_and_written_on_is_read_anew(tmp_path: Path) -> None:
    reader, writer = FileStorage(tmp_path), FileStorage(tmp_path)
    for number in range(3):
        writer.call(append("c", number, commit_id=f"id{number}"))
    shutil.copy(tmp_path / "c.jsonl", tmp_path / "backup")
    for number in range(3, 6):
        writer.call(append("c", number, commit_id=f"id{number}"))
    assert texts(reader, "c") == ["0", "1", "2", "3", "4", "5"]
    writer.close()
    shutil.copyfile(tmp_path / "backup", tmp_path / "c.jsonl")
    other = FileStorage(tmp_path)
    for number in range(3, 8):  # lines of the same length at the same places
        other.call(append("c", number + 90 if number > 9 else chr(100 + number), commit_id=f"ID{number}"))
    assert texts(reader, "c") == texts(FileStorage(tmp_path), "c") == ["0", "1", "2", "g", "h", "i", "j", "k"]
    reader.close()
    other.close()


# --- several layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_id", ["user-1", "User-1", "user:1", "ü", "a/b", "x" * 300, "con", "slug~" + "0" * 32])
def test_all_layouts_lock_a_context_by_the_same_lock(tmp_path: Path, context_id: str) -> None:
    log, document = FileStorage(tmp_path), FileStorage(tmp_path, layout="document")
    document.call(append(context_id, 1))
    held = False

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal held
        if name == "replace" and not held:
            held = True
            with pytest.raises(StateTimeoutError):
                log.call(append(context_id, 2, deadline=time.monotonic() + 0.01))
        return call(*arguments)

    between = Between(around)
    third = FileStorage(tmp_path, layout="document", file_system=between)
    third.call(append(context_id, 3))
    assert held
    for storage in (log, document, third):
        storage.close()


@pytest.mark.parametrize("context_id", ["user-1", "User-1", "a/b"])
def test_unfinished_documents_are_removed_under_the_lock_of_their_context(tmp_path: Path, context_id: str) -> None:
    storage = FileStorage(tmp_path, layout="document")
    unfinished: list[bool] = []

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "sync" and not unfinished:
            cleaner = FileStorage(tmp_path, layout="document")
            cleaner.call(Listing(idle_for=3600.0))
            unfinished.append(any(entry.name.endswith(".json.new") for entry in tmp_path.iterdir()))
            cleaner.close()
        return call(*arguments)

    other = FileStorage(tmp_path, layout="document", file_system=Between(around))
    other.call(append(context_id, 1))
    assert unfinished == [True]
    assert texts(storage, context_id) == ["1"]
    storage.close()
    other.close()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_a_file_that_is_finished_while_a_cleanup_looks_at_it_is_no_trouble(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    name = "c.jsonl" if layout == "log" else "c.json"
    FileStorage(tmp_path, layout=layout).call(append("c", 1))

    def around(called: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if called == "unlink" and arguments[0].endswith(".new"):
            (tmp_path / f"{name}.new").rename(tmp_path / name)
        return call(*arguments)

    storage = FileStorage(tmp_path, layout=layout, file_system=Between(around))
    shutil.copy(tmp_path / name, tmp_path / f"{name}.new")
    assert storage.call(Listing(idle_for=3600.0)) == Page((), None)
    assert caplog.text == ""
    assert texts(storage, "c") == ["1"]
    storage.close()


# --- listings -------------------------------------------------------------------------------------------------------


class Moving(Between):
    """A folder in which some names are passed by while it is read, others each time."""

    def __init__(self, passed_by: list[set[str]]) -> None:
        super().__init__()
        self.passed_by = passed_by
        self.around = self._through

    def _through(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if name == "names":
            hidden = self.passed_by.pop(0) if self.passed_by else set()
            return (entry for entry in result if entry not in hidden)
        return result


@pytest.mark.parametrize("layout", ["log", "document"])
def test_a_context_that_exists_all_along_is_listed_though_its_name_moves(tmp_path: Path, layout: str) -> None:
    writer = FileStorage(tmp_path, layout=layout)
    for number in range(30):
        writer.call(append(f"c{number}", 1))
    suffix = ".jsonl" if layout == "log" else ".json"
    hidden = [
        {f"c{number}{suffix}" for number in range(start, 30, 3)} | {f"c{start + 20}{suffix}"} for start in range(3)
    ]
    storage = FileStorage(tmp_path, layout=layout, file_system=Moving([*hidden, {f"c7{suffix}"}]))
    page = storage.call(Listing())
    assert isinstance(page, Page)
    assert sorted(page.context_ids) == sorted(f"c{number}" for number in range(30))
    storage.close()
    writer.close()


def test_a_listing_of_a_folder_where_names_vanish_comes_to_its_end(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    for number in range(10):
        storage.call(append(f"c{number}", 1))

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if name == "names":
            (tmp_path / f"c{between.calls.count('names')}.jsonl").unlink()
        return result

    between = Between(around)
    page = FileStorage(tmp_path, file_system=between).call(Listing())
    assert isinstance(page, Page)
    assert 2 <= between.calls.count("names") <= 3
    storage.close()


# --- exclusive ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there a file that is open cannot be removed")
@pytest.mark.parametrize("removed", ["store.lock", "everything"])
def test_a_second_owner_is_kept_out_though_the_lock_file_was_removed(tmp_path: Path, removed: str) -> None:
    owner = FileStorage(tmp_path, exclusive=True)
    owner.call(append("c", 1))
    if removed == "store.lock":
        (tmp_path / ".locks" / "store.lock").unlink()
    else:
        shutil.rmtree(tmp_path / ".locks")
    for exclusive in (True, False):
        second = FileStorage(tmp_path, exclusive=exclusive)
        with pytest.raises(StateUnavailableError, match="in use"):
            second.call(append("c", 2, deadline=time.monotonic() + 0.05))
        second.close()
    owner.call(append("c", 3))
    assert texts(owner, "c") == ["1", "3"]
    owner.close()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_a_cleanup_beside_an_exclusive_owner_is_refused_and_removes_nothing(tmp_path: Path, layout: str) -> None:
    owner = FileStorage(tmp_path, exclusive=True, layout=layout)
    owner.call(append("c", 1))
    assert owner.call(Lease("c", "take", "token", 30.0)) is True
    suffix = "jsonl" if layout == "log" else "json"
    (tmp_path / f"c.{suffix}.new").write_text("being written")
    before = {path.name for path in tmp_path.rglob("*")}
    for exclusive in (True, False):
        other = FileStorage(tmp_path, exclusive=exclusive, layout=layout)
        with pytest.raises(StateUnavailableError, match="exclusive"):
            other.call(Listing(idle_for=0.001, deadline=time.monotonic() + 0.05))
        if exclusive:  # it would hold no lock that the owner heeds
            with pytest.raises(StateUnavailableError, match="exclusive"):
                other.call(Listing(deadline=time.monotonic() + 0.05))
        else:
            assert other.call(Listing()) == Page(("c",), None)
            assert texts(other, "c") == ["1"]
        other.close()
    assert {path.name for path in tmp_path.rglob("*")} == before
    owner.call(append("c", 2, fence="token"))
    assert texts(owner, "c") == ["1", "2"]
    owner.close()


def test_a_cleanup_makes_no_folder(tmp_path: Path) -> None:
    for layout in ("log", "document"):
        storage = FileStorage(tmp_path / "nowhere", layout=layout)
        assert storage.call(Listing(idle_for=1.0)) == Page((), None)
        storage.close()
    assert list(tmp_path.iterdir()) == []


# --- planted files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["log", "document"])
@pytest.mark.parametrize("kind", ["file", "link", "hard link"])
def test_what_stands_under_the_name_of_a_temporary_file_does_not_become_the_conversation(
    tmp_path: Path, layout: str, kind: str
) -> None:
    storage = FileStorage(tmp_path, layout=layout)
    storage.call(append("c", 1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("something else")
    planted = tmp_path / ("c.jsonl.new" if layout == "log" else "c.json.new")
    if kind == "file":
        planted.write_text("planted")
        planted.chmod(0o666)
    elif kind == "link":
        planted.symlink_to(elsewhere)
    else:
        planted.hardlink_to(elsewhere)
    held = planted.open("rb") if kind != "link" else elsewhere.open("rb")
    number = os.fstat(held.fileno()).st_ino
    storage.call(clear("c"))
    storage.call(append("c", 2))
    path = tmp_path / ("c.jsonl" if layout == "log" else "c.json")
    assert path.lstat().st_ino != number
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert elsewhere.read_text() == "something else"
    assert texts(storage, "c") == ["2"]
    held.close()
    storage.close()


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_wrong_for_a_while_erases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(tmp_path, ttl=60.0)
    storage.call(append("c", 1))
    storage.call(commit("c", Pop(1), commit_id="pop"))
    storage.call(append("c", 2))
    now = time.time_ns() // 1000
    with monkeypatch.context() as patch:
        patch.setattr(logoperations, "now_microseconds", lambda: now + 3600_000_000)
        assert look(storage, "c") is None
        assert storage.call(commit("c", Pop(1))) == b"[]"
        assert storage.call(commit("c", Delete(), user="someone")) == b"false"
        assert look(storage, "c") is None
    assert texts(storage, "c") == ["2"]
    storage.call(append("c", 3))
    assert texts(storage, "c") == texts(FileStorage(tmp_path), "c") == ["2", "3"]
    storage.close()
