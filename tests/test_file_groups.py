"""Groups of operations on files, locks, threads, and lazy flushes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filetools import Between, append, clear, commit, look, message, put, texts, together

from agentstate import FileStorage
from agentstate.errors import (
    StateConflictError,
    StateError,
    StateTimeoutError,
)
from agentstate.operations import Increment, Lease, Listing, Pop, Query, Window
from agentstate.storage.file import logfile, loggroup
from agentstate.testing.harness import eventually


def test_a_group_keeps_the_order_of_each_context(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    outcomes = together(
        storage,
        append("a", 1), append("b", 1), Query("a", history=Window()), append("a", 2), clear("b"), Query("b"),
        Query("a", history=Window()), append("b", 2), Query("c"), Listing(), commit("a", Pop(5)), append("a", 3),
        Query("b", history=Window()), commit("a", Increment("n", b"3")), put("b", n=b'""'),
        commit("b", Increment("n", b"1")), append("b", 3),
    )  # fmt: skip
    assert len(outcomes[2].messages) == 1  # type: ignore[union-attr]
    assert outcomes[4] == b"true"
    assert outcomes[5] is None
    assert len(outcomes[6].messages) == 2  # type: ignore[union-attr]
    assert outcomes[8] is None
    assert outcomes[10] == b"[" + message(1) + b"," + message(2) + b"]"
    assert len(outcomes[12].messages) == 1  # type: ignore[union-attr]
    assert outcomes[13] == b"3"
    assert isinstance(outcomes[15], StateConflictError)
    assert (texts(storage, "a"), texts(storage, "b")) == (["3"], ["2", "3"])
    assert texts(FileStorage(tmp_path), "b") == ["2", "3"]
    storage.close()


@pytest.mark.parametrize("at_once", [True, False], ids=["syncfs", "each"])
def test_a_group_of_many_files_is_settled_file_by_file_as_each_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(loggroup.Flushing, "everything", lambda self, files: at_once)
    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    together(storage, *(append(f"c{number}", 1) for number in range(40)))
    between.forget()
    seen = []
    storage.execute(
        [append(f"c{number}", 2) for number in range(40)],
        lambda index, outcome: seen.append((outcome, between.calls.count("sync"), between.calls.count("sync_all"))),
    )
    assert [outcome for outcome, _, _ in seen] == [b""] * 40
    if at_once:
        assert {(files, everything) for _, files, everything in seen} == {(0, 1)}
    else:
        assert all(flushed >= number for number, (_, flushed, _) in enumerate(seen, 1))
        assert seen[0][1] < 40, "the first one had to wait for all the others"
    storage.close()


def test_a_group_does_not_wait_for_one_locked_file(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    together(storage, *(append(f"c{number}", 1) for number in range(10)))
    layout: Any = storage._layout
    other = FileStorage(tmp_path)
    other.call(append("c0", 1))
    lock = other._layout.access.lock("c0")  # type: ignore[union-attr]
    assert lock.try_acquire()
    settled: list[tuple[int, Any]] = []
    try:
        deadline = time.monotonic() + 0.4
        operations = [append(f"c{number}", 2, deadline=deadline) for number in range(10)]
        storage.execute(operations, lambda index, outcome: settled.append((index, outcome)))
    finally:
        lock.release()
    held = {number for number in range(10) if layout.access.lock(f"c{number}") is layout.access.lock("c0")}
    assert {index for index, _ in settled[: 10 - len(held)]} == set(range(10)) - held
    assert all(isinstance(outcome, StateTimeoutError) == (index in held) for index, outcome in settled)
    assert texts(storage, "c0")[-1] == "1"
    storage.call(append("c0", "after"))
    storage.close()
    other.close()


def test_in_a_group_each_operation_waits_until_its_own_deadline(tmp_path: Path) -> None:
    storage, other = FileStorage(tmp_path), FileStorage(tmp_path)
    other.call(append("alice", 1))
    layout: Any = other._layout
    lock = layout.access.lock("alice")
    assert lock.try_acquire()
    settled: dict[int, Any] = {}

    def settle(index: int, outcome: Any) -> None:
        settled[index] = outcome
        if index == 0:
            assert settled == {0: outcome}, "the others have more time"
            lock.release()

    now = time.monotonic()
    storage.execute(
        [append("alice", 2, deadline=now + 0.1), append("alice", 3, deadline=now + 60), append("alice", 4)], settle
    )
    assert isinstance(settled[0], StateTimeoutError)
    assert settled[1] == settled[2] == b""
    assert texts(storage, "alice") == ["1", "3", "4"]
    storage.close()
    other.close()


def test_how_to_flush_many_files_is_measured() -> None:
    flushing = loggroup.Flushing()
    if loggroup.can_sync_all():
        assert flushing.everything(100)
    flushing.took_everything(2.0)
    assert not flushing.everything(100)
    for _ in range(50):
        flushing.took_each(0.0001)
        flushing.everything(100)
    assert flushing.everything(100) == loggroup.can_sync_all()
    assert not flushing.everything(2)


def test_waiting_for_a_lock_ends_at_the_deadline(tmp_path: Path) -> None:
    storage, other = FileStorage(tmp_path), FileStorage(tmp_path)
    other.call(append("alice", 1))
    lock = other._layout.access.lock("alice")  # type: ignore[union-attr]
    assert lock.try_acquire()
    soon = time.monotonic() + 0.2
    for operation in (append("alice", 2, deadline=soon), Lease("alice", "take", "t", 1, deadline=soon)):
        with pytest.raises(StateTimeoutError, match="nothing was done"):
            storage.call(operation)
    assert texts(storage, "alice") == ["1"]  # readers take no lock
    lock.release()
    storage.call(append("alice", 3))
    assert texts(storage, "alice") == ["1", "3"]
    storage.close()
    other.close()


@pytest.mark.parametrize(
    "options", [{}, {"exclusive": True}, {"fsync": "everysec"}], ids=["shared", "exclusive", "lazy"]
)
def test_many_threads_lose_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    storage = FileStorage(tmp_path, cache_bytes=20_000, **options)
    seen: list[Exception] = []

    def write(thread: int) -> None:
        try:
            for number in range(25):
                context_id = f"c{number % 5}"
                if number % 4 == 3:
                    together(storage, *(append(f"c{other}", f"{thread}-{number}-g") for other in range(5)))
                else:
                    storage.call(append(context_id, f"{thread}-{number}"))
                storage.call(commit(context_id, Increment("n", b"1")))
                snapshot = look(storage, context_id)
                assert snapshot is not None
                assert len(snapshot.messages) == snapshot.end
        except (StateError, AssertionError) as error:
            seen.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == []
    storage.close()
    cold = FileStorage(tmp_path)
    assert sum(len(texts(cold, f"c{number}")) for number in range(5)) == 8 * (19 + 6 * 5)
    assert sum(int(look(cold, f"c{number}").variables["n"]) for number in range(5)) == 8 * 25  # type: ignore[union-attr]
    for number in range(5):
        for thread in range(8):
            mine = [text for text in texts(cold, f"c{number}") if text.startswith(f"{thread}-")]
            assert [int(text.split("-")[1]) for text in mine] == sorted(int(text.split("-")[1]) for text in mine)
    assert list(cold.verify()) == []
    cold.close()


def test_what_is_written_lazily_is_flushed_by_and_by_and_at_the_end(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, fsync="everysec", file_system=between)
    together(storage, append("a", 1), append("b", 1))
    assert between.calls.count("sync") == 0
    assert eventually(lambda: between.calls.count("sync") == 2)
    assert between.calls.count("sync_folder") >= 1
    storage.call(append("a", 2))
    storage.close()
    assert between.calls.count("sync") == 3


def test_an_interrupt_in_the_middle_of_a_commit_leaves_no_false_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    for where in ("write", "flush", "_take"):
        with monkeypatch.context() as patch:
            patch.setattr(logfile.LogFile, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                storage.call(append("alice", "interrupted"))
            with pytest.raises(KeyboardInterrupt):
                together(storage, append("alice", "interrupted"), append("bob", "interrupted"))
    kept = texts(FileStorage(tmp_path), "alice")
    assert texts(storage, "alice") == kept
    storage.call(append("alice", 2))
    assert texts(storage, "alice") == [*kept, "2"] == texts(FileStorage(tmp_path), "alice")
    storage.close()
