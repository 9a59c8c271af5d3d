"""What calls say about arguments that make no sense, the same on every backend and with both contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

from agentstate import InMemoryStorage, StateOutcomeUnknownError, StateSerializationError, SyncConversationContext
from agentstate.operations import Commit


@dataclass
class DataMessage:
    role: str
    content: str


class ModelMessage(pydantic.BaseModel):
    role: str = "user"
    content: str = "hi"


@pytest.fixture
def context() -> SyncConversationContext:
    return SyncConversationContext()


@pytest.mark.parametrize(
    "messages",
    [{"role": "user", "content": "hi"}, DataMessage("user", "hi"), ModelMessage(), "hi", 3, None],
    ids=lambda messages: type(messages).__name__,
)
def test_messages_are_given_as_a_list(context: SyncConversationContext, messages: Any) -> None:
    expected = f"messages must be a list of messages, got {type(messages).__name__}"
    with pytest.raises(TypeError, match=expected):
        context.extend_history("a", messages)
    with pytest.raises(TypeError, match=expected):
        context.update_state("a", history=messages)
    with context.batch("a") as batch, pytest.raises(TypeError, match=expected):
        batch.extend_history(messages)
    assert not context.exists("a")


def test_messages_may_come_from_any_iterable(context: SyncConversationContext) -> None:
    context.extend_history("a", (message for message in [DataMessage("user", "1"), ModelMessage(content="2")]))
    context.extend_history("a", ({"role": "user", "content": "3"},))
    assert [message["content"] for message in context.get_history("a")] == ["1", "2", "3"]


def test_one_bad_message_of_several_is_named(context: SyncConversationContext) -> None:
    with pytest.raises(StateSerializationError, match=r"messages\[1\]: a message must be a mapping .*, got str"):
        context.extend_history("a", [ModelMessage(), "hi"])  # type: ignore[list-item]
    assert not context.exists("a")


WITH_AN_ID: list[Callable[[Any], None]] = [
    lambda batch: batch.add_to_history("a", "user", "hi"),
    lambda batch: batch.increment_variable("a", "n"),
]


@pytest.mark.parametrize("call", WITH_AN_ID)
def test_the_methods_of_a_batch_take_no_context_id(context: SyncConversationContext, call: Any) -> None:
    with (
        context.batch("a") as batch,
        pytest.raises(TypeError, match="of a batch take no context_id"),
    ):
        call(batch)
    assert not context.exists("a")


def test_the_function_of_update_variable_is_a_plain_one(context: SyncConversationContext) -> None:
    async def function(value: Any) -> Any:
        return value

    # A coroutine that is never awaited would be a warning, and warnings are errors here.
    with pytest.raises(TypeError, match="function must be a plain function, got an async one"):
        context.update_variable("a", "k", function)
    assert not context.exists("a")


class Silent(InMemoryStorage):
    """Carries every commit out and does not answer the first one."""

    answers = False

    def execute(self, operations: Any, settle: Any) -> None:
        def answer(index: int, outcome: Any) -> None:
            if not self.answers and isinstance(operations[index], Commit):
                self.answers = True
                outcome = StateOutcomeUnknownError("no answer", commit_id=operations[index].commit_id)
            settle(index, outcome)

        super().execute(operations, answer)


@pytest.mark.parametrize("user", [None, "alice"])
@pytest.mark.parametrize("commit_id", [None, "order-1"])
def test_the_commit_id_of_an_error_is_that_of_the_same_call(user: str | None, commit_id: str | None) -> None:
    context = SyncConversationContext(Silent(), user_id=user)
    with pytest.raises(StateOutcomeUnknownError) as raised:
        context.increment_variable("a", "n", 5, commit_id=commit_id)
    assert context.increment_variable("a", "n", 5, commit_id=raised.value.commit_id) == 5
    if commit_id is not None:
        assert context.increment_variable("a", "n", 5, commit_id=commit_id) == 5
