"""A Valkey server that is paused, killed, full, a replica, loading, wants a password, or holds keys of other types."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import valkey
from servers import HOST, ValkeyServer

from agentstate import SyncConversationContext, ValkeyStorage
from agentstate.errors import (
    StateConfigError,
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)

from .figures import Figures
from .model import Step, Steps
from .witness import Witness

_PREFIX = "outages:"


def outages(random: Random, rounds: int, figures: Figures, *, server: ValkeyServer, layout: str = "log") -> None:
    """`rounds` outages of the server, which is the scenario's own."""
    kinds: tuple[Callable[[ValkeyServer, str, Random, Figures], None], ...] = (
        paused, killed, full, read_only, loading, other_types, without_scripts, without_password,
    )  # fmt: skip
    for number in range(rounds):
        kinds[number % len(kinds)](server, layout, random, figures)
        figures.faults += 1


def _context(server: ValkeyServer, layout: str, **options: Any) -> SyncConversationContext:
    return SyncConversationContext(ValkeyStorage(server.url, key_prefix=_PREFIX, layout=layout, **options))


def _begin(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> tuple[Witness, Steps]:
    """A conversation with something in it."""
    witness = Witness(figures, f"alice-{random.getrandbits(32)}")
    steps = Steps(random, large=False, clears=False)
    with _context(server, layout) as context:
        for _ in range(5):
            witness.call(context, next(steps))
        witness.look(context)
    return witness, steps


def _expect(figures: Figures, error: StateError | None, kinds: type[StateError], what: str) -> None:
    if not isinstance(error, kinds):
        figures.fail_silently(f"{what}: {error!r} instead of {kinds.__name__}")


def paused(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """Paused for longer than the deadline: the outcome is unknown in time; the same call again is applied once."""
    witness, steps = _begin(server, layout, random, figures)
    with _context(server, layout, deadline=0.3) as context:
        witness.look(context)  # connected
        unknown: list[tuple[Step, StateOutcomeUnknownError]] = []
        with server.paused():
            step = next(steps)
            error = witness.call(context, step)
            if isinstance(error, StateOutcomeUnknownError):
                unknown.append((step, error))
            else:
                _expect(figures, error, StateUnavailableError, "a write while the server was paused")
            _expect(figures, witness.look(context), StateUnavailableError, "a read while the server was paused")
        time.sleep(random.choice((0.0, 0.05)))
        with _context(server, layout) as other:
            for step, again in unknown:
                witness.retry(other, step, again)
            witness.look(other, "after SIGCONT")
            time.sleep(0.05)
            witness.look(other, "a while after SIGCONT")


def killed(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """It is killed and started again with its append-only file: what it had acknowledged is there."""
    witness, steps = _begin(server, layout, random, figures)
    with _context(server, layout, deadline=0.3) as context, _context(server, layout, deadline=10.0) as waiting:
        witness.look(context)
        witness.look(waiting)
        witness.call(context, next(steps))
        server.kill()
        error = witness.call(context, next(steps))
        _expect(figures, error, StateUnavailableError, "a write to a dead server")
        _expect(figures, witness.look(context), StateUnavailableError, "a read from a dead server")
        server.start()
        error = witness.call(waiting, next(steps), insist=True)
        error = error or witness.look(waiting, "after a restart")
        if error is not None:
            figures.lose(f"after a restart: {error}")


def full(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """`maxmemory` is reached, and nothing may be evicted: reads and deletions work, writes are refused."""
    witness, steps = _begin(server, layout, random, figures)
    with server.client() as client, _context(server, layout, deadline=0.5) as context:
        witness.look(context)
        client.config_set("maxmemory", "1")
        try:
            for _ in range(3):
                error = witness.call(context, Step("add_to_history", ("user", steps.content())))
                _expect(figures, error, StateUnavailableError, "a write to a full server")
                if isinstance(error, StateOutcomeUnknownError):
                    figures.fail_silently("a full server's outcome is called unknown")
            error = witness.look(context, "on a full server")
            if error is not None:
                figures.fail_silently(f"a read from a full server: {error!r}")
        finally:
            client.config_set("maxmemory", "0")
        witness.call(context, next(steps))
        witness.look(context, "on a server with memory again")


def read_only(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """It has become a replica of something else."""
    witness, steps = _begin(server, layout, random, figures)
    with server.client() as client, _context(server, layout, deadline=0.3) as context:
        witness.look(context)
        # Nothing listens there, so the replica keeps its data and waits.
        client.execute_command("REPLICAOF", HOST, 1)
        try:
            error = witness.call(context, Step("add_to_history", ("user", steps.content())))
            _expect(figures, error, StateUnavailableError, "a write to a replica")
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
        witness.call(context, next(steps))
        error = witness.look(context, "on a primary again")
        if error is not None:
            figures.fail_silently(f"a read from a primary: {error!r}")


def loading(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """It has started and is still reading its data."""
    witness, steps = _begin(server, layout, random, figures)
    with server.client() as client:
        # While it reads, it listens every 1,024 commands: enough of them to take a second or two.
        client.eval("for i = 1, 12000 do redis.call('SET', 'filler:' .. i, i) end", 0)
    server.stop()
    config = server.directory / "valkey.conf"
    text = config.read_text()
    config.write_text(f"{text}key-load-delay 150\n")
    answers = server._answers
    server._answers = lambda: _loads(server)  # type: ignore[method-assign]
    try:
        server.start()
        with _context(server, layout, deadline=0.5) as context:
            _expect(figures, witness.look(context), StateUnavailableError, "a read while loading")
            error = witness.call(context, Step("add_to_history", ("user", steps.content())))
            _expect(figures, error, StateUnavailableError, "a write while loading")
    finally:
        server._answers = answers  # type: ignore[method-assign]
        config.write_text(text)
        server.kill()
        server.start()
    with server.client() as client:
        client.eval("for i = 1, 12000 do redis.call('DEL', 'filler:' .. i) end", 0)
    with _context(server, layout) as context:
        witness.call(context, next(steps))
        witness.look(context, "when loaded")


def _loads(server: ValkeyServer) -> bool:
    with server.client(socket_timeout=1.0) as client:
        try:
            client.ping()
        except valkey.BusyLoadingError:
            return True
        except (valkey.ConnectionError, valkey.TimeoutError):
            return False
    raise RuntimeError("the server had loaded its data before anybody could look")


def other_types(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """Under the key is something else: neither absent nor overwritten."""
    context_id = f"other-{random.getrandbits(32)}"
    key = _PREFIX + context_id
    with server.client() as client, _context(server, layout) as context:
        puts: tuple[Callable[[], Any], ...] = (
            lambda: client.rpush(key, "a", "b"),
            lambda: client.sadd(key, "a"),
            lambda: client.zadd(key, {"a": 1}),
            lambda: client.hset(key, "a", "1"),
            lambda: client.set(key, b"\xff\xfe no JSON"),
            lambda: client.set(key, '{"context_id": "x", '),
        )
        for put in puts:
            put()
            _refused(client, context, context_id, key, figures)
            client.delete(key)


def _refused(client: Any, context: SyncConversationContext, context_id: str, key: str, figures: Figures) -> None:
    before, kind = client.dump(key), client.type(key)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: context.get_state(context_id),
        lambda: context.add_to_history(context_id, "user", "over it"),
        lambda: context.get_variable(context_id, "a"),
        lambda: context.increment_variable(context_id, "n"),
        lambda: context.clear_context(context_id),
    )
    for call in calls:
        begin = time.monotonic()
        try:
            answer: Any = call()
        except StateError:
            pass
        else:
            figures.fail_silently(f"a {kind!r} under the key was answered with {answer!r}")
        figures.took(time.monotonic() - begin, 5.0, "a call on a key of another type")
    if client.dump(key) != before:
        figures.fail_silently(f"a {kind!r} under the key was changed")


def without_scripts(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """Its scripts are flushed between calls."""
    witness, steps = _begin(server, layout, random, figures)
    with server.client() as client, _context(server, layout) as context:
        for _ in range(10):
            client.script_flush()
            error = witness.call(context, next(steps)) or witness.look(context, "after SCRIPT FLUSH")
            if error is not None:
                figures.fail_silently(f"after SCRIPT FLUSH: {error!r}")


def without_password(server: ValkeyServer, layout: str, random: Random, figures: Figures) -> None:
    """It wants a password that the client does not have."""
    witness, steps = _begin(server, layout, random, figures)
    with server.client() as client:
        client.config_set("requirepass", "secret")
        try:
            with _context(server, layout, deadline=0.5) as context:
                for error in (witness.look(context), witness.call(context, next(steps))):
                    if not isinstance(error, StateConfigError | StateUnavailableError | StateConflictError):
                        figures.fail_silently(f"without a password: {error!r}")
        finally:
            client.config_set("requirepass", "")
    with _context(server, layout) as context:
        witness.look(context, "without a password again")
