"""Whether a recorded history of concurrent calls on one conversation could have happened one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from random import Random
from typing import Any, Final, NamedTuple

from agentstate import SyncConversationContext
from agentstate.errors import StateError

from .figures import Figures
from .model import Model, Step, observed, perform

READ: Final = "get_state"


class Call(NamedTuple):
    """A call that returned: when it began and ended, and what it answered (a read: the model that it saw)."""

    begin: float
    end: float
    step: Step
    answer: Any


def is_linearizable(calls: list[Call], first: Model | None = None) -> bool:
    """Whether there is an order of the calls that explains all answers, in which no call comes before one that had
    ended when it began. (Wing and Gong's search; what was tried in vain is remembered.)"""
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
    make: Callable[[], list[SyncConversationContext]],
    threads: int = 4,
    calls: int = 8,
) -> None:
    """`rounds` histories: threads, through several storages on one store, do what they like to one conversation."""
    contexts = make()
    try:
        for number in range(rounds):
            context_id = f"line-{number}-{random.getrandbits(24)}"
            record: list[Call] = []
            workers = [
                threading.Thread(
                    target=_work,
                    args=(contexts[index % len(contexts)], context_id, index, Random(random.random()), calls, record),
                )
                for index in range(threads)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            figures.faults += 1
            for call in record:
                figures.took(call.end - call.begin, contexts[0].storage.deadline, call.step.name)
            if len(record) != threads * calls:
                figures.fail_silently(f"history {number}: {threads * calls - len(record)} calls raised")
            if not is_linearizable(record):
                figures.fail_silently(f"history {number} of {len(record)} calls is not linearizable")
            contexts[0].clear_context(context_id)
    finally:
        for context in contexts:
            context.close()


def _work(
    context: SyncConversationContext, context_id: str, worker: int, random: Random, calls: int, record: list[Call]
) -> None:
    for number in range(calls):
        content = f"{worker}-{number}"
        step = random.choice(
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
        begin = time.monotonic()
        try:
            answer = (
                observed(context.get_state(context_id)) if step.name == READ else perform(context, context_id, step)
            )
        except StateError:
            return
        record.append(Call(begin, time.monotonic(), step, answer))
