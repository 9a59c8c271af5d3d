"""Forks while threads and a loop are at work: locks are held, connections are open, groups are under way."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from random import Random

from agentstate import ConversationContext, StateStorage, SyncConversationContext
from agentstate.errors import StateError

from .figures import Figures
from .model import Step, Steps, perform, perform_async
from .witness import Witness

_CALLS = 5
_CHILDREN = 4
_DEADLINE = 20.0


def forks(random: Random, rounds: int, figures: Figures, *, make: Callable[..., StateStorage]) -> None:
    """`rounds` forks: parent and child both keep using the storage object, and neither sees data of the other.

    To be run in a process of its own: it forks.
    """
    number = 0
    while figures.faults < rounds:
        number += 1
        storage = make(deadline=_DEADLINE)
        _Parent(storage, f"{number}-{random.getrandbits(24)}", random, figures).run()
        storage.close()


class _Parent:
    def __init__(self, storage: StateStorage, name: str, random: Random, figures: Figures) -> None:
        self.storage = storage
        self.context = SyncConversationContext(storage)
        self.name = name
        self.random = random
        self.figures = figures
        self.done = threading.Event()

    def run(self) -> None:
        workers = [
            threading.Thread(target=self._in_a_thread),
            threading.Thread(target=asyncio.run, args=(self._loop(),)),
        ]
        for worker in workers:
            worker.start()
        children = []
        witness = Witness(self.figures, f"parent-{self.name}")
        try:
            for number in range(_CHILDREN):
                witness.call(self.context, Step("add_to_history", ("user", f"p{number}")))
                time.sleep(self.random.random() * 0.01)
                pid = os.fork()
                if pid == 0:
                    self._be_a_child(number)
                self.figures.faults += 1
                children.append(pid)
            for pid in children:
                begin = time.monotonic()
                if os.waitpid(pid, 0)[1] != 0:
                    self.figures.fail_silently("a forked child failed")
                self.figures.took(time.monotonic() - begin, _DEADLINE, "a forked child")
        finally:
            self.done.set()
            for worker in workers:
                worker.join()
        error = witness.look(self.context, "after forks")
        if error is not None:
            self.figures.lose(f"after forks: {error!r}")
        for number in range(_CHILDREN):
            contents = [message["content"] for message in self.context.get_history(f"child-{self.name}-{number}")]
            if contents != list(range(2 * _CALLS)):
                self.figures.lose(f"of a forked child: {contents}")
        counted = self.context.get_variable(f"busy-{self.name}", "children")
        if counted != _CALLS * _CHILDREN:
            self.figures.lose(f"forked children counted to {counted} instead of {_CALLS * _CHILDREN}")

    def _in_a_thread(self) -> None:
        steps = Steps(Random(0), "thread-", clears=False)
        while not self.done.is_set():
            perform(self.context, f"busy-{self.name}", next(steps))

    async def _loop(self) -> None:
        context = ConversationContext(self.storage)

        async def work(number: int) -> None:
            steps = Steps(Random(number), "task-")
            while not self.done.is_set():
                await perform_async(context, f"task-{self.name}-{number}", next(steps))

        await asyncio.gather(*(work(number) for number in range(6)))

    def _be_a_child(self, number: int) -> None:
        context_id = f"child-{self.name}-{number}"

        async def append() -> None:
            context = ConversationContext(self.storage)
            for index in range(_CALLS, 2 * _CALLS):
                await context.add_to_history(context_id, "user", index)

        status = 1
        try:
            for index in range(_CALLS):
                self.context.add_to_history(context_id, "user", index)
                self.context.increment_variable(f"busy-{self.name}", "children")
            asyncio.run(append())
            status = 0
        except StateError as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
