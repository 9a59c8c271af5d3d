"""The system refuses: every call in turn, for once and for good."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from random import Random

from agentstate import FileStorage, SyncConversationContext

from .figures import Figures
from .model import Step, Steps
from .places import scratch
from .seam import ERRORS, Failing, Seam
from .witness import Witness

_STEPS = 9


def system_errors(random: Random, rounds: int, figures: Figures) -> None:
    """Sequences of calls in which the nth call of the system fails, for every n, until `rounds` faults happened."""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            for_good = random.random() < 0.4
            shortly = random.random() < 0.3
            steps = _steps(random)
            nth = 1
            while figures.faults < rounds:
                failing = Failing(
                    errno.ENOSPC if shortly else random.choice(ERRORS), nth, for_good=for_good, shortly=shortly
                )
                _sequence(folder / f"{number}-{nth}", steps, failing, figures, random)
                if not failing.failed:
                    break
                nth += 1


def _steps(random: Random) -> list[Step]:
    supply = Steps(random, large=False)
    if random.random() < 0.2:  # superseded data enough that the file is written anew
        return [Step("set_variable", ("a", f"{number}:" + "x" * 30_000)) for number in range(_STEPS)]
    return [next(supply) for _ in range(_STEPS)]


def _sequence(folder: Path, steps: list[Step], failing: Failing, figures: Figures, random: Random) -> None:
    """Some calls with a fault among them; then the system is fine again, and everything is compared."""
    witness = Witness(figures, "alice")
    seam = Seam(failing.around)
    storage = FileStorage(folder, file_system=seam, deadline=2.0)
    context = SyncConversationContext(storage)
    for step in steps:
        witness.call(context, step, insist=random.random() < 0.5 and not failing.failed)
        if random.random() < 0.3:  # somebody who has not read the file yet
            with SyncConversationContext(FileStorage(folder, file_system=seam)) as reader:
                witness.look(reader, f"for the first time, while {failing.error} at call {failing.calls}")
        witness.look(context, f"while {failing.error} at call {failing.calls}")
    figures.faults += bool(failing.failed)
    failing.names = frozenset()  # nothing fails any more
    when = f"after {errno.errorcode[failing.error]}, call {failing.calls}, {[step.name for step in steps]}"
    for through in (context, SyncConversationContext(FileStorage(folder))):
        error = witness.look(through, when)
        error = error or witness.call(through, Step("add_to_history", ("user", f"afterwards {id(through)}")))
        error = error or witness.look(through, when)
        if error is not None:
            figures.lose(f"{when}: {error}")
        through.close()
    # A new file that the system let nobody remove stays until the next one takes its name: no more than one.
    debris = {path.name for path in folder.iterdir()} - {"alice.jsonl", ".locks", ".leases"}
    if debris - {"alice.jsonl.new"} or (debris and failing.failed < 2):
        figures.fail_silently(f"{when}: left behind {debris}")
    shutil.rmtree(folder)


def full_disk(folder: Path, random: Random, rounds: int, figures: Figures) -> None:
    """A real disk of a few pages that is full, and is freed, and is full again. `folder` is on it."""
    witness = Witness(figures, "alice")
    ballast = folder / "ballast"
    steps = Steps(random, clears=False)
    storage = FileStorage(folder / "states", deadline=2.0)
    context = SyncConversationContext(storage)
    for number in range(rounds):
        try:
            with ballast.open("ab", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        figures.faults += 1
        for _ in range(3):
            witness.call(context, next(steps), insist=True)
            witness.look(context, f"on a full disk {number}")
        ballast.unlink()
        witness.call(context, Step("trim_history", (10,)))
        witness.call(context, next(steps))
        error_ = witness.look(context, f"on a disk with space again {number}")
        if error_ is not None:
            figures.lose(str(error_))
    storage.close()
