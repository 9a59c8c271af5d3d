"""What AgentUp has in its module ``context``, by the same names: porting changes import lines and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ConversationContext as ConversationContext
    from . import ConversationState as ConversationState
    from . import FileStorage as FileStorage
    from . import InMemoryStorage as InMemoryStorage
    from . import Message as Message
    from . import StateStorage as StateStorage
    from . import SyncConversationContext as SyncConversationContext
    from . import ValkeyStorage as ValkeyStorage
    from . import get_context_manager as get_context_manager
    from . import stateful as stateful

__all__ = [
    "ConversationContext",
    "ConversationState",
    "FileStorage",
    "InMemoryStorage",
    "Message",
    "StateStorage",
    "SyncConversationContext",
    "ValkeyStorage",
    "get_context_manager",
    "stateful",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, as by the package itself.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import agentstate

    return getattr(agentstate, name)
