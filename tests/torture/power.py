"""The power fails: at every change of the disk, in every way in which unsynced data may be kept or not."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from random import Random

from agentstate import FileStorage, SyncConversationContext

from .figures import Figures
from .model import Model, Step, Steps
from .places import scratch
from .seam import Disk, Failing, materialize
from .witness import Witness, distinct

_STEPS = 25


def power(random: Random, rounds: int, figures: Figures, *, failing: bool = False, layout: str = "log") -> None:
    """At least `rounds` cuts. With `failing`, flushes fail now and then before the power does."""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            _Cuts(folder, number, random, rounds, figures, failing, layout).run()


class _Cuts:
    """One sequence of steps, with the power cut at every change that it makes to the disk."""

    def __init__(
        self, folder: Path, number: int, random: Random, rounds: int, figures: Figures, failing: bool, layout: str
    ) -> None:
        self.random = random
        self.figures = figures
        self.rounds = rounds
        self.number = number
        self.root = folder / f"disk-{number}"
        self.root.mkdir()
        self.scratch = folder / "after"
        self.disk = Disk(self.root)
        self.disk.watch = self._cut_now
        self.failing = failing
        self.layout = layout
        self.witness = Witness(figures, "alice")
        self.under_way: Step | None = None
        self.points = 0

    def run(self) -> None:
        random = self.random
        storage = FileStorage(self.root / "states", layout=self.layout, file_system=self.disk.seam)
        context = SyncConversationContext(storage)
        steps = Steps(random, large=random.random() < 0.5)
        if random.random() < 0.3:  # superseded data enough that the file is written anew
            steps_ = [Step("set_variable", ("a", steps.content() + "x" * 30_000)) for _ in range(8)]
        else:
            steps_ = [next(steps) for _ in range(_STEPS)]
        for step in steps_:
            if self.figures.faults >= self.rounds:
                break
            if self.failing and random.random() < 0.3:
                names = frozenset((random.choice(("sync", "sync_folder", "write", "replace")),))
                self.disk.failing = Failing(errno.EIO, random.randint(1, 2), names=names)
            self.under_way = step
            self.witness.call(context, step)
            self.under_way = None
            self.disk.failing = None
            self._cut("between calls")
        self.disk.watch = lambda name: None
        self.witness.look(context, "without a cut")
        storage.close()
        shutil.rmtree(self.root)

    def _cut_now(self, call: str) -> None:
        self.points += 1
        self._cut(f"after {call} {self.points}")

    def _cut(self, moment: str) -> None:
        """Look at all the disks that a cut at this moment may leave."""
        possible = self.witness.possible
        if self.under_way is not None:
            step = self.under_way
            possible = distinct([*possible, *(model.after(step)[0] for model in possible)])
        for variant, state in self.disk.states(self.random):
            if self.figures.faults >= self.rounds:
                return
            self.figures.faults += 1
            self._check(state, possible, f"round {self.number}, power cut {moment}, {variant}")

    def _check(self, state: dict[str, bytes | None], possible: list[Model], when: str) -> None:
        self.scratch.mkdir()
        try:
            materialize(state, str(self.root), self.scratch)
            storage = FileStorage(self.scratch / "states", layout=self.layout, fsync="no")
            context = SyncConversationContext(storage)
            after = Witness(self.figures, "alice")
            after.possible = possible
            error = after.look(context, when)
            if error is None:
                # The next writer goes on from there.
                error = after.call(context, Step("add_to_history", ("user", "afterwards")))
                after.look(context, f"{when}, and a write")
            if error is not None:
                self.figures.lose(f"{when}: {error}")
            storage.close()
        finally:
            shutil.rmtree(self.scratch)
