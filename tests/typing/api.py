"""Never run, only type-checked: what users of the public names see.

mypy and pyright check each `assert_type`, and that what is marked as an error is one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, assert_type

from agentstate import (
    ConversationContext,
    ConversationState,
    InMemoryStorage,
    Message,
    StateOutcomeUnknownError,
    StateStorage,
    SyncConversationContext,
    get_context_manager,
    load_config,
    register_storage,
)
from agentstate.config import StateConfig

storage: StateStorage = InMemoryStorage(ttl=3600, max_history=100)


@dataclass
class Preferences:
    theme: str = "light"


# --- the two contexts -----------------------------------------------------------------------------------------------


async def every_call_of_the_awaitable_context(context: ConversationContext) -> None:
    assert_type(await context.get_or_create("a", user_id="alice"), ConversationState)
    assert_type(await context.get_state("a", history_limit=10), ConversationState | None)
    assert_type(await context.exists("a"), bool)
    await context.update_state("a", variables={"k": 1}, commit_id="c1")
    assert_type(await context.clear_context("a"), bool)
    await context.fork_context("a", "b", upto=3)
    assert_type(await context.cleanup_old_contexts(max_age_hours=24), int)
    assert_type(context.list_contexts(user_id="alice"), AsyncIterator[str])

    await context.add_to_history("a", "user", "hi", {"lang": "en"}, commit_id="c2")
    await context.extend_history("a", [{"role": "user", "content": "hi"}])
    assert_type(await context.get_history("a", limit=3), list[Message])
    assert_type(await context.get_history("a", 3, before=10), list[Message])
    assert_type(context.iter_history("a", page_size=50), AsyncIterator[Message])
    assert_type(await context.count_history("a"), int)
    await context.trim_history("a", keep=10)
    assert_type(await context.pop_history("a", n=2), list[Message])
    await context.clear_history("a")

    assert_type(await context.get_variable("a", "p", as_type=Preferences), Any)
    assert_type(await context.get_variables("a"), dict[str, Any])
    await context.set_variable("a", "k", {"any": ["json"]})
    await context.set_variables("a", {"k": 1})
    assert_type(await context.delete_variable("a", "k"), bool)
    assert_type(await context.increment_variable("a", "n", by=2.5), Any)
    assert_type(await context.update_variable("a", "k", lambda value: [*value, 1], default=[]), Any)

    assert_type(await context.get_metadata("a", "k", default=""), Any)
    assert_type(await context.get_all_metadata("a"), dict[str, Any])
    await context.set_metadata("a", "k", "v")
    assert_type(await context.delete_metadata("a", "k"), bool)

    async with context.batch("a", commit_id="c3") as batch:
        batch.add_to_history("user", "hi")
        batch.set_variables({"k": 1})
    async with context.turn("a", lease=30.0, timeout=5) as turn:
        turn.set_variable("k", 1)
        assert_type(turn.token, str)
    async with ConversationContext(storage, user_id="alice") as bound:
        assert_type(bound.user_id, str | None)
    assert_type(context.degraded, bool)
    await context.aclose()


def every_call_of_the_blocking_context(context: SyncConversationContext) -> None:
    assert_type(context.get_or_create("a", user_id="alice"), ConversationState)
    assert_type(context.get_state("a", history_limit=10), ConversationState | None)
    assert_type(context.exists("a"), bool)
    context.update_state("a", variables={"k": 1}, commit_id="c1")
    assert_type(context.clear_context("a"), bool)
    context.fork_context("a", "b", upto=3)
    assert_type(context.cleanup_old_contexts(max_age_hours=24), int)
    assert_type(context.list_contexts(user_id="alice"), Iterator[str])

    context.add_to_history("a", "user", "hi", {"lang": "en"}, commit_id="c2")
    context.extend_history("a", [{"role": "user", "content": "hi"}])
    assert_type(context.get_history("a", limit=3), list[Message])
    assert_type(context.get_history("a", 3, before=10), list[Message])
    assert_type(context.iter_history("a", page_size=50), Iterator[Message])
    assert_type(context.count_history("a"), int)
    context.trim_history("a", keep=10)
    assert_type(context.pop_history("a", n=2), list[Message])
    context.clear_history("a")

    assert_type(context.get_variable("a", "p", as_type=Preferences), Any)
    assert_type(context.get_variables("a"), dict[str, Any])
    context.set_variable("a", "k", {"any": ["json"]})
    context.set_variables("a", {"k": 1})
    assert_type(context.delete_variable("a", "k"), bool)
    assert_type(context.increment_variable("a", "n", by=2.5), Any)
    assert_type(context.update_variable("a", "k", lambda value: [*value, 1], default=[]), Any)

    assert_type(context.get_metadata("a", "k", default=""), Any)
    assert_type(context.get_all_metadata("a"), dict[str, Any])
    context.set_metadata("a", "k", "v")
    assert_type(context.delete_metadata("a", "k"), bool)

    with context.batch("a", commit_id="c3") as batch:
        batch.add_to_history("user", "hi")
    with context.turn("a", lease=30.0, timeout=5) as turn:
        turn.set_variable("k", 1)
    with SyncConversationContext(storage, user_id="alice") as bound:
        assert_type(bound.user_id, str | None)
    context.close()


async def what_the_twins_do_not_let_pass(context: ConversationContext, blocking: SyncConversationContext) -> None:
    await context.get_history()  # type: ignore[call-arg]
    await context.get_history("a", "3")  # type: ignore[arg-type]
    await context.get_history("a", last=3)  # type: ignore[call-arg]
    await context.set_variable("a", "k", 1, "c1")  # type: ignore[call-arg]
    blocking.get_history("a", "3")  # type: ignore[arg-type]
    context.get_history("a").append("x")  # type: ignore[attr-defined]
    (await context.get_history("a")).append("x")  # type: ignore[arg-type]
    with context.batch("a"):  # type: ignore[attr-defined]
        pass


# --- managers -------------------------------------------------------------------------------------------------------


def managers(blocking: bool) -> None:
    assert_type(get_context_manager(), ConversationContext)
    assert_type(get_context_manager("valkey", url="valkey://localhost:6379", ttl=3600), ConversationContext)
    assert_type(get_context_manager("file", blocking=True, storage_dir="./states"), SyncConversationContext)
    assert_type(get_context_manager("file", blocking=blocking), SyncConversationContext | ConversationContext)
    assert_type(load_config(), StateConfig)


class OtherStorage(InMemoryStorage):
    pass


register_storage("other", OtherStorage)
register_storage("other", int)  # type: ignore[arg-type]


# --- errors ---------------------------------------------------------------------------------------------------------


def a_commit_may_be_made_again(context: SyncConversationContext) -> None:
    try:
        context.add_to_history("a", "user", "hi")
    except StateOutcomeUnknownError as error:
        context.add_to_history("a", "user", "hi", commit_id=error.commit_id)
