"""What only the memory backend does. The rest is in `test_contract.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from interruptions import everywhere

import agentstate
from agentstate.context import SyncConversationContext
from agentstate.errors import StateConflictError, StateUnavailableError
from agentstate.operations import CHANGED, REMEMBER_CLEARED, Commit, Create, Lease
from agentstate.storage import memory, resolve
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


# --- in the middle of a write ---------------------------------------------------------------------------------------


def everything(context: SyncConversationContext) -> Any:
    """All that can be read but the times."""
    state = context.get_state("a")
    if state is None:
        return None
    contents = [message["content"] for message in state.history]
    return state.variables, state.metadata, contents, state.history_start, state.revision, state.user_id


def batch(context: SyncConversationContext, commit_id: str) -> None:
    with context.batch("a", commit_id=commit_id) as batch:
        batch.add_to_history("user", "more")
        batch.set_variables({"x": 2, "y": 3})
        batch.increment_variable("n", 4)
        batch.delete_metadata("m")
        batch.trim_history(keep=3)


WRITES: dict[str, Callable[[SyncConversationContext, str], object]] = {
    "append": lambda context, commit_id: context.add_to_history("a", "user", "more", commit_id=commit_id),
    "set": lambda context, commit_id: context.set_variables("a", {"x": 2, "y": 3}, commit_id=commit_id),
    "increment": lambda context, commit_id: context.increment_variable("a", "n", 4, commit_id=commit_id),
    "pop": lambda context, commit_id: context.pop_history("a", 2, commit_id=commit_id),
    "trim": lambda context, commit_id: context.trim_history("a", 1, commit_id=commit_id),
    "replace": lambda context, commit_id: context.update_state(
        "a", history=[{"role": "user", "content": "only"}], metadata={}, commit_id=commit_id
    ),
    "clear": lambda context, commit_id: context.clear_context("a", commit_id=commit_id),
    "batch": batch,
}


def prepared() -> SyncConversationContext:
    context = SyncConversationContext(InMemoryStorage())
    for number in range(5):
        context.add_to_history("a", "user", number)
    context.pop_history("a")  # its room is left over
    context.set_variables("a", {"x": 1, "n": 1})
    context.set_metadata("a", "m", "v")
    return context


class Interrupted(BaseException):
    """Raised by the handler of a signal."""


def interrupt() -> None:
    raise Interrupted


@pytest.mark.parametrize("name", WRITES)
def test_a_write_takes_effect_whole_or_not_at_all_wherever_it_is_interrupted(name: str) -> None:
    undisturbed = prepared()
    before = everything(undisturbed)
    WRITES[name](undisturbed, "id")
    after = everything(undisturbed)
    seen = []
    for interrupting in everywhere(memory, resolve):
        context = prepared()
        with suppress(Interrupted), interrupting(interrupt):
            WRITES[name](context, "id")
        seen.append(everything(context))
        WRITES[name](context, "id")  # what was applied is not applied again, and what was not is now
        assert everything(context) == after
        context.set_variable("a", "z", 1)
        assert context.get_variable("a", "z") == 1
    assert all(state in (before, after) for state in seen)
    assert seen.count(before) > 5
    assert seen.count(after) > 1


@pytest.mark.parametrize("name", WRITES)
def test_a_handler_that_runs_inside_a_write_reads_what_is_whole_and_loses_nothing(name: str) -> None:
    undisturbed = prepared()
    before = everything(undisturbed)
    WRITES[name](undisturbed, "id")
    after = everything(undisturbed)
    refused = []

    def handler() -> None:
        assert everything(context) in (before, after)
        try:
            context.set_metadata("a", "handler", 1)
            wrote.append(everything(context))
        except StateConflictError as error:
            refused.append(str(error))

    for interrupting in everywhere(memory, resolve):
        context = prepared()
        wrote: list[Any] = []
        with interrupting(handler):
            WRITES[name](context, "id")
        context.set_metadata("b", "handler", 1)
        if wrote:
            context.delete_metadata("a", "handler") if name not in ("replace", "clear") else None
            assert context.storage.call(Commit("a", (), "id", answer=CHANGED)) != CHANGED
            assert wrote[0][1].get("handler") == 1
        else:
            assert everything(context) == after
    assert refused
    assert all("in the middle of another write of the same thread" in reason for reason in refused)


def test_a_read_that_is_interrupted_by_a_write_is_of_one_state() -> None:
    def handler() -> None:
        context.pop_history("a", 2)
        context.extend_history("a", [{"role": "user", "content": "new"}] * 2)
        context.set_variable("a", "x", 2)

    for interrupting in everywhere(memory, resolve):
        context = prepared()
        before = everything(context)
        with interrupting(handler):
            read = everything(context)
        assert read in (before, everything(context))


FORKING = """
import os, sys
sys.path.insert(0, {tests!r})
from interruptions import everywhere
from test_memory import WRITES, everything, prepared
from agentstate.storage import memory, resolve

for name in ("append", "batch"):
    write = WRITES[name]
    undisturbed = prepared()
    before = everything(undisturbed)
    write(undisturbed, "id")
    after = everything(undisturbed)

    def fork():
        child = os.fork()
        if child == 0:
            found = everything(context)
            write(context, "id")
            context.set_variable("b", "x", "child")
            os._exit(7 if found in (before, after) and everything(context) == after else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, name

    for interrupting in everywhere(memory, resolve):
        context = prepared()
        with interrupting(fork):
            write(context, "id")
        assert not context.exists("b")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_has_whole_commits_and_no_lock_held() -> None:
    program = FORKING.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_closing_is_not_absence() -> None:
    def handler() -> None:
        context.storage.close()

    for interrupting in everywhere(memory):
        context = prepared()
        with suppress(StateUnavailableError), interrupting(handler):
            assert context.exists("a")
        context = prepared()
        with suppress(StateUnavailableError), interrupting(handler):
            assert list(context.list_contexts()) == ["a"]


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
