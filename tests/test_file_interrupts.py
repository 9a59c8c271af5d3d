"""An exception at any moment (a signal's handler, a RecursionError) leaves no false memory and no lock behind."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filetools import Interruption, append, clear, commit, interrupted, look, put, texts, together

from agentstate import FileStorage
from agentstate.errors import StateConflictError, StateError
from agentstate.operations import Increment, Listing, Pop, Window
from agentstate.storage.file import logimage

# Interrupted between opening a folder and the block that closes it, the garbage collector closes it; and it closes
# generators, which may be interrupted as well.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a log is there after a few messages."""
    monkeypatch.setattr(logimage, "_CHECKPOINT_EVERY", 700)
    monkeypatch.setattr(logimage, "_RECENT_MESSAGES", 4)
    monkeypatch.setattr(logimage, "_RUN_BYTES", 500)


def _from_another_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in another thread, which can take no lock that is still held here."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(20)
    assert results, "it waits for a lock that nobody holds any more"
    return results[0]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda storage: look(storage, "c"),
        lambda storage: look(storage, "c", Window(limit=3)),
        lambda storage: look(storage, "c", Window(limit=2, before=3)),
        lambda storage: storage.call(Listing()),
        lambda storage: storage.call(Listing(user="alice")),
    ],
    ids=["all", "the last ones", "the first ones", "listing", "listing of one user"],
)
def test_a_read_that_is_interrupted_anywhere_is_forgotten(tmp_path: Path, exclusive: bool, read: Any) -> None:
    reader = FileStorage(tmp_path, exclusive=exclusive)
    # The owner of an exclusive store is the only one who writes.
    writer = reader if exclusive else FileStorage(tmp_path)
    for step in itertools.count():
        writer.call(clear("c"))
        writer.call(append("c", *range(6)))
        assert len(texts(reader, "c")) == 6
        writer.call(append("c", 6))
        writer.call(append("c", 7, 8))
        more = interrupted(step, lambda: read(reader))
        writer.call(append("c", 9))
        expected = [str(number) for number in range(10)]
        assert texts(reader, "c") == expected, f"after an interruption at step {step}"
        if step % 5 == 0:
            _from_another_thread(lambda: reader.call(append("c", "popped", deadline=time.monotonic() + 10)))
            reader.call(commit("c", Pop(1)))
            assert texts(writer, "c") == expected
        if not more:
            break
    assert step > 20
    reader.close()
    writer.close()


WRITES: dict[str, Callable[[str], list[Any]]] = {
    "append": lambda id_: [append("c", id_, commit_id=id_)],
    "increment": lambda id_: [commit("c", Increment("n", b"1"), commit_id=id_)],
    "clear": lambda id_: [clear("c", commit_id=id_)],
    "create": lambda id_: [append(f"new{id_}", id_, commit_id=id_)],
    "group": lambda id_: [append("c", id_, commit_id=id_), append("d", id_, commit_id=id_)],
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_a_write_that_is_interrupted_anywhere_is_done_or_not_and_holds_no_lock(
    tmp_path: Path, kind: str, fsync: str
) -> None:
    storage, other = FileStorage(tmp_path, fsync=fsync), FileStorage(tmp_path)
    for step in itertools.count():
        storage.call(clear("c"))
        storage.call(append("c", "before"))
        texts(other, "c")
        operations = WRITES[kind](f"commit-{step}")

        def work(operations: list[Any] = operations) -> None:
            together(storage, *operations) if len(operations) > 1 else storage.call(operations[0])

        more = interrupted(step, work)
        for operation in operations:
            context_id = operation.context_id
            now = look(other, context_id)
            assert look(storage, context_id) == now
            # The same again does nothing if it was done, and is done now if not.
            again = operation._replace(deadline=time.monotonic() + 10)
            _from_another_thread(lambda again=again: storage.call(again))  # type: ignore[misc]
            if kind == "append":
                assert texts(other, "c").count(operation.commit_id) == 1
            assert (
                _from_another_thread(
                    lambda context_id=context_id: other.call(
                        append(context_id, "after", deadline=time.monotonic() + 10)
                    )  # type: ignore[misc]
                )
                == b""
            )
            assert texts(storage, context_id) == texts(other, context_id) == texts(FileStorage(tmp_path), context_id)
        if kind == "increment":
            assert look(other, "c").variables["n"] == b"1"  # type: ignore[union-attr]
        if not more:
            break
    assert step > 20
    storage.close()
    other.close()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_a_call_that_runs_out_of_stack_anywhere_holds_no_lock(tmp_path: Path, layout: str) -> None:
    storage = FileStorage(tmp_path, layout=layout)
    storage.call(append("c", "before"))
    limit = sys.getrecursionlimit()

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        else:
            storage.call(append("c", "deep"))

    outcomes = set()
    depth = len(_stack())
    try:
        for left in range(3, 60):
            sys.setrecursionlimit(depth + 100 + left)
            try:
                deep(98)
                outcomes.add("done")
            except RecursionError:
                outcomes.add("refused")
            except StateError as error:
                outcomes.add(type(error).__name__)
            sys.setrecursionlimit(limit)
            _from_another_thread(lambda: storage.call(put("c", x=b"1")._replace(deadline=time.monotonic() + 10)))
    finally:
        sys.setrecursionlimit(limit)
    assert {"done", "refused"} <= outcomes
    assert texts(storage, "c") == texts(FileStorage(tmp_path, layout=layout), "c")
    storage.close()


def _stack() -> list[Any]:
    frame: Any = sys._getframe()
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def test_a_call_from_within_a_call_of_the_same_thread_is_refused_at_once(tmp_path: Path) -> None:
    """So a signal's handler may end up, which uses the storage that the main thread is using."""
    from filetools import Between

    between = Between()
    storage = FileStorage(tmp_path, file_system=between)
    storage.call(append("c", 1))
    refused: list[StateError] = []

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "write":
            between.around = lambda name, call, arguments: call(*arguments)
            with pytest.raises(StateConflictError, match="signal handler") as caught:
                storage.call(append("c", "from within"))
            refused.append(caught.value)
        return call(*arguments)

    between.around = around
    storage.call(append("c", 2))
    assert len(refused) == 1
    storage.call(append("c", 3))
    assert texts(storage, "c") == ["1", "2", "3"]
    storage.close()


def test_interruption_is_not_an_error_of_ours() -> None:
    assert not issubclass(Interruption, Exception)
