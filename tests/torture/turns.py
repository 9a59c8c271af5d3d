"""Turns whose holders are stopped or killed, and clocks that jump: a stale holder never commits or delays others."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from unittest.mock import patch

from agentstate import ConversationContext, StateStorage, SyncConversationContext
from agentstate.errors import StateError, StateTimeoutError, TurnLostError

from .figures import Figures

_LEASE = 0.3


def turns(random: Random, rounds: int, figures: Figures, *, make: Callable[[], StateStorage]) -> None:
    """`rounds` holders that are stopped or killed inside a turn. To be run in a process of its own: it forks."""
    for number in range(rounds):
        context_id = f"turn-{number}-{random.getrandbits(24)}"
        dies = random.random() < 0.3
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                if number % 2:
                    asyncio.run(_hold_async(make(), context_id, write))
                else:
                    _hold(make(), context_id, write)
            finally:
                os._exit(1)
        os.close(write)
        os.read(read, 1)  # it holds the turn now
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL if dies else signal.SIGSTOP)
        figures.faults += 1
        with SyncConversationContext(make()) as context:
            try:
                with context.turn(context_id, lease=20.0, timeout=5.0) as turn:
                    figures.took(time.monotonic() - begin, _LEASE, "waiting for the turn of a stopped holder")
                    turn.add_to_history("user", "the next one")
                    if not dies:
                        # The stale holder wakes up while the next one is at work, and commits.
                        os.kill(pid, signal.SIGCONT)
                        result = os.read(read, 100)
                        if result != b"lost":
                            figures.fail_silently(f"turn {number}: the stale holder saw {result!r}")
            except StateError as error:
                figures.fail_silently(f"turn {number}: the next one got {error!r}")
            contents = [message["content"] for message in context.get_history(context_id)]
            if contents.count("the stale one"):
                figures.fail_silently(f"turn {number}: a stale holder committed")
            if contents.count("the next one") != 1:
                figures.lose(f"turn {number}: {contents}")
            context.clear_context(context_id)
        os.waitpid(pid, 0)
        os.close(read)


def _hold(storage: StateStorage, context_id: str, pipe: int) -> None:
    context = SyncConversationContext(storage)
    result = b"committed"
    try:
        with context.turn(context_id, lease=_LEASE) as turn:
            os.write(pipe, b"h")
            time.sleep(_LEASE)  # stopped in here
            turn.add_to_history("user", "the stale one")
    except TurnLostError:
        result = b"lost"
    os.write(pipe, result)


async def _hold_async(storage: StateStorage, context_id: str, pipe: int) -> None:
    context = ConversationContext(storage)
    result = b"committed"
    try:
        async with context.turn(context_id, lease=_LEASE) as turn:
            os.write(pipe, b"h")
            await asyncio.sleep(_LEASE)  # stopped in here
            turn.add_to_history("user", "the stale one")
    except TurnLostError:
        result = b"lost"
    os.write(pipe, result)


def clock_jumps(random: Random, rounds: int, figures: Figures, *, make: Callable[[], StateStorage]) -> None:
    """`rounds` turns during which this machine's clock is set, by up to a day: they are neither lost nor shared."""
    with SyncConversationContext(make()) as holder, SyncConversationContext(make()) as other:
        for number in range(rounds):
            context_id = f"clock-{number}-{random.getrandbits(24)}"
            holder.add_to_history(context_id, "user", 0)
            jump = random.choice((-1, 1)) * random.choice((1, 60, 86_400))
            figures.faults += 1
            began = time.monotonic()
            try:
                with holder.turn(context_id, lease=10.0) as turn, _clock_set(by=jump):
                    try:
                        with other.turn(context_id, timeout=0.05):
                            figures.fail_silently(f"a jump by {jump} s: two turns at a time")
                    except StateTimeoutError:
                        pass
                    other.add_to_history(context_id, "user", 1)
                    turn.add_to_history("user", 2)
                with _clock_set(by=jump), other.turn(context_id, timeout=1.0) as turn:
                    turn.add_to_history("user", 3)
            except StateError as error:
                figures.fail_silently(f"a jump by {jump} s: {error!r}")
            figures.took(time.monotonic() - began, 1.0, f"two turns and a jump by {jump} s")
            contents = [message["content"] for message in other.get_history(context_id)]
            if contents != [0, 1, 2, 3]:
                figures.lose(f"a jump by {jump} s: {contents}")


@contextmanager
def _clock_set(*, by: int) -> Iterator[None]:
    seconds, nanoseconds = time.time, time.time_ns
    with (
        patch.object(time, "time", lambda: seconds() + by),
        patch.object(time, "time_ns", lambda: nanoseconds() + by * 1_000_000_000),
    ):
        yield
