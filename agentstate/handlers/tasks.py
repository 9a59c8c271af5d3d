"""Reads the ids of the conversation and of the user in a task.

A task may be an a2a-sdk object (from 1.0 on a protobuf message: what is not set is ``""``, and its metadata is a
`Struct`), its JSON as a dict, or any object.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from ..errors import InvalidContextIdError

_EXACT_FLOAT: Final = 2.0**53  # beyond it, neighbouring whole numbers are the same float


def field(source: Any, name: str) -> Any:
    """A field of a task or of its metadata, which may be a mapping or an object; None if it is missing."""
    if not isinstance(source, Mapping):
        return getattr(source, name, None)
    # Not get(): a protobuf Struct has no such method, and adds the keys that it is indexed with.
    if name not in source:
        return None
    try:
        return source[name]
    except ValueError as error:  # a protobuf Value of no kind
        raise InvalidContextIdError(f"the task's {name!r} has no value: {error}") from error


def metadata(task: Any, name: str) -> Any:
    """A field of the task's metadata; None if it is missing."""
    return field(field(task, "metadata"), name)


def as_text(value: Any, where: str) -> str | None:
    """An id as text; None if it is not set. Raises InvalidContextIdError for a value that is not a definite id."""
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value) or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        # In protobuf metadata every number is a float, and a number that was never set is 0.
        if value and (isinstance(value, int) or (value.is_integer() and abs(value) < _EXACT_FLOAT)):
            return str(int(value))
        raise InvalidContextIdError(f"{where} must be text or a whole number other than 0, got {value!r}")
    uuid = sys.modules.get("uuid")
    if uuid is not None and isinstance(value, uuid.UUID):
        return str(value)
    raise InvalidContextIdError(f"{where} must be text, a whole number or a UUID, got {type(value).__name__}")
