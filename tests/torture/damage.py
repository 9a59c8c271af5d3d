"""Files that were cut short, and files in which a bit changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateCorruptedError, StateError

from .figures import Figures
from .model import Model, Step, Steps, observed, perform
from .places import scratch
from .witness import Witness, accuse


class _Written:
    """A conversation's file, with what was stored after each of its commits."""

    def __init__(self, folder: Path, random: Random, *, steps: int, large: bool) -> None:
        self.random = random
        self.folder = folder
        storage = FileStorage(folder, fsync="no")
        context = SyncConversationContext(storage)
        self.file = folder / "alice.jsonl"
        self.after: list[tuple[int, Model]] = [(0, Model())]  # (size of the file, what is stored)
        supply = Steps(random, clears=False, large=large)
        model = Model()
        made = 0
        while made < steps or len(self.after) < 2:
            step = next(supply)
            perform(context, "alice", step)
            model = model.after(step)[0]
            size = self.file.stat().st_size if self.file.exists() else 0
            made += 1
            if size > self.after[-1][0]:
                self.after.append((size, model))
            elif size < self.after[-1][0]:  # written anew
                self.after = [(size, model)]
        storage.close()
        self.data = self.file.read_bytes()
        self.model = model

    def stored(self, size: int) -> Model:
        """What is stored if the last write was cut at `size`: its commit is there once its first line is whole.

        (A checkpoint may be behind it, written together with it.)
        """
        (before, older), (_, newer) = self.after[-2:]
        first = self.data[:before].count(b"\n") == 0  # then the header is written with it
        record = self.data.index(b"\n", self.data.index(b"\n") + 1 if first else before) + 1
        return newer if size >= record else older

    def read(self) -> Model:
        storage = FileStorage(self.folder, fsync="no")
        try:
            return observed(SyncConversationContext(storage).get_state("alice"))
        finally:
            storage.close()


def torn_ends(random: Random, rounds: int, figures: Figures) -> None:
    """The file cut at every byte of its last record: what was acknowledged before is there, and life goes on."""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            written = _Written(folder / str(number), random, steps=random.randint(1, 40), large=number % 2 == 0)
            before = written.after[-2][0]
            cuts = list(range(before, len(written.data)))
            if len(cuts) > 600:
                cuts = sorted({*cuts[:200], *cuts[-200:], *random.sample(cuts, 200)})
            for cut in cuts:
                if figures.faults >= rounds:
                    break
                figures.faults += 1
                tail = bytes(len(written.data) - cut) if random.random() < 0.3 else b""
                written.file.write_bytes(written.data[:cut] + tail)
                expected = written.stored(cut)
                when = f"cut at {cut} of {len(written.data)}" + (", NULs behind" if tail else "")
                _goes_on(written, expected, when, figures)
            shutil.rmtree(written.folder)


def _goes_on(written: _Written, expected: Model, when: str, figures: Figures) -> None:
    witness = Witness(figures, "alice")
    witness.possible = [expected]
    storage = FileStorage(written.folder, fsync="no")
    context = SyncConversationContext(storage)
    error = witness.look(context, when)
    error = error or witness.call(context, Step("add_to_history", ("user", "afterwards")))
    storage.close()
    again = SyncConversationContext(FileStorage(written.folder, fsync="no"))
    error = error or witness.look(again, f"{when}, and a write")
    again.close()
    if error is not None:
        figures.lose(f"{when}: {error}")


def flipped_bits(random: Random, rounds: int, figures: Figures) -> None:
    """Single bits of a file flipped: noticed, or without any effect; and nothing is written over it.

    A file that is smaller than `rounds` bits has each of its bits flipped.
    """
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            large = number % 3 == 0
            written = _Written(folder / str(number), random, steps=60 if large else 8, large=large)
            bits = range(8 * len(written.data))
            chosen = list(bits) if not large and len(bits) <= rounds else random.sample(bits, min(len(bits), 2000))
            newlines = [8 * index + bit for index, byte in enumerate(written.data) if byte == 10 for bit in range(8)]
            for bit in [*newlines, *chosen]:
                if figures.faults >= rounds:
                    break
                figures.faults += 1
                flip(written, bit, figures)
            shutil.rmtree(written.folder)


def flip(written: _Written, bit: int, figures: Figures) -> None:
    """Flip one bit, read, and try to write."""
    data = bytearray(written.data)
    data[bit // 8] ^= 1 << bit % 8
    written.file.write_bytes(data)
    when = f"bit {bit % 8} of byte {bit // 8} of {len(data)} flipped"
    figures.calls += 1
    try:
        seen = written.read()
    except StateCorruptedError:
        pass
    except StateError as error:
        figures.fail_silently(f"{when}: {type(error).__name__}: {error}")
    else:
        if seen != written.model:
            accuse(figures, seen, [written.model], when)
        return  # in what is superseded: nothing that can be read depends on it
    storage = FileStorage(written.folder, fsync="no")
    context = SyncConversationContext(storage)
    try:
        context.get_history("alice")
        context.add_to_history("alice", "user", "over it")
    except StateCorruptedError:
        if written.file.read_bytes() != data:
            figures.fail_silently(f"{when}: refused, and yet the file was changed")
    else:
        figures.fail_silently(f"{when}: noticed by one read, and not by the next")
    finally:
        storage.close()
