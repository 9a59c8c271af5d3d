"""What only the memory backend does. The rest is in `test_contract.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import agentstate
from agentstate.context import SyncConversationContext
from agentstate.operations import REMEMBER_CLEARED, Commit, Create, Lease
from agentstate.storage import memory
from agentstate.storage.memory import InMemoryStorage


def test_it_answers_without_a_thread_of_its_own() -> None:
    before = threading.active_count()
    context = SyncConversationContext(InMemoryStorage())
    for number in range(10):
        context.add_to_history("a", "user", number)
    assert threading.active_count() == before


def test_a_script_imports_little_for_it() -> None:
    heavy = [
        "asyncio",
        "valkey",
        "yaml",
        "filelock",
        "dataclasses_json",
        "dataclasses",
        "datetime",
        "inspect",
        "logging",
        "typing",
    ]
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(agentstate.__file__).parent.parent)!r})
        from agentstate import SyncConversationContext
        context = SyncConversationContext()
        context.add_to_history("a", "user", "hi")
        context.set_variable("a", "k", [1])
        assert context.get_history("a", limit=1)[0]["content"] == "hi"
        print([name for name in {heavy!r} if name in sys.modules])
    """
    # Without `site`, which runs what other packages have put there, imports included.
    command = [sys.executable, "-S", "-c", textwrap.dedent(program)]
    assert subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout.strip() == "[]"


def test_every_storage_is_a_store_of_its_own() -> None:
    one, other = (SyncConversationContext(InMemoryStorage()) for _ in range(2))
    one.set_variable("a", "x", 1)
    assert other.get_state("a") is None


def test_a_context_without_a_storage_has_one_in_memory() -> None:
    context = SyncConversationContext()
    context.set_variable("a", "x", 1)
    assert isinstance(context.storage, InMemoryStorage)
    assert SyncConversationContext().get_state("a") is None


def test_what_is_over_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = InMemoryStorage(ttl=0.01)
    context = SyncConversationContext(storage)
    for number in range(300):
        context.set_variable(f"expires-{number}", "x", 1)
        storage.call(Lease(f"leased-{number}", "take", "token", 0.01))
        context.clear_context(f"expires-{number - 100}")
    assert len(storage._contexts) == 300
    later = time.monotonic() + REMEMBER_CLEARED + 1
    time.sleep(0.02)
    monkeypatch.setattr(time, "monotonic", lambda: later)
    for number in range(1000):  # commits pay for the sweep, each a little
        context.set_variable("busy", "x", number)
    assert set(storage._contexts) <= {"busy"} | {f"expires-{number}" for number in range(300)}
    monkeypatch.setattr(time, "monotonic", lambda: later + REMEMBER_CLEARED + 1)
    for number in range(1000):
        context.set_variable("busy", "x", number)
    assert set(storage._contexts) == {"busy"}
    assert not storage._leases


def test_a_sweep_keeps_what_lives() -> None:
    context = SyncConversationContext(InMemoryStorage())
    for number in range(200):
        context.set_variable(f"context-{number}", "x", number)
    for number in range(500):
        context.set_variable("busy", "x", number)
    assert [context.get_variable(f"context-{number}", "x") for number in range(200)] == list(range(200))


def test_closing_forgets_everything() -> None:
    storage = InMemoryStorage()
    storage.call(Commit("a", (Create(),), "c1"))
    storage.close()
    assert not storage._contexts


def test_messages_read_are_not_those_that_are_kept() -> None:
    storage = InMemoryStorage()
    context = SyncConversationContext(storage)
    context.add_to_history("a", "user", "hi")
    snapshot: Any = storage.call(context._query("a", variables=None, metadata=None, history=None))
    snapshot.variables["x"] = b"1"
    assert context.get_variables("a") == {}


FORKING = """
import os
from agentstate import InMemoryStorage, SyncConversationContext
storage = InMemoryStorage()
context = SyncConversationContext(storage)
context.set_variable("a", "x", "parent")
with storage._lock:  # as if another thread were in the middle of something
    child = os.fork()
    if child == 0:
        assert context.get_variable("a", "x") == "parent"
        context.set_variable("a", "x", "child")
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert context.get_variable("a", "x") == "parent"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_fork_has_its_own_copy_and_no_lock_held() -> None:
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=60)


def test_a_context_that_expires_while_it_is_got_is_created_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = InMemoryStorage(ttl=1.0)
    context = SyncConversationContext(storage)
    born = context.get_or_create("a")
    readings = iter([0, 1_500_000])  # the commit comes before the expiry, the read after it
    clock = memory.now_microseconds
    start = clock()
    monkeypatch.setattr(memory, "now_microseconds", lambda: start + next(readings, 1_500_001))
    state = context.get_or_create("a")
    assert state.revision == 1
    assert state.created_at > born.created_at
