"""The findings of doctor."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """The result of one check. `advice` is what to do about it."""

    level: Literal["ok", "note", "warning", "problem"]
    subject: str
    text: str
    advice: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def note(subject: str, text: str, advice: str = "") -> Finding:
    return Finding("note", subject, text, advice)


def warning(subject: str, text: str, advice: str = "") -> Finding:
    return Finding("warning", subject, text, advice)


def problem(subject: str, text: str, advice: str = "") -> Finding:
    return Finding("problem", subject, text, advice)
