"""Files that were truncated, in which a bit was flipped, or whose lines were moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateCorruptedError, StateError

from .figures import Figures
from .model import REPAIR, Model, Step, Steps, perform
from .places import scratch
from .witness import Witness


class _Written:
    """A conversation's file, with what was stored after each of its commits."""

    def __init__(
        self,
        folder: Path,
        random: Random,
        *,
        steps: int,
        large: bool,
        fsync: str = "",
        layout: str = "log",
        name: str = "alice",
        appending: bool = False,
    ) -> None:
        self.random = random
        self.folder = folder
        storage = FileStorage(folder, fsync=fsync or random.choice(("always", "no")), layout=layout)
        context = SyncConversationContext(storage)
        self.layout = layout
        self.file = folder / (f"{name}.jsonl" if layout == "log" else f"{name}.json")
        self.after: list[tuple[int, Model]] = [(0, Model())]  # (size of the file, what is stored)
        self.ever: list[str] = []  # all messages that were ever stored
        supply = Steps(random, clears=False, large=large)
        model = Model()
        made = 0
        while made < steps or len(self.after) < 2:
            # (The loss of a last line that changes nothing could not be noticed.)
            last = made == steps - 1
            step = Step("add_to_history", ("user", supply.content())) if last and appending else next(supply)
            perform(context, name, step)
            before = set(model.history)
            model = model.after(step)[0]
            self.ever += [content for content in model.history if content not in before]
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

    def open(self) -> SyncConversationContext:
        return SyncConversationContext(FileStorage(self.folder, fsync="no", layout=self.layout))


def torn_ends(random: Random, rounds: int, figures: Figures) -> None:
    """The file cut at every byte of its last record: what was acknowledged before is there, and can be written to."""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            written = _Written(folder / str(number), random, steps=random.randint(1, 40), large=number % 2 == 0)
            for cut in _some(range(written.after[-2][0], len(written.data)), random):
                if figures.faults >= rounds:
                    break
                figures.faults += 1
                tail = bytes(len(written.data) - cut) if random.random() < 0.3 else b""
                written.file.write_bytes(written.data[:cut] + tail)
                when = f"cut at {cut} of {len(written.data)}" + (", NULs behind" if tail else "")
                _goes_on(written, written.stored(cut), when, figures)
            shutil.rmtree(written.folder)


def _some(places: Sequence[int], random: Random) -> Sequence[int]:
    """All of them, or if there are very many, those near the ends and some between."""
    return places if len(places) <= 600 else sorted({*places[:200], *places[-200:], *random.sample(places, 200)})


def _goes_on(written: _Written, expected: Model, when: str, figures: Figures) -> None:
    witness = Witness(figures, "alice")
    witness.possible = [expected]
    with written.open() as context:
        error = witness.look(context, when)
        error = error or witness.call(context, Step("add_to_history", ("user", "afterwards")))
    with written.open() as again:
        error = error or witness.look(again, f"{when}, and a write")
    if error is not None:
        figures.lose(f"{when}: {error}")


def torn_documents(random: Random, rounds: int, figures: Figures) -> None:
    """A document cut at every byte is refused and left as it is. (Other programs may write incomplete documents.)"""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            written = _Written(folder / str(number), random, steps=12, large=False, layout="document")
            for cut in _some(range(len(written.data)), random):
                if figures.faults >= rounds:
                    break
                figures.faults += 1
                _noticed(written, written.data[:cut], f"document cut at {cut} of {len(written.data)}", random, figures)
            shutil.rmtree(written.folder)


