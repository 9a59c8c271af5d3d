"""Locks whose holders are killed or stopped, or that do not work."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateError, StateTimeoutError, StateUnavailableError

from .figures import Figures
from .model import Steps, observed
from .places import scratch
from .seam import Seam
from .witness import Witness


def holders(random: Random, rounds: int, figures: Figures) -> None:
    """`rounds` holders of a lock in trouble. To be run in a process of its own: it forks."""
    kinds: tuple[Callable[[Path, Random, Figures], None], ...] = (killed, stopped, without_flock, removed)
    with scratch() as folder:
        for number in range(rounds):
            place = folder / str(number)
            kinds[number % len(kinds)](place, random, figures)
            figures.faults += 1


def _holder(folder: Path, before: str) -> int:
    """A child that holds the lock of "alice": it pauses in the call `before` of its second commit."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:

            def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
                if name == before and armed:
                    os.write(write, b"h")
                    time.sleep(60)
                return call(*arguments)

            armed: list[bool] = []
            context = SyncConversationContext(FileStorage(folder, file_system=Seam(around)))
            context.add_to_history("alice", "user", "first")
            armed.append(True)
            context.add_to_history("alice", "user", "second")
        finally:
            os._exit(1)
    os.close(write)
    if os.read(read, 1) != b"h":
        raise RuntimeError("the holder failed")
    os.close(read)
    return pid


def killed(folder: Path, random: Random, figures: Figures) -> None:
    """A process that waits for the lock of a killed process gets it at once."""
    pid = _holder(folder, random.choice(("write", "sync")))
    with SyncConversationContext(FileStorage(folder, deadline=5.0)) as context:
        threading.Timer(0.1, lambda: os.kill(pid, signal.SIGKILL)).start()
        begin = time.monotonic()
        try:
            context.add_to_history("alice", "user", "third")
        except StateError as error:
            figures.fail_silently(f"after the holder's death: {error!r}")
        figures.took(time.monotonic() - begin, 0.1, "taking over the lock of a dead process")
        contents = [message["content"] for message in context.get_history("alice")]
    os.waitpid(pid, 0)
    if contents not in (["first", "third"], ["first", "second", "third"]):
        figures.lose(f"after the holder's death: {contents}")


def stopped(folder: Path, random: Random, figures: Figures) -> None:
    """A stopped process keeps its lock: the others time out, and change nothing."""
    pid = _holder(folder, random.choice(("write", "sync")))
    try:
        os.kill(pid, signal.SIGSTOP)
        with SyncConversationContext(FileStorage(folder, deadline=0.2)) as context:
            begin = time.monotonic()
            try:
                context.add_to_history("alice", "user", "third")
            except StateTimeoutError:
                pass
            else:
                figures.fail_silently("the lock of a stopped process was broken")
            figures.took(time.monotonic() - begin, 0.2, "waiting for the lock of a stopped process")
            contents = [message["content"] for message in context.get_history("alice")]
            if contents not in (["first"], ["first", "second"]):
                figures.fail_silently(f"beside a stopped holder: {contents}")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def without_flock(folder: Path, random: Random, figures: Figures) -> None:
    """A file system without locks is refused: no soft lock in silence."""
    import fcntl

    number = random.choice((errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK))

    def flock(fd: int, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    with SyncConversationContext(FileStorage(folder, deadline=0.5)) as context:
        context.add_to_history("alice", "user", "first")
        before = observed(context.get_state("alice"))
    with SyncConversationContext(FileStorage(folder, deadline=0.5)) as context, patch.object(fcntl, "flock", flock):
        begin = time.monotonic()
        try:
            context.add_to_history("alice", "user", "unlocked")
        except StateUnavailableError:
            pass
        else:
            figures.fail_silently("a write where there are no locks")
        figures.took(time.monotonic() - begin, 0.5, "a write where there are no locks")
    with SyncConversationContext(FileStorage(folder)) as context:
        if observed(context.get_state("alice")) != before:
            figures.fail_silently("a refused write is there")


def removed(folder: Path, random: Random, figures: Figures) -> None:
    """Lock files left behind, or removed during use, do not block any writer."""
    witness = Witness(figures, "alice")
    contexts = [SyncConversationContext(FileStorage(folder)) for _ in range(2)]
    steps = Steps(random, large=False)
    for number in range(12):
        witness.call(contexts[number % 2], next(steps))
        if number % 4 == 3:
            for lock in (folder / ".locks").glob("[0-9]*"):
                lock.unlink()
        elif number % 4 == 1:
            for lock in (folder / ".locks").glob("[0-9]*"):
                lock.write_text("4711 some.host\n")  # as a marker file would have it
    witness.look(contexts[0], "after lock files were removed")
    for context in contexts:
        context.close()
