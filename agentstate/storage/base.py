"""The contract of a storage backend."""

from __future__ import annotations

import errno
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from math import inf
from time import monotonic_ns

from ..codec import MAX_VALUE_BYTES
from ..errors import StateConfigError, StateError, StateOutcomeUnknownError, StateTimeoutError, StateUnavailableError
from ..operations import LONGEST, NEVER, Commit, Listing, Operation, Outcome
from .tally import TIMED_ONE_IN, Tally

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Final, TypeAlias

    from .statistics import StorageStatistics

Settle: TypeAlias = Callable[[int, Outcome | StateError], None]
"""Called by `execute` with the index of an operation and its outcome, or the error of the one that failed."""

PENDING: Final[Any] = object()
"""Stands for an outcome that is not known yet (None is one: an absent context)."""

_alive: Final[weakref.WeakSet[StateStorage]] = weakref.WeakSet()


_OF_ONE_FILE: Final = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)


class StateStorage(ABC):
    """Keeps contexts, each a history, variables and metadata.

    A backend implements `execute` and `close`. (With only "read a document, replace a document, list them" at hand,
    derive from `agentstate.storage.document.DocumentStorage` instead.) `agentstate.testing.StorageContract` tells
    whether it keeps its promises.

    Options of every backend:

    - `ttl`: seconds after its last write until a context expires; None keeps it forever
    - `max_history`: a context keeps only its last so many messages; None keeps all
    - `max_value_bytes`: the largest variable, metadata value or message, as JSON
    - `deadline`: seconds a call may take, lock waits and retries included; after it no attempt starts

    Raises StateConfigError for an option that makes no sense.
    """

    blocking: ClassVar[bool] = True
    """Whether `execute` may wait for something (disk, network, locks). Where it never does, it is called on the event
    loop's own thread."""

    concurrency: ClassVar[int] = 4
    """How many calls of `execute` are useful at a time, for each `lane`. What waits meanwhile is joined into the next
    one."""

    largest_group: ClassVar[int] = 1024
    """Operations that are given to `execute` together at most; more would make the first of them wait for the last."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `execute_one` is a short way through `execute`: a class that replaces only the latter must not be passed by.
        nearest = next(base for base in cls.__mro__ if {"execute", "execute_one"} & vars(base).keys())
        if "execute_one" not in vars(nearest):
            cls.execute_one = StateStorage.execute_one  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        ttl: float | None = None,
        max_history: int | None = None,
        max_value_bytes: int = MAX_VALUE_BYTES,
        deadline: float = 5.0,
        **unknown: Any,
    ) -> None:
        if unknown:
            from .options import unknown_option  # late: only an error needs it

            raise unknown_option(type(self), next(iter(unknown)))
        self.ttl = None if ttl is None else positive_seconds("ttl", ttl)
        self.max_history = None if max_history is None else positive_integer("max_history", max_history)
        self.max_value_bytes = positive_integer("max_value_bytes", max_value_bytes)
        self.deadline = positive_seconds("deadline", deadline)
        self.closed = False
        self.tally = Tally()
        self.telemetry: Any = None  # who is told of calls: see `agentstate.telemetry`
        self.before_close: list[Callable[[], object]] = []
        """Called when `close` begins, by whoever has calls for this storage in a queue."""
        _alive.add(self)

    @abstractmethod
    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        """Carry out `operations` and call `settle(index, outcome)` exactly once for each, as soon as it is known.

        Operations on one context take effect in the order given; nothing is promised between contexts. A failed
        operation fails alone: its outcome is a StateError, and nothing is raised for it. Blocking and thread-safe;
        several calls may run at a time, but the caller sees to it that no two hold operations of one context.
        An operation whose `deadline` has passed is not attempted (StateTimeoutError); lock waits and retries end there.
        """

    def execute_one(self, operation: Operation) -> Outcome:
        """`execute` for one operation, whose error is raised. A backend that knows a shorter way overrides it."""
        outcomes: list[Any] = [PENDING]
        self.execute((operation,), outcomes.__setitem__)
        outcome: Outcome | StateError = outcomes[0]
        if outcome is PENDING:
            outcome = abandoned(self, operation)
        if isinstance(outcome, StateError):
            raise outcome
        return outcome

    def lane(self, operation: Operation) -> Hashable:
        """What the operation shares with others when it is slow, such as the server that it goes to.

        Operations of different lanes are never given to `execute` together, and do not use up each other's
        `concurrency`. Decided without waiting for anything.
        """
        return None

    def expects(self, context_id: str) -> bool:
        """Whether the context is likely to exist, so that `get_or_create` should read it first, and only if it is gone
        commit that it be there. For backends where a commit that finds it existing costs more than a read."""
        return False

    def close(self) -> None:
        """Let go of files, connections and locks, after what is under way (at most a `deadline` long).

        What was acknowledged is stored. Later calls are StateUnavailableError; closing twice is fine. A backend calls
        this first, and then lets go of what is its own.
        """
        if not self.closed:
            for finish in self.before_close:
                finish()
            self.closed = True

    def call(self, operation: Operation) -> Outcome:
        """Carry out one operation in this thread, and return its outcome or raise its error.

        One without a deadline gets that of the storage.
        """
        if operation.deadline == NEVER:
            operation = operation._replace(deadline=time.monotonic() + self.deadline)
        tally = self.tally
        kind = type(operation)
        try:
            # Next to a call that is all in memory, two readings of the clock would be much.
            if next(tally.alone[kind]) % TIMED_ONE_IN and not self.blocking:
                return self.execute_one(operation)
            began = monotonic_ns()
            try:
                return self.execute_one(operation)
            finally:
                tally.took(kind, monotonic_ns() - began)
        except StateError as error:
            tally.failed(error)
            raise

    def carry_out(self, operations: Sequence[Operation]) -> list[Outcome | StateError]:
        """`execute` in this thread, counted, with the outcomes in a list.

        As with `execute`, the caller sees to it that no other thread is at these contexts.
        """
        outcomes: list[Any] = [PENDING] * len(operations)
        began = monotonic_ns()
        self.execute(operations, outcomes.__setitem__)
        for index, outcome in enumerate(outcomes):
            if outcome is PENDING:
                outcomes[index] = abandoned(self, operations[index])
        self.tally.note(operations, outcomes, monotonic_ns() - began)
        return outcomes

    def statistics(self) -> StorageStatistics:
        """What this object has done since it was made (in the child of a fork: since the fork).

        Counting is always on, costs a fraction of a microsecond a call, and sees this object only: not what other
        processes, or other objects in this one, do with the same store.
        """
        from .statistics import statistics_of  # late: dataclasses take their time to import

        return statistics_of(self.tally)

    def telemetry_attributes(self) -> dict[str, str | int]:
        """What telemetry says of this store, in the names of OpenTelemetry's conventions for databases.

        Nothing secret, and nothing of single conversations: all spans and metrics carry it.
        """
        return {"db.system.name": f"agentstate.{type(self).__name__.removesuffix('Storage').lower()}"}

    def check_open(self) -> None:
        """Raise StateUnavailableError after `close`."""
        if self.closed:
            raise StateUnavailableError(f"this {type(self).__name__} is closed")

    def _after_fork(self) -> None:  # noqa: B027 - nothing to forget is a fine answer
        """In the child of a fork: forget sockets, lock handles and threads of the parent without touching them."""


def check_deadline(operation: Operation) -> None:
    """Raise StateTimeoutError where the operation may not be attempted any more."""
    if time.monotonic() >= operation.deadline:
        raise StateTimeoutError(
            "the deadline passed before the operation was attempted; nothing was done",
            context_id=getattr(operation, "context_id", None),
        )


def concerns_one_context(error: StateError) -> bool:
    """Whether the store can be reached, and only what it keeps of this context cannot be read.

    So it is with a file that is another user's, is a link, or is none: a folder, a FIFO, a socket.
    """
    if not isinstance(error, StateUnavailableError):
        return not isinstance(error, StateTimeoutError)
    cause = error.__cause__
    while isinstance(cause, StateError):  # several operations may have failed by one error
        cause = cause.__cause__
    return isinstance(cause, OSError) and cause.errno in _OF_ONE_FILE


def positive_seconds(option: str, value: Any) -> float:
    """`value` as seconds, at most `LONGEST`. Raises StateConfigError unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise StateConfigError(f"{option} is a positive number of seconds, not {value!r}")
    return min(value, LONGEST)


