"""System calls that fail, and kills, at every call in turn."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

from agentstate.errors import StateError, StateOutcomeUnknownError

from .figures import Figures
from .model import REPAIR, Model, Step, perform
from .places import scratch
from .plots import Plot, numbers
from .seam import ERRORS, Failing, Seam
from .witness import distinct

Once = Callable[[Path, Plot, int, Random, Figures], bool]
"""Makes the calls of a plot with a fault at the nth system call; false if there were fewer."""


def _at_every_call(once: Once, random: Random, rounds: int, figures: Figures, layout: str) -> None:
    """Plots, each repeated, in which the nth system call fails, for every n."""
    with scratch() as folder:
        for number in numbers(random):
            if figures.faults >= rounds:
                break
            plot = Plot(random, number, layout=layout)
            nth = 1
            while figures.faults < rounds and once(folder / "store", plot, nth, random, figures):
                figures.faults += 1
                nth += 1
                shutil.rmtree(folder / "store")
            shutil.rmtree(folder / "store", ignore_errors=True)


# --- errors ---------------------------------------------------------------------------------------------------------


def system_errors(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """System calls fail, once or from then on, or a write is short."""
    _at_every_call(_with_an_error, random, rounds, figures, layout)


def _with_an_error(folder: Path, plot: Plot, nth: int, random: Random, figures: Figures) -> bool:
    """Some calls with a fault among them; then no call fails, and everything is compared."""
    shortly = random.random() < 0.3
    failing = Failing(
        errno.ENOSPC if shortly else random.choice(ERRORS), nth, for_good=random.random() < 0.4, shortly=shortly
    )
    states = plot.lay_out(folder)
    states.mkdir(parents=True, exist_ok=True)
    seam = Seam(failing.around)
    witness = plot.witness(figures)
    repaired = False
    context = plot.open(states, file_system=seam, deadline=2.0)
    for step in plot.steps:
        while_ = f"while {failing.error} at call {failing.calls} of {plot}"
        insist = random.random() < 0.5 and not failing.failed and step != REPAIR
        error = witness.call(context, step, insist=insist)
        if step == REPAIR:
            if error is not None:
                break  # nothing can be written to a damaged file
            repaired = True
        if not plot.options.get("exclusive") and random.random() < 0.3:  # a reader that has not read the file yet
            with plot.open(states, file_system=seam) as reader:
                witness.look(reader, f"for the first time, {while_}")
        witness.look(context, while_)
    failing.names = frozenset()  # nothing fails any more
    if not failing.failed:
        context.close()
        return False
    when = f"after {errno.errorcode[failing.error]}, call {failing.calls}, of {plot}"
    if repaired or plot.kind != "repaired":
        error = witness.look(context, when)
        error = error or witness.call(context, Step("add_to_history", ("user", "afterwards, the same")))
        error = error or witness.look(context, when)
        if error is not None:
            figures.lose(f"{when}: {error}")
    context.close()
    plot.goes_on(states, witness.possible, figures, when, repaired=repaired)
    return True


# --- kills ----------------------------------------------------------------------------------------------------------

_DONE: Final = b"d"
_UNKNOWN: Final = b"u"
_NOT_DONE: Final = b"n"


def kills_at_calls(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """The process gets SIGKILL just before, in the middle of, or just after a system call.

    Now and then another call has failed before. To be run in a process of its own: it forks.
    """
    _at_every_call(_killed, random, rounds, figures, layout)


def _killed(folder: Path, plot: Plot, nth: int, random: Random, figures: Figures) -> bool:
    states = plot.lay_out(folder)
    states.mkdir(parents=True, exist_ok=True)
    where = random.choice(("before", "within", "after"))
    failing = None
    if random.random() < 0.3:
        failing = Failing(random.choice(ERRORS), random.randint(1, 8), names=frozenset(("write", "sync", "replace")))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            _run_until_killed(plot, states, _Killer(nth, where, failing), write)
        finally:
            os._exit(0)
    os.close(write)
    reported = b""
    while data := os.read(read, 1000):
        reported += data
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        if status:
            figures.fail_silently(f"a writer ended by itself, with {status}: {plot}")
        return False
    possible, repaired = _replayed(plot, reported.decode())
    figures.calls += len(reported)
    figures.unknown += reported.count(_UNKNOWN)
    plot.goes_on(states, possible, figures, f"killed {where} call {nth} of {plot}", repaired=repaired)
    return True


class _Killer:
    """Kills this process at its nth system call."""

    def __init__(self, nth: int, where: str, failing: Failing | None) -> None:
        self._left = nth
        self._where = where
        self._failing = failing

    def around(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self._left -= 1
        if self._left == 0:
            if self._where == "after":
                call(*arguments)
            elif self._where == "within" and name == "write":
                descriptor, data = arguments
                call(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments) if self._failing is None else self._failing.around(name, call, arguments)


def _run_until_killed(plot: Plot, states: Path, killer: _Killer, pipe: int) -> None:
    """Make the calls, and report how each ended."""
    context = plot.open(states, file_system=Seam(killer.around), deadline=2.0)
    for step in plot.steps:
        reported = _DONE
        try:
            perform(context, "alice", step)
        except StateOutcomeUnknownError:
            reported = _UNKNOWN
        except StateError:
            reported = _NOT_DONE
        os.write(pipe, reported)
        if step == REPAIR and reported != _DONE:
            break


def _replayed(plot: Plot, reported: str) -> tuple[list[Model], bool]:
    """What may be stored after calls with these outcomes and one in flight, and whether there was a repair."""
    possible = [plot.model]
    for step, ended in zip(plot.steps, f"{reported}u", strict=False):
        after = [model.after(step)[0] for model in possible]
        if ended == "d":
            possible = after
        elif ended == "u":
            possible = distinct([*possible, *after])
    return possible, plot.steps[0] == REPAIR and reported.startswith("d")
