"""What has expired, or was cleared, is gone from the files; what must be remembered of it is remembered."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from filetools import append, clear, commit, finish, look, put, start_python, texts

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateConflictError
from agentstate.operations import Increment, Listing, Page, Pop
from agentstate.storage.file import expiry


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def content(folder: Path) -> bytes:
    """All bytes of all files."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("layout", ["log", "document"])
def test_expired_text_leaves_the_files_while_the_store_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(expiry, "_SHORTEST_INTERVAL", 0.05)
    storage = FileStorage(tmp_path, layout=layout, ttl=0.2)
    for number in range(30):
        storage.call(append(f"c{number}", "something private"))
        storage.call(commit(f"c{number}", Pop(1)))  # its answer is remembered
        storage.call(append(f"c{number}", "something private"))
    storage.call(append("c0", "something private", commit_id="one"))
    assert b"private" in content(tmp_path)
    wait_until(lambda: b"private" not in content(tmp_path))
    storage.call(append("c0", "a retry", commit_id="one"))  # which was done
    assert look(storage, "c0") is None
    storage.close()


def test_a_process_that_only_reads_removes_nothing_and_starts_no_thread(tmp_path: Path) -> None:
    writer = FileStorage(tmp_path)
    writer.call(append("c", 1))
    writer.close()
    storage = FileStorage(tmp_path, ttl=1.0)
    assert texts(storage, "c") == ["1"]
    assert texts(storage, "c") == ["1"]
    assert "agentstate-expiry" not in {thread.name for thread in threading.enumerate()}
    storage.close()


def test_the_thread_ends_with_its_storage_and_begins_again_in_a_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "_SHORTEST_INTERVAL", 0.05)

    def running() -> bool:
        return "agentstate-expiry" in {thread.name for thread in threading.enumerate()}

    storage = FileStorage(tmp_path, ttl=0.1)
    storage.call(append("c", 1))
    storage.call(append("c", 2))
    assert running()
    storage.close()
    wait_until(lambda: not running())
    forgotten = FileStorage(tmp_path, ttl=0.1)
    forgotten.call(append("c", 1))
    forgotten.call(append("c", 2))
    assert running()
    del forgotten
    wait_until(lambda: not running())


def test_it_goes_on_in_the_child_of_a_fork(tmp_path: Path) -> None:
    (output,) = finish(
        start_python(
            """
            from agentstate.storage.file import expiry
            expiry._SHORTEST_INTERVAL = 0.05
            storage = FileStorage(sys.argv[1], ttl=0.2)
            storage.call(append("c", "private")), storage.call(append("c", "private"))
            child = os.fork()
            if child:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            storage.call(append("d", "private")), storage.call(append("d", "private"))
            path = os.path.join(sys.argv[1], "d.jsonl")
            end = time.monotonic() + 20
            while b"private" in open(path, "rb").read():
                assert time.monotonic() < end
                time.sleep(0.02)
            print("gone", flush=True)
            os._exit(0)
            """,
            tmp_path,
        )
    )
    assert output == "gone\n"


def test_a_clock_that_was_set_is_not_believed_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"time": 1e9, "monotonic": 50.0}

    def pass_by(seconds: float, *, step: float = 0.0) -> None:
        clocks["monotonic"] += seconds
        clocks["time"] += seconds + step

    monkeypatch.setattr(expiry, "time", SimpleNamespace(**{name: lambda name=name: clocks[name] for name in clocks}))
    clock = expiry.SettledClock()
    assert clock.is_settled()
    pass_by(60, step=0.5)  # slewed
    assert clock.is_settled()
    pass_by(60, step=3600)
    assert not clock.is_settled()
    pass_by(540)
    assert not clock.is_settled()
    pass_by(60, step=-3600)  # set right again: what seemed expired lives
    assert not clock.is_settled()
    pass_by(600)
    assert clock.is_settled()


# --- what was cleared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["log", "document"])
def test_nothing_of_what_was_cleared_is_left_in_remembered_answers(tmp_path: Path, layout: str) -> None:
    storage = FileStorage(tmp_path, layout=layout)
    context = SyncConversationContext(storage)
    context.set_variable("c", "v", "private value")
    context.update_variable("c", "v", lambda value: value + " changed", commit_id="update")
    context.add_to_history("c", "user", "private message", commit_id="append")
    assert context.pop_history("c", commit_id="pop")[0]["content"] == "private message"
    context.increment_variable("c", "n", 4711, commit_id="increment")
    assert context.clear_context("c", commit_id="clear") is True
    kept = content(tmp_path)
    assert b"private" not in kept
    assert b"4711" not in kept
    context.add_to_history("c", "user", "private message", commit_id="append")
    with pytest.raises(StateConflictError, match="already applied"):
        context.pop_history("c", commit_id="pop")
    with pytest.raises(StateConflictError, match="already applied"):
        context.increment_variable("c", "n", 4711, commit_id="increment")
    assert context.clear_context("c", commit_id="clear") is True  # its own answer tells nothing
    assert not context.exists("c")
    again = SyncConversationContext(FileStorage(tmp_path, layout=layout))
    with pytest.raises(StateConflictError, match="already applied"):
        again.pop_history("c", commit_id="pop")
    again.close()
    context.close()


