"""How a command ends when it is asked to: by Ctrl-C, by `kill`, by a terminal that closes.

The first request is an exception, so that what is under way cleans up after itself. A second one ends the process at
once, whatever that is doing: nobody has to wait for a command that does not come to its end.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

# Windows has no SIGHUP.
_NUMBERS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_waits = False
_waiting: list[int] = []


class Terminated(BaseException):
    """The process was asked to end, and not by Ctrl-C, which is a KeyboardInterrupt as everywhere."""


def take_signals() -> None:
    """Let the signals that ask a process to end be exceptions in its main thread.

    But those that whoever started it wants ignored: `nohup` does so.
    """
    for number in _NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _asked)


def leave_signals() -> None:
    """Let them end the process at once, without a word."""
    for number in _NUMBERS:
        if signal.getsignal(number) in (_asked, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL)


def take_every_ctrl_c() -> None:
    """Let each Ctrl-C be a KeyboardInterrupt, as Python itself does, which is what asyncio waits for."""
    if signal.getsignal(signal.SIGINT) == _asked:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def undisturbed() -> AbstractContextManager[None]:
    """For what must be done as a whole: requests to end wait until the block is left."""
    return _waiting_for_requests(True)


def disturbed() -> AbstractContextManager[None]:
    """For the part of an undisturbed block that takes long: requests to end are heeded in it."""
    return _waiting_for_requests(False)


@contextmanager
def _waiting_for_requests(waits: bool) -> Iterator[None]:
    global _waits
    before, _waits = _waits, waits
    try:
        _heed()
        yield
    finally:
        _waits = before
        _heed()


def _asked(number: int, frame: object) -> None:
    first, may_end = not _waiting, not _waits
    _waiting.append(number)
    if first and not may_end:
        return
    leave_signals()
    if not first:
        signal.raise_signal(number)
    _heed()


def _heed() -> None:
    """End now, if that was asked for and need not wait."""
    if _waiting and not _waits:
        leave_signals()
        raise KeyboardInterrupt if _waiting.pop() == signal.SIGINT else Terminated
