"""Storages by name, and the contexts that a process shares.

    manager = get_context_manager("file", storage_dir="./conversation_states")

A name is one of `BUILT_IN`, one that `register_storage` was given, or an entry point of the group `ENTRY_POINTS`.
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
"""Where the classes of this package are: imported when they are used, for each has imports of its own to pay for."""


# --- names ----------------------------------------------------------------------------------------------------------

_registered: dict[str, type[StateStorage]] = {}


def register_storage(name: str, cls: type[StateStorage]) -> None:
    """Make `cls` the storage of that name, for configuration files, `@stateful` and `get_context_manager`.

    Its options are the parameters of `cls` and, where it has ``**options``, those of its base classes. Registering the
    same class again is fine, and so is one that a reload of its module made anew. Raises StateConfigError where the
    name is taken, TypeError where `cls` is no StateStorage.
    """
    _check_storage(name, cls)
    known = _registered.get(name)
    if name in BUILT_IN or (known is not None and _home(known) != _home(cls)):
        taken = BUILT_IN[name][1] if name in BUILT_IN else _home(cast(type, known))
        raise StateConfigError(f"the storage name {name!r} is taken by {taken}: register {cls.__name__} under another")
    _registered[name] = cls


def storage_class(name: str) -> type[StateStorage]:
    """The storage of that name. Raises StateConfigError, with the nearest name, where there is none."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        return cast(type[StateStorage], getattr(import_module(module), attribute))
    if name not in _registered:
        _registered[name] = _from_entry_point(name)
    return _registered[name]


def storage_names() -> list[str]:
    """The names of all storages, those of entry points included."""
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
        raise StateConfigError(f"several packages bring a storage {name!r} ({', '.join(sorted(points))}): keep one")
    value, point = points.popitem()
    try:
        cls = point.load()
    except (ImportError, AttributeError) as error:
        raise StateConfigError(f"the storage {name!r} cannot be loaded from {value}: {error}") from error
    _check_storage(name, cls)
    return cast(type[StateStorage], cls)


def _check_storage(name: Any, cls: Any) -> None:
    if not isinstance(name, str) or not name:
        raise StateConfigError(f"the name of a storage is text that is not empty, not {name!r}")
    if not isinstance(cls, type) or not issubclass(cls, StateStorage):
        raise TypeError(f"the storage {name!r} must be a class derived from StateStorage, not {cls!r}")


def _home(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# --- options --------------------------------------------------------------------------------------------------------


def _new_storage(backend: str, options: Mapping[str, Any]) -> StateStorage:
    cls = storage_class(backend)
    options = dict(options)
    telemetry = options.pop("telemetry", False)  # of every storage, and no business of any
    try:
        storage = cls(**options)
    except TypeError as error:
        # Not checked beforehand: what a class does with its `**options` is its own business.
        accepted = storage_options(cls)
        for option in options:
            if option not in accepted:
                raise unknown_option(cls, option) from error
        for option, parameter in accepted.items():
            if parameter.default is Parameter.empty and option not in options:
                raise StateConfigError(f"the storage {backend!r} needs the option {option!r}") from error
        raise
    if telemetry:
        from .telemetry import instrument  # late: who has no telemetry need not have its package

        instrument(storage)
    return storage


def _identity(cls: type[StateStorage], options: Mapping[str, Any]) -> Hashable:
    """What two calls have in common that get the same instance: the class and its options, defaults filled in."""
    defaults = {
        name: parameter.default
        for name, parameter in storage_options(cls).items()
        if parameter.default is not Parameter.empty
    }
    return cls, frozenset(
        (name, _frozen(name, value)) for name, value in {"telemetry": False, **defaults, **options}.items()
    )


class _Same:
    """Stands for an unhashable object in a key: equal to itself only. Keeps it alive, lest another get its id."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _frozen(name: str, value: Any) -> Hashable:
    """`value` as part of a key. Paths are compared by what they lead to from here."""
    if isinstance(value, os.PathLike) or (name == "storage_dir" and isinstance(value, str)):
        try:
            return "path", os.path.realpath(value)
        except ValueError:  # no path here: what is wrong with it is for the storage to say
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
    """The context that this process shares for a storage and its options; different options, different instances.

    Without `storage_type` the configuration file decides. `options` override the file key by key; for another storage
    than the file's, the file's keys of that one do not count. `blocking`: a SyncConversationContext, on the same
    storage object as its awaitable twin. `force_new`: an instance of the caller's own. One that was closed is replaced
    by a new one. Thread-safe; reads the file at every call, so keep what it returns where calls are many.

    Raises StateConfigError for an unknown storage or option, and where the file is wrong or says `enabled: false` and
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
    with _lock:
        shared = _shared.get(key)
        if shared is None or shared.storage.closed:
            shared = _shared[key] = _Shared(_new_storage(backend, options), {})
        context = shared.contexts.get(blocking)
        if context is None:
            context = shared.contexts.setdefault(blocking, new_context(shared.storage, blocking))
        return context


def new_context(storage: StateStorage, blocking: bool) -> Manager:
    if blocking:
        return SyncConversationContext(storage)
    from .aio import ConversationContext

    return ConversationContext(storage)


# --- the configuration file -----------------------------------------------------------------------------------------


def read_config() -> StateConfig:
    """The configuration file's state section, names and options of third parties' storages included."""
    try:
        return load_config()
    except StateConfigError as error:
        problem = error
    # It may be that a third party's storage has a name like a misspelt one of ours; only now is it worth looking.
    names = set(storage_names()) - set(BUILT_IN)
    if not names:
        raise problem
    return load_config(known_backends=dict.fromkeys(names))


def check_enabled(config: StateConfig) -> None:
    """Raise StateConfigError where the file switches state management off."""
    if not config.enabled:
        raise StateConfigError(f"state management is switched off: `enabled: false` in {config.source}")


def overridden(config: StateConfig, backend: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the storage and its options, once `options` lie over the file's. Raises StateConfigError."""
    if backend is not None and not isinstance(backend, str):
        raise StateConfigError(f"a storage is chosen by its name, not by {backend!r}")
    chosen = config.backend if backend is None else backend
    for name in options:
        if name in KEYS and not KEYS[name].backends:
            raise StateConfigError(f"{name!r} is a key of the configuration file, and no option of a storage")
    if chosen in BACKENDS:
        return chosen, config.override(chosen, **options).options()
    common = {name: value for name, value in options.items() if name in known_to(chosen)}
    # The others are the third party's, and may be objects that no file could hold.
    return chosen, {**config.override(chosen, **common).options(), **options}
