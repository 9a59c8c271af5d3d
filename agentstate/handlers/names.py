"""Handlers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import StateConfigError, StateError

F = TypeVar("F", bound=Callable[..., Any])

_handlers: dict[str, Callable[..., Any]] = {}


class HandlerNotFoundError(StateError, LookupError):
    """No handler is registered under that name. The message names the nearest one."""


def register_handler(name: str) -> Callable[[F], F]:
    """Register a handler under a name, for `get_handler` and for `skill_overrides` in the configuration file.

    Works above or below `@stateful`. Raises StateConfigError if another handler has the name. Registering the same
    handler again, as when its module is reloaded, replaces it.
    """
    if callable(name) or not name:
        raise TypeError("register_handler needs a name: @register_handler('memory_assistant')")

    def register(handler: F) -> F:
        known = _handlers.get(name)
        if known is not None and _place(known) != _place(handler):
            raise StateConfigError(f"the handler name {name!r} is already used by {_place(known)}; choose another")
        _handlers[name] = handler
        return handler

    return register


def get_handler(name: str) -> Callable[..., Any]:
    """The handler that is registered under `name`. Raises HandlerNotFoundError, a LookupError."""
    handler = _handlers.get(name)
    if handler is not None:
        return handler
    from difflib import get_close_matches

    near = get_close_matches(str(name), _handlers, 1)
    known = ", ".join(map(repr, list_handlers()))
    hint = f"registered are {known}" if known else "none is registered: has its module been imported?"
    if near:
        hint = f"did you mean {near[0]!r}?"
    raise HandlerNotFoundError(f"unknown handler {name!r}; {hint}")


def list_handlers() -> list[str]:
    """The names of all registered handlers, sorted."""
    return sorted(_handlers)


def replace_handler(handler: Callable[..., Any], by: Callable[..., Any]) -> None:
    """Register `by` under every name of `handler`, for a decorator above `@register_handler`."""
    for name, registered in list(_handlers.items()):
        if registered is handler:
            _handlers[name] = by


def name_of(handler: Callable[..., Any]) -> str | None:
    """A name that `handler` is registered under, itself or wrapped by other decorators."""
    for name, registered in list(_handlers.items()):
        inner: Any = registered
        while inner is not None:
            if inner is handler:
                return name
            inner = getattr(inner, "__wrapped__", None)
    return None


def _place(handler: Any) -> str:
    # Objects (partials, instances) have no qualified name: each is another handler.
    name = getattr(handler, "__qualname__", None) or f"{type(handler).__qualname__} object at {id(handler):#x}"
    return f"{handler.__module__}.{name}"
