"""The engine in front of storages made to be slow, stuck or broken."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateOutcomeUnknownError,
    StateStorage,
    StateUnavailableError,
    SyncConversationContext,
)
from agentstate.engine import CallBack, Job, engine_of
from agentstate.operations import Append, Commit, Delete, Listing, Operation, Query, Window
from agentstate.storage.base import Settle

INSIDE = ("perform", "_in_this_thread", "_check_entry", "_leave", "_end_of_run", "_request")


class Gated(InMemoryStorage):
    """A storage that waits: each `execute` is recorded, and held until its gate opens."""

    blocking = True
    concurrency = 2

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.calls: list[list[Operation]] = []

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self.calls.append(list(operations))
        assert self.gate.wait(20)
        super().execute(operations, settle)


def submit(storage: StateStorage, operations: Sequence[Operation], function: Callable[[list[Any]], object]) -> Job:
    """Queue a job whose outcomes are passed to a function."""
    job = CallBack(operations, lambda job: function(job.outcomes))
    engine_of(storage).submit(job)
    return job


def append(context_id: str, number: int) -> Commit:
    return Commit(context_id, (Append((b"%d" % number,)),), f"{context_id}-{number}")


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not happen within 20 s"
        time.sleep(0.001)


class Collected:
    """Outcomes of submitted jobs, in the order in which they came."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, list[Any]]] = []

    def of(self, name: str) -> Callable[[list[Any]], None]:
        return lambda outcomes: self.outcomes.append((name, outcomes))

    def __len__(self) -> int:
        return len(self.outcomes)


def test_what_waits_while_a_group_is_executed_travels_as_one_group() -> None:
    storage = Gated()
    storage.concurrency = 1  # type: ignore[misc]
    done = Collected()
    submit(storage, (append("first", 0),), done.of("first"))
    eventually(lambda: storage.calls)
    for number in range(20):
        submit(storage, (append(f"c{number}", 0),), done.of(str(number)))
    storage.gate.set()
    eventually(lambda: len(done) == 21)
    assert [len(call) for call in storage.calls] == [1, 20]


def test_operations_of_one_context_are_executed_in_order_and_never_in_two_groups_at_a_time() -> None:
    storage = Gated()
    done = Collected()
    for number in range(50):
        submit(storage, (append("a", number),), done.of(str(number)))
    eventually(lambda: storage.calls)
    time.sleep(0.02)
    assert len(storage.calls) == 1, "a second group began with operations of the same context"
    storage.gate.set()
    eventually(lambda: len(done) == 50)
    assert [name for name, _ in done.outcomes] == [str(number) for number in range(50)]
    messages = storage.call(Query("a", history=Window())).messages  # type: ignore[union-attr]
    assert list(messages) == [b"%d" % number for number in range(50)]


def test_a_stuck_context_does_not_hold_up_the_others() -> None:
    class OneIsStuck(InMemoryStorage):
        blocking = True
        concurrency = 2
        freed = threading.Event()

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            if any(getattr(operation, "context_id", "") == "stuck" for operation in operations):
                assert self.freed.wait(20)
            super().execute(operations, settle)

    storage = OneIsStuck()
    done = Collected()
    submit(storage, (append("stuck", 0),), done.of("stuck"))
    time.sleep(0.02)
    for number in range(30):
        submit(storage, (append(f"c{number}", 0),), done.of("other"))
    eventually(lambda: engine_of(storage).look_after() and len(done) == 30)  # as whoever waits does
    assert {name for name, _ in done.outcomes} == {"other"}
    storage.freed.set()
    eventually(lambda: len(done) == 31)


def test_outcomes_known_early_are_delivered_before_the_group_ends() -> None:
    class OneWaits(InMemoryStorage):
        blocking = True
        concurrency = 1
        freed = threading.Event()

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            for index, operation in enumerate(operations):
                if operation == append("c", 0):
                    assert self.freed.wait(20)
                super().execute((operation,), lambda _, outcome, index=index: settle(index, outcome))  # type: ignore[misc]

    storage = OneWaits()
    done = Collected()
    for name in ("a", "b", "c"):
        submit(storage, (append(name, 0),), done.of(name))
    eventually(lambda: len(done) == 2)
    assert [name for name, _ in done.outcomes] == ["a", "b"]
    storage.freed.set()
    eventually(lambda: len(done) == 3)


