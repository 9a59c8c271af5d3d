"""The contract of a storage backend."""

from __future__ import annotations

import errno
import os
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from math import inf
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from ..codec import MAX_VALUE_BYTES
from ..errors import StateConfigError, StateError, StateOutcomeUnknownError, StateTimeoutError, StateUnavailableError
from ..operations import LONGEST, NEVER, Commit, Listing, Operation, Outcome
from .tally import TIMED_ONE_IN, Tally

if TYPE_CHECKING:
    from .statistics import StorageStatistics

Settle: TypeAlias = Callable[[int, Outcome | StateError], None]
"""Called by `execute` with the index of an operation and its outcome, or the error of the one that failed."""

PENDING: Final[Any] = object()
"""Stands for an outcome that is not known yet (None is one: an absent context)."""

alive: Final[weakref.WeakSet[StateStorage]] = weakref.WeakSet()
"""All storages of this process: what a forked child has to reset."""


_OF_ONE_FILE: Final = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)


class StateStorage(ABC):
    """Keeps contexts, each a history, variables and metadata.

    A backend implements `execute` and `close`. A store that can only read a document, replace a document and list
    them derives from `agentstate.storage.document.DocumentStorage` instead. `agentstate.testing.StorageContract` tests
    whether a backend keeps the promises of this class.

    Options of every backend:

    - `ttl`: seconds from the last write to a context until it expires; None: never
    - `max_history`: messages that a context keeps, the newest ones; None: all
    - `max_value_bytes`: bytes that a variable, metadata value or message may have as JSON
    - `deadline`: seconds that a call may take, waiting for locks and retries included; no attempt starts after it

    Raises StateConfigError for an unknown option or an invalid value.
    """

    blocking: ClassVar[bool] = True
    """Whether `execute` may wait for a disk, the network or a lock. If it never does, asyncio calls it directly on the
    thread of the event loop."""

    concurrency: ClassVar[int] = 4
    """How many calls of `execute` may run at the same time, for each `lane`. Operations that arrive meanwhile wait, and
    are given to the next call together."""

    largest_group: ClassVar[int] = 1024
    """How many operations are given to one call of `execute` at most."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `execute_one` is a shortcut for `execute`. A subclass that overrides only `execute` must not inherit it.
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
        """Functions that `close` calls first: they wait for the calls that are queued for this storage."""
        alive.add(self)

    def __repr__(self) -> str:
        # Only what holds no secret: other options, those of third parties included, may.
        options = {name: getattr(self, name, None) for name in ("storage_dir", "key_prefix", "ttl", "max_history")}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
        return f"{type(self).__name__}({shown})"

    @abstractmethod
    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        """Carry out `operations` and call `settle(index, outcome)` exactly once for each, as soon as it is known.

        Operations on one context take effect in the order given; nothing is promised between contexts. An operation
        that fails does not affect the others: its outcome is a StateError, which is not raised. Blocking and
        thread-safe: several calls may run at a time, but never two with operations on the same context.
        An operation whose `deadline` has passed is not attempted (StateTimeoutError). Waiting for locks and retries
        end there too.
        """

    def execute_one(self, operation: Operation) -> Outcome:
        """`execute` for one operation: returns its outcome or raises its error. A backend may override it to be
        faster; the default calls `execute`."""
        outcomes: list[Any] = [PENDING]
        self.execute((operation,), outcomes.__setitem__)
        outcome: Outcome | StateError = outcomes[0]
        if outcome is PENDING:
            outcome = abandoned(self, operation)
        if isinstance(outcome, StateError):
            raise outcome
        return outcome

    def lane(self, operation: Operation) -> Hashable:
        """A name for what may be slow on its own, such as the server of a cluster that the operation is sent to.

        Operations of different lanes are never given to `execute` together, and each lane has its own `concurrency`: a
        stalled server delays only the operations that need it. Must not wait for anything.
        """
        return None

    def expects(self, context_id: str) -> bool:
        """Whether the context probably exists. Then `get_or_create` reads first, and commits only if it is absent.
        For backends where a commit costs more than a read."""
        return False

    def close(self) -> None:
        """Wait for calls that have begun (at most `deadline` seconds), then release files, connections and locks.

        Acknowledged writes are stored. Later calls raise StateUnavailableError; closing again does nothing. A backend
        that overrides this calls it first, and then releases its own resources.
        """
        if not self.closed:
            for finish in self.before_close:
                finish()
            self.closed = True

    def has_resources(self) -> bool:
        """Whether the object has opened files or connections that `close` would release."""
        return False

    def __del__(self) -> None:
        try:
            unclosed = not self.closed and not sys.is_finalizing() and self.has_resources()
        except AttributeError:  # `__init__` refused an option before it had set all attributes
            return
        if unclosed:
            from warnings import warn

            text = f"unclosed {self!r}: call close(), or use its context in a with block"
            warn(text, ResourceWarning, stacklevel=2, source=self)
            self.close()

    def call(self, operation: Operation) -> Outcome:
        """Carry out one operation in this thread, and return its outcome or raise its error.

        One without a deadline gets that of the storage.
        """
        if operation.deadline == NEVER:
            operation = operation._replace(deadline=time.monotonic() + self.deadline)
        tally = self.tally
        kind = type(operation)
        try:
            # Reading the clock twice would be a large part of a call that never waits.
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
        """`execute` in this thread. Returns the outcomes, errors as values.

        As with `execute`, no other call on these contexts may run at the same time.
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
        """What this object has done since it was created (in a forked child: since the fork).

        Always counted, for less than a microsecond per call. Other processes, and other objects in this process that
        use the same store, are not included.
        """
        from .statistics import statistics_of  # late: dataclasses take their time to import

        return statistics_of(self.tally)

    def telemetry_attributes(self) -> dict[str, str | int]:
        """Attributes of this store for all spans and metrics, named as in OpenTelemetry's database conventions.

        They contain no secrets and nothing about single conversations.
        """
        return {"db.system.name": f"agentstate.{type(self).__name__.removesuffix('Storage').lower()}"}

    def check_open(self) -> None:
        """Raise StateUnavailableError after `close`."""
        if self.closed:
            raise StateUnavailableError(f"this {type(self).__name__} is closed")

    def _after_fork(self) -> None:  # noqa: B027 - nothing to forget is a fine answer
        """In a forked child: drop the sockets, lock handles and threads of the parent without using them."""


def check_deadline(operation: Operation) -> None:
    """Raise StateTimeoutError if the deadline of the operation has passed."""
    if time.monotonic() >= operation.deadline:
        raise StateTimeoutError(
            "the deadline passed before the operation was attempted; nothing was done",
            context_id=getattr(operation, "context_id", None),
        )


def concerns_one_context(error: StateError) -> bool:
    """Whether the store itself is reachable, and only this context cannot be read.

    For example because its file belongs to another user, is a link, or is a folder, a FIFO or a socket.
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
        raise StateConfigError(f"{option} must be a positive number of seconds, got {value!r}")
    return min(value, LONGEST)


def positive_integer(option: str, value: Any) -> int:
    """`value` as a count. Raises StateConfigError unless it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise StateConfigError(f"{option} must be a positive whole number, got {value!r}")
    return value


def one_of(option: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`. Raises StateConfigError otherwise."""
    if value not in allowed:
        raise StateConfigError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
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
    for storage in list(alive):
        storage.tally.begin_anew()
        storage._after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_reset_all_after_fork)
