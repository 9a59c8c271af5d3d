"""Tests of the harness: its parts, and that it finds the bugs seeded into the library."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from servers import require_server

from torture.figures import Figures
from torture.linearizable import READ, Call, is_linearizable
from torture.longrun import BEGIN, END, LongRun
from torture.model import Model, Step, Steps
from torture.mutations import MUTATIONS, how_caught
from torture.seam import Disk
from torture.witness import accuse

# One of each kind; all of them are in the long run.
QUICK = ("a commit is not flushed", "the checksum is ignored", "a batch is committed in two parts", "a retry is blind")


@pytest.mark.skipif(sys.platform == "win32", reason="fork and signals")
@pytest.mark.parametrize("name", QUICK)
def test_a_seeded_bug_is_caught(name: str) -> None:
    if "valkey" in MUTATIONS[name].file:
        require_server("9.1")
    assert how_caught(name, 7)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_bug_still_applies(name: str) -> None:
    import agentstate

    mutation = MUTATIONS[name]
    text = (Path(agentstate.__file__).parent / mutation.file).read_text()
    assert text.count(mutation.old) == 1


@pytest.mark.parametrize(
    ("history", "figure"),
    [(["a"], "lost"), ([], "lost"), (["a", "b", "b"], "doubled"), (["b", "a"], "silent"), (["a", "b", "c"], "silent")],
)
def test_what_is_wrong_is_called_by_its_name(history: list[str], figure: str) -> None:
    figures = Figures("", 0)
    accuse(figures, Model(True, 0, history), [Model(True, 0, ["a", "b"])], "now")
    assert getattr(figures, figure) == 1
    assert not figures.clean


def test_a_call_hangs_one_second_past_its_deadline() -> None:
    figures = Figures("", 0)
    figures.took(1.9, 1.0, "a call")
    assert figures.clean
    figures.took(2.1, 1.0, "a call")
    assert figures.hanging == 1


def test_figures_survive_their_text() -> None:
    figures = Figures("x", 7, faults=3)
    figures.lose("everything")
    assert Figures.from_json(figures.to_json()) == figures


@pytest.mark.skipif(sys.platform == "win32", reason="fork and signals")
def test_a_long_run_goes_on_where_it_ended_and_writes_its_page(tmp_path: Path) -> None:
    state, page = tmp_path / "run.json", tmp_path / "page.md"
    run = LongRun(7, scale=0.024)
    run.run(["handlers"], 0.0, state)
    assert run.progress["handlers"].made == 0
    run.save(state)
    again = LongRun.load(state)
    assert again == run
    again.run(["handlers"], None, state)
    assert LongRun.load(state) == again
    assert again.progress["handlers"].slices == 2
    figures = again.total
    assert (figures.faults, figures.calls, figures.clean) == (48, 48, True)
    page.write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    for _ in range(2):
        again.report(page)
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
        assert text.count("| `handlers` | 2% | 48 | 48 | 0 | 0 | 0 | 0 | 0 |") == 1


def test_the_model_answers_as_the_documentation_says() -> None:
    model = Model()
    for step, answer in (
        (Step("add_to_history", ("user", "a")), None),
        (Step("increment_variable", ("n", 2)), 2),
        (Step("trim_history", (0,)), None),
        (Step("pop_history", (3,)), []),
        (Step("delete_variable", ("n",)), True),
        (Step("delete_variable", ("n",)), False),
        (Step("clear_context", ()), True),
        (Step("clear_context", ()), False),
    ):
        model, answered = model.after(step)
        assert answered == answer
    assert model == Model()


def test_the_same_seed_gives_the_same_steps() -> None:
    one, other = (Steps(random.Random(3)) for _ in range(2))
    assert [next(one) for _ in range(100)] == [next(other) for _ in range(100)]


def call(begin: float, end: float, name: str, arguments: tuple[object, ...] = (), answer: object = None) -> Call:
    return Call(begin, end, Step(name, arguments), answer)


def test_a_history_that_has_an_order_is_linearizable() -> None:
    increments = [call(0, 9, "increment_variable", ("n", 1), value) for value in (3, 1, 2)]
    assert is_linearizable(increments)
    assert is_linearizable([*increments, call(10, 11, READ, (), Model(True, variables={"n": 3}))])


@pytest.mark.parametrize(
    "calls",
    [
        # Two that saw the same, one that ended before what it follows began, a read of the past, half a batch.
        [call(0, 9, "increment_variable", ("n", 1), 1), call(0, 9, "increment_variable", ("n", 1), 1)],
        [call(0, 1, "increment_variable", ("n", 1), 2), call(2, 3, "increment_variable", ("n", 1), 1)],
        [call(0, 1, "add_to_history", ("user", "a")), call(2, 3, READ, (), Model())],
        [
            call(0, 5, "batch", (Step("add_to_history", ("user", "a")), Step("add_to_history", ("user", "b")))),
            call(1, 2, READ, (), Model(True, history=["a"])),
        ],
    ],
)
def test_a_history_that_has_none_is_not(calls: list[Call]) -> None:
    assert not is_linearizable(calls)


def test_a_disk_may_lose_what_was_not_synced_and_nothing_else(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    fs = disk.seam
    synced, unsynced = str(tmp_path / "synced"), str(tmp_path / "unsynced")
    import os

    for path in (synced, unsynced):
        fd = fs.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        fs.write(fd, b"first,")
        if path == synced:
            fs.sync(fd)
            fs.sync_folder(str(tmp_path))
        fs.write(fd, b"second")
        fs.close(fd)
    states = [state for _, state in disk.states(random.Random(1))]
    assert all((state[synced] or b"").startswith(b"first,") for state in states)
    assert {state[synced] for state in states} >= {b"first,", b"first,second", b"first," + bytes(6)}
    assert any(unsynced not in state for state in states)
    assert {state.get(unsynced) for state in states} >= {None, b"", b"first,second", b"first,"}
