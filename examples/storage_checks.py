"""The checks of test_memory_storage.py, test_file_storage.py and test_valkey_storage.py.

Each check tests one guarantee on a real storage. `run` prints one line for each and returns the exit code. To test your
own backend, use `agentstate.testing.StorageContract`, which tests much more.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable

from agentstate import ConversationContext, StateAccessError, StateSerializationError, StateStorage

OpenStorage = Callable[..., StateStorage]
"""Opens the storage under test with these additional options. It has the data that was stored before."""


async def variables(context: ConversationContext) -> None:
    await context.set_variable("c", "preferences", {"theme": "dark", "languages": ["en", "de"]})
    preferences = await context.get_variable("c", "preferences", {})
    assert preferences == {"theme": "dark", "languages": ["en", "de"]}
    preferences["theme"] = "light"
    assert (await context.get_variable("c", "preferences"))["theme"] == "dark", "a value that was read is not a copy"
    assert await context.get_variable("c", "missing", "default") == "default"


async def history(context: ConversationContext) -> None:
    for number in range(12):
        await context.add_to_history("c", "user" if number % 2 == 0 else "assistant", f"message {number}")
    newest = await context.get_history("c", limit=10)
    assert [message["content"] for message in newest] == [f"message {number}" for number in range(2, 12)]
    assert set(newest[0]) == {"role", "content", "timestamp", "metadata"}
    assert len(await context.get_history("c")) == await context.count_history("c") == 12


async def metadata(context: ConversationContext) -> None:
    await context.set_metadata("c", "session_start", "2026-01-31T12:00:00+00:00")
    assert await context.get_metadata("c", "session_start") == "2026-01-31T12:00:00+00:00"
    assert await context.get_all_metadata("c") == {"session_start": "2026-01-31T12:00:00+00:00"}


async def owners(context: ConversationContext) -> None:
    state = await context.get_or_create("c", user_id="alice")
    assert (state.context_id, state.user_id) == ("c", "alice")
    try:
        await context.get_or_create("c", user_id="bob")
    except StateAccessError:
        return
    raise AssertionError("bob got the conversation of alice")


async def unicode_is_kept(context: ConversationContext) -> None:
    await context.add_to_history("c", "user", "Grüße, 世界 👋")
    assert (await context.get_history("c"))[0]["content"] == "Grüße, 世界 👋"


async def what_is_not_json_is_refused(context: ConversationContext) -> None:
    culprit = ""
    try:
        await context.set_variable("c", "preferences", {"sizes": [1.0, float("nan")]})
    except StateSerializationError as error:
        culprit = error.path
    assert culprit == "preferences.sizes[1]", "NaN was stored"
    assert not await context.exists("c"), "a refused value changed something"


async def batches_are_atomic(context: ConversationContext) -> None:
    try:
        async with context.batch("c") as batch:
            batch.set_variable("step", 1)
            raise KeyError("changed my mind")
    except KeyError:
        assert not await context.exists("c")
    async with context.batch("c") as batch:
        batch.add_to_history("user", "Hello")
        batch.set_variable("step", 1)
    state = await context.get_state("c")
    assert state is not None
    assert (len(state.history), state.variables, state.revision) == (1, {"step": 1}, 1)


async def concurrent_updates_lose_nothing(context: ConversationContext) -> None:
    await asyncio.gather(*(context.increment_variable("c", "count") for _ in range(50)))
    assert await context.get_variable("c", "count") == 50


async def clear_and_cleanup(context: ConversationContext) -> None:
    await context.set_variable("old", "x", 1)
    await asyncio.sleep(0.01)
    assert await context.cleanup_old_contexts(max_age_hours=24) == 0
    assert await context.cleanup_old_contexts(max_age_hours=0) == 1
    await context.set_variable("c", "x", 1)
    assert await context.clear_context("c") is True
    assert await context.clear_context("c") is False
    assert [context_id async for context_id in context.list_contexts()] == []


CHECKS: tuple[Callable[[ConversationContext], Awaitable[None]], ...] = (
    variables,
    history,
    metadata,
    owners,
    unicode_is_kept,
    what_is_not_json_is_refused,
    batches_are_atomic,
    concurrent_updates_lose_nothing,
    clear_and_cleanup,
)


def run(name: str, open_storage: OpenStorage, *, persistent: bool) -> int:
    """Run every check on an empty storage. Returns the exit code: 0 if all passed."""
    failed = 0
    cases = {check.__name__: on_empty(open_storage, check) for check in CHECKS}
    cases["ttl"] = expires(open_storage)
    cases["persistence" if persistent else "forgets_at_exit"] = reopened(open_storage, persistent)
    print(f"{name} storage")
    for title, case in cases.items():
        started = time.perf_counter()
        try:
            asyncio.run(case)
        except Exception:  # noqa: BLE001  any failure is reported, and the other checks run
            failed += 1
            print(f"  FAILED  {title}\n{traceback.format_exc()}")
        else:
            print(f"  ok      {title.replace('_', ' ')} ({(time.perf_counter() - started) * 1000:.0f} ms)")
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


async def on_empty(open_storage: OpenStorage, check: Callable[[ConversationContext], Awaitable[None]]) -> None:
    async with ConversationContext(open_storage()) as context:
        try:
            await check(context)
        finally:
            await clear_all(context)


async def expires(open_storage: OpenStorage) -> None:
    async with ConversationContext(open_storage(ttl=0.2)) as context:
        await context.set_variable("c", "x", 1)
        assert await context.exists("c")
        await asyncio.sleep(0.4)
        assert not await context.exists("c")


async def reopened(open_storage: OpenStorage, persistent: bool) -> None:
    async with ConversationContext(open_storage()) as context:
        await context.add_to_history("c", "user", "Remember me")
    async with ConversationContext(open_storage()) as context:
        history = await context.get_history("c")
        await clear_all(context)
    assert [message["content"] for message in history] == (["Remember me"] if persistent else [])


async def clear_all(context: ConversationContext) -> None:
    async for context_id in context.list_contexts():
        await context.clear_context(context_id)