def test_a_queued_job_can_be_taken_back_and_is_never_executed() -> None:
    storage = Gated()
    done = Collected()
    submit(storage, (append("a", 0),), done.of("running"))
    eventually(lambda: storage.calls)
    second = submit(storage, (append("a", 1),), done.of("second"))
    third = submit(storage, (append("a", 2),), done.of("third"))
    assert engine_of(storage).withdraw(second)
    assert not engine_of(storage).withdraw(second), "it was taken back already"
    storage.gate.set()
    eventually(lambda: len(done) == 2)
    assert [name for name, _ in done.outcomes] == ["running", "third"]
    assert not engine_of(storage).withdraw(third), "it is done"


def test_many_threads_lose_nothing_and_keep_their_order() -> None:
    class Slow(InMemoryStorage):
        blocking = True
        concurrency = 2

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            time.sleep(0.0002)
            super().execute(operations, settle)

    context = SyncConversationContext(Slow(deadline=60.0))

    def write(writer: int) -> None:
        for number in range(40):
            context.add_to_history(f"c{number % 3}", "user", [writer, number])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [message["content"] for number in range(3) for message in context.get_history(f"c{number}")]
    assert sorted(seen) == [[writer, number] for writer in range(8) for number in range(40)]
    for number in range(3):
        for writer in range(8):
            own = [m["content"][1] for m in context.get_history(f"c{number}") if m["content"][0] == writer]
            assert own == sorted(own)


def test_a_backend_that_breaks_down_leaves_nobody_waiting() -> None:
    class Broken(InMemoryStorage):
        blocking = True

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            raise ZeroDivisionError("a defect")

    async def calls() -> None:
        context = ConversationContext(Broken())
        with pytest.raises(StateOutcomeUnknownError, match="a defect") as caught:
            await context.set_variable("a", "k", 1)
        assert caught.value.commit_id
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(StateUnavailableError, match="a defect"):
            await context.get_variable("a", "k")
        with pytest.raises(StateUnavailableError, match="a defect"):
            [name async for name in context.list_contexts()]

    asyncio.run(calls())


def test_an_exception_of_others_passes_through_a_blocking_call_untouched() -> None:
    """A task queue's time limit is raised by a signal handler, in the middle of whatever the main thread does."""

    class TimeLimitError(Exception): ...

    class Slow(InMemoryStorage):
        blocking = True
        limited = True

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            if self.limited:
                signal.raise_signal(signal.SIGUSR1)
            super().execute(operations, settle)

    def limit(*_: object) -> None:
        raise TimeLimitError

    storage = Slow()
    context = SyncConversationContext(storage)
    before = signal.signal(signal.SIGUSR1, limit)
    try:
        for call in (lambda: context.set_variable("a", "k", 1), lambda: context.get_or_create("a")):
            with pytest.raises(TimeLimitError):
                call()
    finally:
        signal.signal(signal.SIGUSR1, before)
    storage.limited = False
    context.set_variable("a", "k", 2)
    assert context.get_variable("a", "k") == 2


@pytest.fixture
def no_threads() -> Iterator[Callable[[], object]]:
    """No thread can be started, since none has a place for its stack, until this is called."""
    usual = threading.stack_size(1 << 47)
    yield lambda: threading.stack_size(usual)
    threading.stack_size(usual)


def test_without_a_thread_calls_are_not_done_and_later_ones_are(no_threads: Callable[[], object]) -> None:
    class Waiting(InMemoryStorage):
        blocking = True

    async def calls() -> None:
        context = ConversationContext(Waiting())
        for name in "abab":
            with pytest.raises(StateUnavailableError, match="nothing was done") as caught:
                await context.set_variable(name, "k", 1)
            assert caught.value.context_id == name
        both = await asyncio.gather(context.exists("a"), context.exists("b"), return_exceptions=True)
        assert {type(error) for error in both} == {StateUnavailableError}
        no_threads()
        assert not any(await asyncio.gather(context.exists("a"), context.exists("b")))
        await context.set_variable("a", "k", 2)
        assert await context.get_variable("a", "k") == 2

    asyncio.run(calls())


