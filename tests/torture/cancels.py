"""Tasks that are cancelled, loops that are closed, interpreters that exit: a call takes full effect or none."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

from servers import HOST, ValkeyServer

from agentstate import (
    ConversationContext,
    FileStorage,
    StateStorage,
    SyncConversationContext,
    ValkeyStorage,
    stateful,
)
from agentstate.errors import StateError, StateOutcomeUnknownError
from agentstate.testing.faults import FaultProxy

from .figures import Figures
from .model import Model, Step, Steps, observed, perform_async
from .places import scratch
from .witness import accuse, distinct

_PER_CONVERSATION = 25
_CONVERSATIONS = 8


def cancels(
    random: Random,
    rounds: int,
    figures: Figures,
    *,
    make: Callable[[], StateStorage],
    disturb: Callable[[Random], None] | None = None,
) -> None:
    """`rounds` calls, each cancelled after some passes of the loop or some time, on a sequence of event loops.

    Those of several conversations are under way at a time, so that they wait for each other, and travel together.
    `disturb` asks for a fault that makes the library try again.
    """
    storage = make()
    while figures.faults < rounds:
        asyncio.run(_on_a_loop(ConversationContext(storage), random, rounds, figures, disturb))
    storage.close()


async def _on_a_loop(
    context: ConversationContext,
    random: Random,
    rounds: int,
    figures: Figures,
    disturb: Callable[[Random], None] | None,
) -> None:
    # Their order depends on the machine, so each has a random generator of its own.
    conversations = [
        _Cancelled(context, f"cancel-{random.getrandbits(32)}", Random(random.random()), figures, disturb)
        for _ in range(_CONVERSATIONS)
    ]
    await asyncio.gather(*(conversation.run(rounds) for conversation in conversations))


class _Cancelled:
    """A conversation of which every call is cancelled at some moment."""

    def __init__(
        self,
        context: ConversationContext,
        context_id: str,
        random: Random,
        figures: Figures,
        disturb: Callable[[Random], None] | None,
    ) -> None:
        self.context = context
        self.context_id = context_id
        self.random = random
        self.figures = figures
        self.disturb = disturb
        self.possible = [Model()]

    async def run(self, rounds: int) -> None:
        steps = Steps(self.random, large=False)
        for index in range(_PER_CONVERSATION):
            if self.figures.faults >= rounds:
                break
            self.figures.faults += 1
            if self.disturb is not None and self.random.random() < 0.5:
                self.disturb(self.random)
            begin = time.monotonic()
            await self._cancel(next(steps))
            self.figures.took(time.monotonic() - begin, self.context.storage.deadline, "a cancelled call")
            await self._look(f"cancelled call {index}")
        await asyncio.sleep(0.01)
        await self._look("afterwards")
        await self.context.clear_context(self.context_id)

    async def _cancel(self, step: Step) -> None:
        after = [model.after(step) for model in self.possible]
        task = asyncio.create_task(perform_async(self.context, self.context_id, step))
        if self.random.random() < 0.5:
            for _ in range(self.random.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self.random.random() * 0.004)
        task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError as cancelled:
            # It was applied as a whole or not at all, and does not change afterwards.
            self.figures.unknown += isinstance(cancelled.__cause__, StateOutcomeUnknownError)
            self.possible = distinct([*self.possible, *(model for model, _ in after)])
        except StateError as error:
            self.figures.fail_silently(f"a call that was cancelled raised {error!r}")
        else:
            self.possible = distinct([model for model, expected in after if expected == answer])
            if not self.possible:
                self.figures.fail_silently(f"{step} answered {answer!r}")
                self.possible = [model for model, _ in after]

    async def _look(self, when: str) -> None:
        seen = observed(await self.context.get_state(self.context_id))
        if seen not in self.possible:
            accuse(self.figures, seen, self.possible, f"{self.context_id}, {when}")
        self.possible = [seen]


def cancels_on_a_bad_line(random: Random, rounds: int, figures: Figures, *, server: ValkeyServer) -> None:
    """The same through a proxy that cuts connections, so that calls are cancelled during retries."""
    with FaultProxy(HOST, server.port) as proxy:

        def disturb(random: Random) -> None:
            cut = random.choice((proxy.cut_request, proxy.cut_reply))
            cut(random.randrange(200))

        def make() -> StateStorage:
            return ValkeyStorage(f"valkey://{HOST}:{proxy.port}/0", key_prefix="cancels:")

        cancels(random, rounds, figures, make=make, disturb=disturb)


_WRITER = """
import asyncio, os, signal, sys, threading
from agentstate import ConversationContext, FileStorage, SyncConversationContext, ValkeyStorage

place, way = sys.argv[1:]
def storage():
    return ValkeyStorage(place) if place.startswith("valkey:") else FileStorage(place)

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it would be ignored

async def write(context, writer):
    for number in range(100000):
        os.write(1, f'["begun", {writer}, {number}]\\n'.encode())
        await context.add_to_history("alice", f"w{writer}", number)
        os.write(1, f'["done", {writer}, {number}]\\n'.encode())

async def main():
    context = ConversationContext(storage())
    if way == "loop":
        # The loop ends, and with it all that waits for an answer.
        tasks = [asyncio.create_task(write(context, writer)) for writer in range(6)]
        await asyncio.sleep(0.1)
        return
    if way == "handler":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sys.exit, 3)
    await asyncio.gather(*(write(context, writer) for writer in range(6)))

def thread(writer):
    context = SyncConversationContext(storage())
    for number in range(100000):
        os.write(1, f'["begun", {writer}, {number}]\\n'.encode())
        context.add_to_history("alice", f"w{writer}", number)
        os.write(1, f'["done", {writer}, {number}]\\n'.encode())

