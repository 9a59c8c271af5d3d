"""The log says what is done, never what is said: no content, no value, no password, at DEBUG, when things fail too."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
import valkey
from servers import ValkeyServer
from stores import KINDS, Stores, store

from agentstate import (
    ConversationContext,
    FileStorage,
    StateConfigError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateSerializationError,
    StateUnavailableError,
    SyncConversationContext,
    ValkeyStorage,
    compat,
    stateful,
)
from agentstate.transfer import migrate

__all__ = ["store"]

SECRET = "sesame-0451"  # ASCII without anything that an encoding would change, in every value that is stored
PASSWORD = "tr@vel:li/ght?#%25"


class Log:
    """Everything that any logger is given, formatted as it would be with tracebacks."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self.handler = logging.StreamHandler(self._text)
        self.handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)r"))

    def __str__(self) -> str:
        return self._text.getvalue()

    def tells_nothing(self, *secrets: str) -> bool:
        """Whether it has none of these, nor what `repr` or a URL makes of them."""
        text = str(self)
        return not any(
            form in text for one in (SECRET, *secrets) for form in (one, repr(one)[1:-1], quote(one, safe=""))
        )


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    root = logging.getLogger()
    before = root.level
    root.addHandler(log.handler)
    root.setLevel(logging.DEBUG)
    yield log
    root.setLevel(before)
    root.removeHandler(log.handler)


def use(context: SyncConversationContext) -> None:
    """Every kind of call, and refusals of each kind, with the secret wherever a value goes."""
    said = {"role": "user", "content": SECRET, "metadata": {"note": SECRET}}
    context.get_or_create("alice", "alice@home")
    context.add_to_history("alice", "user", SECRET, {"note": SECRET})
    context.extend_history("alice", [said] * 3)
    context.set_variable("alice", "key", [SECRET])
    context.set_variables("alice", {"name": SECRET, "n": 1})
    context.set_metadata("alice", "key", SECRET)
    context.update_variable("alice", "name", lambda value: f"{value} {SECRET}")
    context.increment_variable("alice", "n")
    context.update_state("alice", metadata={"key": SECRET}, history=[said])
    with context.batch("bob") as batch:
        batch.set_variable("key", SECRET)
        batch.add_to_history("user", SECRET)
    with context.turn("bob") as turn:
        turn.set_variable("other", SECRET)
        with pytest.raises(StateConflictError):
            context.turn("bob").__enter__()
    for refused in (
        lambda: context.increment_variable("alice", "name"),
        lambda: context.set_variable("alice", "key", {"inner": {SECRET}}),
        lambda: context.set_variable("alice", "key", float("nan")),
        lambda: context.add_to_history("alice", "user", SECRET.encode()),
        lambda: context.update_state("alice", user_id="alice@home", variables={"key": {SECRET}}),
        lambda: context.fork_context("alice", "bob"),
    ):
        with pytest.raises((StateConflictError, StateSerializationError)) as caught:
            refused()
        assert SECRET not in str(caught.value)

    def broken(value: Any) -> Any:
        raise LookupError(SECRET)

    with pytest.raises(LookupError):
        context.update_variable("alice", "key", broken)
    assert context.get_history("alice")[0]["content"] == SECRET
    assert list(context.iter_history("alice", page_size=1))
    assert context.get_state("alice") is not None
    assert sorted(context.list_contexts()) == ["alice", "bob"]
    context.fork_context("alice", "carol")
    context.pop_history("carol")
    context.delete_variable("carol", "key")
    context.cleanup_old_contexts(max_age_hours=0)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_logged_without_what_is_said(kind: str, store: Stores, log: Log) -> None:
    use(SyncConversationContext(store(kind)))
    for said in ("add_to_history 'alice'", "update_variable 'alice'", "batch 'bob'", "turn 'bob'", "end of turn 'bob'"):
        assert f"agentstate.context DEBUG {said}" in str(log)
    assert "ms, LookupError" in str(log)
    assert log.tells_nothing()


@pytest.mark.parametrize("kind", KINDS)
def test_the_awaitable_context_tells_nothing_either(kind: str, store: Stores, log: Log) -> None:
    async def calls() -> None:
        context = ConversationContext(store(kind))
        await asyncio.gather(*(context.add_to_history(f"c{n}", "user", SECRET) for n in range(5)))
        await context.update_variable("c0", "key", lambda _: SECRET)
        with pytest.raises(StateConflictError):
            await context.increment_variable("c0", "key")

    asyncio.run(calls(), debug=True)  # asyncio then logs too
    assert "agentstate.context DEBUG update_variable 'c0'" in str(log)
    assert log.tells_nothing()


