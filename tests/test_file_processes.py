"""Several processes on one folder: nothing lost, killed holders, stopped holders, forks, exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filetools import append, finish, lines, logs, look, says, start_python, texts, together

from agentstate import FileStorage
from agentstate.errors import StateTimeoutError, StateUnavailableError
from agentstate.operations import Lease, Query
from agentstate.testing.harness import eventually

Start = Callable[..., subprocess.Popen[str]]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks")


@pytest.fixture
def python() -> Iterator[Start]:
    """Starts other processes, which end with the test."""
    with ExitStack() as stack:

        def start(code: str, *arguments: object) -> subprocess.Popen[str]:
            process = stack.enter_context(start_python(code, *arguments))
            stack.callback(process.kill)
            return process

        yield start


def test_two_processes_that_append_at_once_lose_nothing(tmp_path: Path, python: Start) -> None:
    code = """
        from agentstate.operations import Increment
        storage = FileStorage(sys.argv[1], fsync=sys.argv[3])
        for number in range(150):
            if number % 10 == 9:
                together(storage, append("alice", f"{sys.argv[2]}-{number}"), append("bob", sys.argv[2]))
            else:
                storage.call(append("alice", f"{sys.argv[2]}-{number}"))
            storage.call(commit("alice", Increment("n", b"1")))
        storage.close()
    """
    for fsync in ("no", "always"):
        folder = tmp_path / fsync
        finish(*(python(code, folder, name, fsync) for name in ("x", "y", "z")))
        storage = FileStorage(folder)
        found = texts(storage, "alice")
        for name in ("x", "y", "z"):
            assert [text for text in found if text.startswith(name)] == [f"{name}-{number}" for number in range(150)]
        assert len(found) == 450
        assert look(storage, "alice").variables == {"n": b"450"}  # type: ignore[union-attr]
        assert len(texts(storage, "bob")) == 45
        assert list(storage.verify()) == []
        storage.close()


def test_readers_never_see_half_a_commit(tmp_path: Path, python: Start) -> None:
    code = """
        storage = FileStorage(sys.argv[1], fsync="no")
        for number in range(400):
            storage.call(append("alice", number, number, "x" * (number % 50 * 100)))
        storage.close()
    """
    writer = python(code, tmp_path)
    storage = FileStorage(tmp_path)
    seen = 0
    while writer.poll() is None:
        reader = storage if seen % 2 else FileStorage(tmp_path)
        found = texts(reader, "alice")
        assert len(found) % 3 == 0
        assert found[0::3] == found[1::3] == [str(number) for number in range(len(found) // 3)]
        seen += 1
    finish(writer)
    assert len(texts(storage, "alice")) == 1200
    storage.close()


@pytest.mark.parametrize("fsync", ["always", "no"])
def test_a_writer_that_is_killed_loses_nothing_it_acknowledged(tmp_path: Path, fsync: str, python: Start) -> None:
    code = """
        storage = FileStorage(sys.argv[1], fsync=sys.argv[2])
        begin = int(sys.argv[3])
        for number in range(begin, begin + 100000):
            storage.call(append("alice", number, commit_id=f"n{number}"))
            if number % 5 == 0:
                together(storage, *(append(f"c{other}", number) for other in range(3)))
            os.write(1, b"%d\\n" % number)
    """
    begin = 0
    for round_number in range(6):
        process = python(code, tmp_path, fsync, begin)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{begin}\n"
        time.sleep(0.02 + 0.03 * round_number)
        process.kill()
        acknowledged = [begin, *map(int, process.stdout.read().split())]
        process.wait()
        storage = FileStorage(tmp_path)
        found = [int(text) for text in texts(storage, "alice")]
        assert found == list(range(len(found)))
        assert acknowledged[-1] <= found[-1] <= acknowledged[-1] + 1
        storage.call(append("alice", found[-1], commit_id=f"n{found[-1]}"))  # what a caller does who does not know
        assert len(texts(storage, "alice")) == len(found)
        assert list(storage.verify()) == []
        storage.close()
        begin = len(found)
    assert logs(tmp_path) == {"alice.jsonl", "c0.jsonl", "c1.jsonl", "c2.jsonl"}


def test_the_lock_of_a_killed_process_is_free_at_once_and_that_of_a_stopped_one_is_not_broken(
    tmp_path: Path, python: Start
) -> None:
    code = """
        storage = FileStorage(sys.argv[1])
        storage.call(append("alice", "holder"))
        lock = storage._layout.access.lock("alice")
        assert lock.try_acquire()
        print("held", flush=True)
        import time; time.sleep(60)
    """
    process = python(code, tmp_path)
    says(process, "held")
    process.send_signal(signal.SIGSTOP)
    storage = FileStorage(tmp_path)
    with pytest.raises(StateTimeoutError):
        storage.call(append("alice", 1, deadline=time.monotonic() + 0.2))
    assert texts(storage, "alice") == ["holder"]
    process.kill()
    process.wait()
    storage.call(append("alice", 2, deadline=time.monotonic() + 60))
    assert texts(storage, "alice") == ["holder", "2"]
    storage.close()


def test_an_exclusive_store_is_free_once_its_process_is_killed(tmp_path: Path, python: Start) -> None:
    code = """
        storage = FileStorage(sys.argv[1], exclusive=True)
        storage.call(append("alice", "holder"))
        print("held", flush=True)
        import time; time.sleep(60)
    """
    process = python(code, tmp_path)
    says(process, "held")
    storage = FileStorage(tmp_path, exclusive=True)
    with pytest.raises(StateUnavailableError, match="in use"):
        storage.call(Query("alice", deadline=time.monotonic() + 0.1))
    process.kill()
    process.wait()
    assert texts(storage, "alice") == ["holder"]
    storage.close()


def test_a_lease_outlives_its_process_and_ends_on_time(tmp_path: Path, python: Start) -> None:
    code = """
        from agentstate.operations import Lease
        storage = FileStorage(sys.argv[1])
        assert storage.call(Lease("alice", "take", "theirs", 4))
        os.kill(os.getpid(), 9)
    """
    process = python(code, tmp_path)
    process.wait(30)
    storage = FileStorage(tmp_path)
    assert storage.call(Lease("alice", "take", "mine", 30)) is False
    assert eventually(lambda: storage.call(Lease("alice", "take", "mine", 30)) is True)
    storage.close()


def test_a_context_that_another_process_cleared_is_gone(tmp_path: Path, python: Start) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    finish(python('storage = FileStorage(sys.argv[1]); storage.call(clear("alice")); storage.close()', tmp_path))
    assert look(storage, "alice") is None
    storage.call(append("alice", 2))
    assert texts(storage, "alice") == ["2"]
    storage.close()


def fork(child: object) -> int:
    """Run `child` in a fork of this process and return how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_shares_no_lock_and_no_memory(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "before"))
    lock = storage._layout.access.lock("alice")  # type: ignore[union-attr]
    assert lock.try_acquire()

    def locked() -> None:
        with pytest.raises(StateTimeoutError):  # the lock stays the parent's
            storage.call(append("alice", "child", deadline=time.monotonic() + 0.2))
        assert texts(storage, "alice") == ["before"]

    assert fork(locked) == 0
    other = FileStorage(tmp_path)
    with pytest.raises(StateTimeoutError):  # and the child's end did not free it
        other.call(append("alice", "other", deadline=time.monotonic() + 0.1))
    lock.release()

    def free() -> None:
        storage.call(append("alice", "child"))
        together(storage, append("alice", "child"), append("bob", "child"))
        storage.close()

    assert fork(free) == 0
    storage.call(append("alice", "after"))
    assert texts(storage, "alice") == ["before", "child", "child", "after"]
    other.close()
    storage.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_threads_write_works_in_both_processes(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, fsync="everysec")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            storage.call(append("alice", "thread"))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert fork(lambda: storage.call(append("alice", "child"))) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert texts(storage, "alice").count("child") == 10
    assert list(storage.verify()) == []
    storage.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_an_exclusive_storage_does_not_hold_the_store(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, exclusive=True)
    storage.call(append("alice", 1))

    def child() -> None:
        with pytest.raises(StateUnavailableError, match="in use"):
            storage.call(append("alice", "child", deadline=time.monotonic() + 0.1))

    assert fork(child) == 0
    storage.call(append("alice", 2))
    assert texts(storage, "alice") == ["1", "2"]
    storage.close()


