"""Power cuts at every change of the disk, with every part of the unsynced data kept or lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol

from agentstate import FileStorage, SyncConversationContext
from agentstate.caller import new_commit_id
from agentstate.operations import Append, Commit

from .figures import Figures
from .model import REPAIR, Model, Step
from .places import scratch
from .plots import Plot, numbers
from .seam import Disk, Failing, materialize
from .witness import Witness, distinct

_STEPS: Final = 20


class Breakable(Protocol):
    """A disk for a store, which can be read in the state in which a power cut would leave it now."""

    root: Path
    seam: Any
    failing: Failing | None
    watch: Callable[[str], None]

    def after(self, random: Random) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        """The possible states after a cut: a description, and a context manager of a folder."""


class Rebuilt(Disk):
    """A folder of which all disk states that POSIX allows are rebuilt."""

    def __init__(self, root: Path) -> None:
        self.place = root
        super().__init__(root)

    def after(self, random: Random) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        for what, state in self.states(random):
            yield what, self._materialized(state)

    @contextmanager
    def _materialized(self, state: dict[str, bytes | None]) -> Iterator[Path]:
        target = self.place.with_name("after")
        target.mkdir()
        try:
            materialize(state, self.root, target)
            yield target
        finally:
            shutil.rmtree(target)


@contextmanager
def rebuilt(folder: Path, lay_out: Callable[[Path], object]) -> Iterator[Rebuilt]:
    """A new disk in this folder, on which the files of `lay_out` are synced."""
    root = folder / "disk"
    root.mkdir()
    try:
        lay_out(root)
        yield Rebuilt(root)
    finally:
        shutil.rmtree(root)


def power(
    random: Random,
    rounds: int,
    figures: Figures,
    *,
    failing: bool = False,
    layout: str = "log",
    lazily: bool = False,
    disk: Callable[..., AbstractContextManager[Any]] = rebuilt,
) -> None:
    """`rounds` cuts. With `failing`, flushes and other calls fail now and then before the power does.

    With `lazily`, nothing is flushed: the newest commits may be gone, and what is left is what once was.
    """
    with scratch() as folder:
        for number in numbers(random):
            if figures.faults >= rounds:
                break
            plot = Plot(random, number, layout=layout, steps=_STEPS, fsync="no" if lazily else "always")
            with disk(folder, plot.lay_out) as broken:
                _Cuts(plot, broken, random, rounds, figures, failing).run()


class _Cuts:
    """One sequence of steps, with the power cut at every change that it makes to the disk."""

    def __init__(
        self, plot: Plot, disk: Breakable, random: Random, rounds: int, figures: Figures, failing: bool
    ) -> None:
        self.plot = plot
        self.disk = disk
        self.random = random
        self.rounds = rounds
        self.figures = figures
        self.failing = failing
        self.witness = plot.witness(figures)
        self.under_way: Step | None = None
        self.repaired = False
        self.earlier: list[Model] = []  # what may be left where nothing is flushed
        self.points = 0

    def run(self) -> None:
        random = self.random
        context = self.plot.open(Path(self.disk.root) / "states", file_system=self.disk.seam)
        self.disk.watch = self._cut_now
        for step in self.plot.steps:
            if self.figures.faults >= self.rounds:
                break
            if self.failing and random.random() < 0.3:
                names = frozenset((random.choice(("sync", "sync_folder", "write", "replace")),))
                self.disk.failing = Failing(errno.EIO, random.randint(1, 2), names=names)
            if self.plot.options.get("fsync") == "no":
                self.earlier = distinct([*self.earlier, *self.witness.possible])
            self.under_way = step
            error = self.witness.call(context, step)
            self.under_way = None
            self.disk.failing = None
            if step == REPAIR:
                if error is not None:
                    break  # nothing can be written to a damaged file
                self.repaired = self.plot.options.get("fsync") != "no"
            self._cut("between calls")
        else:
            self.disk.watch = lambda name: None
            self.witness.look(context, "without a cut")
        self.disk.watch = lambda name: None
        context.close()

    def _cut_now(self, call: str) -> None:
        self.points += 1
        self._cut(f"after {call} {self.points}")

    def _cut(self, moment: str) -> None:
        """Check all disk states that a cut at this moment may leave."""
        possible = distinct([*self.witness.possible, *self.earlier])
        if self.under_way is not None:
            step = self.under_way
            possible = distinct([*possible, *(model.after(step)[0] for model in self.witness.possible)])
        for variant, entered in self.disk.after(self.random):
            if self.figures.faults >= self.rounds:
                return
            self.figures.faults += 1
            with entered as folder:
                when = f"power cut {moment}, {variant}, of {self.plot}"
                self.plot.goes_on(folder / "states", possible, self.figures, when, repaired=self.repaired)


def grouped_power(random: Random, rounds: int, figures: Figures) -> None:
    """Power cuts while commits to many conversations are written and flushed together."""
    with scratch() as folder:
        while figures.faults < rounds:
            with rebuilt(folder, lambda root: None) as disk:
                _Groups(disk, random, rounds, figures).run()


class _Groups:
    """Groups of appends; those to one conversation are numbered."""

    def __init__(self, disk: Rebuilt, random: Random, rounds: int, figures: Figures) -> None:
        self.disk = disk
        self.random = random
        self.rounds = rounds
        self.figures = figures
        self.begun = dict.fromkeys([f"c{number}" for number in range(random.randint(2, 9))], 0)
        self.done = dict(self.begun)

    def run(self) -> None:
        storage = FileStorage(self.disk.place / "states", file_system=self.disk.seam)
        self.disk.watch = lambda call: self._cut(f"after {call}")
        for number in range(6):
            if self.figures.faults >= self.rounds:
                break
            if self.random.random() < 0.2:
                names = frozenset((self.random.choice(("sync_all", "sync", "sync_folder", "write")),))
                self.disk.failing = Failing(errno.EIO, 1, names=names)
            operations = []
            for context_id in self.begun:
                for _ in range(self.random.randint(0, 2)):
                    content = self.begun[context_id]
                    self.begun[context_id] += 1
                    message = b'{"role":"user","content":%d,"timestamp":"2026-01-31T12:00:00+00:00","metadata":{}}'
                    operations.append(Commit(context_id, (Append((message % content,)),), new_commit_id()))
            outcomes: dict[int, Any] = {}
            if operations:
                storage.execute(operations, outcomes.__setitem__)
            self.disk.failing = None
            failed = any(isinstance(outcome, Exception) for outcome in outcomes.values())
            for index, operation in enumerate(operations):
                if not failed and outcomes[index] == b"":
                    self.done[operation.context_id] += 1
            self._cut(f"after group {number}")
            if failed:  # numbers may be missing from now on
                break
        self.disk.watch = lambda call: None
        storage.close()

    def _cut(self, moment: str) -> None:
        for variant, entered in self.disk.after(self.random):
            if self.figures.faults >= self.rounds:
                return
            self.figures.faults += 1
            with entered as folder, SyncConversationContext(FileStorage(folder / "states", fsync="no")) as context:
                for context_id, done in self.done.items():
                    self._look(context, context_id, done, f"power cut {moment}, {variant}")

    def _look(self, context: SyncConversationContext, context_id: str, done: int, when: str) -> None:
        witness = Witness(self.figures, context_id)
        numbers = range(done, self.begun[context_id] + 1)
        witness.possible = [Model(count > 0, 0, list(range(count))) for count in numbers]
        error = witness.look(context, when) or witness.call(context, Step("add_to_history", ("user", "afterwards")))
        error = error or witness.look(context, f"{when}, and a write")
        if error is not None:
            self.figures.lose(f"{context_id}, {when}: {error}")
