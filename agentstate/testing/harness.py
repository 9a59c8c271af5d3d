"""The base of the contract tests: the hooks of a backend, and one interface to both contexts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from inspect import iscoroutine
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import pytest

from ..aio import ConversationContext
from ..blocking import SyncConversationContext
from ..storage.base import StateStorage

Context: TypeAlias = SyncConversationContext
"""The interface of the tests. The awaitable context is wrapped to have it, too."""


class Connect(Protocol):
    """Creates contexts on the store of the running test."""

    def __call__(
        self, storage: StateStorage | None = None, *, user_id: str | None = None, **options: Any
    ) -> Context: ...


class Harness:
    """The hooks of `StorageContract`."""

    shared: ClassVar[bool] = True
    """Whether all storages from `make_storage` during one test use the same store, so that each sees what the others
    wrote, also after these were closed. False if each has a store of its own."""

    def make_storage(self, **options: Any) -> StateStorage:
        """A storage with these options, which every storage has. The store must be empty when a test begins."""
        raise NotImplementedError("subclasses of StorageContract make their storage here")

    @pytest.fixture(params=["sync", "async"])
    def connect(self, request: pytest.FixtureRequest) -> Iterator[Connect]:
        """Creates contexts: blocking ones, and awaitable ones with a blocking interface."""
        with ExitStack() as stack:

            def connect(storage: StateStorage | None = None, *, user_id: str | None = None, **options: Any) -> Context:
                if storage is None:
                    storage = self.make_storage(**options)
                    stack.callback(storage.close)
                if request.param == "sync":
                    return SyncConversationContext(storage, user_id=user_id)
                driven = Driven(ConversationContext(storage, user_id=user_id))
                stack.callback(driven.stop)
                return cast(Context, driven)

            yield connect

    @pytest.fixture
    def context(self, connect: Connect) -> Context:
        """A context on an empty store, with no options."""
        return connect()

    def another(self, connect: Connect, context: Context, **options: Any) -> Context:
        """A context on a second storage on the store of `context`. Skips the test if stores are not shared."""
        if not self.shared:
            pytest.skip("every storage has a store of its own")
        return connect(**options)


class Driven:
    """An awaitable context with the interface of a blocking one: every call is run in an event loop of this object."""

    def __init__(self, context: ConversationContext) -> None:
        self.awaitable = context
        self._runner = asyncio.Runner()

    def stop(self) -> None:
        self._runner.close()

    def run_together(self, calls: tuple[Callable[[Any], Any], ...]) -> list[Any]:
        async def run() -> list[Any]:
            return await asyncio.gather(*(call(self.awaitable) for call in calls), return_exceptions=True)

        return self._runner.run(run())

    def close(self) -> None:
        self._runner.run(self.awaitable.aclose())

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.awaitable, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*args, **kwargs)
            if iscoroutine(result):
                return self._runner.run(result)
            if hasattr(result, "__anext__"):
                return self._iterate(result)
            return _DrivenManager(self._runner, result) if hasattr(result, "__aenter__") else result

        return call

    def _iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()

        async def following() -> Any:
            return await anext(items, end)

        while (item := self._runner.run(following())) is not end:
            yield item


class _DrivenManager:
    """An asynchronous context manager (a batch, a turn) with the interface of a blocking one."""

    def __init__(self, runner: asyncio.Runner, manager: Any) -> None:
        self._runner = runner
        self._manager = manager

    def __enter__(self) -> Any:
        async def enter() -> Any:
            return await self._manager.__aenter__()

        return self._runner.run(enter())

    def __exit__(self, *exc: object) -> bool | None:
        async def leave() -> bool | None:
            return cast(bool | None, await self._manager.__aexit__(*exc))

        return self._runner.run(leave())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def together(context: Context, *calls: Callable[[Context], Any]) -> list[Any]:
    """Make all calls concurrently, in threads or tasks; return their results, or raise the first error."""
    driven = _driven(context)
    results = driven.run_together(calls) if driven else in_threads(context, *calls)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def in_threads(context: Context, *calls: Callable[[Context], Any]) -> list[Any]:
    """Make each call in a thread of its own, all with the same context; return results, and errors as values."""
    original = _driven(context)
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        driven = Driven(original.awaitable) if original else None
        try:
            start.wait()
            results[index] = calls[index](cast(Context, driven) if driven else context)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            results[index] = error
        finally:
            if driven:
                driven.stop()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _driven(context: Any) -> Driven | None:
    return context if isinstance(context, Driven) else None


def eventually(condition: Callable[[], bool], *, within: float = 10.0) -> bool:
    """Whether the condition becomes true in time."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def contents(context: Context, context_id: str) -> list[Any]:
    """The contents of the history."""
    return [message["content"] for message in context.get_history(context_id)]


def fill(context: Context, context_id: str, count: int) -> None:
    """Append messages with the contents 0, 1, ... `count` - 1."""
    context.extend_history(context_id, [{"role": "user", "content": number} for number in range(count)])
