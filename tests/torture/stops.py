"""Processes that are stopped for longer than their deadline at any moment of a call, and continued."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from random import Random

from agentstate import StateStorage, SyncConversationContext

from .figures import Figures, moment
from .model import Steps
from .witness import Witness

_AT_A_TIME = 6
_DEADLINE = 0.2
_PAUSE = 0.3


def stopped_clients(random: Random, rounds: int, figures: Figures, *, make: Callable[..., StateStorage]) -> None:
    """`rounds` stops of processes that make calls. What they send afterwards is too late, or has been applied already.

    To be run in a process of its own: it forks.
    """
    stopped = _Stopped()
    seeds = [random.getrandbits(32) for _ in range(_AT_A_TIME)]
    children = [_Child(make, seed, stopped, figures) for seed in seeds]
    try:
        while figures.faults < rounds:
            time.sleep(0.02 + random.random() * 0.05)
            begin = time.monotonic()
            for child in children:
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(random.random() * 0.002)
            figures.faults += len(children)
            time.sleep(_PAUSE)
            stopped.add(time.monotonic() - begin)
            for child in children:
                os.kill(child.pid, signal.SIGCONT)
    finally:
        for child in reversed(children):  # the later ones hold copies of the ends of the earlier ones' pipes
            child.end(figures)


class _Stopped:
    """For how many seconds in all the children were stopped, in memory that all processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def add(self, seconds: float) -> None:
        self._memory[:] = struct.pack("d", self.seconds() + seconds)

    def seconds(self) -> float:
        return float(struct.unpack("d", self._memory)[0])

    def clock(self) -> float:
        """A clock that does not count the time in which they were stopped."""
        return moment() - self.seconds()


class _Child:
    """Makes calls until its pipe is closed, and then reports what it saw."""

    def __init__(self, make: Callable[..., StateStorage], seed: int, stopped: _Stopped, figures: Figures) -> None:
        read, self._asking = os.pipe()
        self._reports, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._asking)
                os.close(self._reports)
                os.set_blocking(read, False)
                seen = _calls(make(deadline=_DEADLINE), seed, read, stopped, Figures(figures.name, figures.seed))
                os.write(write, seen.to_json().encode())
            finally:
                os._exit(0)
        os.close(read)
        os.close(write)

    def end(self, figures: Figures) -> None:
        os.close(self._asking)
        reported = b""
        while data := os.read(self._reports, 65536):
            reported += data
        os.close(self._reports)
        os.waitpid(self.pid, 0)
        if reported:
            figures += Figures.from_json(reported.decode())
        else:
            figures.fail_silently("a process that was stopped now and then failed")


def _calls(storage: StateStorage, seed: int, pipe: int, stopped: _Stopped, figures: Figures) -> Figures:
    random = Random(seed)
    with SyncConversationContext(storage) as context:
        number = 0
        while _goes_on(pipe):
            number += 1
            witness = Witness(figures, f"stops-{seed}-{number}", clock=stopped.clock)
            steps = Steps(random, large=False)
            for _ in range(100):
                step = next(steps)
                witness.call(context, step, insist=True)
                error = witness.look(context, f"after {step.name}")
                if error is not None:  # stopped within the deadline of the read, too
                    witness.look(context, f"after {step.name}, again")
    return figures


def _goes_on(pipe: int) -> bool:
    try:
        return os.read(pipe, 1) != b""
    except BlockingIOError:
        return True
