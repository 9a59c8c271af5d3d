"""Every kind of handler, each called once: python examples/handlers.py

The patterns are those of AgentUp's guide to state management. They store their state in memory. In your own handlers,
write "file" or "valkey", or no storage to use agent_config.yaml.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

from agentstate import (
    ConversationContext,
    SyncConversationContext,
    get_handler,
    list_handlers,
    register_handler,
    stateful,
)

Task = dict[str, Any]  # or an A2A task, or any object with a context_id


@register_handler("my_stateful_skill")
@stateful("memory")
async def my_stateful_skill(task: Task, context: ConversationContext, context_id: str) -> str:
    """A coroutine that uses the history and a variable."""
    history = await context.get_history(context_id, limit=10)
    await context.set_variable(context_id, "user_preference", "dark_mode")
    preference = await context.get_variable(context_id, "user_preference", "default")
    response = f"{len(history)} messages so far; you prefer {preference}."
    await context.add_to_history(context_id, "user", task["input"])
    await context.add_to_history(context_id, "assistant", response)
    return response


@register_handler("learning_assistant")
@stateful("memory", context_id="user")
def learning_assistant(task: Task, context: SyncConversationContext, context_id: str) -> str:
    """An ordinary function with state for each user, not for each conversation."""
    if "python" in task["input"].lower():
        context.update_variable(context_id, "interests", lambda known: sorted({*known, "programming"}), default=[])
    interests = context.get_variable(context_id, "interests", [])
    return f"I see you're interested in {', '.join(interests)}!" if interests else "How can I assist you today?"


@register_handler("task_manager")
@stateful("memory", serialize_turns=True)
async def task_manager(task: Task, context: ConversationContext, context_id: str) -> str:
    """One call at a time in each conversation, across all processes."""
    current = await context.get_variable(context_id, "current_task")
    if task["input"].lower().startswith("start task"):
        current = {"id": str(uuid.uuid4()), "current_step": 0, "started_at": datetime.now(UTC)}
    elif current is None:
        return "Say 'start task' to begin or 'next step' to continue."
    else:
        current["current_step"] += 1
    await context.set_variable(context_id, "current_task", current)
    return f"You are at step {current['current_step'] + 1}."


@register_handler("streaming_assistant")
@stateful("memory")
async def streaming_assistant(task: Task, context: ConversationContext, context_id: str) -> AsyncIterator[str]:
    """An async generator that yields the answer in pieces, and stores it at the end."""
    words = ["You", "said:", task["input"]]
    for word in words:
        yield word
    async with context.batch(context_id) as batch:
        batch.add_to_history("user", task["input"])
        batch.add_to_history("assistant", " ".join(words))


@register_handler("countdown")
@stateful("memory")
def countdown(task: Task, context: SyncConversationContext, context_id: str) -> Iterator[int]:
    """A generator that continues where the last call stopped."""
    while (left := context.get_variable(context_id, "left", 3)) > 0:
        context.set_variable(context_id, "left", left - 1)
        yield left


class Assistant:
    """A class whose method is a handler."""

    def __init__(self, name: str) -> None:
        self.name = name

    @stateful("memory", context_id=lambda task: f"room:{task['room']}")
    async def reply(self, task: Task, context: ConversationContext, context_id: str) -> str:
        visits = await context.increment_variable(context_id, "visits")
        return f"{self.name} was called {visits} times in {context_id}."


async def main() -> None:
    hello = {"context_id": "alice", "input": "Hello!", "metadata": {"user_id": "alice"}, "room": "kitchen"}
    print("registered:", ", ".join(sorted(list_handlers())))
    for _ in range(2):
        print(await get_handler("my_stateful_skill")(hello))
    print(learning_assistant({**hello, "input": "I write Python."}))
    for command in ("start task", "next step"):
        print(await task_manager({**hello, "input": command}))
    print([word async for word in streaming_assistant(hello)])
    print(next(iter(countdown(hello))), list(countdown(hello)))
    assistant = Assistant("Max")
    print(await assistant.reply(hello))
    print(await assistant.reply(hello, context_id="room:cellar"))  # an explicit id has priority


if __name__ == "__main__":
    asyncio.run(main())