def test_clearing_and_writing_in_one_commit_keeps_no_answer_either(tmp_path: Path) -> None:
    from agentstate.operations import Append, Delete

    storage = FileStorage(tmp_path)
    storage.call(append("c", "private"))
    assert storage.call(commit("c", Pop(1), commit_id="pop")) != b"[]"
    storage.call(commit("c", Delete(), Append((b'{"role":"user","content":"new"}',))))
    assert b"private" not in content(tmp_path)
    with pytest.raises(StateConflictError, match="already applied"):
        storage.call(commit("c", Pop(1), commit_id="pop"))
    assert texts(storage, "c") == ["new"]
    storage.close()


def test_a_cleared_context_costs_a_listing_one_look_at_its_last_line(tmp_path: Path) -> None:
    from filetools import Between

    storage = FileStorage(tmp_path)
    for number in range(10):
        storage.call(put(f"c{number}", x=b"1"))
        storage.call(commit(f"c{number}", Increment("n", b"1")))
        storage.call(clear(f"c{number}"))
    between = Between()
    lister = FileStorage(tmp_path, file_system=between)
    for listing in (Listing(), Listing(user="alice"), Listing(idle_for=1.0)):
        between.forget()
        assert lister.call(listing) == Page((), None)
        assert between.calls.count("read_at") <= 10 + 2 * (listing.idle_for is not None)
    storage.close()
    lister.close()


@pytest.mark.parametrize("fsync", ["always", "no"])
def test_clearing_flushes_nothing_where_nothing_is_to_be_flushed(tmp_path: Path, fsync: str) -> None:
    from filetools import Between

    between = Between()
    storage = FileStorage(tmp_path, fsync=fsync, file_system=between)
    storage.call(append("c", 1))
    between.forget()
    storage.call(clear("c"))
    assert between.calls.count("sync") == (1 if fsync == "always" else 0)
    storage.close()


# --- whose files they are -------------------------------------------------------------------------------------------

as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")


@as_root
@pytest.mark.parametrize("layout", ["log", "document"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_what_root_creates_in_the_folder_of_another_user_belongs_to_that_user(
    tmp_path: Path, layout: str, exclusive: bool
) -> None:
    folder = tmp_path / "states"
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 2345)
    storage = FileStorage(folder, layout=layout, exclusive=exclusive)
    for number in range(3):
        storage.call(append(f"c{number}", 1))
        storage.call(append(f"Other {number}", 1))
    storage.call(clear("c0"))
    from agentstate.operations import Lease

    storage.call(Lease("c1", "take", "token", 30.0))
    storage.call(Listing(idle_for=3600.0))
    storage.close()
    if layout == "log":
        path = folder / "c1.jsonl"
        path.write_bytes(path.read_bytes().replace(b"content", b"damaged", 1))
        os.chown(path, 1234, 2345)
        repairing = FileStorage(folder)
        repairing.repair("c1")
        repairing.close()
        assert (folder / "c1.jsonl.damaged").exists()
    found = {
        path.relative_to(folder).as_posix(): (path.stat().st_uid, path.stat().st_gid) for path in folder.rglob("*")
    }
    assert len(found) > 8
    assert set(found.values()) == {(1234, 2345)}, found


@as_root
def test_what_cannot_be_given_away_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentstate.errors import StateUnavailableError

    folder = tmp_path / "states"
    folder.mkdir()
    os.chown(folder, 1234, 2345)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    storage = FileStorage(folder)
    with pytest.raises(StateUnavailableError, match="nothing was done"):
        storage.call(append("c", 1))
    assert list(folder.iterdir()) == []
    storage.close()


@as_root
def test_the_folder_of_another_user_is_not_begun_by_one_who_would_lock_its_owner_out(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    folder.chmod(0o777)
    os.chown(folder, 1234, 2345)
    for above in folder.parents:
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    (output,) = finish(
        start_python(
            """
            FileStorage(sys.argv[2]).call(append("c", 1))  # imports all that is needed
            os.setgid(4321), os.setuid(4321)
            try:
                FileStorage(sys.argv[1]).call(append("c", 1))
            except Exception as error:
                print(type(error).__name__, "belongs to the user with the id 1234" in str(error))
            """,
            folder,
            tmp_path / "other",
        )
    )
    assert output == "StateUnavailableError True\n"
    assert list(folder.iterdir()) == []


# --- the home folder ------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentstate.errors import StateConfigError

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    storage = FileStorage("~/states")
    storage.call(append("c", 1))
    assert storage.storage_dir == str(tmp_path / "states")
    assert json.loads((tmp_path / "states" / "c.jsonl").read_text().splitlines()[0])["id"] == "c"
    storage.close()
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    with pytest.raises(StateConfigError, match="home folder"):
        FileStorage("~nobody-of-this-name/states")
    assert FileStorage("./~x").storage_dir == str(tmp_path / "~x")
