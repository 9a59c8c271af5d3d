"""Groups of storages that say when they are under way: who is told when, and who waits for whom."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from agentstate import ConversationContext, InMemoryStorage, StateUnavailableError
from agentstate.operations import Append, Commit, Operation, Query
from agentstate.storage import crew
from agentstate.storage.base import Settle
from agentstate.storage.bell import CAN_RING, Bell
from agentstate.storage.jobs import CallBack, Group, at_once, held_up, under_way


class Announcing(InMemoryStorage):
    """A storage that waits, and says when it is under way. `work` is what it does with a group."""

    waits = True

    def __init__(self, work: Callable[[Sequence[Operation], Settle], None], **options: Any) -> None:
        super().__init__(**options)
        self.says_when_under_way = True
        self._work = work

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self._work(operations, settle)


class Answer:
    """What a step waits for. Its answer has come once it is `given`, or its deadline has passed."""

    def __init__(self, seconds: float = 20.0) -> None:
        self.deadline = time.monotonic() + seconds
        self._ours, self._theirs = socket.socketpair()

    def fileno(self) -> int:
        return self._ours.fileno()

    def give(self) -> None:
        self._theirs.send(b"x")

    def take(self) -> bool:
        """Wait for it. Returns whether it came in time."""
        self._ours.settimeout(max(0.001, self.deadline - time.monotonic()))
        try:
            return bool(self._ours.recv(1))
        except TimeoutError:
            return False
        finally:
            self._ours.close()
            self._theirs.close()


Steps = Callable[[Sequence[Operation], Settle], Iterator[Answer]]


class Stepping(Announcing):
    """A storage that carries groups out in steps, with `begin` or (not `in_steps`) without."""

    def __init__(self, steps: Steps, *, in_steps: bool = True, **options: Any) -> None:
        super().__init__(self._all_at_once, **options)
        self._steps = steps
        self._in_steps = in_steps

    def begin(self, operations: Sequence[Operation], settle: Settle) -> Iterator[Answer] | None:
        return self._steps(operations, settle) if self._in_steps else None

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self._work(operations, settle)

    def _all_at_once(self, operations: Sequence[Operation], settle: Settle) -> None:
        for _ in self._steps(operations, settle):
            pass


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


class Server:
    """Notes what is sent to it, by the name of its first context, and answers when it is told to."""

    def __init__(self) -> None:
        self.sent: dict[str, Answer] = {}
        self.told: list[str] = []
        self.late: list[str] = []
        self.seconds = 20.0
        self.gates: dict[str, threading.Event] = {}  # what a group waits for between two answers
        self.storage = Stepping(self._steps)

    def _steps(self, operations: Sequence[Any], settle: Settle) -> Iterator[Answer]:
        first = operations[0].context_id
        for index, operation in enumerate(operations):
            answer = self.sent[operation.context_id] = Answer(self.seconds)
            yield answer
            if not answer.take():
                self.late.append(first)
            if first in self.gates:
                assert self.gates[first].wait(20)
            settle(index, b"")

    def submit(self, *names: str, then: Callable[[], object] = lambda: None) -> None:
        """One group of a job with each of these names, if nothing is under way."""

        def tell(name: str) -> Callable[[Any], None]:
            def told(_: Any) -> None:
                self.told.append(name)
                then()

            return told

        self.storage.dispatcher.submit_jobs([CallBack((commit(name),), tell(name)) for name in names])

    def gets(self, name: str) -> None:
        eventually(lambda: name in self.sent)

    def hears(self, *names: str) -> None:
        eventually(lambda: set(names) <= set(self.told))


@pytest.mark.usefixtures("endless_patience")
def test_the_next_group_is_sent_while_the_last_one_is_on_its_way() -> None:
    server = Server()
    server.submit("a")
    server.gets("a")
    server.submit("b")
    server.gets("b")
    server.submit("c")
    time.sleep(0.02)
    assert [*server.sent] == ["a", "b"], "a third one is of no use to the server yet"
    assert not server.told
    server.sent["a"].give()
    server.hears("a")
    server.gets("c")
    assert server.told == ["a"]
    server.sent["c"].give()
    server.sent["b"].give()
    server.hears("b", "c")


def test_answers_that_are_there_do_not_wait_for_those_of_an_earlier_group() -> None:
    server = Server()
    server.submit("a")
    server.gets("a")
    server.submit("b")
    server.gets("b")
    server.sent["b"].give()
    server.hears("b")
    assert server.told == ["b"]
    server.sent["a"].give()
    server.hears("a")


def test_a_group_that_is_long_on_its_way_is_not_in_the_way() -> None:
    server = Server()
    for name in ("a", "b", "c", "d"):
        server.submit(name)
        server.gets(name)
    server.submit("e")
    time.sleep(0.05)
    assert "e" not in server.sent, "four are as many as the storage wants"
    server.sent["c"].give()
    server.hears("c")
    server.gets("e")
    for name in ("e", "d", "b", "a"):
        server.sent[name].give()
        server.hears(name)
    assert server.told == ["c", "e", "d", "b", "a"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_group_whose_deadline_passes_goes_on_without_its_answer(name: str) -> None:
    server = Server()
    for each in ("a", "b"):
        server.seconds = 0.1 if each == name else 20.0
        server.submit(each)
        server.gets(each)
    server.hears(name)
    assert server.late == [name]
    server.sent["b" if name == "a" else "a"].give()
    server.hears("a", "b")


@pytest.mark.usefixtures("endless_patience")
def test_who_has_more_answers_to_come_is_still_the_first() -> None:
    server = Server()
    server.storage.shares = 1  # type: ignore[misc]
    server.submit("a1", "a2")
    server.gets("a1")
    server.submit("b")
    server.gets("b")
    server.sent["a1"].give()
    server.gets("a2")
    server.sent["a2"].give()
    server.hears("a1", "a2")
    server.sent["b"].give()
    server.hears("b")


def test_what_is_known_of_a_group_that_is_long_on_its_way_is_told() -> None:
    server = Server()
    server.storage.shares = 1  # type: ignore[misc]
    server.submit("a1", "a2")
    server.gets("a1")
    server.sent["a1"].give()
    server.hears("a1")
    assert server.told == ["a1"]
    server.sent["a2"].give()
    server.hears("a2")


def test_a_group_that_was_given_up_comes_back_to_whoever_leads() -> None:
    server = Server()
    server.storage.shares = 1  # type: ignore[misc]
    gate = server.gates["a1"] = threading.Event()
    server.submit("a1", "a2")
    server.gets("a1")
    server.submit("b")
    server.gets("b")
    server.sent["a1"].give()
    time.sleep(0.1)  # now another worker waits for "b" alone, with patience until its deadline
    gate.set()
    server.gets("a2")
    server.sent["a2"].give()
    eventually(lambda: server.told == ["a1", "a2"])
    server.sent["b"].give()
    server.hears("b")


def test_who_takes_long_to_be_told_holds_nobody_up() -> None:
    server = Server()
    heard = threading.Event()
    waited: list[bool] = []
    server.submit("a", then=lambda: waited.append(heard.wait(20)))
    server.gets("a")
    server.submit("b", then=heard.set)
    server.gets("b")
    server.sent["a"].give()
    server.hears("a")
    server.sent["b"].give()
    eventually(heard.is_set)
    assert server.storage.dispatcher.wait_until_empty(20)
    assert (server.told, waited) == (["a", "b"], [True])


def test_a_step_that_breaks_down_leaves_nobody_waiting() -> None:
    answers: list[Answer] = []

    def steps(operations: Sequence[Operation], settle: Settle) -> Iterator[Answer]:
        if Query("at once") in operations:
            raise ZeroDivisionError("before anything was sent")
        answers.append(Answer())
        yield answers[-1]
        answers[-1].take()
        if Query("later") in operations:
            raise ZeroDivisionError("a defect")

    told: dict[str, Any] = {}
    storage = Stepping(steps)
    for name in ("at once", "later", "forgotten"):
        storage.dispatcher.submit((Query(name),), lambda outcomes, name=name: told.update({name: outcomes[0]}))  # type: ignore[misc]
        if name != "at once":
            eventually(lambda name=name: len(answers) == ["at once", "later", "forgotten"].index(name))  # type: ignore[misc]
            answers[-1].give()
        eventually(lambda name=name: name in told)  # type: ignore[misc]
    assert "before anything was sent" in str(told["at once"])
    assert "a defect" in str(told["later"])
    assert "forgot an operation" in str(told["forgotten"])


def test_no_group_is_larger_than_the_storage_wants_it() -> None:
    sizes: list[int] = []

    def work(operations: Sequence[Operation], settle: Settle) -> None:
        sizes.append(len(operations))
        settle_all(operations, settle)

    storage = Announcing(work)
    storage.largest_group = 10  # type: ignore[misc]
    told: list[Any] = []
    storage.dispatcher.submit_jobs([CallBack((commit(f"c{number}"),), told.append) for number in range(35)])
    eventually(lambda: len(told) == 35)
    assert sum(sizes) == 35
    assert max(sizes) == 10


def test_a_class_with_another_execute_is_not_carried_out_in_steps() -> None:
    class Counting(Stepping):
        calls = 0

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            self.calls += 1
            super().execute(operations, settle)

    def steps(operations: Sequence[Operation], settle: Settle) -> Iterator[Answer]:
        answer = Answer()
        answer.give()
        yield answer
        assert answer.take()
        settle_all(operations, settle)

    storage = Counting(steps)
    assert storage.begin((commit("a"),), lambda index, outcome: None) is None
    told: list[Any] = []
    storage.dispatcher.submit((commit("a"),), told.append)
    eventually(lambda: told)
    assert storage.calls == 1


@pytest.mark.skipif(not CAN_RING, reason="this platform has no poll")
@pytest.mark.parametrize("platform", ["linux", "another"])
def test_a_bell_wakes_who_waits_however_often_it_is_rung(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform if sys.platform == "linux" else sys.platform)
        bell = Bell()
    try:
        answer = Answer()
        assert bell.wait([answer.fileno()], 0.0) == set()
        answer.give()
        assert bell.wait([answer.fileno()], 20.0) == {answer.fileno()}
        answer.take()
        threading.Timer(0.01, bell.ring).start()
        began = time.monotonic()
        assert bell.wait([], 20.0) == set()
        assert time.monotonic() - began < 10
        for _ in range(100_000):  # more than a pipe takes
            bell.ring()
        assert bell.wait([], 20.0) == set()
    finally:
        bell.close()


@pytest.mark.parametrize("in_steps", [False, True], ids=["at once", "in steps"])
@pytest.mark.parametrize("patience", [0.0, 0.002])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_storage_does_each_job_is_carried_out_in_order_and_told_once(
    seed: int, patience: float, in_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "PATIENCE", patience)
    chance = random.Random(seed)
    lock = threading.Lock()
    running: dict[str, int] = {}
    executed: list[Commit] = []

    def steps(operations: Sequence[Any], settle: Settle) -> Iterator[Answer]:
        with lock:
            own = Counter(names(operations))
            assert not own.keys() & running.keys(), "two groups at a time hold operations of one context"
            running.update(own)
            executed.extend(operations)
            mood, places = chance.random(), chance.sample(range(len(operations)), len(operations))
        if mood < 0.7:
            under_way(settle)
        for start in range(0, len(places), 10):
            answer = Answer()
            threading.Timer(chance.choice((0, 0, 0.0005, 0.004)), answer.give).start()
            yield answer
            assert answer.take()
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

    storage = Stepping(steps, in_steps=in_steps, deadline=60.0)
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
