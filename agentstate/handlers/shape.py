"""How a handler is called: its kind, its arguments, its task, its state and its conversation."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from inspect import (
    Parameter,
    Signature,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
    ismethod,
    isroutine,
    signature,
)
from typing import Any, Final, NamedTuple

from ..errors import InvalidContextIdError, StateAccessError, StateConfigError, StateError
from ..keys import check_context_id
from ..registry import Manager, check_enabled, new_context, overridden, read_config, shared_context
from ..storage.base import StateStorage
from .names import name_of
from .tasks import as_text, field, metadata

_INJECTED: Final = ("context", "context_id")
_OWNERS: Final = ("self", "cls", "mcs")
_POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BY_KEYWORD: Final = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


_sharing: Final[list[weakref.ref[Handler]]] = []
"""The handlers whose conversations are shared by name: see `SHARED_BY` of the decorator."""


class Kind(Enum):
    """What calling a handler returns."""

    FUNCTION = "its result"
    GENERATOR = "a generator"
    COROUTINE = "an awaitable"
    ASYNC_GENERATOR = "an async generator"


class Owner(Enum):
    """Whether the first argument is the object that a method belongs to."""

    UNKNOWN = "it depends on the signature"
    FIRST = "it is the first argument"
    NONE = "there is none"


class Settings(NamedTuple):
    """The arguments of the decorator."""

    storage: str | StateStorage | None
    options: Mapping[str, Any]
    context_id: Callable[[Any], Any] | str | None
    user_id: Callable[[Any], Any] | None
    serialize_turns: bool
    on_unavailable: str | None


class Connection(NamedTuple):
    """The context on a handler's storage; None if state management is disabled."""

    context: Manager | None
    ephemeral: bool


