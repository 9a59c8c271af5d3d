"""What a process of its own runs for test_handlers_turns.py: a module that it can import by name."""

from __future__ import annotations

import time
from typing import Any

from agentstate import FileStorage, SyncConversationContext, stateful


def take_turns(folder: str, times: int) -> None:
    """Count up in a way that only turns make safe."""
    with SyncConversationContext(FileStorage(folder)) as context:

        @stateful(context.storage, serialize_turns=True)
        def handler(task: Any, context: SyncConversationContext, context_id: str) -> None:
            number = context.get_variable(context_id, "n", 0)
            time.sleep(0.005)
            context.set_variable(context_id, "n", number + 1)

        for _ in range(times):
            handler({"id": "alice"})
