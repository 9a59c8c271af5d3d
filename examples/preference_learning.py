"""An assistant that learns the interests of its user, and stores them as a dataclass.

    python examples/preference_learning.py --user alice "How do I read a file in Python?"
    python examples/preference_learning.py --user alice "And please keep it short"
    python examples/preference_learning.py --user alice "What should I read next?"

Preferences are stored per user, not per conversation: `context_id="user"` takes the id from the task's `user_id`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any

from agentstate import StateError, SyncConversationContext, stateful

TOPICS = {
    "programming": ("python", "code", "rust", "debug"),
    "cooking": ("recipe", "cook", "bake"),
    "travel": ("train", "flight", "hotel"),
}


@dataclass
class Preferences:
    """What is known about a user."""

    interests: list[str] = field(default_factory=list)
    style: str = "detailed"


def learned_from(message: str, known: Preferences) -> Preferences:
    """The preferences after this message. A pure function: it runs again if another writer changed them meanwhile."""
    words = message.lower()
    new = [topic for topic, signs in TOPICS.items() if topic not in known.interests and any(s in words for s in signs)]
    style = "short" if "short" in words or "brief" in words else known.style
    return Preferences([*known.interests, *new], style)


@stateful("file", storage_dir="./conversation_states", context_id="user")
def learning_assistant(task: dict[str, Any], context: SyncConversationContext, context_id: str) -> str:
    """Learn from the message, and answer using what is known about the user."""
    # Dataclasses are stored as JSON objects, so the function gets a dictionary.
    context.update_variable(
        context_id,
        "preferences",
        lambda stored: learned_from(task["text"], Preferences(**stored)),
        default=Preferences(),
    )
    known = context.get_variable(context_id, "preferences", as_type=Preferences)
    if not known.interests:
        return "How can I assist you today?"
    answer = f"I see you're interested in {' and '.join(known.interests)}!"
    return answer if known.style == "short" else f"{answer} Let me tell you more about that."


def main() -> int:
    parser = argparse.ArgumentParser(description="An assistant that learns preferences.")
    parser.add_argument("message")
    parser.add_argument("--user", default="alice", help="the user who sends the message (default: alice)")
    args = parser.parse_args()
    try:
        print(learning_assistant({"text": args.message, "metadata": {"user_id": args.user}}))
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
