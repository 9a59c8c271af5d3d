"""The decorator `@stateful`, and the types of what it makes."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Concatenate, Final, Literal, Protocol, TypeAlias, TypeVar, overload

from ..errors import StateConfigError
from ..storage.base import StateStorage, one_of
from .call import Call
from .names import replace_handler
from .shape import Handler, Kind, Owner, Settings

C = TypeVar("C")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)
S_contra = TypeVar("S_contra", contravariant=True)
T_contra = TypeVar("T_contra", contravariant=True)

SHARED_BY: Final = ("conversation", "user", "session")
"""The values of `context_id` that are not functions: each reads ``task.metadata["<name>_id"]``."""

OverTask: TypeAlias = Callable[[Any], Any]


# --- types ----------------------------------------------------------------------------------------------------------


# What a handler takes besides what is injected into it, one type for each case. Where an argument holds `Any` (the task
# is a dict, or has no annotation), mypy gives up on overloads of which more than one fits. So no handler fits two of
# these (except one that takes `context_id` before `context`), and there is none for "any callable".


class _Function(Protocol[T_contra, R_co]):
    def __call__(self, task: T_contra, /, *, context: Any, context_id: str) -> R_co: ...


class _FunctionOfContext(Protocol[T_contra, R_co]):
    def __call__(self, task: T_contra, /, *, context: Any) -> R_co: ...


class _FunctionOfId(Protocol[T_contra, R_co]):
    def __call__(self, task: T_contra, /, *, context_id: str) -> R_co: ...


class _Method(Protocol[S_contra, T_contra, R_co]):
    def __call__(self, owner: S_contra, task: T_contra, /, *, context: Any, context_id: str) -> R_co: ...


class _MethodOfContext(Protocol[S_contra, T_contra, R_co]):
    def __call__(self, owner: S_contra, task: T_contra, /, *, context: Any) -> R_co: ...


# `self`, a task, what is injected, and more.
_WithMore: TypeAlias = Callable[Concatenate[Any, Any, Any, Any, Any, ...], R]


class StatefulFunction(Protocol[T_contra, R_co]):
    """A function of a task, as its callers see it. `context_id` names the conversation and overrides the task."""

    __name__: str

    def __call__(self, task: T_contra, /, *, context_id: str | None = None) -> R_co: ...


class StatefulMethod(Protocol[S_contra, T_contra, R_co]):
    """A method that takes a task, or a function of two arguments, as its callers see it."""

    __name__: str

    def __call__(self, owner: S_contra, task: T_contra, /, *, context_id: str | None = None) -> R_co: ...
    @overload
    def __get__(
        self: StatefulMethod[type[C], T, R], owner: C | None, cls: type[C], /
    ) -> StatefulFunction[T, R]: ...  # of a class method
    @overload
    def __get__(self, owner: None, cls: type[Any], /) -> StatefulMethod[S_contra, T_contra, R_co]: ...
    @overload
    def __get__(self, owner: S_contra, cls: type[Any], /) -> StatefulFunction[T_contra, R_co]: ...


class StatefulDecorator(Protocol):
    """What `stateful(...)` returns.

    A handler that takes no task, or further keyword-only arguments without a default, has no type here.
    """

    @overload
    def __call__(self, handler: _Function[T, R], /) -> StatefulFunction[T, R]: ...
    @overload
    def __call__(self, handler: _FunctionOfContext[T, R], /) -> StatefulFunction[T, R]: ...
    @overload
    def __call__(self, handler: _FunctionOfId[T, R], /) -> StatefulFunction[T, R]: ...
    @overload
    def __call__(self, handler: _Method[S, T, R], /) -> StatefulMethod[S, T, R]: ...
    @overload
    def __call__(self, handler: _MethodOfContext[S, T, R], /) -> StatefulMethod[S, T, R]: ...
    @overload
    def __call__(self, handler: _WithMore[R], /) -> Callable[..., R]: ...


class _Unset(Enum):
    UNSET = "as configured"

    def __repr__(self) -> str:
        return f"<{self.value}>"


_UNSET: Final[Any] = _Unset.UNSET


# --- the decorator --------------------------------------------------------------------------------------------------


@overload
def stateful(handler: _Function[T, R], /) -> StatefulFunction[T, R]: ...
@overload
def stateful(handler: _FunctionOfContext[T, R], /) -> StatefulFunction[T, R]: ...
@overload
def stateful(handler: _FunctionOfId[T, R], /) -> StatefulFunction[T, R]: ...
@overload
def stateful(handler: _Method[S, T, R], /) -> StatefulMethod[S, T, R]: ...
@overload
def stateful(handler: _MethodOfContext[S, T, R], /) -> StatefulMethod[S, T, R]: ...
@overload
def stateful(handler: _WithMore[R], /) -> Callable[..., R]: ...
@overload
def stateful(
    storage: str | StateStorage | None = None,
    *,
    url: str = ...,
    key_prefix: str = ...,
    ttl: float | None = ...,
    storage_dir: str = ...,
    context_id: OverTask | Literal["conversation", "user", "session"] | None = None,
    user_id: OverTask | None = None,
    serialize_turns: bool = False,
    on_unavailable: Literal["raise", "ephemeral"] | None = None,
    **backend_options: Any,
) -> StatefulDecorator: ...
def stateful(
    storage: Any = None,
    *,
    url: str = _UNSET,
    key_prefix: str = _UNSET,
    ttl: float | None = _UNSET,
    storage_dir: str = _UNSET,
    context_id: OverTask | str | None = None,
    user_id: OverTask | None = None,
    serialize_turns: bool = False,
    on_unavailable: Literal["raise", "ephemeral"] | None = None,
    **backend_options: Any,
) -> Any:
    """Pass a handler the state of its conversation, as the keyword arguments `context` and `context_id`.

    For functions, coroutine functions, generators and async generators, and for methods of these kinds. An `async`
    handler gets a ConversationContext, any other a SyncConversationContext. Only the arguments that its signature names
    are passed. Its own exceptions propagate unchanged, and it never runs twice.

    `storage` is the name of a storage or a StateStorage object. By default the configuration file decides; without a
    file, the file storage is used. Options (`url`, `key_prefix`, `ttl`, `storage_dir` and all others of the storage)
    override the file key by key. The file is read at the first call; with a StateStorage object it is not read.

    The conversation is the first of these that is set: the argument `context_id` of the call; this `context_id`, a
    function of the task or one of ``"conversation"``, ``"user"``, ``"session"`` (``"user"`` gives
    ``"user:<value of task.metadata['user_id']>"``); ``task.context_id``; ``task.metadata["context_id"]``; ``task.id``.
    Raises InvalidContextIdError if none is.

    - `user_id`: a function of the task; the handler's context is bound to the user that it returns. Raises
      StateAccessError if it returns none.
    - `serialize_turns`: run one handler at a time per conversation, across processes and machines, inside a turn. Each
      write of the handler is committed at once, and raises TurnLostError if the turn was lost.
    - `on_unavailable`: with ``"ephemeral"``, a call that finds the store unreachable before the handler runs gets a
      context in memory, whose `degraded` is true and which is discarded after the call. None: as configured, else
      ``"raise"``.
    """
    named = {"url": url, "key_prefix": key_prefix, "ttl": ttl, "storage_dir": storage_dir}
    options = {name: value for name, value in named.items() if value is not _UNSET} | backend_options
    settings = Settings(storage, options, context_id, user_id, serialize_turns, on_unavailable)
    if _is_handler(storage) and settings == Settings(storage, {}, None, None, False, None):
        return _decorated(storage, settings._replace(storage=None))
    _check(settings)
    return lambda handler: _decorated(handler, settings)


def _check(settings: Settings) -> None:
    storage: Any = settings.storage
    if storage is not None and not isinstance(storage, str | StateStorage):
        raise StateConfigError(f"storage must be the name of a storage or a storage object, got {storage!r}")
    if isinstance(storage, StateStorage) and settings.options:
        raise StateConfigError(
            f"{', '.join(settings.options)}: pass this to the {type(storage).__name__} object instead"
        )
    if settings.context_id is not None and not callable(settings.context_id):
        one_of("context_id", settings.context_id, SHARED_BY)
    if settings.user_id is not None and not callable(settings.user_id):
        raise StateConfigError(f"user_id must be a function of the task, got {settings.user_id!r}")
    if iscoroutinefunction(settings.context_id) or iscoroutinefunction(settings.user_id):
        raise StateConfigError("context_id and user_id must be plain functions of the task, got an async one")
    if settings.on_unavailable is not None:
        one_of("on_unavailable", settings.on_unavailable, ("raise", "ephemeral"))


def _is_handler(value: Any) -> bool:
    return isinstance(value, classmethod | staticmethod) or (
        callable(value) and not isinstance(value, type | StateStorage)
    )


def _decorated(handler: Any, settings: Settings) -> Any:
    if not _is_handler(handler):
        raise TypeError(f"@stateful must decorate a function or a method, got {handler!r}")
    if isinstance(handler, classmethod):
        return classmethod(_wrapped(Handler(handler.__func__, settings, Owner.FIRST)))
    if isinstance(handler, staticmethod):
        return staticmethod(_wrapped(Handler(handler.__func__, settings, Owner.NONE)))
    return _wrapped(Handler(handler, settings))


def _wrapped(handler: Handler) -> Callable[..., Any]:
    """The function that replaces the handler: of the same kind, with its signature without the injected arguments."""
    wrapper = _WRAPPERS[handler.kind](handler, handler.function)
    wrapper.__name__ = handler.name
    wrapper.__signature__ = handler.signature  # type: ignore[attr-defined]
    handler.wrapper = wrapper
    replace_handler(handler.function, wrapper)  # @register_handler may stand below
    return wrapper


def _function(handler: Handler, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with Call(handler, args, kwargs) as call:
            return function(*call.args, **call.kwargs)

    return wrapper


def _generator(handler: Handler, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with Call(handler, args, kwargs) as call:
            return (yield from function(*call.args, **call.kwargs))

    return wrapper


def _coroutine(handler: Handler, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        async with Call(handler, args, kwargs) as call:
            result = function(*call.args, **call.kwargs)
            # A plain function that wraps a coroutine function may have run it to its end itself.
            return await result if hasattr(result, "__await__") else result

    return wrapper


def _async_generator(handler: Handler, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        async with Call(handler, args, kwargs) as call:
            items = function(*call.args, **call.kwargs)
            # `yield from`, which async generators do not have.
            try:
                item = await items.__anext__()
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001
                        item = await items.athrow(error)
                    else:
                        item = await items.asend(sent)
            except StopAsyncIteration:
                return
            finally:
                await items.aclose()

    return wrapper


_WRAPPERS: Final = {
    Kind.FUNCTION: _function,
    Kind.GENERATOR: _generator,
    Kind.COROUTINE: _coroutine,
    Kind.ASYNC_GENERATOR: _async_generator,
}
