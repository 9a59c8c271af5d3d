"""Failures of servers: whether to try again, how long to wait, and which error the caller gets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from copy import copy
from time import monotonic, sleep
from typing import Final, TypeVar

from ...errors import StateConfigError, StateConflictError, StateError, StateTimeoutError, StateUnavailableError
from .nodes import Servers
from .wire import LostConnectionError, NoTimeLeftError, ServerError

T = TypeVar("T")

FIRST_PAUSE: Final = 0.005
LONGEST_PAUSE: Final = 0.25
"""Seconds between attempts."""

_PASSING: Final = frozenset(
    ("LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "NOREPLICAS", "MOVED", "ASK", "NOSCRIPT")
)
"""Errors that are temporary, or that another server does not have. The command that they answer was not carried out."""


def passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, ServerError):
        return error.code in _PASSING or "max number of clients" in str(error)
    return isinstance(error, LostConnectionError | StateTimeoutError)  # no connection in time: some may wait longer


def pauses() -> Iterator[float]:
    """Seconds to wait before each further attempt: exponential back-off with jitter."""
    longest = FIRST_PAUSE
    while True:
        yield longest * (0.5 + random.random() / 2)
        longest = min(LONGEST_PAUSE, longest * 2)


def repeat(attempt: Callable[[], T], deadline: float, servers: Servers, context_id: str | None = None) -> T:
    """The result of `attempt`, a read, repeated until it succeeds.

    Raises the StateError that says why it did not succeed until the deadline.
    """
    if monotonic() >= deadline:
        raise StateTimeoutError("the deadline passed before anything was done", context_id=context_id)
    problem: Exception | None = None
    for pause in pauses():
        try:
            return attempt()
        except (LostConnectionError, ServerError) as error:
            servers.changed(error)
            if problem is None or not isinstance(error, NoTimeLeftError):
                problem = error
        left = deadline - monotonic()
        if left <= 0 or not passes(problem):
            raise failure(problem, context_id, reads=True) from problem
        servers.tally.add(attempts_repeated=1)
        sleep(min(left, pause))
    raise AssertionError("there is no end of pauses")


def failure(problem: Exception | None, context_id: str | None, *, reads: bool) -> StateError:
    """The error of an operation that was not done because of a problem with the server. `reads`: it was a read."""
    error: StateError
    code = problem.code if isinstance(problem, ServerError) else ""
    if isinstance(problem, StateError):
        error = copy(problem)  # one for each operation that it ended
        error.context_id = context_id
        return error
    if code == "NOAUTH":
        error = StateConfigError("Valkey asks for a password: set password=, or put it into the url")
    elif code == "WRONGPASS" or (code and "AUTH" in str(problem)):
        error = StateConfigError("Valkey refuses the user name or the password of the url")
    elif code == "NOPERM":
        error = StateUnavailableError(f"the Valkey user lacks a permission (grant it with ACL SETUSER): {problem}")
    elif code == "WRONGTYPE":
        error = StateConflictError("a key of the context holds something that is not ours; not touched")
    elif code == "OOM":
        error = StateUnavailableError("Valkey has no memory left (maxmemory); nothing was changed")
    else:
        done = "could not read from Valkey" if reads else "Valkey cannot be used; nothing was changed"
        error = StateUnavailableError(f"{done}: {problem}")
    error.context_id = context_id
    error.__cause__ = problem
    return error
