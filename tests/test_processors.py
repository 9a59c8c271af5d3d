"""Worker threads run on the processor of the event loop that waits for them, and let go of it again."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence

import pytest

from agentstate import ConversationContext, InMemoryStorage, SyncConversationContext
from agentstate.operations import Operation
from agentstate.storage import processors
from agentstate.storage.base import Settle
from agentstate.storage.crew import LONELY

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)


class Watched(InMemoryStorage):
    """A storage that waits, and notes where each of its groups could run."""

    waits = True
    groups = 1

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, set[int]]] = []

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        self.seen.append((len(operations), os.sched_getaffinity(0)))
        super().execute(operations, settle)


def test_a_group_runs_where_its_loop_runs_and_lone_calls_anywhere() -> None:
    storage = Watched()
    context = ConversationContext(storage)
    everywhere = os.sched_getaffinity(0)

    async def pairs_on(processor: int) -> None:
        os.sched_setaffinity(0, {processor})
        try:
            for number in range(5):
                await asyncio.gather(*(context.set_variable(name, "x", number) for name in ("a", "b")))
        finally:
            os.sched_setaffinity(0, everywhere)
        assert storage.seen.pop() == (2, {processor})

    async def main() -> None:
        first, second = sorted(everywhere)[:2]
        await pairs_on(first)
        await pairs_on(second)
        for number in range(LONELY + 1):
            assert storage.seen.pop()[1] != everywhere, "one lonely call is no reason to move"
            await context.set_variable("a", "x", number)
        assert storage.seen.pop() == (1, everywhere)
        await pairs_on(first)

    asyncio.run(main())
    assert os.sched_getaffinity(0) == everywhere


def test_a_loop_that_moves_about_is_not_followed() -> None:
    places = iter([0, 1] * 20 + [1] * 10 + [0, 1, 1, 1] + [0] * 10)
    home = processors.Home(lambda: next(places))
    assert {home.processor() for _ in range(40)} == {processors.ANYWHERE}
    assert [home.processor() for _ in range(10)] == [processors.ANYWHERE] * 2 + [1] * 8
    assert [home.processor() for _ in range(4)] == [1, 1, 1, 1], "it was elsewhere but once"
    assert [home.processor() for _ in range(10)] == [1] + [processors.ANYWHERE] * 2 + [0] * 7


def test_a_thread_that_waits_lends_no_processor() -> None:
    storage = Watched()
    everywhere = os.sched_getaffinity(0)
    asyncio.run(ConversationContext(storage).set_variable("a", "x", 1))
    storage.seen.clear()
    context = SyncConversationContext(storage)
    threads = [threading.Thread(target=context.set_variable, args=("a", "x", number)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {frozenset(allowed) for _, allowed in storage.seen} == {frozenset(everywhere)}


def test_where_the_processor_is_not_known_threads_run_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    monkeypatch.setattr("agentstate.aio._this_processor", processors.find_processor())
    storage = Watched()
    asyncio.run(ConversationContext(storage).set_variable("a", "x", 1))
    assert storage.seen == [(1, os.sched_getaffinity(0))]


def test_a_processor_that_is_not_allowed_is_no_error() -> None:
    seat = processors.Seat()
    before = os.sched_getaffinity(0)
    try:
        seat.move(1023)
        assert os.sched_getaffinity(0) == before
        seat.move(processors.ANYWHERE)
    finally:
        os.sched_setaffinity(0, before)
