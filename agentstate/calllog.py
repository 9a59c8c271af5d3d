"""Reports each call when it ends, to the debug log and to telemetry: sizes and times, never contents."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .caller import Each, Emit, InOrder
from .errors import StateError
from .operations import Change, Commit
from .storage.base import StateStorage

if TYPE_CHECKING:
    from logging import Logger

R = TypeVar("R")
S = TypeVar("S")


LOGGED_AS = ["agentstate.context"]
"""The names of the loggers for calls; the first that is enabled for DEBUG gets the record."""

_DEBUG = 10  # logging.DEBUG
_NAMES = {"_finish": "batch", "_take": "turn", "_end": "end of turn"}


class Call:
    """A call of a context: its name, its context id, the bytes of values written and read, and how it ended."""

    __slots__ = ("bytes_read", "bytes_written", "changes", "context_id", "error", "finished", "name", "seconds", "span")

    def __init__(self, name: str) -> None:
        self.name = _NAMES.get(name, name)
        self.context_id: str | None = None
        self.bytes_written = 0
        self.bytes_read = 0
        self.changes: Sequence[Change] = ()  # of a batch or turn
        self.seconds = 0.0  # of the storage's operations, including the time in the queue
        self.finished = False  # whether it returned, and was neither ended by an exception nor abandoned
        self.error: BaseException | None = None
        self.span: Any = None


def observed(steps: Generator[S, Any, R], storage: StateStorage) -> Generator[S, Any, R]:
    """`steps`, reported to the debug log and to the storage's `telemetry` if these are enabled.

    The debug log gets one record at the end, telemetry a span around them. An application that does not use `logging`
    does not import it.
    """
    logger = _enabled_logger() if "logging" in sys.modules else None
    if logger is None and storage.telemetry is None:
        return steps
    return _observing(steps, logger, storage.telemetry)


def _enabled_logger() -> Logger | None:
    for name in LOGGED_AS:
        logger = _loggers.get(name) or _logger(name)
        if logger.isEnabledFor(_DEBUG):
            return logger
    return None


_loggers: dict[str, Logger] = {}


def _logger(name: str) -> Logger:
    from logging import getLogger

    return _loggers.setdefault(name, getLogger(name))


def _observing(steps: Generator[S, Any, R], logger: Logger | None, telemetry: Any) -> Generator[S, Any, R]:
    call = Call(getattr(steps, "__name__", ""))
    step: Any = None
    try:
        step = next(steps)
        call.context_id = _context_id_of(step)
        if telemetry is not None:
            telemetry.begin(call)
        while True:
            call.context_id = call.context_id or _context_id_of(step)
            call.bytes_written += _bytes_in(step)
            if type(step) is Commit and call.name in _NAMES.values():
                call.changes = step.changes
            began = time.perf_counter()
            try:
                outcome = yield step
            except StateError as error:
                call.seconds += time.perf_counter() - began
                step = steps.throw(error)
            else:
                if type(step) is not Emit:  # the time after an emitted item is its consumer's
                    call.seconds += time.perf_counter() - began
                    call.bytes_read += _bytes_in(outcome)
                step = steps.send(outcome)
    except StopIteration as stop:
        call.finished = True
        result: R = stop.value
        return result
    except GeneratorExit as left:
        if type(step) is not Emit:  # leaving an iterator early is not an error
            call.error = left
        steps.close()
        raise
    except BaseException as error:
        call.error = error
        raise
    finally:
        if logger is not None:
            _log(call, logger)
        if telemetry is not None:
            telemetry.end(call)


def _log(call: Call, logger: Logger) -> None:
    end = ""
    if not call.finished:
        failed = call.error is not None and not isinstance(call.error, GeneratorExit)
        end = f", {type(call.error).__name__}" if failed else ", not finished"
    logger.debug(
        "%s %r: %d bytes written, %d read, %.3f ms%s",
        call.name,
        call.context_id,
        call.bytes_written,
        call.bytes_read,
        call.seconds * 1000,
        end,
    )


def _context_id_of(step: Any) -> str | None:
    operations = step.operations if isinstance(step, InOrder | Each) else [step]
    return getattr(operations[0], "context_id", None)


def _bytes_in(value: Any) -> int:
    """The length of all values in a step or an outcome."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, tuple | list) else 0
