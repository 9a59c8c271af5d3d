"""Signals whose handlers raise, at any moment of a call: no caller hangs, and the store stays usable."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, Final, NoReturn

from agentstate import ConversationContext, StateStorage, SyncConversationContext
from agentstate.errors import StateTimeoutError

from .figures import Figures

_WRITERS: Final = 6
_DEADLINE: Final = 2.0
_BEGUN: Final = b"b"
_DONE: Final = b"d"
_USED_ON: Final = b"u"


def interrupts(random: Random, rounds: int, figures: Figures, *, make: Callable[..., StateStorage]) -> None:
    """`rounds` processes whose main thread is interrupted in a call, as by Ctrl-C or by `sys.exit` in a handler.

    (A later call may raise StateTimeoutError, because of a lock that was taken when the interrupt came.)

    To be run in a process of its own: it forks.
    """
    for number in range(rounds):
        name = f"{number}-{random.getrandbits(32)}"
        figures.faults += 1
        read, write = os.pipe()
        gc.collect()  # what is raised while the child collects our garbage, Python would ignore
        pid = os.fork()
        if pid == 0:
            _be_interrupted(make(deadline=_DEADLINE), name, number % 3 == 0, write)
        os.close(write)
        reported = os.read(read, 2)
        time.sleep(random.random() * 0.01)
        os.kill(pid, signal.SIGINT if number % 3 == 1 else signal.SIGTERM)
        begin = time.monotonic()
        while select.select((read,), (), (), 10 * _DEADLINE)[0] and (data := os.read(read, 65536)):
            reported += data
        figures.took(time.monotonic() - begin, _DEADLINE, f"continuing after an interrupt of {name}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        if not reported.endswith(_USED_ON):
            figures.fail_silently(f"{name}: the store could not be used after an interrupt")
        with SyncConversationContext(make()) as context:
            _compare(context, name, reported, figures)


def _compare(context: SyncConversationContext, name: str, reported: bytes, figures: Figures) -> None:
    done, begun = reported.count(_DONE), reported.count(_BEGUN)
    figures.calls += done
    stored = 0
    for writer in range(_WRITERS):
        contents = [message["content"] for message in context.get_history(f"{name}-{writer}")]
        stored += len(contents)
        if contents != list(range(len(contents))):
            figures.double(f"{name}: {contents[-10:]}")
        context.clear_context(f"{name}-{writer}")
    if stored < done:
        figures.lose(f"{name}: {done} acknowledged, {stored} stored")
    elif stored > begun:
        figures.double(f"{name}: {begun} begun, {stored} stored")


def _be_interrupted(storage: StateStorage, name: str, blocking: bool, pipe: int) -> NoReturn:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # of which asyncio makes a cancellation
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            if blocking:
                _write(SyncConversationContext(storage), f"{name}-0", pipe)
            else:
                asyncio.run(_write_in_tasks(ConversationContext(storage), name, pipe))
        except KeyboardInterrupt:
            pass
        with suppress(StateTimeoutError):
            if blocking:
                SyncConversationContext(storage).increment_variable(f"{name}-0", "n")
            else:
                asyncio.run(_use_on(ConversationContext(storage), name))
        os.write(pipe, _USED_ON)
    finally:
        os._exit(0)


def _write(context: SyncConversationContext, context_id: str, pipe: int) -> None:
    number = 0
    while True:
        os.write(pipe, _BEGUN)
        context.add_to_history(context_id, "user", number)
        os.write(pipe, _DONE)
        number += 1


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


async def _write_in_tasks(context: ConversationContext, name: str, pipe: int) -> None:
    # What a handler raises that is not the loop's own makes asyncio itself forget what it was about to do.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _interrupt)

    async def write(writer: int) -> None:
        number = 0
        while True:
            os.write(pipe, _BEGUN)
            await context.add_to_history(f"{name}-{writer}", "user", number)
            os.write(pipe, _DONE)
            number += 1

    await asyncio.gather(*(write(writer) for writer in range(_WRITERS)))


async def _use_on(context: ConversationContext, name: str) -> None:
    await asyncio.gather(*(context.increment_variable(f"{name}-{writer}", "n") for writer in range(_WRITERS)))
