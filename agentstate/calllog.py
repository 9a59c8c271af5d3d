"""The debug log of the contexts: one record per call, with sizes and times, and never with contents."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator

from .caller import Each, Emit, InOrder
from .errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from logging import Logger
    from typing import Any, TypeVar

    R = TypeVar("R")
    S = TypeVar("S")


LOGGED_AS = ["agentstate.context"]
"""Names of the loggers that operations may be logged by: the first that is enabled for DEBUG takes the record."""

_DEBUG = 10  # logging.DEBUG
_LOGGED_NAMES = {"_finish": "batch", "_take": "turn", "_end": "end of turn"}


def logged(steps: Generator[S, Any, R]) -> Generator[S, Any, R]:
    """`steps`, which write one DEBUG record when they end, if somebody wants it.

    It says what was called, for which context, how many bytes of values went each way and how long the storage took;
    never what the values are. An application that does not use `logging` does not pay for its import.
    """
    if "logging" in sys.modules:
        for name in LOGGED_AS:
            logger = _loggers.get(name) or _logger(name)
            if logger.isEnabledFor(_DEBUG):
                return _logging(steps, logger)
    return steps


_loggers: dict[str, Logger] = {}


def _logger(name: str) -> Logger:
    from logging import getLogger

    return _loggers.setdefault(name, getLogger(name))


def _logging(steps: Generator[S, Any, R], logger: Logger) -> Generator[S, Any, R]:
    context_id: str | None = None
    written = read = 0
    seconds = 0.0
    end = ""
    try:
        step = next(steps)
        while True:
            context_id = context_id or _context_id_of(step)
            written += _bytes_in(step)
            began = time.perf_counter()
            try:
                outcome = yield step
            except StateError as error:
                seconds += time.perf_counter() - began
                step = steps.throw(error)
            else:
                if type(step) is not Emit:  # the time of an emitted item is its consumer's
                    seconds += time.perf_counter() - began
                    read += _bytes_in(outcome)
                step = steps.send(outcome)
    except StopIteration as stop:
        result: R = stop.value
        return result
    except GeneratorExit:
        end = ", not finished"
        steps.close()
        raise
    except BaseException as error:
        end = f", {type(error).__name__}"
        raise
    finally:
        name = getattr(steps, "__name__", "")
        logger.debug(
            "%s %r: %d bytes written, %d read, %.3f ms%s",
            _LOGGED_NAMES.get(name, name),
            context_id,
            written,
            read,
            seconds * 1000,
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
