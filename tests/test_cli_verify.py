"""verify: what is damaged is found, and what is intact of it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import valkey
from commands import run
from servers import ValkeyServer
from stores import many, restore

from agentstate.cli import exits
from agentstate.cli.verify import _damaged, _Seen
from agentstate.context import SyncConversationContext
from agentstate.operations import Snapshot
from agentstate.storage.file import FileStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.storage.valkey import ValkeyStorage


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a store in the default place, in which one conversation is damaged in its middle."""
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states", fsync="no")) as context:
        many(context.storage, 5)
        for number in range(60):
            context.add_to_history("damaged", "user", f"message {number}.")
    path = tmp_path / "conversation_states" / "damaged.jsonl"
    path.write_bytes(path.read_bytes().replace(b"message 30.", b"massage 30."))
    return tmp_path


def test_an_intact_store_is_reported(tmp_path: Path) -> None:
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        many(context.storage, 5)
    ran = run("verify", cwd=tmp_path)
    assert (ran.code, ran.out) == (0, "5 conversations with 5 messages, all intact.\n")
    assert run("verify", "--json", cwd=tmp_path).json == {"conversations": 5, "messages": 5, "damaged": []}


def test_damage_is_found_and_repaired_and_the_original_is_kept(here: Path) -> None:
    before = (here / "conversation_states" / "damaged.jsonl").read_bytes()
    ran = run("verify", cwd=here)
    assert ran.code == exits.CORRUPTED
    assert "damaged: " in ran.out
    assert (here / "conversation_states" / "damaged.jsonl").read_bytes() == before
    repaired = run("verify", "--repair", cwd=here)
    assert repaired.code == 0, repaired
    assert "59 messages" in repaired.out
    assert (here / "conversation_states" / "damaged.jsonl.damaged").read_bytes() == before
    history = run("show", "damaged", "--json", cwd=here).json["history"]
    assert [message["content"] for message in history] == [f"message {n}." for n in range(60) if n != 30]
    assert run("verify", cwd=here).code == 0


def test_some_conversations_can_be_verified_alone(here: Path) -> None:
    assert run("verify", "c000001", cwd=here).code == 0
    document = run("verify", "damaged", "c000001", "nobody", "--json", cwd=here)
    assert document.code == exits.CORRUPTED
    assert [each["context_id"] for each in document.json["damaged"]] == ["damaged"]


def test_damage_that_cannot_be_repaired_is_reported(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.json").write_text('{"context_id": "a", "hist')
    ran = run("verify", "--repair", "--storage-dir", "docs", "--layout", "document", cwd=tmp_path)
    assert ran.code == exits.CORRUPTED
    assert (tmp_path / "docs" / "a.json").read_text() == '{"context_id": "a", "hist'


def test_a_history_that_another_program_cut_is_found_on_a_server(
    tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str
) -> None:
    options = ["--url", valkey_9.url, "--key-prefix", key_prefix]
    with SyncConversationContext(ValkeyStorage(valkey_9.url, key_prefix=key_prefix)) as context:
        for number in range(10):
            context.add_to_history("a", "user", number)
            context.add_to_history("b", "user", number)
        assert run("verify", *options, cwd=tmp_path).code == 0
        with valkey.Valkey.from_url(valkey_9.url) as client:
            client.lpop(f"{key_prefix}{{{key_prefix}a}}:history")
        ran = run("verify", "--json", *options, cwd=tmp_path)
        assert ran.code == exits.CORRUPTED
        assert [each["context_id"] for each in ran.json["damaged"]] == ["a"]
        assert (ran.json["conversations"], ran.json["messages"]) == (1, 10)
        ran = run("verify", "--repair", *options, cwd=tmp_path)
        assert ran.code == exits.CORRUPTED
        assert "cannot be repaired" in ran.err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"variables": {"v": b"{nonsense"}}, "variable 'v' is not JSON"),
        ({"metadata": {"m": b"[" * 100_000}}, "metadata 'm' is not JSON"),
        ({"messages": [b'"text"'], "end": 1}, "message 0 is not a JSON object"),
    ],
)
def test_values_that_are_not_json_are_found(change: dict[str, Any], reason: str) -> None:
    storage = InMemoryStorage()
    restore(storage, "a", Snapshot(None, 1, 1, 1, 0, 0, {}, {}, 0, ())._replace(**change))
    assert [damage.reason for damage in _damaged(storage, [], _Seen())] == [
        f"the {reason}".replace("the message", "message")
    ]
