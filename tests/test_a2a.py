"""`@stateful` with the real types of a2a-sdk: protobuf messages, where what is not set is `""`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

a2a_types = pytest.importorskip("a2a.types", reason="a2a-sdk is not installed; it is in the extra `test`")

from a2a.server.agent_execution import RequestContext  # noqa: E402
from a2a.server.context import ServerCallContext  # noqa: E402
from a2a.types import Message, Part, Role, SendMessageRequest, Task, TaskState, TaskStatus  # noqa: E402
from google.protobuf.json_format import MessageToDict  # noqa: E402
from google.protobuf.struct_pb2 import Struct, Value  # noqa: E402

from agentstate import InMemoryStorage, InvalidContextIdError, SyncConversationContext, stateful  # noqa: E402


@pytest.fixture
def storage() -> Iterator[InMemoryStorage]:
    storage = InMemoryStorage()
    yield storage
    storage.close()


def resolve(task: Any, **arguments: Any) -> str:
    found: str = stateful(InMemoryStorage(), **arguments)(lambda task, context_id: context_id)(task)
    return found


def test_a_task_is_known_by_its_context() -> None:
    assert resolve(Task(id="task-1", context_id="context-1")) == "context-1"


def test_a_task_without_a_context_is_known_by_its_metadata_and_then_by_itself() -> None:
    assert resolve(Task(id="task-1", metadata={"context_id": "from-metadata"})) == "from-metadata"
    assert resolve(Task(id="task-1", context_id="")) == "task-1"
    assert resolve(Task(id="task-1", metadata={"context_id": ""})) == "task-1"
    assert resolve(Task(id="task-1", metadata={"context_id": None})) == "task-1"


@pytest.mark.parametrize("context_id", [None, "conversation", "user", "session"])
def test_a_task_that_sets_nothing_shares_no_conversation(context_id: Any) -> None:
    with pytest.raises(InvalidContextIdError, match=r"a task \(Task\) without an id"):
        resolve(Task(), context_id=context_id)


def test_metadata_says_who_shares_a_conversation() -> None:
    task = Task(id="task-1", context_id="context-1", metadata={"user_id": "alice", "session_id": "s1"})
    assert resolve(task, context_id="user") == "user:alice"
    assert resolve(task, context_id="session") == "session:s1"
    assert resolve(task, context_id="conversation") == "context-1"


def test_a_number_in_metadata_arrives_as_a_float_and_is_the_number_that_was_meant() -> None:
    task = Task(metadata={"user_id": 42})
    assert isinstance(task.metadata["user_id"], float)
    assert resolve(task, context_id="user") == "user:42"


def test_a_number_that_protobuf_rounded_is_refused() -> None:
    with pytest.raises(InvalidContextIdError, match="must be text or a whole number"):
        resolve(Task(metadata={"user_id": 2**53 + 1}), context_id="user")


@pytest.mark.parametrize("value", [True, ["alice"], {"name": "alice"}])
def test_metadata_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(InvalidContextIdError, match=r"task.metadata\['user_id'\] must be text"):
        resolve(Task(id="task-1", metadata={"user_id": value}), context_id="user")


def test_a_value_of_no_kind_is_refused() -> None:
    metadata = Struct()
    metadata.fields["user_id"].CopyFrom(Value())
    with pytest.raises(InvalidContextIdError, match="'user_id' has no value"):
        resolve(Task(id="task-1", metadata=metadata), context_id="user")


def test_looking_leaves_the_task_as_it_is() -> None:
    # A Struct adds the fields that it is asked for.
    task = Task(id="task-1")
    before = task.SerializeToString()
    assert resolve(task, context_id="user") == "task-1"
    assert task.SerializeToString() == before
    assert not task.HasField("metadata")


def test_messages_and_request_contexts_are_tasks_too() -> None:
    message = Message(message_id="m", context_id="context-1", role=Role.ROLE_USER, parts=[Part(text="hi")])
    assert resolve(message) == "context-1"
    with pytest.raises(InvalidContextIdError, match=r"a task \(Message\)"):
        resolve(Message(message_id="m"))
    request = RequestContext(ServerCallContext(), SendMessageRequest(message=message))
    assert resolve(request) == "context-1"
    request = RequestContext(ServerCallContext(), SendMessageRequest(message=message, metadata={"user_id": "alice"}))
    assert resolve(request, context_id="user") == "user:alice"


def test_the_json_of_a_task_is_known_as_the_task_is() -> None:
    data = MessageToDict(Task(id="task-1", context_id="context-1"))
    assert data["contextId"] == "context-1"
    assert resolve(data) == "context-1"


def test_an_assistant_remembers_what_two_tasks_of_one_conversation_said(storage: InMemoryStorage) -> None:
    def task(number: int, text: str) -> Task:
        message = Message(message_id=f"m{number}", role=Role.ROLE_USER, parts=[Part(text=text)])
        status = TaskStatus(state=TaskState.TASK_STATE_WORKING, message=message)
        return Task(id=f"task-{number}", context_id="context-1", status=status, history=[message])

    @stateful(storage, user_id=lambda task: "alice", serialize_turns=True)
    async def assistant(task: Task, context: Any, context_id: str) -> list[str]:
        text = task.history[-1].parts[0].text
        await context.add_to_history(context_id, "user", text)
        return [message["content"] for message in await context.get_history(context_id)]

    assert asyncio.run(assistant(task(1, "I like tea"))) == ["I like tea"]
    assert asyncio.run(assistant(task(2, "and cake"))) == ["I like tea", "and cake"]
    state = SyncConversationContext(storage).get_state("context-1")
    assert state is not None
    assert state.user_id == "alice"
