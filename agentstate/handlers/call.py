"""One call of a handler: what is done before it and after it."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ..errors import StateUnavailableError
from .shape import Handler


class Call:
    """One call of a handler: a context manager, blocking or async, for the time that the handler runs.

    Entering it decides whether the store or memory is used, takes the turn, and completes `args` and `kwargs`.
    """

    __slots__ = ("_context", "_context_id", "_ephemeral", "_handler", "_turn", "args", "kwargs")

    def __init__(self, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._handler = handler
        self._context: Any = None
        self._context_id = ""
        self._ephemeral = False
        self._turn: Any = None
        self.args = args
        self.kwargs = kwargs

    def _prepare(self) -> bool:
        """Find out whose conversation it is and where. False where the handler runs without state."""
        handler, kwargs = self._handler, self.kwargs
        if "context" in kwargs:
            raise TypeError(f"{handler.name}() gets its `context` from @stateful, and cannot be called with one")
        explicit = kwargs.pop("context_id", None)
        task = handler.task(self.args, kwargs)
        self.args = handler.arranged(self.args, kwargs)
        self._context, self._ephemeral = handler.connect()
        if self._context is None:
            if explicit is not None and "context_id" in handler.injected:
                kwargs["context_id"] = explicit
            return False
        self._context_id = handler.context_id(explicit, task)
        user = handler.user(task)
        if user is not None:
            self._context = type(self._context)(self._context.storage, user_id=user)
        return True

    def __enter__(self) -> Call:
        if not self._prepare():
            return self
        if self._ephemeral:
            try:
                self._context.exists(self._context_id)
            except StateUnavailableError as error:
                self._stand_in(error)
        if self._handler.settings.serialize_turns:
            turn = self._context.turn(self._context_id)
            self._context._run(turn._take(sys._getframe(1), track=False))
            self._hold(turn)
        self._inject()
        return self

    def __exit__(self, *_: object) -> None:
        if self._turn is not None:
            self._context._run(self._turn._end(False))

    async def __aenter__(self) -> Call:
        if not self._handler.connected:
            from asyncio import to_thread

            # The first call reads a file, imports a client, opens a store: the event loop need not wait for that.
            await to_thread(self._handler.connect)
        if not self._prepare():
            return self
        if self._ephemeral:
            try:
                await self._context.exists(self._context_id)
            except StateUnavailableError as error:
                self._stand_in(error)
        if self._handler.settings.serialize_turns:
            turn = self._context.turn(self._context_id)
            await self._context._run(turn._take(sys._getframe(1), track=False))
            self._hold(turn)
        self._inject()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._turn is not None:
            await self._context._run(self._turn._end(False))

    def _inject(self) -> None:
        for name in self._handler.injected:
            self.kwargs[name] = self._context if name == "context" else self._context_id

    def _hold(self, turn: Any) -> None:
        # The fence goes with the context object and not with a contextvar: the handler may write from other threads,
        # and the caller of a generator is not inside the turn.
        self._context = self._context.holding(self._context_id, turn.token)
        self._turn = turn

    # --- outages ---

    def _stand_in(self, error: StateUnavailableError) -> None:
        """Go on with a context in memory, for this call only, that has the limits of the store out of reach."""
        from logging import getLogger

        from ..storage.memory import InMemoryStorage

        storage = self._context.storage
        memory = InMemoryStorage(
            ttl=storage.ttl,
            max_history=storage.max_history,
            max_value_bytes=storage.max_value_bytes,
            deadline=storage.deadline,
        )
        self._context = type(self._context)(memory, user_id=self._context.user_id)
        self._context.degraded = True
        storage.tally.add(degraded_calls=1)
        _count_degraded()
        getLogger("agentstate.handlers").warning(
            "the store cannot be reached: %s() answers %r from memory, and forgets: %s",
            self._handler.name,
            self._context_id,
            error,
        )


_degraded = 0
_degraded_lock = threading.RLock()  # a handler of a signal may call a handler


def degraded_calls() -> int:
    """How many calls of handlers this process answered without the store (`on_unavailable="ephemeral"`)."""
    return _degraded


def _count_degraded() -> None:
    global _degraded
    with _degraded_lock:
        _degraded += 1