def flipped_bits(random: Random, rounds: int, figures: Figures) -> None:
    """Single bits of a file flipped: noticed, or without any effect; nothing is written over it; the rest is saved.

    Each of the bits of a file that is not large is flipped in turn, where `rounds` allows it.
    """
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            large = number % 3 == 0
            written = _Written(folder / str(number), random, steps=60 if large else 8, large=large, appending=True)
            bits = range(8 * len(written.data))
            chosen = list(bits) if not large and len(bits) <= rounds else random.sample(bits, min(len(bits), 2000))
            newlines = [8 * index + bit for index, byte in enumerate(written.data) if byte == 10 for bit in range(8)]
            for bit in [*newlines, *chosen]:
                if figures.faults >= rounds:
                    break
                figures.faults += 1
                data = bytearray(written.data)
                data[bit // 8] ^= 1 << bit % 8
                when = f"bit {bit % 8} of byte {bit // 8} of {len(data)} flipped"
                if _noticed(written, bytes(data), when, random, figures) and random.random() < 0.25:
                    _salvaged(written, bit // 8, when, figures)
            shutil.rmtree(written.folder)


def moved_lines(random: Random, rounds: int, figures: Figures) -> None:
    """Whole intact lines are moved, or a part in the middle is replaced by NULs."""
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            written, other = (
                _Written(folder / f"{number}-{name}", random, steps=12, large=False, fsync="always", name=name)
                for name in ("alice", "bob")
            )
            lines, others = (one.data.splitlines(keepends=True) for one in (written, other))
            for _ in range(40):
                if figures.faults >= rounds or len(lines) < 4:
                    break
                what, data = _rearranged(lines, others, written.after[-2][0], random)
                if data != written.data:
                    figures.faults += 1
                    _noticed(written, data, what, random, figures)
            shutil.rmtree(written.folder)
            shutil.rmtree(other.folder)


def _rearranged(lines: list[bytes], others: list[bytes], flushed: int, random: Random) -> tuple[str, bytes]:
    """What was done to the lines, and the new content of the file.

    Not its end cut off, nor a hole behind `flushed`, in what was written last: that is what a crash leaves.
    """
    lines = list(lines)
    one, two = sorted(random.sample(range(len(lines) - 1), 2))
    match random.randrange(5):
        case 0:
            lines[one], lines[two] = lines[two], lines[one]
            what = f"lines {one} and {two} exchanged"
        case 1:
            lines.insert(random.choice((one + 1, two, len(lines))), lines[one])
            what = f"line {one} repeated"
        case 2:
            del lines[one]
            what = f"line {one} gone"
        case 3:
            lines[one:two] = others[one:two]
            what = f"lines {one} to {two} of another conversation"
        case _:
            data = b"".join(lines)
            begin = random.randrange(flushed)
            end = random.randint(begin + 1, flushed)
            return f"NULs from {begin} to {end}", data[:begin] + bytes(end - begin) + data[end:]
    return what, b"".join(lines)


def _noticed(written: _Written, data: bytes, when: str, random: Random, figures: Figures) -> bool:
    """Replace the file by `data`. Returns whether that is noticed; if not, everything must read as it was written."""
    written.file.write_bytes(data)
    witness = Witness(figures, "alice")
    witness.possible = [written.model]
    with written.open() as context:
        _read_a_part(context, written.model, when, random, figures)
    with written.open() as context:
        error = witness.look(context, when)
        if error is None:  # in superseded data: nothing that can be read depends on it
            _goes_on(written, written.model, f"{when}, unnoticed", figures)
            return False
    if not isinstance(error, StateCorruptedError):
        figures.fail_silently(f"{when}: {error!r}")
    with written.open() as context:
        error = witness.call(context, Step("add_to_history", ("user", "behind it")))
    # A write need not read everything, but must not change what it could not read.
    after = written.file.read_bytes()
    if not isinstance(error, StateCorruptedError | None) or (error is not None and after != data):
        figures.fail_silently(f"{when}: noticed by a read, and the write after it: {error!r}")
    with written.open() as context:
        if not after.startswith(data) or not isinstance(witness.look(context), StateCorruptedError):
            figures.fail_silently(f"{when}: noticed by a read, and by none after the next write")
    written.file.write_bytes(data)
    return True


def _read_a_part(context: SyncConversationContext, model: Model, when: str, random: Random, figures: Figures) -> None:
    """A read that need not read everything may not notice, but its result must be right."""
    limit = random.randint(1, 5)
    before = random.randint(model.start, model.start + len(model.history))
    key = random.choice("abmn")
    calls: list[tuple[Callable[[], Any], Any]] = [
        (lambda: [message["content"] for message in context.get_history("alice", limit)], model.history[-limit:]),
        (
            lambda: [message["content"] for message in context.get_history("alice", limit, before=before)],
            model.history[: before - model.start][-limit:],
        ),
        (lambda: context.get_variable("alice", key), model.variables.get(key)),
        (lambda: context.count_history("alice"), len(model.history)),
    ]
    call, expected = random.choice(calls)
    try:
        answer = call()
    except StateCorruptedError:
        return
    except StateError as error:
        figures.fail_silently(f"{when}: {error!r}")
        return
    if answer != expected:
        figures.fail_silently(f"{when}: a part was read as {str(answer)[:200]}, not {str(expected)[:200]}")


def _salvaged(written: _Written, place: int, when: str, figures: Figures) -> None:
    """A repair keeps everything except the damaged line, and a copy of the damaged file."""
    damaged = written.file.read_bytes()
    lines = written.data.splitlines(keepends=True)
    hit: set[str] = set()
    offset = 0
    for line in lines:
        if offset <= place < offset + len(line):
            hit = {message["content"] for message in json.loads(line).get("add", ())}
        offset += len(line)
    with written.open() as context:
        try:
            perform(context, "alice", REPAIR)
            saved = [message["content"] for message in context.get_history("alice")]
            context.add_to_history("alice", "user", "after the repair")
        except StateError as error:
            figures.fail_silently(f"{when}: not repaired: {error!r}")
            return
        storage = context.storage
        assert isinstance(storage, FileStorage)
        for problem in storage.verify():
            figures.fail_silently(f"{when}: repaired, and yet {problem.reason}")
    known = {content: number for number, content in enumerate(written.ever)}
    order = [known.get(content, -1) for content in saved]
    if -1 in order or order != sorted(set(order)):
        figures.fail_silently(f"{when}: repaired to {saved}")
    missing = [content for content in written.model.history if content not in saved and content not in hit]
    if missing:
        figures.lose(f"{when}: a repair lost {missing[:3]} and {max(0, len(missing) - 3)} more")
    kept = written.file.with_name(written.file.name + ".damaged")
    if not kept.exists() or kept.read_bytes() != damaged:
        figures.lose(f"{when}: the damaged file was not kept")
    kept.unlink(missing_ok=True)
