"""The memory backend, against a dict and a list, with a deep copy of what is returned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from agentstate import InMemoryStorage, SyncConversationContext

from .measure import SIZES, Run, repeated
from .messages import TEXT, content_of, one_turn, prepare_turn
from .sampling import Limit, Sample, in_sequence

OURS, PLAIN = "agentstate", "dict, list, deepcopy"
_WHERE = "memory"
_WHY = "a call checks its arguments, encodes or decodes JSON and takes a lock; a dict does none of this"


class Plain:
    """Conversations in a dict. What is returned is a copy, so that its receiver may change it."""

    def __init__(self) -> None:
        self._contexts: dict[str, dict[str, Any]] = {}

    def _context(self, context_id: str) -> dict[str, Any]:
        return self._contexts.setdefault(context_id, {"history": [], "variables": {}, "metadata": {}})

    def add_to_history(self, context_id: str, role: str, content: Any) -> None:
        now = datetime.now(UTC).isoformat()
        message = {"role": role, "content": content, "timestamp": now, "metadata": {}}
        self._context(context_id)["history"].append(message)

    def get_history(self, context_id: str, limit: int) -> list[dict[str, Any]]:
        return copy.deepcopy(self._context(context_id)["history"][-limit:])

    def set(self, context_id: str, space: str, key: str, value: Any) -> None:
        self._context(context_id)[space][key] = value

    def get(self, context_id: str, space: str, key: str) -> Any:
        return copy.deepcopy(self._context(context_id)[space][key])

    def get_state(self, context_id: str, limit: int) -> dict[str, Any]:
        context = self._context(context_id)
        return copy.deepcopy({**context, "history": context["history"][-limit:]})

    def clear(self, context_id: str) -> None:
        self._contexts.pop(context_id, None)


def memory(run: Run) -> None:
    """Single operations and the agent turn in memory."""
    context = SyncConversationContext(InMemoryStorage())
    plain = Plain()
    _sizes(run, context, plain)
    prepare_turn(context)
    for _ in range(10):
        plain.add_to_history("turn", "user", TEXT)
    preferences = {"theme": "dark", "language": "en", "topics": ["tea", "trains"]}
    for key, value in (("theme", "dark"), ("language", "en"), ("preferences", preferences)):
        context.set_variable("turn", key, value)
        plain.set("turn", "variables", key, value)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "agent turn": (lambda: one_turn(context), lambda: _plain_turn(plain)),
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
    for name, (ours, theirs) in pairs.items():
        measured = run.compare({OURS: repeated(ours), PLAIN: repeated(theirs)}, seconds=0.05)
        run.row(_WHERE, name, measured, OURS, PLAIN, at_most=1.0, why=_WHY)


def _plain_turn(plain: Plain) -> None:
    state = plain.get_state("turn", 5)
    plain.add_to_history("turn", "user", TEXT)
    plain.add_to_history("turn", "agent", TEXT)
    plain.set("turn", "variables", "language", state["variables"]["language"])
    plain.set("turn", "metadata", "last_topic", "tea")


def _sizes(run: Run, context: SyncConversationContext, plain: Plain) -> None:
    for size in SIZES:
        content = content_of(size)
        context.extend_history("ten", [{"role": "user", "content": content}] * 10)
        for _ in range(10):
            plain.add_to_history("ten", "user", content)

        def append(limit: Limit, content: str = content) -> Sample:
            context.clear_context("log")
            return in_sequence(lambda: context.add_to_history("log", "user", content), limit)

        def plain_append(limit: Limit, content: str = content) -> Sample:
            plain.clear("log")
            return in_sequence(lambda: plain.add_to_history("log", "user", content), limit)

        target = 1.0 if content == TEXT else None
        measured = run.compare({OURS: append, PLAIN: plain_append}, seconds=0.05, size=size)
        run.row(_WHERE, "append", measured, OURS, PLAIN, size=size, at_most=target, why=_WHY)
        cases = {
            OURS: repeated(lambda: context.get_history("ten", limit=10)),
            PLAIN: repeated(lambda: plain.get_history("ten", 10)),
        }
        run.row(
            _WHERE, "read of the last 10", run.compare(cases, seconds=0.05), OURS, PLAIN, size=size, at_most=target,
            why=_WHY,
        )  # fmt: skip
        context.clear_context("ten")
        plain.clear("ten")
