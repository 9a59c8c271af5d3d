"""Conversations in a file store: the files before a fault, the calls, and what must hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateCorruptedError, StateError

from .figures import Figures
from .model import REPAIR, Model, Step, Steps, observed, perform
from .places import scratch
from .witness import Witness

ID: Final = "alice"
KINDS: Final = ("calls", "calls", "rewritten", "adopted", "repaired")
DOCUMENT_KINDS: Final = ("calls", "calls", "found")


def numbers(random: Random) -> Iterator[int]:
    """The numbers of plots: a short run begins at a random one, a long run has all."""
    return count(random.randrange(30))


class Plot:
    """The calls on one conversation, and its files before the first call.

    - `calls`: a new conversation, and random calls
    - `rewritten`: so much is superseded that its file is rewritten during the calls
    - `adopted`: AgentUp left a document, which the first write converts to a log
    - `found`: the same, with the layout of documents
    - `repaired`: its log is damaged, and the first call repairs it
    """

    def __init__(self, random: Random, number: int, *, layout: str = "log", steps: int = 9, **options: Any) -> None:
        # Each kind in turn, in an exclusive store and in one for many.
        kinds = KINDS if layout == "log" else DOCUMENT_KINDS
        self.kind = kinds[number % len(kinds)]
        self.options = {"layout": layout, "exclusive": number // len(kinds) % 3 == 0, **options}
        self.model = Model()
        self.files: dict[str, bytes] = {}
        self.keeps: bytes | None = None
        """What must not disappear: a document of another program, or what could not be read."""
        supply = Steps(random, large=random.random() < 0.5, clears=self.kind != "repaired")
        if self.kind == "rewritten":
            self.steps = [Step("set_variable", ("a", supply.content() + "x" * 30_000)) for _ in range(steps)]
        else:
            self.steps = [next(supply) for _ in range(steps)]
            if self.kind in ("adopted", "found") and random.random() < 0.4:
                self.steps.insert(random.randrange(3), Step("clear_context", ()))
        if self.kind in ("adopted", "found"):
            self._leave_document(supply)
        elif self.kind == "repaired":
            self._damage(random)
            self.steps.insert(0, REPAIR)

    def __str__(self) -> str:
        return f"{self.kind} {self.options}"

    def _leave_document(self, supply: Steps) -> None:
        contents = [supply.content() for _ in range(4)]
        self.model = Model(True, 0, contents, {"a": supply.content(), "n": 3}, {"a": "left"})
        document = {
            "context_id": ID,
            "user_id": None,
            "created_at": "2025-01-01T12:00:00",
            "updated_at": "2025-01-01T12:00:00",
            "metadata": self.model.metadata,
            "variables": self.model.variables,
            "history": [
                {"role": "user", "content": content, "timestamp": "2025-01-01T12:00:00", "metadata": {}}
                for content in contents
            ],
        }
        data = json.dumps(document, indent=2).encode()
        self.files = {f"{ID}.json": data}
        # (What was adopted is thrown away with its conversation.)
        if self.options["layout"] == "log" and all(step.name != "clear_context" for step in self.steps):
            self.keeps = data

    def _damage(self, random: Random) -> None:
        """A log with a bit of it changed, and what an undisturbed repair saves of it."""
        while not self.files:
            with scratch() as folder, SyncConversationContext(FileStorage(folder, fsync="no")) as context:
                steps = Steps(random, clears=False)
                for _ in range(random.randint(3, 12)):
                    perform(context, ID, next(steps))
                file = folder / f"{ID}.jsonl"
                if not file.exists():  # all of them were of those that do nothing
                    continue
                data = bytearray(file.read_bytes())
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
                file.write_bytes(data)
                with SyncConversationContext(FileStorage(folder, fsync="no")) as reader:
                    try:
                        reader.get_state(ID)
                    except StateCorruptedError:
                        perform(reader, ID, REPAIR)
                        self.model = observed(reader.get_state(ID))
                        self.files = {file.name: bytes(data)}
                        self.keeps = bytes(data)

    def lay_out(self, folder: Path) -> Path:
        """Write the files as they were before. Returns the folder of the store."""
        states = folder / "states"
        if self.files:
            states.mkdir(parents=True)
            for name, data in self.files.items():
                (states / name).write_bytes(data)
        return states

    def open(self, states: Path, **options: Any) -> SyncConversationContext:
        """A store on that folder."""
        return SyncConversationContext(FileStorage(states, **{**self.options, **options}))

    def witness(self, figures: Figures) -> Witness:
        """A witness that starts from the files before the first call."""
        witness = Witness(figures, ID)
        witness.possible = [self.model]
        return witness

    def goes_on(
        self, states: Path, possible: list[Model], figures: Figures, when: str, *, repaired: bool = True
    ) -> Witness:
        """After the fault: what is there is one of `possible`, the next writer continues from it, nothing is damaged.

        Without `repaired`, it may still be as damaged as it was.
        """
        witness = self.witness(figures)
        witness.possible = possible
        steps: list[Callable[[SyncConversationContext], StateError | None]] = [
            lambda context: witness.look(context, when),
            lambda context: witness.call(context, Step("add_to_history", ("user", "afterwards"))),
            lambda context: witness.look(context, f"{when}, and a write"),
        ]
        if self.kind == "repaired" and not repaired:
            steps[0] = lambda context: self._look_or_repair(witness, context, when)
        with self.open(states, fsync="no") as context:
            error = None
            for step in steps:
                error = error or step(context)
            storage = context.storage
            assert isinstance(storage, FileStorage)
            for problem in [] if error else storage.verify():
                figures.fail_silently(f"{when}: {problem.path} is damaged: {problem.reason}")
        if error is not None:
            figures.lose(f"{when}: {error}")
        self.check_files(states, figures, when)
        return witness

    def _look_or_repair(self, witness: Witness, context: SyncConversationContext, when: str) -> StateError | None:
        error = witness.look(context, when)
        if isinstance(error, StateCorruptedError):
            error = witness.call(context, REPAIR) or witness.look(context, f"{when}, repaired")
        return error

    def check_files(self, states: Path, figures: Figures, when: str) -> None:
        """What must not disappear is there, and no debris but one unfinished successor of each file."""
        files = {path.name: path for path in states.iterdir() if path.is_file()}
        if self.keeps is not None and all(path.read_bytes() != self.keeps for path in files.values()):
            figures.lose(f"{when}: of {list(self.files)}, as it was before, there are only {sorted(files)}")
        main = f"{ID}.json" if self.options["layout"] == "document" else f"{ID}.jsonl"
        debris = files.keys() - {main, f"{main}.new", f"{ID}.json.adopted", f"{main}.damaged", f"{main}.damaged.new"}
        if debris:
            figures.fail_silently(f"{when}: left behind {sorted(debris)}")
