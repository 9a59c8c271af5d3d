"""The same operation on a long conversation and on a short one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from agentstate import FileStorage, InMemoryStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .measure import Round, Run
from .messages import TEXT
from .sampling import Limit, Sample, in_sequence
from .servers import start_server

Operation = Callable[[SyncConversationContext, str], object]
MakeStorage = Callable[[], StateStorage]

OPERATIONS: dict[str, Operation] = {
    "append": lambda context, name: context.add_to_history(name, "user", TEXT),
    "get_history(limit=10)": lambda context, name: context.get_history(name, limit=10),
    "get_state(history_limit=5)": lambda context, name: context.get_state(name, history_limit=5),
    "count_history": lambda context, name: context.count_history(name),
    "get_variable": lambda context, name: context.get_variable(name, "theme"),
    "set_variable": lambda context, name: context.set_variable(name, "theme", "dark"),
    "increment_variable": lambda context, name: context.increment_variable(name, "turns"),
    "pop_history and append": lambda context, name: (
        context.pop_history(name),
        context.add_to_history(name, "user", TEXT),
    ),
}
SHORT = 10
VARIABLES = {"theme": "dark", "language": "en", "turns": 0}
_WHY_COLD_FILES = "the first read of a long file looks for its last checkpoint, which a short file does not have"


def growth(run: Run) -> None:
    """Operations on 100,000 messages against 10; warm, and cold: by a storage object that has read nothing yet."""
    length = run.amount(100_000, 2_000)
    server = start_server(run)
    folder = run.folder()
    backends: dict[str, MakeStorage] = {
        "memory": InMemoryStorage,
        "files, fsync: no": lambda: FileStorage(folder, fsync="no"),
        "Valkey": lambda: ValkeyStorage(server.url),
    }
    for backend, make in backends.items():
        context = run.closing(SyncConversationContext(make()))
        run.say(f"{backend}: adding {length:,} messages")
        context.set_variables("long", VARIABLES)
        for _ in range(length):
            context.add_to_history("long", "user", TEXT)
        pair = Pair(context)
        for name, operation in OPERATIONS.items():
            cases = {kind: pair.warm(kind, operation) for kind in ("long", "short")}
            _compare(run, f"{backend}, warm", f"{name}, {length:,} messages", cases)
        for name, operation in OPERATIONS.items() if backend != "memory" else ():
            cases = {kind: pair.cold(kind, operation, make) for kind in ("long", "short")}
            _compare(run, f"{backend}, cold", f"{name}, {length:,} messages", cases)


def _compare(run: Run, where: str, name: str, cases: dict[str, Round]) -> None:
    measured = run.compare(cases, seconds=0.03)
    why = _WHY_COLD_FILES if where.startswith("files") and where.endswith("cold") else ""
    run.row(where, name, measured, "long", "short", at_most=1.2, against=f"{SHORT} messages", why=why)


class Pair:
    """A short conversation and a long one.

    Rounds make the short one longer, so each round is given a new one.
    """

    def __init__(self, context: SyncConversationContext) -> None:
        self._context = context
        self._numbers = itertools.count()

    def warm(self, kind: str, operation: Operation) -> Round:
        """Rounds by the storage object that wrote the conversation."""

        def once(limit: Limit) -> Sample:
            name = self._name(kind)
            return in_sequence(lambda: operation(self._context, name), limit)

        return once

    def cold(self, kind: str, operation: Operation, make: MakeStorage) -> Round:
        """Rounds in which each call is made by a new storage object."""

        def once(limit: Limit) -> Sample:
            name = self._name(kind)
            context = SyncConversationContext(make())

            def prepare() -> None:
                nonlocal context
                context.close()
                context = SyncConversationContext(make())
                # The cost of a cold read of a long conversation depends on how long ago the last checkpoint was
                # written; and both kinds come after the same work of another context.
                for _ in range(2):
                    self._context.add_to_history("long" if kind == "long" else "other", "user", TEXT)

            sample = in_sequence(lambda: operation(context, name), limit, prepare)
            context.close()
            return sample

        return once

    def _name(self, kind: str) -> str:
        if kind == "long":
            return kind
        name = f"short-{next(self._numbers)}"
        self._context.set_variables(name, VARIABLES)
        self._context.extend_history(name, [{"role": "user", "content": TEXT}] * SHORT)
        return name
