"""The data of a conversation: `ConversationState` and `Message`, and their conversions."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Message(TypedDict):
    """One message of a conversation, as `get_history` returns it.

    `content` is text, or any JSON value where a framework stores lists of parts. `timestamp` is ISO 8601 in UTC with
    its offset: ``2026-01-31T12:00:00.000000+00:00``.
    """

    role: str
    content: Any
    timestamp: str
    metadata: dict[str, Any]


@dataclass
class ConversationState:
    """A copy of a conversation at one moment: changing it does not change what is stored.

    `history` contains the messages, oldest first. Its first message is at position `history_start`, or later if a
    `history_limit` left messages out. Positions are absolute: trimming raises `history_start` and never renumbers.
    `revision` grows by one with every commit to the context. `created_at` and `updated_at` are aware datetimes in UTC.
    """

    context_id: str
    user_id: str | None
    created_at: datetime
    updated_at: datetime
    variables: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    history: list[Message] = field(default_factory=list)
    history_start: int = 0
    revision: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values, with the field names and order of AgentUp's documents."""
        return {
            "context_id": self.context_id,
            "user_id": self.user_id,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
            "metadata": self.metadata,
            "variables": self.variables,
            "history": self.history,
            "history_start": self.history_start,
            "revision": self.revision,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversationState:
        """The inverse of `to_dict`. Reads documents written by AgentUp, too (naive times are UTC).

        Raises KeyError or ValueError if `data` is not such a document.
        """
        return cls(
            context_id=data["context_id"],
            user_id=data.get("user_id"),
            created_at=parse_time(data["created_at"]),
            updated_at=parse_time(data["updated_at"]),
            variables=data.get("variables") or {},
            metadata=data.get("metadata") or {},
            history=data.get("history") or [],
            history_start=data.get("history_start", 0),
            revision=data.get("revision", 0),
        )


def parse_time(text: str) -> datetime:
    """An ISO 8601 time as an aware datetime in UTC. Naive times, as AgentUp writes them, are in UTC."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def to_microseconds(time: datetime) -> int:
    """An aware datetime as microseconds since 1970, exactly (a float of seconds would be rounded)."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def from_microseconds(microseconds: int) -> datetime:
    """Microseconds since 1970 as an aware datetime in UTC, exactly."""
    return _EPOCH + timedelta(0, 0, microseconds)