def positive_integer(option: str, value: Any) -> int:
    """`value` as a count. Raises StateConfigError unless it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise StateConfigError(f"{option} is a positive whole number, not {value!r}")
    return value


def one_of(option: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`. Raises StateConfigError otherwise."""
    if value not in allowed:
        raise StateConfigError(f"{option} is one of {', '.join(map(repr, allowed))}, not {value!r}")
    return str(value)


def now_microseconds() -> int:
    """This machine's clock: microseconds since 1970."""
    return time.time_ns() // 1000


class _Unsettled(Exception):
    """A backend returned from `execute` without having settled all operations."""


def abandoned(storage: StateStorage, operation: Operation, failure: BaseException | None = None) -> StateError:
    """The outcome of an operation that a backend left open when it failed, or forgot."""
    failure = failure or _Unsettled(f"{type(storage).__name__}.execute forgot an operation")
    context_id = None if isinstance(operation, Listing) else operation.context_id
    message = f"the storage failed: {type(failure).__name__}: {failure}"
    error: StateError
    if isinstance(operation, Commit):
        error = StateOutcomeUnknownError(message, context_id=context_id, commit_id=operation.commit_id)
    else:
        error = StateUnavailableError(message, context_id=context_id)
    error.__cause__ = failure
    return error


def _reset_all_after_fork() -> None:
    for storage in list(_alive):
        storage.tally.begin_anew()
        storage._after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_reset_all_after_fork)