def test_without_a_thread_there_is_no_turn_and_later_ones_are_renewed(no_threads: Callable[[], object]) -> None:
    context = SyncConversationContext(InMemoryStorage())
    eventually(lambda: all(thread.name != "agentstate-leases" for thread in threading.enumerate()))
    with pytest.raises(StateUnavailableError, match="renew"), context.turn("a", lease=0.3):
        raise AssertionError("must not come here")
    context.set_variable("a", "k", 1)  # is not fenced
    no_threads()
    with context.turn("a", lease=1.5) as turn:
        time.sleep(2)
        turn.set_variable("k", 2)
    assert context.get_variable("a", "k") == 2


def test_a_lease_for_ever_does_not_keep_others_from_being_renewed() -> None:
    context = SyncConversationContext(InMemoryStorage())
    with context.turn("a", lease=1e300), context.turn("b", lease=1.5) as turn:
        time.sleep(2)
        turn.set_variable("k", 1)
    assert context.get_variable("b", "k") == 1


def test_a_backend_that_forgets_an_operation_is_found_out() -> None:
    class Forgetful(InMemoryStorage):
        blocking = True

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            return

    done = Collected()
    storage = Forgetful()
    submit(storage, (Query("a"), Query("a")), done.of("job"))
    eventually(lambda: len(done))
    assert all(isinstance(outcome, StateUnavailableError) for outcome in done.outcomes[0][1])
    with pytest.raises(StateUnavailableError, match="forgot an operation"):
        SyncConversationContext(storage).exists("a")
    storage.blocking = False  # type: ignore[misc]
    with pytest.raises(StateUnavailableError, match="forgot an operation"):
        SyncConversationContext(storage).exists("a")
    with pytest.raises(StateOutcomeUnknownError, match="forgot an operation"):
        SyncConversationContext(storage).get_or_create("a")


def test_a_class_with_an_execute_of_its_own_is_not_passed_by(tmp_path: Path) -> None:
    """The built-in backends know a shorter way for one operation; it leads around what such a class does."""
    seen: list[Operation] = []

    class Watching:
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            seen.extend(operations)
            super().execute(operations, settle)  # type: ignore[misc]

    class Own(InMemoryStorage):
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            seen.extend(operations)
            super().execute(operations, settle)

    class Mixed(Watching, InMemoryStorage): ...

    class Files(Watching, FileStorage): ...

    class Usual(InMemoryStorage): ...

    for storage, times in ((Own(), 1), (Mixed(), 1), (Files(tmp_path), 1), (Usual(), 0)):
        seen.clear()
        SyncConversationContext(storage).set_variable("a", "k", 1)
        assert len(seen) == times
        storage.close()


def test_keyboard_interrupt_in_the_callers_thread_is_raised_and_frees_the_context() -> None:
    class Interrupted(InMemoryStorage):
        blocking = True
        broken = True

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            if self.broken:
                raise KeyboardInterrupt
            super().execute(operations, settle)

    storage = Interrupted()
    context = SyncConversationContext(storage)
    with pytest.raises(KeyboardInterrupt):
        context.set_variable("a", "k", 1)
    storage.broken = False
    context.set_variable("a", "k", 2)
    assert context.get_variable("a", "k") == 2


def test_listings_do_not_wait_for_one_another() -> None:
    storage = Gated()
    done = Collected()
    for number in range(2):
        submit(storage, (Listing(),), done.of("listing"))
        eventually(lambda number=number: engine_of(storage).look_after() and len(storage.calls) > number)  # type: ignore[misc]
    storage.gate.set()
    eventually(lambda: len(done) == 2)


def test_closing_waits_for_what_is_under_way_and_refuses_what_comes_later() -> None:
    storage = Gated()
    done = Collected()
    submit(storage, (append("a", 0),), done.of("a"))
    eventually(lambda: storage.calls)
    threading.Timer(0.05, storage.gate.set).start()
    storage.close()
    assert done.outcomes == [("a", [b""])]
    storage.close()
    with pytest.raises(StateUnavailableError, match="closed"):
        SyncConversationContext(storage).exists("a")