def test_what_was_acknowledged_is_there_after_an_exit_without_close(tmp_path: Path, python: Start) -> None:
    code = """
        storage = FileStorage(sys.argv[1], fsync=sys.argv[2], exclusive=True)
        for number in range(20):
            storage.call(append("alice", number))
    """
    for fsync in ("always", "everysec", "no"):
        finish(python(code, tmp_path / fsync, fsync))
        assert texts(FileStorage(tmp_path / fsync), "alice") == [str(number) for number in range(20)]


def test_lazily_written_data_is_flushed_when_the_interpreter_exits(tmp_path: Path, python: Start) -> None:
    code = """
        def around(name, call, arguments):
            if name == "sync":
                print(name, flush=True)
            return call(*arguments)

        storage = FileStorage(sys.argv[1], fsync="everysec", file_system=Between(around))
        storage.call(append("alice", 1))
    """
    assert finish(python(code, tmp_path)) == ["sync\n"]


def test_many_short_processes_leave_nothing_behind(tmp_path: Path, python: Start) -> None:
    code = 'storage = FileStorage(sys.argv[1]); storage.call(append("alice", os.getpid())); os.kill(os.getpid(), 9)'
    for _ in range(3):
        python(code, tmp_path).wait(30)
    assert logs(tmp_path) == {"alice.jsonl"}
    assert len(lines(tmp_path / "alice.jsonl")) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"alice.jsonl", ".locks", ".leases"}


@pytest.mark.parametrize("slow", ["filelock", "agentstate.storage.documentformat"])
def test_a_fork_while_another_thread_makes_the_first_write_leaves_no_child_waiting(
    tmp_path: Path, slow: str, python: Start
) -> None:
    (tmp_path / "agentup.json").write_text(
        '{"context_id":"agentup","created_at":"2026-01-01T00:00:00","updated_at":"2026-01-01T00:00:00","history":[]}'
    )
    process = python(
        """
        import importlib.abc, signal, threading
        importing, go_on = threading.Event(), threading.Event()

        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == sys.argv[2] and threading.current_thread() is not threading.main_thread():
                    importing.set()
                    go_on.wait(30)

        sys.modules.pop(sys.argv[2], None)
        sys.meta_path.insert(0, Slow())
        storage = FileStorage(sys.argv[1])
        thread = threading.Thread(target=storage.call, args=(append("agentup", "parent"),))
        thread.start()
        assert importing.wait(30)
        threading.Timer(0.3, go_on.set).start()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            FileStorage(sys.argv[1]).call(append("agentup", "child"))
            os._exit(0)
        go_on.set()
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(sorted(texts(storage, "agentup")), flush=True)
        storage.close()
        """,
        tmp_path,
        slow,
    )
    assert finish(process) == ["['child', 'parent']\n"]
