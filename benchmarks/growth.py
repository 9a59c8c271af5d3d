"""The same operation on a long conversation and on a short one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from agentstate import FileStorage, InMemoryStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .measure import TEXT, Round, Run, benchmark
from .servers import start_server

OPERATIONS: dict[str, Callable[[SyncConversationContext, str], object]] = {
    "add_to_history": lambda context, name: context.add_to_history(name, "user", TEXT),
    "get_history(limit=10)": lambda context, name: context.get_history(name, limit=10),
    "get_state(history_limit=5)": lambda context, name: context.get_state(name, history_limit=5),
    "count_history": lambda context, name: context.count_history(name),
    "get_variable": lambda context, name: context.get_variable(name, "theme"),
    "set_variable": lambda context, name: context.set_variable(name, "theme", "dark"),
    "increment_variable": lambda context, name: context.increment_variable(name, "turns"),
    "pop_history": lambda context, name: (
        context.pop_history(name),
        context.add_to_history(name, "user", TEXT),
    ),
}
SHORT = 10


@benchmark("growth")
def growth(run: Run) -> None:
    """Every operation on 100,000 messages against 10; warm, and cold: by a storage object that saw nothing before."""
    length = run.size(100_000, 2_000)
    server = start_server(run)
    folder = run.folder()
    backends: dict[str, Callable[[], StateStorage]] = {
        "memory": InMemoryStorage,
        "file": lambda: FileStorage(folder, fsync="no"),
        "Valkey": lambda: ValkeyStorage(server.url),
    }
    for backend, make in backends.items():
        context = SyncConversationContext(make())
        run.stack.callback(context.close)
        run.say(f"{backend}: adding {length:,} messages")
        fill(context, "short", SHORT)
        fill(context, "long", length)
        pair = Pair(run, context, length)
        for operation in OPERATIONS:
            pair.compare(f"{backend}, warm", operation, None, run.size(200, 10))
        for operation in OPERATIONS if backend != "memory" else ():
            pair.compare(f"{backend}, cold", operation, make, run.size(40, 2))


def fill(context: SyncConversationContext, name: str, length: int) -> None:
    """A conversation of so many messages, as appends leave it, with some variables."""
    context.set_variables(name, {"theme": "dark", "language": "en", "turns": 0})
    for _ in range(length):
        context.add_to_history(name, "user", TEXT)


class Pair:
    """A short conversation and a long one."""

    def __init__(self, run: Run, context: SyncConversationContext, length: int) -> None:
        self._run = run
        self._context = context
        self._length = length
        self._numbers = itertools.count()

    def compare(self, where: str, operation: str, make: Callable[[], StateStorage] | None, count: int) -> None:
        """One operation on both; each by a storage of its own, where that is to be made."""
        cases = {name: self._round(name, operation, make, count) for name in ("long", "short")}
        samples = self._run.compare(cases, 15)
        work = f"{where}: {operation}, {self._length:,} messages"
        self._run.row(work, samples, "long", "short", at_most=1.2, against=f"{SHORT} messages")

    def _round(self, kind: str, operation: str, make: Callable[[], StateStorage] | None, count: int) -> Round:
        work = OPERATIONS[operation]

        def once() -> float:
            name, context = kind, self._context
            if kind == "short" and (make is not None or operation == "add_to_history"):
                name = f"short-{next(self._numbers)}"  # as it is: the other one has seen much since
                fill(context, name, SHORT)
            spent = 0.0
            for _ in range(count):
                if make is not None:
                    context = SyncConversationContext(make())
                    # What a cold read of a long one costs depends on how long ago the last checkpoint was; and both
                    # come after the same work of somebody else.
                    for _ in range(2):
                        self._context.add_to_history("long" if kind == "long" else "other", "user", TEXT)
                began = time.perf_counter()
                work(context, name)
                spent += time.perf_counter() - began
                if make is not None:
                    context.close()
            return spent / count * 1e6

        return once
