"""AgentUp's import paths, for code whose imports cannot be changed.

import agentstate.compat

agentstate.compat.install()

from src.agent.context import ConversationContext, InMemoryStorage, get_context_manager, stateful
from src.agent.handlers import register_handler
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from .calllog import LOGGED_AS
from .errors import StateConfigError

_PACKAGES = ("src", "src.agent")
_CONTEXT = "src.agent.context"
_HANDLERS = "src.agent.handlers"


def install() -> None:
    """Make `src.agent.context` and `src.agent.handlers` importable, as aliases of modules of agentstate.

    From then on, state operations are logged by the logger `src.agent.context` at DEBUG, if it is enabled for that.
    The application's own packages `src` and `src.agent`, and its own `src.agent.handlers`, are left as they are.
    Installing again has no effect. Raises StateConfigError if the application has its own `src.agent.context`.
    """
    ours = import_module("agentstate.context")
    if sys.modules.get(_CONTEXT) is ours:
        return
    for package in _PACKAGES:
        if not _exists(package):
            _make_package(package)
        elif not hasattr(import_module(package), "__path__"):
            raise StateConfigError(
                f"{package!r} must be a package, but there is a module of that name {_place(package)}"
            )
    if _exists(_CONTEXT):
        raise StateConfigError(
            f"{_CONTEXT} already exists {_place(_CONTEXT)}: remove it, or import from agentstate.context instead"
        )
    _add(_CONTEXT, ours)
    if not _exists(_HANDLERS):
        _add(_HANDLERS, import_module("agentstate.handlers"))
    LOGGED_AS.append(_CONTEXT)


def _exists(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None


def _make_package(name: str) -> None:
    package = ModuleType(name, "Made by agentstate.compat.")
    package.__path__ = []
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    _add(name, package)


def _add(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _place(name: str) -> str:
    file = getattr(import_module(name), "__file__", None)
    return f"in {file}" if file else "without a file"
