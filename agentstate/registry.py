"""Storages by name, and the contexts that are shared by a process.

    manager = get_context_manager("file", storage_dir="./conversation_states")

A name is one of `BUILT_IN`, one passed to `register_storage`, or an entry point of the group `ENTRY_POINTS`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Mapping
from importlib import import_module
from inspect import Parameter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast, overload

from .blocking import SyncConversationContext
from .config import StateConfig, load_config
from .config.model import BACKENDS, KEYS, OTHER_BACKEND_NAMES, known_to
from .errors import StateConfigError
from .storage.base import StateStorage
from .storage.options import did_you_mean, storage_options, unknown_option

if TYPE_CHECKING:
    from .aio import ConversationContext

Manager: TypeAlias = "SyncConversationContext | ConversationContext"

ENTRY_POINTS: Final = "agentstate.storages"
BUILT_IN: Final[Mapping[str, tuple[str, str]]] = {
    "memory": ("agentstate.storage.memory", "InMemoryStorage"),
    "file": ("agentstate.storage.file", "FileStorage"),
    "valkey": ("agentstate.storage.valkey", "ValkeyStorage"),
}
"""The built-in classes, imported on first use: each has expensive imports of its own."""


# --- names ----------------------------------------------------------------------------------------------------------

_registered: dict[str, type[StateStorage]] = {}


def register_storage(name: str, cls: type[StateStorage]) -> None:
    """Make `cls` the storage of that name, for configuration files, `@stateful` and `get_context_manager`.

    Its options are the parameters of `cls` and, if it has ``**options``, those of its base classes. Registering the
    same class again, also after a reload of its module, replaces it. Raises StateConfigError if the name is in use,
    TypeError if `cls` is not a subclass of StateStorage.
    """
    _check_storage(name, cls)
    known = _registered.get(name)
    if name in BUILT_IN or (known is not None and _qualified_name(known) != _qualified_name(cls)):
        taken = BUILT_IN[name][1] if name in BUILT_IN else _qualified_name(cast(type, known))
        raise StateConfigError(
            f"the storage name {name!r} is already used by {taken}; register {cls.__name__} under another"
        )
    _registered[name] = cls


def storage_class(name: str) -> type[StateStorage]:
    """The storage class of that name. Raises StateConfigError, with the nearest name, if it is unknown."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        return cast(type[StateStorage], getattr(import_module(module), attribute))
    if name not in _registered:
        _registered[name] = _from_entry_point(name)
    return _registered[name]


def storage_names() -> list[str]:
    """The names of all storages, including those of entry points."""
    from importlib.metadata import entry_points

    return sorted({*BUILT_IN, *_registered, *entry_points(group=ENTRY_POINTS).names})


def _from_entry_point(name: str) -> type[StateStorage]:
    from importlib.metadata import entry_points

    points = {point.value: point for point in entry_points(group=ENTRY_POINTS, name=name)}
    if not points:
        meant = OTHER_BACKEND_NAMES.get(str(name).lower())
        hint = f"did you mean {meant!r}?" if meant else did_you_mean(name, storage_names())
        raise StateConfigError(f"unknown storage {name!r}; {hint}")
    if len(points) > 1:
        raise StateConfigError(
            f"several packages provide a storage {name!r} ({', '.join(sorted(points))}); uninstall all but one"
        )
    value, point = points.popitem()
    try:
        cls = point.load()
    except (ImportError, AttributeError) as error:
        raise StateConfigError(f"the storage {name!r} cannot be loaded from {value}: {error}") from error
    _check_storage(name, cls)
    return cast(type[StateStorage], cls)


def _check_storage(name: Any, cls: Any) -> None:
    if not isinstance(name, str) or not name:
        raise StateConfigError(f"the name of a storage must be text that is not empty, got {name!r}")
    if not isinstance(cls, type) or not issubclass(cls, StateStorage):
        raise TypeError(f"the storage {name!r} must be a subclass of StateStorage, got {cls!r}")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# --- options --------------------------------------------------------------------------------------------------------


def _new_storage(backend: str, options: Mapping[str, Any]) -> StateStorage:
    cls = storage_class(backend)
    options = dict(options)
    telemetry = options.pop("telemetry", False)  # an option of every storage, handled here
    try:
        storage = cls(**options)
    except TypeError as error:
        # Not checked beforehand: a class may use its `**options` in any way.
        accepted = storage_options(cls)
        for option in options:
            if option not in accepted:
                raise unknown_option(cls, option) from error
        for option, parameter in accepted.items():
            if parameter.default is Parameter.empty and option not in options:
                raise StateConfigError(f"the storage {backend!r} needs the option {option!r}") from error
        raise
    if telemetry:
        from .telemetry import instrument  # late: it needs an optional package

        instrument(storage)
    return storage


