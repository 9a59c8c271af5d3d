"""Groups of storages that say when they are under way: who is told when, and who waits for whom."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentstate import ConversationContext, InMemoryStorage, StateUnavailableError
from agentstate.operations import Append, Commit, Operation, Query
from agentstate.storage import crew
from agentstate.storage.base import Settle
from agentstate.storage.jobs import Group, at_once, held_up, under_way


class Announcing(InMemoryStorage):
    """A storage that waits, and says when it is under way. `work` is what it does with a group."""

    waits = True

    def __init__(self, work: Callable[[Sequence[Operation], Settle], None], **options: Any) -> None:
        super().__init__(**options)
        self.says_when_under_way = True
        self._work = work

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self._work(operations, settle)


def commit(name: str, number: int = 0) -> Commit:
    return Commit(name, (Append((b"%d" % number,)),), f"{name}-{number}")


def names(operations: Sequence[Any]) -> list[str]:
    return [operation.context_id for operation in operations]


def settle_all(operations: Sequence[Any], settle: Settle) -> None:
    for index, operation in enumerate(operations):
        settle(index, operation.commit_id.encode())


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not happen within 20 s"
        time.sleep(0.001)


@pytest.fixture
def endless_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE", 60.0)


@pytest.mark.usefixtures("endless_patience")
def test_those_who_wait_for_a_group_are_told_when_the_next_one_is_under_way() -> None:
    told: list[str] = []
    seen: list[tuple[list[str], list[str], list[str]]] = []
    begun, gate = threading.Event(), threading.Event()

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        begun.set()
        assert gate.wait(20)
        before = list(told)
        under_way(settle)
        seen.append((names(operations), before, list(told)))
        settle_all(operations, settle)

    storage = Announcing(work)
    submit = storage.dispatcher.submit
    submit((commit("a"),), lambda outcomes: told.append("a"))
    assert begun.wait(20)
    submit((commit("b"),), lambda outcomes: told.append("b"))
    submit((commit("c"),), lambda outcomes: told.append("c"))
    gate.set()
    eventually(lambda: len(told) == 3)
    assert seen == [(["a"], [], []), (["b", "c"], [], ["a"])]


@pytest.mark.usefixtures("endless_patience")
def test_one_group_after_the_other_is_carried_out_while_nothing_takes_long() -> None:
    running = 0
    sizes: list[int] = []

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        nonlocal running
        running += 1
        assert running == 1
        under_way(settle)
        time.sleep(0.001)
        sizes.append(len(operations))
        running -= 1
        settle_all(operations, settle)

    async def converse(context: ConversationContext, name: str) -> None:
        for number in range(10):
            await context.set_variable(name, "x", number)

    async def main() -> None:
        context = ConversationContext(Announcing(work))
        await asyncio.gather(*(converse(context, f"c{number}") for number in range(20)))

    asyncio.run(main())
    assert sum(sizes) == 200


@pytest.mark.usefixtures("endless_patience")
def test_a_group_that_nothing_follows_is_told_of_at_its_end() -> None:
    done = threading.Event()
    storage = Announcing(settle_all)
    storage.dispatcher.submit((commit("a"),), lambda outcomes: done.set())
    assert done.wait(20)


def test_a_group_that_takes_long_is_not_waited_for() -> None:
    told: list[str] = []
    begun, gate = threading.Event(), threading.Event()

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        for index, operation in enumerate(operations):
            if operation == commit("stuck"):
                begun.set()
                assert gate.wait(20)
            settle(index, b"")

    storage = Announcing(work)
    submit = storage.dispatcher.submit
    first: list[Any] = []

    def hold_first(outcomes: Any) -> None:
        first.append(outcomes)

    submit((commit("first"),), hold_first)
    eventually(lambda: first)
    jobs = [(commit("quick"), commit("quick", 1)), (commit("stuck"),), (commit("late"),)]
    from agentstate.storage.jobs import CallBack

    storage.dispatcher.submit_jobs(
        [CallBack(job, lambda outcomes, job=job: told.append(job[0].context_id)) for job in jobs]  # type: ignore[misc]
    )
    assert begun.wait(20)
    submit((commit("other"),), lambda outcomes: told.append("other"))
    submit((commit("stuck", 1),), lambda outcomes: told.append("behind"))
    eventually(lambda: len(told) == 2)
    assert sorted(told) == ["other", "quick"], "it has to wait for the context that is stuck"
    gate.set()
    eventually(lambda: len(told) == 5)
    assert told.index("behind") > told.index("stuck")


def test_nobody_waits_long_for_a_next_group_that_does_not_get_under_way() -> None:
    told: list[str] = []
    begun, first_gate, second_gate = threading.Event(), threading.Event(), threading.Event()

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        begun.set()
        assert (first_gate if operations[0] == commit("a") else second_gate).wait(20)
        settle_all(operations, settle)

    storage = Announcing(work)
    storage.dispatcher.submit((commit("a"),), lambda outcomes: told.append("a"))
    assert begun.wait(20)
    storage.dispatcher.submit((commit("b"),), lambda outcomes: told.append("b"))
    first_gate.set()
    eventually(lambda: told == ["a"])
    second_gate.set()
    eventually(lambda: told == ["a", "b"])


def test_nobody_is_told_before_the_outcomes_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[Any]] = {}
    begun, gate = threading.Event(), threading.Event()
    end = Group.end

    def end_slowly(group: Group) -> None:
        time.sleep(0.1)  # more than the patience of those who wait
        end(group)

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        begun.set()
        assert gate.wait(20)
        settle_all(operations, settle)

    monkeypatch.setattr(Group, "end", end_slowly)
    monkeypatch.setattr(crew, "PATIENCE", 60.0)
    storage = Announcing(work)
    storage.dispatcher.submit((commit("a"),), lambda outcomes: told.update(a=outcomes))
    assert begun.wait(20)
    storage.dispatcher.submit((commit("b"),), lambda outcomes: told.update(b=outcomes))
    monkeypatch.setattr(crew, "PATIENCE", 0.01)
    gate.set()
    eventually(lambda: len(told) == 2)
    assert told == {"a": [b"a-0"], "b": [b"b-0"]}


@pytest.mark.usefixtures("endless_patience")
def test_a_storage_that_says_that_it_is_held_up_holds_nobody_up() -> None:
    told: list[str] = []
    begun, gate = threading.Event(), threading.Event()

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        if commit("stuck") in operations:
            with at_once(settle):
                settle(0, b"")
                held_up(settle)
                held_up(settle)  # saying it again does nothing
            begun.set()
            assert gate.wait(20)
            with at_once(settle):
                for index in range(1, len(operations)):
                    settle(index, b"")
        else:
            settle_all(operations, settle)

    storage = Announcing(work)
    from agentstate.storage.jobs import CallBack

    storage.dispatcher.submit_jobs(
        [
            CallBack((commit(name),), lambda outcomes, name=name: told.append(name))  # type: ignore[misc]
            for name in ("quick", "stuck")
        ]
    )
    assert begun.wait(20)
    assert told == ["quick"]
    storage.dispatcher.submit((commit("other"),), lambda outcomes: told.append("other"))
    eventually(lambda: told == ["quick", "other"])
    gate.set()
    eventually(lambda: told == ["quick", "other", "stuck"])


def test_closing_waits_until_everybody_was_told() -> None:
    told: list[int] = []

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        settle_all(operations, settle)

    def slowly(number: int) -> Callable[[Any], None]:
        def done(outcomes: Any) -> None:
            time.sleep(0.002)
            told.append(number)

        return done

    storage = Announcing(work)
    for number in range(30):
        storage.dispatcher.submit((commit(f"c{number}"),), slowly(number))
    storage.close()
    assert sorted(told) == list(range(30))


def test_a_storage_that_breaks_down_or_forgets_leaves_nobody_waiting() -> None:
    def work(operations: Sequence[Operation], settle: Settle) -> None:
        if Query("broken") in operations:
            raise ZeroDivisionError("a defect")
        if Query("left") in operations:
            raise SystemExit("of all there is")

    told: dict[str, Any] = {}
    storage = Announcing(work)
    for name in ("broken", "left", "forgotten"):
        storage.dispatcher.submit((Query(name),), lambda outcomes, name=name: told.update({name: outcomes[0]}))  # type: ignore[misc]
        eventually(lambda name=name: name in told)  # type: ignore[misc]
    assert "a defect" in str(told["broken"])
    assert "SystemExit" in str(told["left"])
    assert isinstance(told["forgotten"], StateUnavailableError)


@pytest.mark.parametrize("patience", [0.0, 0.002])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_storage_does_each_job_is_carried_out_in_order_and_told_once(
    seed: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "PATIENCE", patience)
    chance = random.Random(seed)
    lock = threading.Lock()
    running: dict[str, int] = {}
    executed: list[Commit] = []

    def work(operations: Sequence[Any], settle: Settle) -> None:
        with lock:
            own = Counter(names(operations))
            assert not own.keys() & running.keys(), "two groups at a time hold operations of one context"
            running.update(own)
            executed.extend(operations)
            mood, places = chance.random(), chance.sample(range(len(operations)), len(operations))
        if mood < 0.7:
            under_way(settle)
        for start in range(0, len(places), 10):
            time.sleep(chance.choice((0, 0, 0.0005, 0.004)))
            if mood < 0.2:
                held_up(settle)
            with at_once(settle):
                for index in places[start : start + 10]:
                    operation = operations[index]
                    with lock:
                        running[operation.context_id] -= 1
                        if not running[operation.context_id]:
                            del running[operation.context_id]
                    settle(index, operation.commit_id.encode())

    storage = Announcing(work, deadline=60.0)
    told: list[tuple[int, list[Any]]] = []
    given: list[list[Commit]] = []
    for number in range(400):
        name = f"c{chance.randrange(25)}"
        given.append([commit(name, 10 * number + part) for part in range(chance.choice((1, 1, 1, 3)))])
        storage.dispatcher.submit(given[-1], lambda outcomes, number=number: told.append((number, outcomes)))  # type: ignore[misc]
        if chance.random() < 0.1:
            time.sleep(0.001)
    assert storage.dispatcher.wait_until_empty(20)
    assert len(told) == 400
    assert dict(told) == {
        number: [operation.commit_id.encode() for operation in job] for number, job in enumerate(given)
    }
    for name in {job[0].context_id for job in given}:
        assert [each for each in executed if each.context_id == name] == [
            each for job in given for each in job if each.context_id == name
        ]
    counted = storage.statistics()
    assert sum(counted.operations.values()) == sum(map(len, given))
