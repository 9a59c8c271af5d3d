"""Whether a recorded history of concurrent calls on one conversation is linearizable."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final, NamedTuple

from agentstate import ConversationContext, StateStorage, SyncConversationContext
from agentstate.errors import StateError

from .figures import Figures
from .model import Model, Step, observed, perform, perform_async

READ: Final = "get_state"


class Call(NamedTuple):
    """A call that returned: when it began and ended, and what it answered (a read: the model that it saw)."""

    begin: float
    end: float
    step: Step
    answer: Any


def is_linearizable(calls: list[Call], first: Model | None = None) -> bool:
    """Whether there is an order of the calls that explains all answers, in which no call comes before one that had
    ended when it began. (Wing and Gong's search; states that lead nowhere are remembered.)"""
    calls = sorted(calls)
    everything = (1 << len(calls)) - 1
    tried: set[tuple[int, str]] = set()
    stack: list[tuple[int, Model]] = [(0, first or Model())]
    while stack:
        done, model = stack.pop()
        if done == everything:
            return True
        key = (done, repr(model))
        if key in tried:
            continue
        tried.add(key)
        horizon = min(call.end for index, call in enumerate(calls) if not done >> index & 1)
        for index, call in enumerate(calls):
            if call.begin > horizon:
                break
            if done >> index & 1:
                continue
            if call.step.name == READ:
                after, answer = model, model
            else:
                after, answer = model.after(call.step)
            if answer == call.answer:
                stack.append((done | 1 << index, after))
    return False


def linearizable(
    random: Random,
    rounds: int,
    figures: Figures,
    *,
    make: Callable[[], list[StateStorage]],
    threads: int = 4,
    calls: int = 8,
) -> None:
    """`rounds` histories: threads, through several storages on one store and through both kinds of contexts, do what
    they like to one conversation."""
    storages = make()
    for number in range(rounds):
        context_id = f"line-{number}-{random.getrandbits(24)}"
        record: list[Call] = []
        workers = []
        for index in range(threads):
            steps = _Steps(index, Random(random.random()), calls)
            storage = storages[index % len(storages)]
            # Half of them, and on each of the storages.
            target = _work_async if index // 2 % 2 else _work
            workers.append(threading.Thread(target=target, args=(storage, context_id, steps, record)))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        figures.faults += 1
        for call in record:
            figures.took(call.end - call.begin, storages[0].deadline, call.step.name)
        if len(record) != threads * calls:
            figures.fail_silently(f"history {number}: {threads * calls - len(record)} calls raised")
        if not is_linearizable(record):
            figures.fail_silently(f"history {number} of {len(record)} calls is not linearizable")
        SyncConversationContext(storages[0]).clear_context(context_id)
    for storage in storages:
        storage.close()


class _Steps:
    """The calls of one thread."""

    def __init__(self, worker: int, random: Random, calls: int) -> None:
        self.worker = worker
        self.random = random
        self.calls = calls

    def __iter__(self) -> Iterator[Step]:
        for number in range(self.calls):
            content = f"{self.worker}-{number}"
            yield self.random.choice(
                (
                    Step("add_to_history", ("user", content)),
                    Step("increment_variable", ("n", 1)),
                    Step("pop_history", (1,)),
                    Step("set_variable", ("a", content)),
                    Step("delete_variable", ("a",)),
                    Step("clear_context", ()),
                    Step("batch", (Step("add_to_history", ("user", content)), Step("increment_variable", ("n", 1)))),
                    Step(READ, ()),
                    Step(READ, ()),
                )
            )


def _work(storage: StateStorage, context_id: str, steps: _Steps, record: list[Call]) -> None:
    context = SyncConversationContext(storage)
    for step in steps:
        begin = time.monotonic()
        try:
            if step.name == READ:
                answer: Any = observed(context.get_state(context_id))
            else:
                answer = perform(context, context_id, step)
        except StateError:
            return
        record.append(Call(begin, time.monotonic(), step, answer))


def _work_async(storage: StateStorage, context_id: str, steps: _Steps, record: list[Call]) -> None:
    async def work() -> None:
        context = ConversationContext(storage)
        # Two calls are in flight at a time, and may be sent together.
        supply = iter(steps)
        await asyncio.gather(*(_one_after_another(context, context_id, supply, record) for _ in range(2)))

    asyncio.run(work())


async def _one_after_another(
    context: ConversationContext, context_id: str, supply: Iterator[Step], record: list[Call]
) -> None:
    for step in supply:
        begin = time.monotonic()
        try:
            if step.name == READ:
                answer: Any = observed(await context.get_state(context_id))
            else:
                answer = await perform_async(context, context_id, step)
        except StateError:
            return
        record.append(Call(begin, time.monotonic(), step, answer))
