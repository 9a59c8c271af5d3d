"""Never run, only type-checked: what the callers of `@stateful` handlers see, for every kind of handler and of task."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_type

from agentstate import (
    ConversationContext,
    InMemoryStorage,
    SyncConversationContext,
    get_context_manager,
    get_handler,
    list_handlers,
    register_handler,
    stateful,
)
from agentstate.handlers import StatefulFunction

storage = InMemoryStorage()


@dataclass
class Task:
    context_id: str
    text: str


# --- functions ------------------------------------------------------------------------------------------------------


@register_handler("assistant")
@stateful(storage="valkey", url="valkey://localhost:6379", key_prefix="agentup:state:", ttl=3600)
async def assistant(task: Task, context: ConversationContext, context_id: str) -> str:
    return task.text


@stateful
def script(task: Task, context: SyncConversationContext, context_id: str) -> int:
    return 1


@stateful(storage, serialize_turns=True, on_unavailable="ephemeral", context_id=lambda task: task.context_id)
async def stream(task: Task, *, context: ConversationContext, context_id: str) -> AsyncGenerator[str, None]:
    yield task.text


@stateful("file", context_id="user", user_id=lambda task: task.user)
def steps(task: Task, context: SyncConversationContext, context_id: str) -> Generator[int, None, str]:
    yield 1
    return "done"


@stateful("memory")
async def with_language(task: Task, language: str, context: ConversationContext, context_id: str) -> str:
    return language


async def functions(task: Task) -> None:
    assert_type(await assistant(task), str)
    assert_type(await assistant(task, context_id="alice"), str)
    assert_type(script(task), int)
    assert_type(stream(task), AsyncGenerator[str, None])
    assert_type(steps(task), Generator[int, None, str])
    assert_type(await with_language(task, "en"), str)
    assert_type(script.__name__, str)

    script(task, get_context_manager(), "alice")  # type: ignore[call-arg,arg-type]
    script(task, context=get_context_manager())  # type: ignore[call-arg]
    script("not a task")  # type: ignore[arg-type]
    script()  # type: ignore[call-arg]


# --- tasks whose type holds Any -------------------------------------------------------------------------------------


@stateful("memory")
async def of_dict(task: dict[str, Any], context: ConversationContext, context_id: str) -> str:
    return ""


@stateful
def of_dict_blocking(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> str:
    return ""


@stateful("memory")
async def of_dict_streaming(
    task: dict[str, Any], context: ConversationContext, context_id: str
) -> AsyncIterator[dict[str, Any]]:
    yield task


@stateful
def of_dict_steps(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> Iterator[int]:
    yield 1


@stateful("memory")
def of_dict_and_more(
    task: dict[str, Any], language: str, context: SyncConversationContext, context_id: str
) -> list[str]:
    return [language]


@stateful("memory")
async def of_any(task: Any, context: ConversationContext, context_id: str) -> str:
    return ""


@stateful("memory")
async def untyped_task(task, context: ConversationContext, context_id: str) -> str:
    return ""


@stateful
def untyped(task, context, context_id):
    return ""


async def tasks_whose_type_holds_any() -> None:
    task: dict[str, Any] = {"id": 1}
    assert_type(await of_dict(task), str)
    assert_type(await of_dict(task, context_id="alice"), str)
    assert_type(of_dict_blocking(task), str)
    assert_type(of_dict_streaming(task), AsyncIterator[dict[str, Any]])
    assert_type(of_dict_steps(task), Iterator[int])
    assert_type(of_dict_and_more(task, "en"), list[str])
    assert_type(await of_any(task), str)
    assert_type(await untyped_task(task), str)
    untyped(task)

    await of_dict(1)  # type: ignore[arg-type]
    await of_dict()  # type: ignore[call-arg]
    await of_dict(task, 1)  # type: ignore[call-arg,arg-type]
    await of_dict(task, context_id=1)  # type: ignore[arg-type]
    of_dict_blocking(1)  # type: ignore[arg-type]
    of_dict_streaming(1)  # type: ignore[arg-type]
    of_dict_steps()  # type: ignore[call-arg]
    of_dict_and_more(task, 1)  # type: ignore[arg-type]
    await of_any()  # type: ignore[call-arg]
    await untyped_task()  # type: ignore[call-arg]
    untyped()  # type: ignore[call-arg]


# --- handlers that name one of the two ------------------------------------------------------------------------------


@stateful
def of_context(task: dict[str, Any], context: SyncConversationContext) -> int:
    return 1


@stateful("memory")
async def of_id(task: dict[str, Any], context_id: str) -> int:
    return 1


@stateful("memory")
async def of_both_if_there_is_state(
    task: dict[str, Any], context: ConversationContext | None = None, context_id: str | None = None
) -> int:
    return 1


async def handlers_that_name_one_of_the_two() -> None:
    assert_type(of_context({}), int)
    assert_type(await of_id({}), int)
    assert_type(await of_both_if_there_is_state({}, context_id="alice"), int)

    of_context(1)  # type: ignore[arg-type]
    await of_id(1)  # type: ignore[arg-type]
    await of_both_if_there_is_state(1)  # type: ignore[arg-type]


# --- methods --------------------------------------------------------------------------------------------------------


class Agent:
    @stateful("memory")
    async def answer(self, task: Task, context: ConversationContext, context_id: str) -> bytes:
        return b""

    @stateful
    def of_dict(self, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    @stateful
    def of_context(self, task: dict[str, Any], context: SyncConversationContext) -> Iterator[bytes]:
        yield b""

    @stateful
    def with_language(
        self, task: dict[str, Any], language: str, context: SyncConversationContext, context_id: str
    ) -> bytes:
        return b""

    @classmethod
    @stateful("memory")
    def of_class(cls, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    @stateful("memory")
    @classmethod
    def of_class_outside(cls, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    @staticmethod
    @stateful("memory")
    def static(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    @stateful("memory")
    @staticmethod
    def static_outside(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    def plain(self, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""

    def __call__(self, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> bytes:
        return b""


async def methods(agent: Agent) -> None:
    task = Task("a", "b")
    assert_type(await agent.answer(task), bytes)
    assert_type(await agent.answer(task, context_id="alice"), bytes)
    assert_type(await Agent.answer(agent, task), bytes)
    assert_type(agent.of_dict({}), bytes)
    assert_type(Agent.of_dict(agent, {}), bytes)
    assert_type(agent.of_context({}), Iterator[bytes])
    assert_type(agent.with_language({}, "en"), bytes)
    for of_class in (agent.of_class, Agent.of_class, agent.of_class_outside, Agent.of_class_outside):
        assert_type(of_class({}), bytes)
        of_class(1)  # type: ignore[arg-type]
    for static in (agent.static, Agent.static, agent.static_outside, Agent.static_outside):
        assert_type(static({}), bytes)
        static(1)  # type: ignore[arg-type]

    await agent.answer("not a task")  # type: ignore[arg-type]
    await agent.answer(task, "alice")  # type: ignore[call-arg]
    agent.of_dict(1)  # type: ignore[arg-type]
    Agent.of_dict({}, {})  # type: ignore[arg-type]
    agent.of_context(1)  # type: ignore[arg-type]


# --- decorated objects ----------------------------------------------------------------------------------------------


def welcome(language: str, task: dict[str, Any], context: SyncConversationContext, context_id: str) -> float:
    return 1.0


def objects(agent: Agent) -> None:
    assert_type(stateful(storage)(agent.plain)({}), bytes)
    assert_type(stateful(storage)(agent)({}), bytes)
    assert_type(stateful(storage)(partial(welcome, "en"))({}), float)

    stateful(storage)(agent.plain)(1)  # type: ignore[arg-type]
    stateful(storage)(agent)(1)  # type: ignore[arg-type]


def _names(handler: StatefulFunction[Task, int]) -> str:
    return handler.__name__


_names(script)
_names(of_dict)  # type: ignore[arg-type]

stateful(storage=3)  # type: ignore[call-overload]
stateful("memory", context_id="person")  # type: ignore[call-overload]
stateful("memory", on_unavailable="ignore")  # type: ignore[call-overload]


@stateful  # type: ignore[arg-type]
def without_either(task: Task) -> None: ...


handler: Callable[..., Any] = get_handler("assistant")
names: list[str] = list_handlers()
