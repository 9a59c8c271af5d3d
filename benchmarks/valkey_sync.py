"""Each documented operation, blocking, against one command of a blocking client; and the round trips it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import valkey

from agentstate import SyncConversationContext, ValkeyStorage

from . import floors
from .measure import TEXT, Run, Samples, benchmark, numbered, repeated
from .servers import Counter, placed, start_server

OURS, RAW = "agentstate", "valkey-py"
TOGETHER = " (client and server on one processor)"


class Operation(NamedTuple):
    """A documented operation and the command that does the same. `prepare` readies both sides for one more."""

    name: str
    ours: Callable[[int], object]
    command: str
    theirs: Callable[[int], object]
    prepare: Callable[[int], object] | None = None
    trips: int = 1


@benchmark("valkey-sync")
def operations(run: Run) -> None:
    """Each documented operation against one command of valkey-py, and its round trips."""
    server = start_server(run)
    storage = ValkeyStorage(server.url)
    run.stack.callback(storage.close)
    context = SyncConversationContext(storage)
    client = server.client()
    context.extend_history("ten", [{"role": "user", "content": TEXT}] * 10)
    context.set_variables("ten", {"theme": "dark", "language": "en"})
    context.set_metadata("ten", "channel", "web")
    client.rpush("history", *[floors.message()] * 10)
    client.hset("hash", mapping={"theme": '"dark"', "language": '"en"', "channel": '"web"'})
    counter = Counter(server)
    count = run.size(200, 20)
    for operation in _operations(context, client):
        cases = {
            OURS: numbered(operation.ours, count, operation.prepare),
            RAW: numbered(operation.theirs, count, operation.prepare),
        }
        work, command = f"Valkey, sync: {operation.name}", f"valkey-py {operation.command}"
        with placed(server, together=False):
            run.row(work, run.compare(cases, 15), OURS, RAW, at_most=1.3, against=command)
        with placed(server, together=True):
            run.row(work + TOGETHER, run.compare(cases, 15), OURS, RAW, against=command)
        for number in range(5):
            if operation.prepare is not None:
                operation.prepare(number)
        made = counter.trips(lambda: list(map(operation.ours, range(5)))) / 5  # noqa: B023 - called at once
        run.figure(f"{work}: round trips", made, f"{operation.trips}", operation.trips, "trips", at_most=1.0)


def _operations(context: SyncConversationContext, client: Any) -> list[Operation]:
    def another(number: int) -> None:
        context.set_variable(f"cleared-{number}", "theme", "dark")
        client.hset(f"cleared-{number}", "theme", '"dark"')

    def another_message(_: int) -> None:
        context.add_to_history("popped", "user", TEXT)
        client.rpush("popped", floors.message())

    def another_variable(_: int) -> None:
        context.set_variable("dropped", "theme", "dark")
        client.hset("dropped", "theme", '"dark"')

    return [
        Operation("get_or_create", lambda _: context.get_or_create("ten"), "LRANGE 0 -1",
                  lambda _: client.lrange("history", 0, -1)),
        Operation("add_to_history", lambda _: context.add_to_history("log", "user", TEXT), "RPUSH",
                  lambda _: client.rpush("log", floors.message())),
        Operation("get_history(limit=10)", lambda _: context.get_history("ten", limit=10), "LRANGE -10 -1",
                  lambda _: client.lrange("history", -10, -1)),
        Operation("set_variable", lambda _: context.set_variable("ten", "theme", "dark"), "HSET",
                  lambda _: client.hset("hash", "theme", '"dark"')),
        Operation("get_variable", lambda _: context.get_variable("ten", "theme"), "HGET",
                  lambda _: client.hget("hash", "theme")),
        Operation("set_metadata", lambda _: context.set_metadata("ten", "channel", "web"), "HSET",
                  lambda _: client.hset("hash", "channel", '"web"')),
        Operation("get_metadata", lambda _: context.get_metadata("ten", "channel"), "HGET",
                  lambda _: client.hget("hash", "channel")),
        Operation("get_state(history_limit=5)", lambda _: context.get_state("ten", history_limit=5), "LRANGE -5 -1",
                  lambda _: client.lrange("history", -5, -1)),
        Operation("exists", lambda _: context.exists("ten"), "EXISTS", lambda _: client.exists("hash")),
        Operation("count_history", lambda _: context.count_history("ten"), "LLEN", lambda _: client.llen("history")),
        Operation("get_variables", lambda _: context.get_variables("ten"), "HGETALL",
                  lambda _: client.hgetall("hash")),
        Operation("set_variables", lambda _: context.set_variables("ten", {"theme": "dark", "language": "en"}),
                  "HSET", lambda _: client.hset("hash", mapping={"theme": '"dark"', "language": '"en"'})),
        Operation("increment_variable", lambda _: context.increment_variable("ten", "turns"), "HINCRBY",
                  lambda _: client.hincrby("hash", "turns", 1)),
        Operation("update_variable", lambda _: context.update_variable("ten", "theme", str.upper), "HGET",
                  lambda _: (client.hget("hash", "theme"), client.hset("hash", "theme", '"DARK"')), None, 2),
        Operation("delete_variable", lambda _: context.delete_variable("dropped", "theme"), "HDEL",
                  lambda _: client.hdel("dropped", "theme"), another_variable),
        Operation("extend_history (10 messages)",
                  lambda _: context.extend_history("log", [{"role": "user", "content": TEXT}] * 10), "RPUSH",
                  lambda _: client.rpush("log", *[floors.message() for _ in range(10)])),
        Operation("trim_history", lambda _: context.trim_history("ten", keep=10), "LTRIM",
                  lambda _: client.ltrim("history", -10, -1)),
        Operation("pop_history", lambda _: context.pop_history("popped"), "RPOP", lambda _: client.rpop("popped"),
                  another_message),
        Operation("clear_context", lambda number: context.clear_context(f"cleared-{number}"), "DEL",
                  lambda number: client.delete(f"cleared-{number}"), another),
    ]  # fmt: skip


@benchmark("turn-valkey")
def turn(run: Run) -> None:
    """The reference's agent turn (read 5 messages and 2 variables; write 1 variable, 2 messages, 1 metadata)."""
    server = start_server(run)
    storage = ValkeyStorage(server.url)
    run.stack.callback(storage.close)
    context = SyncConversationContext(storage)
    client = server.client()
    prepare_turn(context)
    client.rpush("history", *[floors.message()] * 10)
    client.hset("variables", mapping={"theme": '"dark"', "language": '"en"'})
    count = run.size(150, 10)
    cases = {
        OURS: repeated(lambda: one_turn(context), count),
        "two valkey-py pipelines": repeated(lambda: _piped_turn(client, atomic=True), count),
        "two valkey-py pipelines without MULTI": repeated(lambda: _piped_turn(client, atomic=False), count),
    }
    for together in (False, True):
        with placed(server, together=together):
            samples: Samples = run.compare(cases, 15)
        work = "Valkey: agent turn" + (TOGETHER if together else "")
        run.row(work, samples, OURS, "two valkey-py pipelines", at_most=None if together else 1.3)
        run.row(work, samples, OURS, "two valkey-py pipelines without MULTI")
    counter = Counter(server)
    read = counter.trips(lambda: context.get_state("turn", history_limit=5))
    both = counter.trips(lambda: one_turn(context))
    sent, by_scripts = counter.commands(lambda: one_turn(context))
    run.report.facts["commands of one turn"] = f"{' '.join(sent)}; run by scripts: {' '.join(by_scripts)}"
    for what, trips in (("read", read), ("write", both - read)):
        run.figure(f"Valkey: agent turn: round trips to {what}", trips, "1", 1, "trips", at_most=1.0)


def prepare_turn(context: SyncConversationContext) -> None:
    """A conversation in which turns are taken."""
    context.extend_history("turn", [{"role": "user", "content": TEXT}] * 10)
    context.set_variables("turn", {"theme": "dark", "language": "en"})


def one_turn(context: SyncConversationContext) -> None:
    """One read, one commit."""
    state = context.get_state("turn", history_limit=5)
    assert state is not None
    language = state.variables["language"], state.variables["theme"], state.history[-1]["content"]
    with context.batch("turn") as batch:
        batch.add_to_history("user", TEXT)
        batch.add_to_history("agent", TEXT)
        batch.set_variable("language", language[0])
        batch.set_metadata("last_topic", "tea")


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