def _identity(cls: type[StateStorage], options: Mapping[str, Any]) -> Hashable:
    """The key of a shared instance: the class and its options, with defaults filled in."""
    defaults = {
        name: parameter.default
        for name, parameter in storage_options(cls).items()
        if parameter.default is not Parameter.empty
    }
    return cls, frozenset(
        (name, _frozen(name, value)) for name, value in {"telemetry": False, **defaults, **options}.items()
    )


class _Same:
    """Replaces an unhashable object in a key; equal only to itself. Keeps the object alive, so its id stays unique."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _frozen(name: str, value: Any) -> Hashable:
    """`value` as part of a key. Paths are resolved, relative to the working directory."""
    if isinstance(value, os.PathLike) or (name == "storage_dir" and isinstance(value, str)):
        try:
            return "path", os.path.realpath(value)
        except ValueError:  # not a path: the storage raises a better error
            return "path", value
    if isinstance(value, Mapping):
        return "mapping", frozenset((key, _frozen("", item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(_frozen("", item) for item in value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value) is bool, value  # True equals 1


# --- contexts -------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    """A storage and the contexts on it, by whether they block."""

    storage: StateStorage
    contexts: dict[bool, Manager]


_shared: dict[Hashable, _Shared] = {}
_lock = threading.RLock()  # a signal's handler may ask for a context while its thread makes one


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that the child does not have may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@overload
def get_context_manager(
    storage_type: str | None = None, *, force_new: bool = False, blocking: Literal[False] = False, **options: Any
) -> ConversationContext: ...
@overload
def get_context_manager(
    storage_type: str | None = None, *, force_new: bool = False, blocking: Literal[True], **options: Any
) -> SyncConversationContext: ...
@overload
def get_context_manager(
    storage_type: str | None = None, *, force_new: bool = False, blocking: bool, **options: Any
) -> Manager: ...
def get_context_manager(
    storage_type: str | None = None, *, force_new: bool = False, blocking: bool = False, **options: Any
) -> Manager:
    """The shared context for a storage and its options; different options give different instances.

    Without `storage_type` the configuration file decides. `options` override the file key by key; with another storage
    than the file's, the file's options of that storage are ignored. `blocking`: a SyncConversationContext, on the same
    storage object as the awaitable one. `force_new`: a new instance that is not shared. An instance that was closed is
    replaced by a new one. Thread-safe. Reads the file at every call: keep the result where calls are frequent.

    Raises StateConfigError for an unknown storage or option, if the file is invalid, or if it says `enabled: false` and
    no `storage_type` is given.
    """
    config = read_config()
    if storage_type is None:
        check_enabled(config)
    backend, all_options = overridden(config, storage_type, options)
    if force_new:
        return new_context(_new_storage(backend, all_options), blocking)
    return shared_context(backend, all_options, blocking=blocking)


def shared_context(backend: str, options: Mapping[str, Any], *, blocking: bool) -> Manager:
    """The shared instance for exactly these options."""
    key = _identity(storage_class(backend), options)
    make = _context_class(blocking)  # imported before the lock is taken: a fork may happen meanwhile
    with _lock:
        shared = _shared.get(key)
        if shared is None or shared.storage.closed:
            shared = _shared[key] = _Shared(_new_storage(backend, options), {})
        context = shared.contexts.get(blocking)
        if context is None:
            context = shared.contexts.setdefault(blocking, make(shared.storage))
        return context


def new_context(storage: StateStorage, blocking: bool) -> Manager:
    return _context_class(blocking)(storage)


def _context_class(blocking: bool) -> type[SyncConversationContext] | type[ConversationContext]:
    if blocking:
        return SyncConversationContext
    from .aio import ConversationContext  # late: blocking programs do not import asyncio

    return ConversationContext


# --- the configuration file -----------------------------------------------------------------------------------------


def read_config() -> StateConfig:
    """The state section of the configuration file, which may name a third party's storage."""
    try:
        return load_config()
    except StateConfigError as error:
        problem = error
    # A third party's storage may have a name similar to a built-in one; only now are entry points searched.
    names = set(storage_names()) - set(BUILT_IN)
    if not names:
        raise problem
    return load_config(known_backends=dict.fromkeys(names))


def check_enabled(config: StateConfig) -> None:
    """Raise StateConfigError if the file disables state management."""
    if not config.enabled:
        raise StateConfigError(f"state management is disabled by `enabled: false` in {config.source}")


def overridden(config: StateConfig, backend: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the storage, and its options: the file's, updated by `options`. Raises StateConfigError."""
    if backend is not None and not isinstance(backend, str):
        raise StateConfigError(f"storage_type must be the name of a storage, got {backend!r:.80}")
    chosen = config.backend if backend is None else backend
    for name in options:
        if name in KEYS and not KEYS[name].backends:
            raise StateConfigError(f"{name!r} is a key of the configuration file, not an option of a storage")
    if chosen in BACKENDS:
        return chosen, config.override(chosen, **options).options()
    common = {name: value for name, value in options.items() if name in known_to(chosen)}
    # The other options are the third party's, and may be objects that a file cannot contain.
    return chosen, {**config.override(chosen, **common).options(), **options}
