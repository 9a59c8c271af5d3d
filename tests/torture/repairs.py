"""Several processes that repair the same damaged conversation and write to it at once.

To be run in a process of its own: it forks.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from random import Random
from typing import Final

from agentstate import FileStorage
from agentstate.errors import StateError

from .figures import Figures, moment
from .model import REPAIR, observed, perform
from .places import scratch
from .plots import ID, Plot

_PROCESSES: Final = 3
_MESSAGES: Final = 3
_REPAIRED_BY_MANY: Final = 9  # the first plot of that kind in a store that is not exclusive
_BEGUN: Final = b"b"
_DONE: Final = b"d"


def repairs(random: Random, rounds: int, figures: Figures) -> None:
    """`rounds` damaged logs, each repaired by three processes at once, one of which may be killed meanwhile."""
    with scratch() as folder:
        for _ in range(rounds):
            figures.faults += 1
            _together(folder / "store", Plot(random, _REPAIRED_BY_MANY), random, figures)
            shutil.rmtree(folder / "store")


def _together(folder: Path, plot: Plot, random: Random, figures: Figures) -> None:
    states = plot.lay_out(folder)
    begin = moment()
    children = [_start(plot, states, number) for number in range(_PROCESSES)]
    victim = random.choice((None, *range(_PROCESSES)))
    if victim is not None:
        time.sleep(random.random() * 0.02)
        os.kill(children[victim][0], signal.SIGKILL)
    reported = []
    for number, (pid, pipe) in enumerate(children):
        with os.fdopen(pipe, "rb") as stream:
            reported.append(stream.read())
        _, status = os.waitpid(pid, 0)
        if number != victim and (status or reported[-1].count(_DONE) != 1 + _MESSAGES):
            figures.fail_silently(f"one of several that repair {plot} failed: {reported[-1]!r}")
    figures.calls += sum(text.count(_DONE) for text in reported)
    with plot.open(states) as context:
        figures.took(moment() - begin, _PROCESSES * context.storage.deadline, "several repairs at once")
        seen = observed(context.get_state(ID))
        storage = context.storage
        assert isinstance(storage, FileStorage)
        for problem in storage.verify():
            figures.fail_silently(f"after several repairs: {problem.reason}")
    before = len(plot.model.history)
    if seen.history[:before] != plot.model.history or seen.variables != plot.model.variables:
        figures.lose(f"several repairs of {plot}: {seen} instead of {plot.model}")
    for number, text in enumerate(reported):
        mine = [content for content in seen.history[before:] if content.startswith(f"{number}-")]
        if len(mine) < text.count(_DONE) - 1:
            figures.lose(f"of a writer after its repair: {mine}, reported {text!r}")
        elif mine != [f"{number}-{index}" for index in range(len(mine))] or len(mine) > text.count(_BEGUN):
            figures.double(f"of a writer after its repair: {mine}, reported {text!r}")
    plot.check_files(states, figures, "after several repairs")


def _start(plot: Plot, states: Path, number: int) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            context = plot.open(states)
            perform(context, ID, REPAIR)
            os.write(write, _DONE)
            for index in range(_MESSAGES):
                os.write(write, _BEGUN)
                context.add_to_history(ID, "user", f"{number}-{index}")
                os.write(write, _DONE)
            status = 0
        except StateError as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(status)
    os.close(write)
    return pid, read
