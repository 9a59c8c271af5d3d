"""Each documented operation, blocking, against one command of a blocking client; and the round trips it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import valkey

from agentstate import SyncConversationContext, ValkeyStorage

from . import floors
from .measure import SIZES, Conditions, Run, repeated
from .messages import TEXT, content_of, one_turn, prepare_turn
from .neighbours import busy_neighbours
from .results import AT_REST, BUSY
from .servers import Counter, placed, start_server

OURS, RAW = "agentstate", "valkey-py"
PIPELINES, PLAIN_PIPELINES = "two valkey-py pipelines", "two valkey-py pipelines without MULTI"
_WHERE = "Valkey"
_WHY_WRITE = "a write is a script of four commands, so that it is atomic and a retry does not apply it twice"
_WHY_READ = "a read also fetches the entry of the context in the same step, and decodes what it returns"


class Operation(NamedTuple):
    """A documented operation and the command that does the same. `prepare` makes both possible once more."""

    name: str
    ours: Callable[[], object]
    command: str
    theirs: Callable[[], object]
    prepare: Callable[[], object] | None = None
    trips: int = 1

    @property
    def reads(self) -> bool:
        """Whether it changes nothing. (Of `get_or_create` the case is measured that the context exists.)"""
        return self.name.startswith(("get_", "read", "exists", "count_"))


def operations(run: Run) -> None:
    """Each documented operation against one command of valkey-py, and its round trips."""
    server = start_server(run)
    context = run.closing(SyncConversationContext(ValkeyStorage(server.url)))
    client = server.client()
    conditions = _conditions(server)
    for size in SIZES:
        for operation in _sized(context, client, content_of(size)):
            _compare(run, operation, conditions, size)
        server.client().flushall()
    counter = Counter(server)
    for operation in _operations(context, client):
        _compare(run, operation, conditions, None)
        trips = 0
        for _ in range(5):
            if operation.prepare is not None:
                operation.prepare()
            trips += counter.trips(operation.ours)
        run.counted(f"Valkey: round trips of {operation.name}", trips / 5, "trips", at_most=operation.trips)


def _conditions(server: Any) -> Conditions:
    """Client and server on a processor each, as on two machines; at rest also on one, where a round trip is short."""

    @contextmanager
    def busy() -> Iterator[None]:
        # The neighbours are started first: a process inherits the processors that it may run on.
        with busy_neighbours(), placed(server, together=False):
            yield

    return {
        AT_REST: lambda: placed(server, together=False),
        BUSY: busy,
        "one processor": lambda: placed(server, together=True),
    }


def _compare(run: Run, operation: Operation, conditions: Conditions, size: int | None) -> None:
    cases = {
        OURS: repeated(operation.ours, operation.prepare),
        RAW: repeated(operation.theirs, operation.prepare),
    }
    measured = run.compare(cases, seconds=0.08, size=size or SIZES[0], conditions=conditions)
    run.row(
        _WHERE, operation.name, measured, OURS, RAW, against=f"valkey-py {operation.command}", size=size,
        at_most=1.3 if size in (None, SIZES[0]) else None, why=_WHY_READ if operation.reads else _WHY_WRITE,
    )  # fmt: skip


def _sized(context: SyncConversationContext, client: Any, content: str) -> list[Operation]:
    context.extend_history("ten", [{"role": "user", "content": content}] * 10)
    client.rpush("history", *[floors.message(content)] * 10)
    return [
        Operation("append", lambda: context.add_to_history("log", "user", content), "RPUSH",
                  lambda: client.rpush("log", floors.message(content))),
        Operation("read of the last 10", lambda: context.get_history("ten", limit=10), "LRANGE -10 -1",
                  lambda: client.lrange("history", -10, -1)),
    ]  # fmt: skip


def _operations(context: SyncConversationContext, client: Any) -> list[Operation]:
    context.extend_history("ten", [{"role": "user", "content": TEXT}] * 10)
    context.set_variables("ten", {"theme": "dark", "language": "en"})
    context.set_metadata("ten", "channel", "web")
    client.rpush("history", *[floors.message()] * 10)
    client.hset("hash", mapping={"theme": '"dark"', "language": '"en"', "channel": '"web"'})

    def another_context() -> None:
        context.set_variable("cleared", "theme", "dark")
        client.hset("raw-cleared", "theme", '"dark"')

    def another_message() -> None:
        context.add_to_history("popped", "user", TEXT)
        client.rpush("raw-popped", floors.message())

    def another_variable() -> None:
        context.set_variable("dropped", "theme", "dark")
        client.hset("raw-dropped", "theme", '"dark"')

    return [
        Operation("get_or_create", lambda: context.get_or_create("ten"), "LRANGE 0 -1",
                  lambda: client.lrange("history", 0, -1)),
        Operation("set_variable", lambda: context.set_variable("ten", "theme", "dark"), "HSET",
                  lambda: client.hset("hash", "theme", '"dark"')),
        Operation("get_variable", lambda: context.get_variable("ten", "theme"), "HGET",
                  lambda: client.hget("hash", "theme")),
        Operation("set_metadata", lambda: context.set_metadata("ten", "channel", "web"), "HSET",
                  lambda: client.hset("hash", "channel", '"web"')),
        Operation("get_metadata", lambda: context.get_metadata("ten", "channel"), "HGET",
                  lambda: client.hget("hash", "channel")),
        Operation("get_state(history_limit=5)", lambda: context.get_state("ten", history_limit=5), "LRANGE -5 -1",
                  lambda: client.lrange("history", -5, -1)),
        Operation("exists", lambda: context.exists("ten"), "EXISTS", lambda: client.exists("hash")),
        Operation("count_history", lambda: context.count_history("ten"), "LLEN", lambda: client.llen("history")),
        Operation("get_variables", lambda: context.get_variables("ten"), "HGETALL",
                  lambda: client.hgetall("hash")),
        Operation("set_variables", lambda: context.set_variables("ten", {"theme": "dark", "language": "en"}),
                  "HSET", lambda: client.hset("hash", mapping={"theme": '"dark"', "language": '"en"'})),
        Operation("increment_variable", lambda: context.increment_variable("ten", "turns"), "HINCRBY",
                  lambda: client.hincrby("hash", "turns", 1)),
        Operation("update_variable", lambda: context.update_variable("ten", "theme", str.upper), "HGET, HSET",
                  lambda: (client.hget("hash", "theme"), client.hset("hash", "theme", '"DARK"')), None, 2),
        Operation("delete_variable", lambda: context.delete_variable("dropped", "theme"), "HDEL",
                  lambda: client.hdel("raw-dropped", "theme"), another_variable),
        Operation("extend_history (10 messages)",
                  lambda: context.extend_history("log", [{"role": "user", "content": TEXT}] * 10), "RPUSH",
                  lambda: client.rpush("raw-log", *[floors.message() for _ in range(10)])),
        Operation("trim_history", lambda: context.trim_history("ten", keep=10), "LTRIM",
                  lambda: client.ltrim("history", -10, -1)),
        Operation("pop_history", lambda: context.pop_history("popped"), "RPOP", lambda: client.rpop("raw-popped"),
                  another_message),
        Operation("clear_context", lambda: context.clear_context("cleared"), "DEL",
                  lambda: client.delete("raw-cleared"), another_context),
    ]  # fmt: skip


def turn(run: Run) -> None:
    """The agent turn against two pipelines of valkey-py, and its round trips."""
    server = start_server(run)
    context = run.closing(SyncConversationContext(ValkeyStorage(server.url)))
    client = server.client()
    prepare_turn(context)
    client.rpush("history", *[floors.message()] * 10)
    client.hset("variables", mapping={"theme": '"dark"', "language": '"en"'})
    cases = {
        OURS: repeated(lambda: one_turn(context)),
        PIPELINES: repeated(lambda: _piped_turn(client, atomic=True)),
        PLAIN_PIPELINES: repeated(lambda: _piped_turn(client, atomic=False)),
    }
    measured = run.compare(cases, conditions=_conditions(server))
    run.row(_WHERE, "agent turn", measured, OURS, PIPELINES, at_most=1.3, why=_WHY_WRITE)
    run.row(_WHERE, "agent turn", measured, OURS, PLAIN_PIPELINES)
    counter = Counter(server)
    read = counter.trips(lambda: context.get_state("turn", history_limit=5))
    both = counter.trips(lambda: one_turn(context))
    sent, by_scripts = counter.commands(lambda: one_turn(context))
    run.report.facts["commands of an agent turn"] = f"{' '.join(sent)}; run by scripts: {' '.join(by_scripts)}"
    run.counted("Valkey: round trips of an agent turn to read", read, "trips", at_most=1)
    run.counted("Valkey: round trips of an agent turn to write", both - read, "trips", at_most=1)


def _piped_turn(client: valkey.Valkey, *, atomic: bool) -> None:
    with client.pipeline(transaction=atomic) as pipe:
        pipe.lrange("history", -5, -1)
        pipe.hmget("variables", ["theme", "language"])
        pipe.execute()
    with client.pipeline(transaction=atomic) as pipe:
        pipe.rpush("history", floors.message(), floors.message())
        pipe.hset("variables", "language", '"en"')
        pipe.hset("metadata", "last_topic", '"tea"')
        pipe.execute()
