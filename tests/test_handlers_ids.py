"""`@stateful`: which conversation a call belongs to, and which user it acts for."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    InvalidContextIdError,
    StateAccessError,
    SyncConversationContext,
    get_context_manager,
    stateful,
)


@dataclass
class Task:
    id: Any = None
    context_id: Any = None
    metadata: Any = field(default_factory=dict)


def resolve(task: Any = None, *, explicit: Any = None, **arguments: Any) -> str:
    """The context id that a handler gets, called with the task."""
    handler = stateful(InMemoryStorage(), **arguments)(lambda task, context, context_id: context_id)
    found: str = handler(task) if explicit is None else handler(task, context_id=explicit)
    return found


# --- the order ------------------------------------------------------------------------------------------------------

FULL = Task(id="by-id", context_id="by-context-id", metadata={"context_id": "by-metadata", "user_id": "alice"})


def test_the_argument_of_the_call_comes_first() -> None:
    assert resolve(FULL, explicit="by-argument", context_id=lambda task: "by-function") == "by-argument"


def test_then_what_the_decorator_says() -> None:
    assert resolve(FULL, context_id=lambda task: "by-function") == "by-function"
    assert resolve(FULL, context_id="user") == "user:alice"


def test_then_the_context_id_of_the_task() -> None:
    assert resolve(FULL) == "by-context-id"


def test_then_the_metadata_of_the_task() -> None:
    assert resolve(Task(id="by-id", metadata={"context_id": "by-metadata"})) == "by-metadata"


def test_then_the_id_of_the_task() -> None:
    assert resolve(Task(id="by-id")) == "by-id"
    assert resolve(SimpleNamespace(id="by-id")) == "by-id"


@pytest.mark.parametrize("unset", [None, ""])
def test_what_is_unset_is_passed_over(unset: Any) -> None:
    task = Task(id="by-id", context_id=unset, metadata={"context_id": unset, "session_id": unset})
    assert resolve(task) == "by-id"
    assert resolve(task, context_id=lambda task: unset) == "by-id"
    assert resolve(task, context_id="session") == "by-id"
    assert resolve(Task(id="by-id", metadata=unset)) == "by-id"


@pytest.mark.parametrize(
    "task",
    [None, Task(), Task(id="", context_id=""), {}, {"metadata": {}}, {"metadata": None}, "text", 3, object(), [], Task],
)
@pytest.mark.parametrize("context_id", [None, "conversation", "user", "session", lambda task: None])
def test_none_found_is_an_error_and_never_a_shared_conversation(task: Any, context_id: Any) -> None:
    with pytest.raises(InvalidContextIdError, match="needs the id of a conversation"):
        resolve(task, context_id=context_id)


def test_the_error_says_what_to_do_and_the_handler_has_not_run() -> None:
    @stateful("memory")
    async def assistant(task: Any, context: Any, context_id: str) -> None:
        raise AssertionError

    with pytest.raises(InvalidContextIdError) as caught:
        asyncio.run(assistant({"text": "hi"}))
    for part in ("assistant()", "a task (dict)", "task.context_id", "task.id", "context_id=", "@stateful(context_id="):
        assert part in str(caught.value)


def test_an_empty_argument_is_an_error_and_not_passed_over() -> None:
    with pytest.raises(InvalidContextIdError, match="must not be empty"):
        resolve(FULL, explicit="")


# --- kinds of tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        {"context_id": "c", "id": "t"},
        {"contextId": "c", "id": "t"},  # A2A's JSON
        {"metadata": {"context_id": "c"}, "id": "t"},
        {"metadata": SimpleNamespace(context_id="c"), "id": "t"},
        MappingProxyType({"context_id": "c"}),
        defaultdict(lambda: "made up", context_id="c"),
        defaultdict(lambda: "made up", id="c"),
        SimpleNamespace(metadata={"context_id": "c"}),
        SimpleNamespace(contextId="c", id="t"),
        SimpleNamespace(context_id=None, metadata=None, id="c"),
        Task(context_id="c", metadata=None),
    ],
)
def test_tasks_are_objects_or_mappings(task: Any) -> None:
    assert resolve(task) == "c"


def test_looking_changes_nothing_in_the_task() -> None:
    task: defaultdict[str, Any] = defaultdict(dict, id="t")
    assert resolve(task, context_id="user") == "t"
    assert dict(task) == {"id": "t"}


# --- kinds of ids ---------------------------------------------------------------------------------------------------


class Color(str, Enum):  # noqa: UP042
    RED = "red"


ID = uuid.UUID("6b1e0f0c-5f35-4d0e-9d0a-0d6c2e9f7a11")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("  ", "  "),
        (Color.RED, "red"),
        (42, "42"),
        (-1001234, "-1001234"),  # some messengers number groups so
        (42.0, "42"),  # protobuf metadata knows no integers
        (2.0**53 - 1, "9007199254740991"),
        (ID, str(ID)),
    ],
)
def test_an_id_is_text_a_whole_number_or_a_uuid(value: Any, text: str) -> None:
    assert resolve(Task(context_id=value)) == text
    assert type(resolve(Task(context_id=value))) is str
    assert resolve(None, explicit=value) == text
    assert resolve(Task(metadata={"user_id": value}), context_id="user") == f"user:{text}"
    assert resolve(Task(), context_id=lambda task: value) == text


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        1.5,
        2.0**53,
        float("nan"),
        float("inf"),
        True,
        False,
        b"bytes",
        ["a"],
        {"a": 1},
        (),
        object(),
        Mock(),
        Task,
    ],
)
def test_what_may_stand_for_several_conversations_is_refused(value: Any) -> None:
    for found in (
        lambda: resolve(Task(context_id=value, id="t")),
        lambda: resolve(Task(id=value)),
        lambda: resolve(None, explicit=value),
        lambda: resolve(Task(metadata={"user_id": value}, id="t"), context_id="user"),
        lambda: resolve(Task(id="t"), context_id=lambda task: value),
    ):
        with pytest.raises(InvalidContextIdError):
            found()


@pytest.mark.parametrize("value", ["a\0b", "x" * 1025, "\ud800"])
def test_what_no_context_can_be_called_is_refused_before_the_handler_runs(value: str) -> None:
    runs: list[int] = []
    handler = stateful(InMemoryStorage())(lambda task, context_id: runs.append(1))
    with pytest.raises(InvalidContextIdError):
        handler(Task(context_id=value))
    assert not runs


# --- one for a user, a session or a conversation --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conversation", "user", "session"])
def test_the_metadata_may_say_who_shares_a_conversation(name: Any) -> None:
    for task in (Task(metadata={f"{name}_id": "x"}, context_id="c"), {"metadata": {f"{name}_id": "x"}, "id": "t"}):
        assert resolve(task, context_id=name) == f"{name}:x"


def test_a_task_without_a_user_cannot_name_the_conversation_of_one() -> None:
    for task in (Task(context_id="user:bob"), Task(metadata={"context_id": "user:bob"}), Task(id="user:bob")):
        with pytest.raises(InvalidContextIdError, match=r"found by task.metadata\['user_id'\]"):
            resolve(task, context_id="user")
    assert resolve(Task(context_id="session:1"), context_id="user") == "session:1"


@pytest.mark.parametrize("store", ["object", "file", "two objects", "options"])
def test_no_handler_on_the_same_store_lets_a_task_name_the_conversation_of_a_user(store: str, tmp_path: Path) -> None:
    arguments: dict[str, tuple[Any, Any]] = {
        "object": (((memory := InMemoryStorage()),), (memory,)),
        "file": (("file", {"storage_dir": str(tmp_path)}), ("file", {"storage_dir": str(tmp_path)})),
        "two objects": ((FileStorage(tmp_path),), (FileStorage(tmp_path),)),
        "options": (("file", {"storage_dir": str(tmp_path), "ttl": 60}), ("file", {"storage_dir": str(tmp_path)})),
    }
    one, two = ((storage, options[0] if options else {}) for storage, *options in arguments[store])
    plain = stateful(one[0], **one[1])(lambda task, context_id: context_id)
    finding = stateful(one[0], **one[1], context_id=lambda task: task.context_id)(lambda task, context_id: context_id)
    assert plain(Task(context_id="user:bob")) == "user:bob"
    by_user = stateful(two[0], **two[1], context_id="user")(lambda task, context_id: context_id)
    # From now on, whether that handler was called or not.
    for task in (Task(context_id="user:bob"), Task(metadata={"context_id": "user:bob"}), {"id": "user:bob"}):
        with pytest.raises(InvalidContextIdError, match="a handler on this store has context_id='user'"):
            plain(task)
    assert by_user(Task(metadata={"user_id": "bob"})) == "user:bob"
    assert plain(Task(context_id="session:1")) == "session:1"
    assert plain(None, context_id="user:bob") == "user:bob"  # what the application itself says is trusted
    assert finding(Task(context_id="user:bob")) == "user:bob"
    elsewhere = stateful(InMemoryStorage())(lambda task, context_id: context_id)
    assert elsewhere(Task(context_id="user:bob")) == "user:bob"
    get_context_manager("file", blocking=True, storage_dir=str(tmp_path)).close()
    get_context_manager("file", blocking=True, storage_dir=str(tmp_path), ttl=60).close()


def test_the_function_is_given_the_task() -> None:
    tasks: list[Any] = []

    def find(task: Any) -> str:
        tasks.append(task)
        return "found"

    task = Task()
    assert resolve(task, context_id=find) == "found"
    assert tasks == [task]


def test_a_handler_that_takes_no_task_has_a_conversation_all_the_same() -> None:
    handler = stateful(InMemoryStorage(), context_id=lambda task: "sensor-1")(lambda context, context_id: context_id)
    assert handler() == "sensor-1"
    handler = stateful(InMemoryStorage())(lambda context, context_id: context_id)
    assert handler(context_id="sensor-2") == "sensor-2"
    with pytest.raises(InvalidContextIdError, match="got no task"):
        handler()


def test_an_exception_of_the_function_passes() -> None:
    with pytest.raises(AttributeError):
        resolve(Task(), context_id=lambda task: task.nothing)


# --- bound to a user ------------------------------------------------------------------------------------------------


@pytest.fixture
def storage() -> Iterator[InMemoryStorage]:
    storage = InMemoryStorage()
    yield storage
    storage.close()


def by_user(task: Any) -> Any:
    return task.metadata.get("user")


def test_a_handler_acts_for_the_user_of_the_task(storage: InMemoryStorage) -> None:
    @stateful(storage, user_id=by_user)
    async def handler(task: Any, context: ConversationContext, context_id: str) -> Any:
        await context.set_variable(context_id, "k", 1)
        return context.user_id

    assert asyncio.run(handler(Task(context_id="c", metadata={"user": "alice"}))) == "alice"
    state = SyncConversationContext(storage).get_state("c")
    assert state is not None
    assert state.user_id == "alice"
    with pytest.raises(StateAccessError, match="does not belong to this user"):
        asyncio.run(handler(Task(context_id="c", metadata={"user": "bob"})))


def test_each_call_has_its_own_user(storage: InMemoryStorage) -> None:
    @stateful(storage, user_id=by_user)
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> list[str]:
        context.set_variable(context_id, "k", 1)
        return sorted(context.list_contexts())

    assert handler(Task(id="1", metadata={"user": "alice"})) == ["1"]
    assert handler(Task(id="2", metadata={"user": 7})) == ["2"]
    assert handler(Task(id="3", metadata={"user": "alice"})) == ["1", "3"]


@pytest.mark.parametrize("nobody", [None, "", 0, True, b"alice", Mock()])
def test_nobody_is_never_somebody(storage: InMemoryStorage, nobody: Any) -> None:
    runs: list[int] = []
    handler = stateful(storage, user_id=by_user)(lambda task, context: runs.append(1))
    with pytest.raises(StateAccessError):
        handler(Task(id="1", metadata={"user": nobody}))
    assert not runs


def test_a_turn_and_an_outage_do_not_lose_the_user(storage: InMemoryStorage) -> None:
    storage.close()
    handler = stateful(storage, user_id=by_user, serialize_turns=True, on_unavailable="ephemeral")(
        lambda task, context: (context.user_id, context.degraded)
    )
    assert handler(Task(id="1", metadata={"user": "alice"})) == ("alice", True)
