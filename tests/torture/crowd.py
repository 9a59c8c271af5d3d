"""Many processes with many threads and tasks, all on one conversation. To be run in a process of its own: it forks."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from random import Random
from typing import Any, Final

from agentstate import ConversationContext, FileStorage, StateStorage, SyncConversationContext, ValkeyStorage
from agentstate.errors import StateError

from .figures import Figures
from .places import scratch

_ID: Final = "everybody"
_DEADLINE: Final = 30.0


def crowd(
    random: Random,
    rounds: int,
    figures: Figures,
    *,
    url: str = "",
    layout: str = "log",
    processes: int = 8,
    threads: int = 8,
) -> None:
    """Each of the threads makes `rounds` rounds of calls: half of them through the awaitable context."""
    with scratch(disk=True) as folder:

        def make() -> StateStorage:
            if url:
                return ValkeyStorage(url, key_prefix=f"{folder.name}:", layout=layout, deadline=_DEADLINE)
            return FileStorage(folder, layout=layout, deadline=_DEADLINE)

        pipes = []
        for process in range(processes):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.close(read)
                    lines = _Process(make(), process, threads, rounds).run()
                    with os.fdopen(write, "w") as pipe:
                        pipe.write("\n".join(map(json.dumps, lines)))
                    status = 0
                finally:
                    os._exit(status)
            os.close(write)
            pipes.append((pid, read))
        reported: list[list[Any]] = []
        for pid, read in pipes:
            with os.fdopen(read) as pipe:
                reported += [json.loads(line) for line in pipe]
            if os.waitpid(pid, 0)[1] != 0:
                figures.fail_silently("a process of the crowd failed")
        with SyncConversationContext(make()) as context:
            _judge(context, reported, figures, rounds, processes, threads)
            context.clear_context(_ID)


class _Process:
    """The threads of one process: writers through both contexts, and a reader that looks for partial commits."""

    def __init__(self, storage: StateStorage, process: int, threads: int, rounds: int) -> None:
        self.storage = storage
        self.process = process
        self.threads = threads
        self.rounds = rounds
        self.reported: list[list[Any]] = []  # what, writer, number, begin, end, answer
        self.writing = threads

    def run(self) -> list[list[Any]]:
        workers = [threading.Thread(target=self._thread, args=(number,)) for number in range(self.threads)]
        workers.append(threading.Thread(target=self._read))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.storage.close()
        return self.reported

    def _thread(self, number: int) -> None:
        writer = f"{self.process}.{number}"
        try:
            if number % 2:
                asyncio.run(self._write_async(ConversationContext(self.storage), writer))
            else:
                self._write(SyncConversationContext(self.storage), writer)
        except BaseException as error:  # noqa: BLE001 - reported to the parent, which counts it
            self.reported.append(["error", writer, 0, 0, 0, f"{type(error).__name__}: {error}"])
        finally:
            self.writing -= 1

    def _tell(self, what: str, writer: str, number: int, begin: float, answer: Any = None) -> None:
        self.reported.append([what, writer, number, begin, time.monotonic(), answer])

    def _write(self, context: SyncConversationContext, writer: str) -> None:
        for number in range(self.rounds):
            now = time.monotonic()
            context.add_to_history(_ID, writer, number)
            self._tell("add", writer, number, now)
            now = time.monotonic()
            self._tell("increment", writer, number, now, context.increment_variable(_ID, "n"))
            now = time.monotonic()
            context.update_variable(_ID, "updated", lambda value: value + 1, 0)
            self._tell("update", writer, number, now)
            now = time.monotonic()
            with context.batch(_ID) as batch:
                _pair(batch, writer, number)
            self._tell("batch", writer, number, now)
            if number % 4 == 0:
                now = time.monotonic()
                with context.turn(_ID, lease=20.0, timeout=_DEADLINE) as turn:
                    turn.set_variable("turns", context.get_variable(_ID, "turns", 0) + 1)
                self._tell("turn", writer, number, now)

    async def _write_async(self, context: ConversationContext, writer: str) -> None:
        for number in range(self.rounds):
            now = time.monotonic()
            _, value = await asyncio.gather(
                context.add_to_history(_ID, writer, number), context.increment_variable(_ID, "n")
            )
            self._tell("add", writer, number, now)
            self._tell("increment", writer, number, now, value)
            now = time.monotonic()
            await context.update_variable(_ID, "updated", lambda value: value + 1, 0)
            self._tell("update", writer, number, now)
            now = time.monotonic()
            async with context.batch(_ID) as batch:
                _pair(batch, writer, number)
            self._tell("batch", writer, number, now)
            if number % 4 == 0:
                now = time.monotonic()
                async with context.turn(_ID, lease=20.0, timeout=_DEADLINE) as turn:
                    turn.set_variable("turns", await context.get_variable(_ID, "turns", 0) + 1)
                self._tell("turn", writer, number, now)

    def _read(self) -> None:
        context = SyncConversationContext(self.storage)
        revision = 0
        while self.writing:
            begin = time.monotonic()
            try:
                state = context.get_state(_ID, history_limit=6)
            except StateError as error:
                self.reported.append(["error", "reader", 0, 0, 0, str(error)])
                return
            self._tell("read", "reader", 0, begin)
            if state is None:
                continue
            one, other = state.variables.get("left"), state.variables.get("right")
            halves = [m["content"] for m in state.history[1:] if isinstance(m["content"], str)]
            if one != other or state.metadata.get("pair", one) != one or state.revision < revision:
                self.reported.append(["half", "reader", 0, 0, 0, f"{one} {other} {state.revision} after {revision}"])
            if len([half for half in halves if half[0] == "<"]) - len([half for half in halves if half[0] == ">"]) > 0:
                self.reported.append(["half", "reader", 0, 0, 0, f"messages {halves}"])
            revision = state.revision


def _pair(batch: Any, writer: str, number: int) -> None:
    mark = f"{writer}:{number}"
    batch.set_variable("left", mark)
    batch.add_to_history("pair", f"<{mark}")
    batch.add_to_history("pair", f">{mark}")
    batch.set_variable("right", mark)
    batch.set_metadata("pair", mark)


def _judge(
    context: SyncConversationContext,
    reported: list[list[Any]],
    figures: Figures,
    rounds: int,
    processes: int,
    threads: int,
) -> None:
    kinds = Counter(line[0] for line in reported)
    for what, writer, _, begin, end, answer in reported:
        if what in ("error", "half"):
            figures.fail_silently(f"{what} {writer}: {answer}")
        else:
            figures.took(end - begin, _DEADLINE, what)
    figures.faults += processes * threads
    state = context.get_state(_ID)
    assert state is not None
    for variable, kind in (("n", "increment"), ("updated", "update"), ("turns", "turn")):
        value = state.variables.get(variable, 0)
        if value < kinds[kind]:
            figures.lose(f"{variable} is {value} after {kinds[kind]}")
        elif value > kinds[kind]:
            figures.double(f"{variable} is {value} after {kinds[kind]}")
    _judge_messages(state.history, reported, figures)
    # There is one order of all increments that agrees with their answers and with the clock.
    latest = 0.0
    answers = sorted((line for line in reported if line[0] == "increment"), key=lambda line: int(line[5]))
    if [line[5] for line in answers] != list(range(1, len(answers) + 1)):
        figures.double("two increments had the same answer")
    for _, _, _, begin, end, answer in answers:
        if end < latest:
            figures.fail_silently(f"the increment to {answer} had ended before an earlier one began")
        latest = max(latest, begin)


def _judge_messages(history: Any, reported: list[list[Any]], figures: Figures) -> None:
    stored: dict[str, list[Any]] = {}
    for message in history:
        stored.setdefault(message["role"], []).append(message["content"])
    pairs = stored.pop("pair", [])
    for begin, end in zip(pairs[::2], pairs[1::2], strict=True):
        if begin[0] != "<" or end != ">" + begin[1:]:
            figures.fail_silently(f"a batch was interrupted: {begin} {end}")
    expected: dict[str, list[Any]] = {}
    for what, writer, number, *_ in reported:
        if what == "add":
            expected.setdefault(writer, []).append(number)
    done = sorted(f"<{writer}:{number}" for what, writer, number, *_ in reported if what == "batch")
    for name, seen, wanted in [
        ("batches", sorted(pairs[::2]), done),
        *((writer, stored.get(writer, []), numbers) for writer, numbers in expected.items()),
    ]:
        if seen == wanted:
            continue
        if len(seen) < len(wanted):
            figures.lose(f"{name}: {len(seen)} of {len(wanted)}")
        elif len(seen) > len(wanted):
            figures.double(f"{name}: {len(seen)} instead of {len(wanted)}")
        else:
            figures.fail_silently(f"{name}: not in order")
