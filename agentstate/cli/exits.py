"""Exit codes, which scripts can rely on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import (
    ContextNotFoundError,
    InvalidContextIdError,
    StateAccessError,
    StateConfigError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateSerializationError,
    StateTimeoutError,
    StateUnavailableError,
)

OK: Final = 0
PROBLEM: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3
NOT_FOUND: Final = 4
REFUSED: Final = 5
CORRUPTED: Final = 6
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141
TERMINATED: Final = 143

MEANINGS: Final = {
    OK: "done",
    PROBLEM: "a problem was found, or something could not be done",
    USAGE: "the command or the configuration is invalid",
    UNAVAILABLE: "the storage cannot be reached, or did not answer in time",
    NOT_FOUND: "the conversation, folder, file or handler does not exist",
    REFUSED: "refused: it exists already, belongs to another user, or is not what was expected",
    CORRUPTED: "the storage or the archive is damaged",
    INTERRUPTED: "interrupted by Ctrl-C",
    PIPE_CLOSED: "the reader of the output closed the pipe",
    TERMINATED: "terminated by a signal",
}

_CODES: Final = (
    (StateConfigError, USAGE),
    (InvalidContextIdError, USAGE),
    (StateUnavailableError, UNAVAILABLE),
    (StateTimeoutError, UNAVAILABLE),
    (ContextNotFoundError, NOT_FOUND),
    (StateCorruptedError, CORRUPTED),
    (StateConflictError, REFUSED),
    (StateAccessError, REFUSED),
    (StateSerializationError, REFUSED),
    (LookupError, NOT_FOUND),  # an unknown handler
)


def code_of_all(errors: Iterable[StateError]) -> int:
    """The exit code for several errors: that of each, or PROBLEM where they differ."""
    codes = {code_of(error) for error in errors} or {OK}
    return codes.pop() if len(codes) == 1 else PROBLEM


def code_of(error: StateError) -> int:
    """The exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), PROBLEM)
