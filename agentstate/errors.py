"""The exceptions of agentstate.

    StateError
    ├── StateConfigError(ValueError)             an option or the configuration file is wrong
    ├── InvalidContextIdError(ValueError)        this can never be the id of a context
    ├── StateSerializationError(TypeError)       a value is not JSON, or not of the type asked for
    ├── StateUnavailableError(ConnectionError)   the store cannot be reached; not done
    │   └── StateOutcomeUnknownError             sent, but never answered: it may have happened
    ├── StateTimeoutError(TimeoutError)          a lock, a lease or a turn was not available in time; not done
    ├── StateCorruptedError                      the stored data is damaged; left as it is
    ├── ContextNotFoundError(LookupError)        the context that is needed does not exist
    ├── StateConflictError                       the state is not what the call requires; refused
    │   └── TurnLostError                        the turn's lease expired before its commit
    └── StateAccessError(PermissionError)        the context belongs to another user; refused

Every call that raises says which of three holds: *not done* (unavailable, timeout), *refused* (all the others), or
*outcome unknown* (`StateOutcomeUnknownError`, whose `commit_id` makes a retry safe).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StateError(Exception):
    """Base of all errors of agentstate.

    `context_id` is the conversation that the failed call was about, or None where there is none.
    """

    def __init__(self, message: str, *, context_id: str | None = None) -> None:
        super().__init__(printable(message))
        self.context_id = context_id

    def __reduce__(self) -> tuple[Any, ...]:
        # The attributes are not in `args`: default pickling would lose them.
        return _rebuild, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        # KeyError and OSError would format the message.
        return str(self.args[0]) if self.args else ""


def printable(text: str) -> str:
    """`text` with escapes for what is not printable: names in a message must not forge lines of a log or a terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _rebuild(cls: type[StateError], args: tuple[Any, ...], attributes: dict[str, Any]) -> StateError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class StateConfigError(StateError, ValueError):
    """An option or the configuration file is wrong. The message names the option and what to write instead.

    `problems` lists all problems of a configuration file, each with file and line; it is empty for other errors.
    """

    def __init__(self, message: str, *, context_id: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message, context_id=context_id)
        self.problems = tuple(map(printable, problems))
        if len(self.problems) > 1:
            self.args = ("\n".join(map(printable, message.split("\n"))),)  # one problem per line


class InvalidContextIdError(StateError, ValueError):
    """The string can never be a context id: empty, over 1,024 bytes of UTF-8, or with a NUL or a lone surrogate."""


class StateSerializationError(StateError, TypeError):
    """A value cannot be stored as JSON, or a stored value cannot be decoded as asked. Nothing was changed.

    `path` is the place of the offending part in the value, for example ``preferences.theme[3]``.
    """

    def __init__(self, message: str, *, context_id: str | None = None, path: str = "") -> None:
        super().__init__(message, context_id=context_id)
        self.path = path

    def within(self, path: str) -> StateSerializationError:
        """The same error for a value that is at `path` of a larger one."""
        reason = str(self).removeprefix(printable(f"{self.path}: "))
        inside = f"{path}.{self.path}"
        return StateSerializationError(f"{inside}: {reason}", context_id=self.context_id, path=inside)


class StateUnavailableError(StateError, ConnectionError):
    """The store cannot be reached or cannot be used. The call was *not done*."""


class StateOutcomeUnknownError(StateUnavailableError):
    """The store did not answer after the change was sent: it may or may not have been applied.

    Make the same call again with ``commit_id=error.commit_id``: it is applied at most once, and returns the same
    result.
    """

    def __init__(self, message: str, *, context_id: str | None = None, commit_id: str | None = None) -> None:
        super().__init__(message, context_id=context_id)
        self.commit_id = commit_id


class StateTimeoutError(StateError, TimeoutError):
    """A lock, a lease or a place in the queue was not available in time. The call was *not done*."""


class StateCorruptedError(StateError):
    """The stored data is damaged. It was left as it is, and is not overwritten."""


class ContextNotFoundError(StateError, LookupError):
    """The context that the call needs does not exist. The store could be read."""


class StateConflictError(StateError):
    """The stored state is not what the call requires. Nothing was changed."""


class TurnLostError(StateConflictError):
    """The lease of this turn expired, and another turn may have begun. Nothing was changed."""


class StateAccessError(StateError, PermissionError):
    """The context belongs to another user, or has no owner while the caller is bound to a user. Nothing was changed."""
