"""What is written and read: a message's content, and the agent turn of AgentUp's documentation."""

from __future__ import annotations

from typing import Final

from agentstate import SyncConversationContext

from .measure import SIZES

_SENTENCE: Final = "Remember that I like tea, and that I never drink it after four o'clock. "


def content_of(size: int) -> str:
    """Text of so many bytes."""
    return (_SENTENCE * (size // len(_SENTENCE) + 1))[:size]


TEXT: Final = content_of(SIZES[0])
"""The content of a message, where nothing else is said."""


def prepare_turn(context: SyncConversationContext) -> None:
    """Make the conversation in which `one_turn` takes place."""
    context.extend_history("turn", [{"role": "user", "content": TEXT}] * 10)
    context.set_variables("turn", {"theme": "dark", "language": "en"})


def one_turn(context: SyncConversationContext) -> None:
    """Read 5 messages and the variables; write 2 messages, 1 variable and 1 metadata value in one commit."""
    state = context.get_state("turn", history_limit=5)
    assert state is not None
    language = state.variables["language"]
    with context.batch("turn") as batch:
        batch.add_to_history("user", TEXT)
        batch.add_to_history("agent", TEXT)
        batch.set_variable("language", language)
        batch.set_metadata("last_topic", "tea")