if way == "exit":
    # The main thread ends while daemon threads write.
    for writer in range(4):
        threading.Thread(target=thread, args=(writer,), daemon=True).start()
    threading.Event().wait(0.1)
else:
    asyncio.run(main())
"""


def exits(random: Random, rounds: int, figures: Figures) -> None:
    """`rounds` interpreters that exit with pending writes: at their end, by SIGTERM (handled or not), by SIGINT."""
    with scratch(disk=True) as folder:
        for number in range(rounds):
            place = folder / str(number)
            _exit(str(place), partial(FileStorage, place), number, random, figures)


def exits_on_valkey(random: Random, rounds: int, figures: Figures, *, server: ValkeyServer) -> None:
    """The same, of clients of a server."""
    for number in range(rounds):
        with server.client() as client:
            client.flushall()
        _exit(server.url, partial(ValkeyStorage, server.url), number, random, figures)


def _exit(place: str, make: Callable[[], StateStorage], number: int, random: Random, figures: Figures) -> None:
    ways = ("loop", "exit", "term", "handler", "int")
    way = ways[number % len(ways)]
    figures.faults += 1
    _compare(make(), _let_it_write(place, way, random, figures), way, figures)


def _let_it_write(place: str, way: str, random: Random, figures: Figures) -> list[list[Any]]:
    child = subprocess.Popen(
        [sys.executable, "-c", _WRITER, place, way], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with child:
        assert child.stdout is not None
        first = child.stdout.readline()
        begin = time.monotonic()
        if way in ("term", "handler", "int"):
            time.sleep(random.random() * 0.1)
            child.send_signal(signal.SIGINT if way == "int" else signal.SIGTERM)
            begin = time.monotonic()
        watchdog = threading.Timer(20.0, child.kill)
        watchdog.start()
        lines = (first + child.stdout.read()).splitlines()
        child.wait()
        watchdog.cancel()
    figures.took(time.monotonic() - begin, 5.0, f"the end of an interpreter ({way})")
    # Its last line may be incomplete.
    return [json.loads(line) for line in lines if line.endswith(b"]")]


def _compare(storage: StateStorage, reported: list[list[Any]], way: str, figures: Figures) -> None:
    with SyncConversationContext(storage) as context:
        history = context.get_history("alice")
        context.add_to_history("alice", "after", 1)
    figures.calls += sum(what == "done" for what, _, _ in reported)
    for writer in {writer for _, writer, _ in reported}:
        stored = [message["content"] for message in history if message["role"] == f"w{writer}"]
        done = sum(line[:2] == ["done", writer] for line in reported)
        begun = sum(line[:2] == ["begun", writer] for line in reported)
        when = f"exit by {way}, writer {writer}: {len(stored)} stored, {done} acknowledged, {begun} begun"
        if len(stored) < done:
            figures.lose(when)
        elif stored != list(range(len(stored))) or len(stored) > begun:
            figures.double(when)


_KINDS: Final = (
    "raises",
    "gets an unknown outcome",
    "loses its store",
    "generates",
    "awaits and raises",
    "is cancelled",
)


def handlers(random: Random, rounds: int, figures: Figures) -> None:
    """`rounds` handlers that raise, are cancelled, or lose their store: each is called exactly once."""
    with scratch() as folder:
        for number in range(rounds):
            figures.faults += 1
            kind = _KINDS[number % len(_KINDS)]
            states = folder / str(number)
            calls: list[str] = []
            options: dict[str, Any] = {"storage": "file", "storage_dir": str(states), "deadline": 1.0}
            if random.random() < 0.3:
                options["serialize_turns"] = True
            begin = time.monotonic()
            try:
                _run_handler(kind, states, options, {"id": f"task-{number}"}, calls)
            except (ArithmeticError, asyncio.CancelledError, StateError):
                pass
            else:
                figures.fail_silently(f"the error was lost of a handler that {kind}")
            figures.took(time.monotonic() - begin, 5.0, f"a handler that {kind}")
            if len(calls) != 1:
                figures.double(f"a handler that {kind} was called {len(calls)} times ({options})")


def _run_handler(kind: str, states: Path, options: dict[str, Any], task: Any, calls: list[str]) -> None:
    if kind == "generates":

        @stateful(**options)
        def generator(task: Any, context: Any, context_id: str) -> Iterator[int]:
            calls.append(context_id)
            yield context.increment_variable(context_id, "n")
            raise ArithmeticError

        list(generator(task))
    elif kind in ("awaits and raises", "is cancelled"):
        asyncio.run(_run_coroutine(kind, options, task, calls))
    else:

        @stateful(**options)
        def handler(task: Any, context: Any, context_id: str) -> None:
            calls.append(context_id)
            context.add_to_history(context_id, "user", "before")
            if kind == "raises":
                raise ArithmeticError
            if kind == "gets an unknown outcome":
                # The handler is not run again when its store fails.
                raise StateOutcomeUnknownError("sent, but not confirmed", context_id=context_id, commit_id="x")
            states.rename(states.with_name("lost-" + states.name))
            context.add_to_history(context_id, "user", "after")

        handler(task)


async def _run_coroutine(kind: str, options: dict[str, Any], task: Any, calls: list[str]) -> None:
    @stateful(**options)
    async def coroutine(task: Any, context: Any, context_id: str) -> None:
        calls.append(context_id)
        await context.add_to_history(context_id, "user", "before")
        if kind == "awaits and raises":
            raise ArithmeticError
        await asyncio.sleep(10)

    running = asyncio.create_task(coroutine(task))
    while not calls:
        await asyncio.sleep(0)
    if kind == "is cancelled":
        running.cancel()
    await running
