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
    """Make `src.agent.context` and `src.agent.handlers` importable, as names of modules of agentstate.

    State operations are logged by `src.agent.context` from then on, at DEBUG, where that logger is enabled for it.
    Packages `src` and `src.agent` of the application stay what they are, and so does its own `src.agent.handlers`.
    Installing again changes nothing. Raises StateConfigError if the application has a `src.agent.context` itself.
    """
    ours = import_module("agentstate.context")
    if sys.modules.get(_CONTEXT) is ours:
        return
    for package in _PACKAGES:
        if not _exists(package):
            _make_package(package)
        elif not hasattr(import_module(package), "__path__"):
            raise StateConfigError(f"there is a module {package!r}, {_place(package)}, which is not a package")
    if _exists(_CONTEXT):
        raise StateConfigError(
            f"there is a {_CONTEXT} already, {_place(_CONTEXT)}: remove it, or import from agentstate.context instead"
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