def test_a_cleanup_deletes_many_together_and_none_of_them_past_its_deadline() -> None:
    class OnASlowDisk(InMemoryStorage):
        blocking = True
        concurrency = 1

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            deletes = [operation for operation in operations if isinstance(operation, Commit)]
            sizes.append(len(deletes))
            for index, operation in enumerate(operations):
                time.sleep(0.01 if deletes else 0)
                super().execute((operation,), lambda _, outcome, index=index: settle(index, outcome))  # type: ignore[misc]

    sizes: list[int] = []
    storage = OnASlowDisk(deadline=3.0)
    for number in range(400):
        storage._carry_out(append(f"c{number}", 1))
    assert SyncConversationContext(storage).cleanup_old_contexts(max_age_hours=0) == 400
    assert 10 < max(sizes) < 100
    storage.close()


def test_idle_workers_end_and_new_ones_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.engine.queue.IDLE_SECONDS", 0.01)
    storage = Gated()
    storage.gate.set()
    done = Collected()
    submit(storage, (append("a", 0),), done.of("a"))
    eventually(lambda: len(done) and not engine_of(storage)._threads)
    submit(storage, (append("a", 1),), done.of("a"))
    eventually(lambda: len(done) == 2)


def test_an_interrupt_while_the_storage_is_taken_leaves_it_usable() -> None:
    """Interrupts come where Python looks for signals: when a function begins, and after it has returned."""
    interrupted = True
    moments = 0
    while interrupted:
        moments += 1
        left = moments
        interrupted = False
        storage = InMemoryStorage()

        def watch(frame: Any, event: str, argument: Any) -> None:
            nonlocal left, interrupted
            if frame.f_code.co_name in INSIDE and event in ("call", "c_return"):
                left -= 1
                if not left:
                    interrupted = True
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(watch)
        try:
            engine_of(storage).perform([append("a", 1)])
        except KeyboardInterrupt:
            assert interrupted
        finally:
            sys.setprofile(None)
        assert engine_of(storage).wait_until_empty(0)
        for number in range(10):  # more than could be under way at a time
            assert engine_of(storage).perform([append("a", number)])
    assert moments > 6


def test_an_error_of_what_had_to_wait_for_its_context_is_raised() -> None:
    class Refusing(Gated):
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            super().execute(operations[:0], settle)
            for index in range(len(operations)):
                settle(index, StateUnavailableError("not today"))

    storage = Refusing()
    caught: list[StateUnavailableError] = []

    def work() -> None:
        try:
            engine_of(storage).call(Query("a"))
        except StateUnavailableError as error:
            caught.append(error)

    submit(storage, (append("a", 1),), lambda outcomes: None)
    eventually(lambda: storage.calls)
    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: engine_of(storage)._contexts["a"].behind)
    storage.gate.set()
    thread.join()
    assert [str(error) for error in caught] == ["not today"]


def test_a_cleanup_goes_on_after_a_conversation_that_cannot_be_deleted() -> None:
    class Stubborn(InMemoryStorage):
        def _carry_out(self, operation: Operation) -> Any:
            if isinstance(operation, Commit) and operation.context_id == "b" and Delete() in operation.changes:
                raise StateUnavailableError("not today", context_id="b")
            return super()._carry_out(operation)

    storage = Stubborn()
    context = SyncConversationContext(storage)
    for name in "abc":
        context.set_variable(name, "k", 1)
    with pytest.raises(StateUnavailableError, match="not today"):
        context.cleanup_old_contexts(max_age_hours=0)
    assert list(context.list_contexts()) == ["b"]


def test_an_interrupt_while_several_operations_are_executed_is_raised_and_frees_the_context() -> None:
    class Interrupted(InMemoryStorage):
        blocking = True
        interrupts = 1

        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            super().execute(operations, settle)
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt

    storage = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        engine_of(storage).perform((append("a", 1), append("a", 2)))
    assert engine_of(storage).perform((append("a", 3), append("a", 4))) == [b"", b""]
    assert SyncConversationContext(storage).count_history("a") == 4
