"""Prints a conversation for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from .. import codec
from ..operations import Snapshot
from . import console

_ROLE_STYLES: Final = {"user": "bold cyan", "assistant": "bold green", "agent": "bold green", "system": "bold magenta"}
_OTHER_ROLE: Final = "bold yellow"


def print_head(context_id: str, snapshot: Snapshot) -> None:
    """Print everything of a conversation except its messages."""
    messages = f"{snapshot.end - snapshot.start:,}"
    if snapshot.start:
        messages += f" (and {snapshot.start:,} older ones that were trimmed)"
    pairs = [
        ("conversation", context_id),
        ("owner", snapshot.user_id or "none"),
        ("created", _moment(snapshot.created)),
        ("updated", _moment(snapshot.updated)),
        *([("expires", _moment(snapshot.expires))] if snapshot.expires is not None else []),
        ("revision", f"{snapshot.revision:,}"),
        ("messages", messages),
    ]
    console.facts(pairs)
    for title, texts in (("variables", snapshot.variables), ("metadata", snapshot.metadata)):
        if texts:
            console.line()
            console.line(title, "bold")
            for key in sorted(texts):
                value = console.json_text(codec.decode(texts[key]), indent=2).replace("\n", "\n  ")
                console.line(f"  {console.one_line(key)} = {value}")
    console.line()


def _moment(microseconds: int) -> str:
    from ..state import from_microseconds

    return f"{from_microseconds(microseconds):%Y-%m-%d %H:%M:%S} UTC, {console.ago(microseconds)}"


def print_message(text: bytes, position: int, *, as_json: bool) -> None:
    """Print one message, for people or as one line of JSON."""
    message = codec.decode(text)
    if as_json:
        console.json_line(message)
        return
    role = console.one_line(str(message.get("role", "?")))
    time_text = console.clock_text(message.get("timestamp", ""))
    console.line(role, _ROLE_STYLES.get(role.lower(), _OTHER_ROLE), end="")
    console.line(f"  {time_text}  #{position}", "dim")
    for line in _content_lines(message.get("content")):
        console.line(f"  {line}")
    if message.get("metadata"):
        console.line(f"  {console.json_text(message['metadata'])}", "dim")
    console.line()


def _content_lines(content: Any) -> Iterator[str]:
    if isinstance(content, list):
        for part in content:
            yield from _content_lines(_text_of_part(part))
    elif isinstance(content, str):
        yield from content.split("\n")
    else:
        yield from json.dumps(content, ensure_ascii=False, indent=2).split("\n")


def _text_of_part(part: Any) -> Any:
    """The text of a part of a message, as A2A and others write them; a part without text is returned unchanged."""
    for place in (part, part.get("root") if isinstance(part, dict) else None):
        if isinstance(place, dict) and isinstance(place.get("text"), str):
            return place["text"]
    return json.dumps(part, ensure_ascii=False) if isinstance(part, list) else part
