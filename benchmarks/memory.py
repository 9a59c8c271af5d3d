"""The memory backend, against a dict and a list, and a deep copy of what is returned."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

from agentstate import InMemoryStorage, SyncConversationContext

from .measure import TEXT, Run, benchmark, repeated
from .valkey_sync import one_turn, prepare_turn

OURS, PLAIN = "agentstate", "dict, list, deepcopy"


class Plain:
    """Conversations in a dict. What is returned is a copy, so that its receiver may change it."""

    def __init__(self) -> None:
        self.contexts: dict[str, dict[str, Any]] = {}

    def context(self, context_id: str) -> dict[str, Any]:
        return self.contexts.setdefault(context_id, {"history": [], "variables": {}, "metadata": {}})

    def add_to_history(self, context_id: str, role: str, content: Any) -> None:
        now = datetime.now(UTC).isoformat()
        self.context(context_id)["history"].append({"role": role, "content": content, "timestamp": now, "metadata": {}})

    def get_history(self, context_id: str, limit: int) -> list[dict[str, Any]]:
        return copy.deepcopy(self.context(context_id)["history"][-limit:])

    def set(self, context_id: str, space: str, key: str, value: Any) -> None:
        self.context(context_id)[space][key] = value

    def get(self, context_id: str, space: str, key: str) -> Any:
        return copy.deepcopy(self.context(context_id)[space][key])

    def get_state(self, context_id: str, limit: int) -> dict[str, Any]:
        context = self.context(context_id)
        return copy.deepcopy({**context, "history": context["history"][-limit:]})

    def turn(self, context_id: str) -> None:
        state = self.get_state(context_id, 5)
        self.add_to_history(context_id, "user", TEXT)
        self.add_to_history(context_id, "agent", TEXT)
        self.set(context_id, "variables", "language", state["variables"]["language"])
        self.set(context_id, "metadata", "last_topic", "tea")


@benchmark("memory")
def memory(run: Run) -> None:
    """Single operations and the agent turn in memory."""
    context = SyncConversationContext(InMemoryStorage())
    plain = Plain()
    prepare_turn(context)
    for _ in range(10):
        plain.add_to_history("turn", "user", TEXT)
    preferences = {"theme": "dark", "language": "en", "topics": ["tea", "trains"]}
    for key, value in (("theme", "dark"), ("language", "en"), ("preferences", preferences)):
        context.set_variable("turn", key, value)
        plain.set("turn", "variables", key, value)
    pairs = {
        "agent turn": (lambda: one_turn(context), lambda: plain.turn("turn")),
        "get_history(limit=10)": (
            lambda: context.get_history("turn", limit=10),
            lambda: plain.get_history("turn", 10),
        ),
        "add_to_history": (
            lambda: context.add_to_history("log", "user", TEXT),
            lambda: plain.add_to_history("log", "user", TEXT),
        ),
        "get_variable (text)": (
            lambda: context.get_variable("turn", "theme"),
            lambda: plain.get("turn", "variables", "theme"),
        ),
        "get_variable (a small dict)": (
            lambda: context.get_variable("turn", "preferences"),
            lambda: plain.get("turn", "variables", "preferences"),
        ),
        "set_variable (a small dict)": (
            lambda: context.set_variable("turn", "preferences", preferences),
            lambda: plain.set("turn", "variables", "preferences", preferences),
        ),
    }
    count = run.size(2000, 50)
    for name, (ours, theirs) in pairs.items():
        samples = run.compare({OURS: repeated(ours, count), PLAIN: repeated(theirs, count)}, 11)
        run.row(f"memory, sync: {name}", samples, OURS, PLAIN, at_most=1.0)
