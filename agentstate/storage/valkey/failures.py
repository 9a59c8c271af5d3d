"""What can go wrong with a server: whether to try again, how long to wait, and what the caller is told."""

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
"""Errors that go away by themselves, or by looking elsewhere. What they answer was not carried out."""


def passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, ServerError):
        return error.code in _PASSING or "max number of clients" in str(error)
    return isinstance(error, LostConnectionError | StateTimeoutError)  # no connection in time: some may wait longer


def pauses() -> Iterator[float]:
    """Seconds to wait before each further attempt: longer and longer, and not in step with others."""
    longest = FIRST_PAUSE
    while True:
        yield longest * (0.5 + random.random() / 2)
        longest = min(LONGEST_PAUSE, longest * 2)


def repeat(attempt: Callable[[], T], deadline: float, servers: Servers, context_id: str | None = None) -> T:
    """The result of `attempt`, made again and again until it succeeds; for what may be done twice.

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
            raise failure(problem, context_id) from problem
        servers.tally.add(attempts_repeated=1)
        sleep(min(left, pause))
    raise AssertionError("there is no end of pauses")


def failure(problem: Exception | None, context_id: str | None) -> StateError:
    """The error of an operation that was not done because of a problem with the server."""
    error: StateError
    code = problem.code if isinstance(problem, ServerError) else ""
    if isinstance(problem, StateError):
        error = copy(problem)  # several operations may have failed by it
        error.context_id = context_id
        return error
    if code == "NOAUTH":
        error = StateConfigError("Valkey asks for a password: give password=, or put it into the url")
    elif code == "WRONGPASS" or (code and "AUTH" in str(problem)):
        error = StateConfigError("Valkey refuses the user name or the password of the url")
    elif code == "NOPERM":
        error = StateUnavailableError(f"the user of this connection lacks a permission (ACL SETUSER): {problem}")
    elif code == "WRONGTYPE":
        error = StateConflictError("a key of the context holds something that is not ours; not touched")
    elif code == "OOM":
        error = StateUnavailableError("Valkey has no memory left (maxmemory); nothing was changed")
    else:
        error = StateUnavailableError(f"Valkey cannot be used; nothing was changed: {problem}")
    error.context_id = context_id
    error.__cause__ = problem
    return error