def test_agentups_logger_is_told_no_more(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    monkeypatch.setattr("agentstate.calllog.LOGGED_AS", ["src.agent.context"])
    assert compat.LOGGED_AS is not None
    use(SyncConversationContext())
    assert "src.agent.context DEBUG add_to_history 'alice'" in str(log)
    assert log.tells_nothing()


def damaged(path: Path, text: bytes, by: bytes) -> None:
    data = path.read_bytes()
    assert text in data
    path.write_bytes(data.replace(text, by))


@pytest.mark.parametrize("layout", ["log", "document"])
@pytest.mark.parametrize(
    ("text", "by"),
    [
        (SECRET.encode(), SECRET.encode()[:-1] + b"\xff"),  # no UTF-8
        (SECRET.encode(), SECRET.encode() + b'"'),  # no JSON
        (b'"content"', b'"c\x00ntent"'),
    ],
)
def test_a_damaged_file_is_not_quoted(tmp_path: Path, log: Log, layout: str, text: bytes, by: bytes) -> None:
    with SyncConversationContext(FileStorage(tmp_path, layout=layout)) as context:
        context.add_to_history("alice", "user", SECRET)
        context.add_to_history("alice", "user", SECRET)
    [path] = [path for path in tmp_path.iterdir() if path.name.startswith("alice.")]
    damaged(path, text, by)
    part = SECRET[:-1]
    with SyncConversationContext(FileStorage(tmp_path, layout=layout), user_id="alice") as context:
        with pytest.raises(StateCorruptedError) as caught:
            context.add_to_history("alice", "user", SECRET)
        assert part not in str(caught.value)
        assert part not in repr(caught.value.__cause__)
        list(context.list_contexts())
        with suppress(StateError):
            context.cleanup_old_contexts(max_age_hours=0)
        assert isinstance(context.storage, FileStorage)
        for problem in context.storage.verify():
            assert part not in str(problem)
        with suppress(StateError):
            context.storage.repair("alice")
    assert "alice" in str(log)
    assert part not in str(log)


def test_a_torn_end_is_not_quoted(tmp_path: Path, log: Log) -> None:
    with SyncConversationContext(FileStorage(tmp_path)) as context:
        context.add_to_history("alice", "user", SECRET)
    with (tmp_path / "alice.jsonl").open("ab") as file:
        file.write(b'{"add":[{"content":"' + SECRET.encode())
    with SyncConversationContext(FileStorage(tmp_path)) as context:
        context.add_to_history("alice", "user", SECRET)
    assert "agentstate.storage.file WARNING" in str(log)
    assert log.tells_nothing()


def test_a_damaged_text_in_valkey_is_not_quoted(valkey_9: ValkeyServer, key_prefix: str, log: Log) -> None:
    for layout, name in (("log", "alice"), ("document", "bob")):
        with valkey.Valkey.from_url(valkey_9.url) as client:
            client.set(f"{key_prefix}{name}", f'{{"context_id": "{name}", "history": [{{"content": "{SECRET}"')
        with SyncConversationContext(ValkeyStorage(valkey_9.url, key_prefix=key_prefix, layout=layout)) as context:
            with pytest.raises(StateCorruptedError) as caught:
                context.set_variable(name, "key", SECRET)
            assert SECRET not in str(caught.value)
            list(context.list_contexts())
            with suppress(StateError):
                context.cleanup_old_contexts(max_age_hours=0)
    assert "StateCorruptedError" in str(log)
    assert log.tells_nothing()


def url_with(server: ValkeyServer, password: str) -> str:
    return f"valkey://:{quote(password, safe='')}@127.0.0.1:{urlsplit(server.url).port}"


def test_a_wrong_password_is_not_told(valkey_password: ValkeyServer, log: Log) -> None:
    storage = ValkeyStorage(url_with(valkey_password, PASSWORD), deadline=1.0)
    with SyncConversationContext(storage) as context, pytest.raises(StateConfigError) as caught:
        context.set_variable("alice", "key", SECRET)
    assert PASSWORD not in f"{caught.value} {caught.value.__cause__!r} {storage!r} {context!r}"
    assert "set_variable 'alice'" in str(log)
    assert log.tells_nothing(PASSWORD)


def test_the_right_password_is_not_told(valkey_password: ValkeyServer, log: Log, key_prefix: str) -> None:
    with SyncConversationContext(ValkeyStorage(valkey_password.url, key_prefix=key_prefix)) as context:
        use(context)
    assert valkey_password.password is not None
    assert unquote(urlsplit(valkey_password.url).password or "") == valkey_password.password
    assert log.tells_nothing(valkey_password.password)


def test_an_outage_tells_nothing(start_valkey: Callable[..., ValkeyServer], log: Log) -> None:
    server = start_valkey(password=PASSWORD)
    storage = ValkeyStorage(server.url, deadline=0.3)
    context = SyncConversationContext(storage)

    @stateful(storage, on_unavailable="ephemeral")
    def handler(task: Any, context: Any, context_id: str) -> bool:
        context.add_to_history(context_id, "user", task["text"])
        return bool(context.degraded)

    assert handler({"context_id": "alice", "text": SECRET}) is False
    with suppress(StateError), context.turn("alice", lease=0.5) as turn:
        turn.set_variable("key", SECRET)
        server.kill()
    assert handler({"context_id": "alice", "text": SECRET}) is True
    for call in (context.set_variable, context.set_metadata):
        with pytest.raises((StateUnavailableError, StateOutcomeUnknownError)) as caught:
            call("alice", "key", SECRET)
        assert SECRET not in str(caught.value)
        assert PASSWORD not in str(caught.value)
    storage.close()
    for logger in ("agentstate.handlers WARNING", "agentstate.context WARNING", "agentstate.context DEBUG"):
        assert logger in str(log)
    assert log.tells_nothing(PASSWORD)


def test_moving_conversations_tells_nothing(store: Stores, log: Log) -> None:
    source, target = store("file"), store("valkey documents")
    with SyncConversationContext(source) as context:
        context.add_to_history("alice", "user", SECRET)
        context.set_variable("alice", "key", SECRET)
        migrate(source, target)
        assert SyncConversationContext(target).get_variable("alice", "key") == SECRET
    assert log.tells_nothing()


def test_a_log_that_tells_something_is_noticed(log: Log) -> None:
    assert log.tells_nothing(PASSWORD)
    logging.getLogger("anything").debug("%s", {"at": [f"valkey://:{quote(PASSWORD, safe='')}@host"]})
    assert not log.tells_nothing(PASSWORD)
    try:
        raise LookupError(SECRET)
    except LookupError:
        logging.getLogger("anything").exception("it failed")
    assert SECRET in str(log)
