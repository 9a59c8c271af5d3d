"""Ending a command by a signal: Ctrl-C, `kill`, or a terminal that closes.

The first signal raises an exception, so that the command cleans up. A second one ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

# Windows has no SIGHUP.
_NUMBERS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_deferred = False
_received: list[int] = []


class Terminated(BaseException):
    """SIGTERM or SIGHUP was received. (SIGINT raises KeyboardInterrupt.)"""


def take_signals() -> None:
    """Raise exceptions in the main thread for SIGINT, SIGTERM and SIGHUP.

    A signal that the parent process ignores stays ignored, as `nohup` wants it.
    """
    for number in _NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def leave_signals() -> None:
    """Let these signals end the process at once, which is their default."""
    for number in _NUMBERS:
        if signal.getsignal(number) in (_on_signal, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL)


def take_every_ctrl_c() -> None:
    """Raise KeyboardInterrupt for every Ctrl-C, by the handler of Python itself, which asyncio looks for."""
    if signal.getsignal(signal.SIGINT) == _on_signal:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def undisturbed() -> AbstractContextManager[None]:
    """A block that must be completed: signals take effect when it is left."""
    return _deferring(True)


def disturbed() -> AbstractContextManager[None]:
    """A part of an undisturbed block that takes long: signals take effect in it."""
    return _deferring(False)


@contextmanager
def _deferring(deferred: bool) -> Iterator[None]:
    global _deferred
    before, _deferred = _deferred, deferred
    try:
        _raise_received()
        yield
    finally:
        _deferred = before
        _raise_received()


def _on_signal(number: int, frame: object) -> None:
    first = not _received
    _received.append(number)
    if first and _deferred:
        return
    leave_signals()
    if not first:
        signal.raise_signal(number)
    _raise_received()


def _raise_received() -> None:
    """Raise the exception for a signal that was received, unless it is deferred."""
    if _received and not _deferred:
        leave_signals()
        raise KeyboardInterrupt if _received.pop() == signal.SIGINT else Terminated
