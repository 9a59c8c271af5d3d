"""Conversation state for agents: history, variables and metadata, in memory, in files, or in Valkey.

    from agentstate import SyncConversationContext, FileStorage

    with SyncConversationContext(FileStorage("./conversation_states")) as context:
        context.add_to_history("alice", "user", "Remember that I like tea")

Names are loaded on first use, so that a script pays for what it uses: `import agentstate` alone imports none of
asyncio, valkey, yaml, filelock and dataclasses-json. Modules that every script needs do without `typing` too, a fifth
of what they cost: it is imported for type checkers, which take any `TYPE_CHECKING` to be true.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .aio import ConversationContext as ConversationContext
    from .blocking import SyncConversationContext as SyncConversationContext
    from .config import load_config as load_config
    from .errors import ContextNotFoundError as ContextNotFoundError
    from .errors import InvalidContextIdError as InvalidContextIdError
    from .errors import StateAccessError as StateAccessError
    from .errors import StateConfigError as StateConfigError
    from .errors import StateConflictError as StateConflictError
    from .errors import StateCorruptedError as StateCorruptedError
    from .errors import StateError as StateError
    from .errors import StateOutcomeUnknownError as StateOutcomeUnknownError
    from .errors import StateSerializationError as StateSerializationError
    from .errors import StateTimeoutError as StateTimeoutError
    from .errors import StateUnavailableError as StateUnavailableError
    from .errors import TurnLostError as TurnLostError
    from .handlers import get_handler as get_handler
    from .handlers import list_handlers as list_handlers
    from .handlers import register_handler as register_handler
    from .handlers import stateful as stateful
    from .registry import get_context_manager as get_context_manager
    from .registry import register_storage as register_storage
    from .state import ConversationState as ConversationState
    from .state import Message as Message
    from .storage.base import StateStorage as StateStorage
    from .storage.document import DocumentStorage as DocumentStorage
    from .storage.file import FileStorage as FileStorage
    from .storage.memory import InMemoryStorage as InMemoryStorage
    from .storage.valkey import ValkeyStorage as ValkeyStorage

_MODULES = {
    "aio": ("ConversationContext",),
    "blocking": ("SyncConversationContext",),
    "config": ("load_config",),
    "errors": (
        "ContextNotFoundError",
        "InvalidContextIdError",
        "StateAccessError",
        "StateConfigError",
        "StateConflictError",
        "StateCorruptedError",
        "StateError",
        "StateOutcomeUnknownError",
        "StateSerializationError",
        "StateTimeoutError",
        "StateUnavailableError",
        "TurnLostError",
    ),
    "handlers": ("get_handler", "list_handlers", "register_handler", "stateful"),
    "registry": ("get_context_manager", "register_storage"),
    "state": ("ConversationState", "Message"),
    "storage.base": ("StateStorage",),
    "storage.document": ("DocumentStorage",),
    "storage.file": ("FileStorage",),
    "storage.memory": ("InMemoryStorage",),
    "storage.valkey": ("ValkeyStorage",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .version import __version__

        return __version__
    if name not in _HOMES:
        raise AttributeError(f"module 'agentstate' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"agentstate.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