class Handler:
    """A handler, with what its signature and the decorator's arguments say about calling it."""

    wrapper: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], settings: Settings, owner: Owner = Owner.UNKNOWN) -> None:
        self.function = function
        self.settings = settings
        self.name = _name_of(function)
        self.kind = _kind_of(function)
        self._connection: Connection | None = None
        whole = _signature_of(function)
        parameters = list(whole.parameters.values())
        self.injected = self._find_injected(parameters)
        self.optional = all(
            parameter.default is not Parameter.empty for parameter in parameters if parameter.name in self.injected
        )
        visible = [parameter for parameter in parameters if parameter.name not in self.injected]
        self.signature = whole.replace(parameters=visible)
        self._names = tuple(parameter.name for parameter in visible if parameter.kind in _POSITIONAL)
        self._task_index, self._task_name = self._find_task(owner)
        # Parameters behind an injected one cannot be passed by position.
        positional = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
        self._places = min((positional.index(name) for name in self.injected if name in positional), default=None)
        if isinstance(settings.context_id, str):
            _sharing.append(weakref.ref(self))

    def _find_injected(self, parameters: list[Parameter]) -> tuple[str, ...]:
        takes = {parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD}
        injected = tuple(name for name in _INJECTED if name in takes)
        if injected:
            return injected
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            return _INJECTED
        names = ", ".join(parameter.name for parameter in parameters)
        raise StateConfigError(
            f"@stateful: the signature of {self.name}({names}) must include `context` and `context_id`, or one of them"
        )

    def _find_task(self, owner: Owner) -> tuple[int, str]:
        """The index of the task among the positional arguments, and its keyword."""
        names = self._names
        if "task" in names:
            return names.index("task"), "task"
        if owner is Owner.UNKNOWN:
            owner = self._owner()
        index = 1 if owner is Owner.FIRST else 0
        return index, names[index] if index < len(names) else "task"

    def _owner(self) -> Owner:
        first = self._names[0] if self._names else ""
        if not _stands_in_class(self.function) or ismethod(self.function):
            return Owner.FIRST if first in _OWNERS else Owner.NONE
        if first not in _OWNERS:
            # If the instance were taken for the task, all calls could share one conversation.
            raise StateConfigError(
                f"@stateful cannot tell which parameter of {self.function.__qualname__}() is the task; name it `task`"
            )
        return Owner.FIRST

    @property
    def blocking(self) -> bool:
        """Whether it gets a SyncConversationContext."""
        return self.kind in (Kind.FUNCTION, Kind.GENERATOR)

    # --- its arguments ---

    def task(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The task of a call; None if it has none."""
        if len(args) > self._task_index:
            return args[self._task_index]
        return kwargs.get(self._task_name)

    def arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments that can be passed by position; the others are moved to `kwargs`."""
        if self._places is None or len(args) <= self._places:
            return args
        for name, value in zip(self._names[self._places :], args[self._places :], strict=False):
            if name in kwargs:
                raise TypeError(f"{self.name}() got multiple values for argument {name!r}")
            kwargs[name] = value
        return args[: self._places] + args[len(self._names) :]

    # --- its state ---

    def connect(self) -> Connection:
        """The context, as the decorator and the file say: the same for all calls, until the storage is closed."""
        connection = self._connection
        if connection is None or (connection.context is not None and connection.context.storage.closed):
            connection = self._connection = self._new_connection()
        return connection

    @property
    def connected(self) -> bool:
        """Whether `connect` returns at once, unless the storage was closed."""
        return self._connection is not None

    def _new_connection(self) -> Connection:
        settings = self.settings
        if isinstance(settings.storage, StateStorage):
            return Connection(new_context(settings.storage, self.blocking), settings.on_unavailable == "ephemeral")
        config = read_config().for_handler(name_of(self.wrapper) or self.name)
        if not config.enabled and self.optional:
            return Connection(None, False)
        check_enabled(config)
        backend, options = overridden(config, settings.storage, settings.options)
        context = shared_context(backend, options, blocking=self.blocking)
        return Connection(context, (settings.on_unavailable or config.on_unavailable) == "ephemeral")

    # --- which conversation, and whose ---

    def context_id(self, explicit: Any, task: Any) -> str:
        """The conversation of a call. Raises InvalidContextIdError if it is not known."""
        if explicit is not None:
            return check_context_id(as_text(explicit, "the argument context_id") or "")
        for where, value in self._candidates(task):
            text = as_text(value, where)
            if text is not None:
                return check_context_id(text)
        given = "no task" if task is None else f"a task ({type(task).__name__}) without an id"
        raise InvalidContextIdError(
            f"{self.name}() needs the id of a conversation, got {given}: set task.context_id, "
            "task.metadata['context_id'] or task.id; or pass context_id= to the call; or use @stateful(context_id=...)"
        )

    def _candidates(self, task: Any) -> Iterator[tuple[str, Any]]:
        finder = self.settings.context_id
        if callable(finder):
            yield "the result of context_id=", finder(task)
        elif finder is not None:
            where = f"task.metadata['{finder}_id']"
            text = as_text(metadata(task, f"{finder}_id"), where)
            yield where, text and f"{finder}:{text}"
        for where, value in (
            ("task.context_id", field(task, "context_id")),
            ("task.contextId", field(task, "contextId")),  # as it is called in A2A's JSON
            ("task.metadata['context_id']", metadata(task, "context_id")),
            ("task.id", field(task, "id")),
        ):
            if isinstance(value, str) and (name := self._shared_by(value)):
                # Or a task that names no user could name the conversation of any user.
                raise InvalidContextIdError(
                    f"{where} must not be {value!r}: such conversations are found by task.metadata['{name}_id'], since "
                    f"a handler on this store has context_id={name!r}"
                )
            yield where, value

    def _shared_by(self, context_id: str) -> str | None:
        """The `context_id` of a handler on the same store (it may be this one) that gives ids like this one."""
        for reference in _sharing:
            other = reference()
            if other is not None and context_id.startswith(f"{other.settings.context_id}:") and self._meets(other):
                return str(other.settings.context_id)
        return None

    def _meets(self, other: Handler) -> bool:
        """Whether the two are on one store, as far as can be told: storages with different options may be."""
        mine = self.connect().context
        try:
            its = other.connect().context
        except StateError:
            return True  # nobody can tell
        if mine is None or its is None:
            return False
        one, two = mine.storage, its.storage
        if one is two or not one.blocking:  # every memory is a store of its own
            return one is two
        return type(one) is type(two) and one.telemetry_attributes() == two.telemetry_attributes()

    def user(self, task: Any) -> str | None:
        """The user that the call is bound to; None without `user_id`. Raises StateAccessError if it finds no user."""
        finder = self.settings.user_id
        if finder is None:
            return None
        try:
            user = as_text(finder(task), "the result of user_id=")
        except InvalidContextIdError as error:
            raise StateAccessError(str(error)) from error
        if user is None:
            raise StateAccessError(f"{self.name}() needs a user, but user_id= found none in the task")
        return user


def _name_of(function: Any) -> str:
    while not hasattr(function, "__name__"):
        function = getattr(function, "func", None) or type(function)  # functools.partial has `func`
    return str(function.__name__)


def _kind_of(function: Any) -> Kind:
    """The kind of a handler. A plain function that wraps an async one counts as async."""
    first = function
    while function is not None:
        code = function if isroutine(function) or hasattr(function, "func") else type(function).__call__
        if isasyncgenfunction(code):
            return Kind.ASYNC_GENERATOR
        if iscoroutinefunction(code):
            return Kind.COROUTINE
        if function is first and isgeneratorfunction(code):
            return Kind.GENERATOR
        function = getattr(function, "__wrapped__", None)
    return Kind.FUNCTION


def _signature_of(function: Callable[..., Any]) -> Signature:
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        # Names that are imported for type checkers only cannot be resolved.
        return signature(function, annotation_format=Format.FORWARDREF)
    return signature(function)


def _stands_in_class(function: Any) -> bool:
    """Whether the function was defined directly in the body of a class."""
    scope = getattr(function, "__qualname__", "").rpartition(".")[0]
    return isroutine(function) and bool(scope) and not scope.endswith("<locals>")
