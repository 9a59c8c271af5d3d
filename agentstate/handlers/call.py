"""One call of a handler: what happens before and after it."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import StateUnavailableError
from .outage import find_outage, find_outage_async, stand_in
from .shape import Handler


class Call:
    """One call of a handler: a context manager, blocking or async, around the handler.

    Entering it chooses the store or memory, takes the turn, and completes `args` and `kwargs`.
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
        """Find the context and the conversation. False if the handler runs without state."""
        handler, kwargs = self._handler, self.kwargs
        if "context" in kwargs:
            raise TypeError(f"{handler.name}() must not be called with `context`: @stateful passes it")
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
            outage = find_outage(self._context, self._context_id)
            if outage is not None:
                self._stand_in(outage)
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

            # The first call reads the configuration file, imports a client and opens the store: not on the event loop.
            await to_thread(self._handler.connect)
        if not self._prepare():
            return self
        if self._ephemeral:
            outage = await find_outage_async(self._context, self._context_id)
            if outage is not None:
                self._stand_in(outage)
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

    def _stand_in(self, error: StateUnavailableError) -> None:
        from logging import getLogger

        self._context = stand_in(self._context)
        getLogger("agentstate.handlers").warning(
            "the store cannot be reached; %s() answers %r from memory, and what it stores is lost: %s",
            self._handler.name,
            self._context_id,
            error,
        )
