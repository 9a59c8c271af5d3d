"""Writers that are killed with SIGKILL, at any moment. To be run in a process of its own: it forks."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

from servers import ValkeyServer

from agentstate import FileStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .figures import Figures
from .model import Model, Step, Steps, observed, perform
from .places import scratch
from .witness import Witness, accuse, distinct

_BEGUN: Final = b"b"
_DONE: Final = b"d"
_FSYNC: Final = ("always", "always", "no", "everysec")
_STORES: Final = 8


def kills(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """Kill `rounds` writers: 1 to 4 at a time, each on a conversation of its own and all on a common one."""
    with scratch(disk=True) as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            states = folder / f"states-{number % _STORES}"
            make = partial(FileStorage, states, layout=layout, fsync=random.choice(_FSYNC))
            _Round(make, number, random, figures).run()
            _look_for_debris(states, f"round {number}", figures)


def kills_of_clients(random: Random, rounds: int, figures: Figures, *, server: ValkeyServer, layout: str) -> None:
    """The same with writers to a server, which keeps running."""
    number = 0
    while figures.faults < rounds:
        number += 1
        make = partial(ValkeyStorage, server.url, key_prefix=f"kills-{number % _STORES}:", layout=layout)
        _Round(make, number, random, figures).run()


class _Writer:
    """A child that makes steps, and reports through a pipe when each begins and when it is done."""

    def __init__(self, make: Callable[..., StateStorage], name: str, seed: int, first: int) -> None:
        self.name = name
        self.seed = seed
        self.first = first
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.pipe)
                self._write(make(deadline=20.0), write)
            finally:
                os._exit(1)
        os.close(write)
        self.reported = b""

    def _write(self, storage: StateStorage, pipe: int) -> None:
        context = SyncConversationContext(storage)
        for place, step in self.steps():
            os.write(pipe, _BEGUN)
            perform(context, place, step)
            os.write(pipe, _DONE)

    def steps(self) -> Any:
        """The same in child and parent: steps on a conversation of its own, and on the common one."""
        random = Random(self.seed)
        own = Steps(random, f"{self.name}-{self.first}-", large=random.random() < 0.5)
        number = 0
        while True:
            number += 1
            if random.random() < 0.5:
                yield self.name, next(own)
            else:
                yield "common", _common(self.name, self.first, number, random)

    def listen(self) -> None:
        """Read what the child has reported until its pipe is empty (until it is closed, once it is dead)."""
        while data := os.read(self.pipe, 65536):
            self.reported += data

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.listen()
        os.close(self.pipe)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"the writer {self.name} ended by itself, with {status}")


def _common(name: str, first: int, number: int, random: Random) -> Step:
    content = f"{name}-{first}-{number}"
    match random.randrange(3):
        case 0:
            return Step("add_to_history", (name, content))
        case 1:
            return Step("increment_variable", (f"n-{name}", 1))
    return Step(
        "batch",
        (
            Step("add_to_history", (name, content + "a")),
            Step("set_variable", (f"last-{name}", content)),
            Step("add_to_history", (name, content + "b")),
        ),
    )


class _Round:
    """Some writers, killed after a while; then everything is checked."""

    def __init__(self, make: Callable[..., StateStorage], number: int, random: Random, figures: Figures) -> None:
        self.make = make
        self.number = number
        self.random = random
        self.figures = figures

    def run(self) -> None:
        random, figures = self.random, self.figures
        before: dict[str, Model] = {}
        names = [f"w{index}" for index in range(random.choice((1, 1, 2, 4)))]
        with SyncConversationContext(self.make()) as context:
            for name in names:
                before[name] = observed(context.get_state(name))
            common = context.get_state("common")
            shares = {name: share(common, name) for name in names}
        writers = [_Writer(self.make, name, random.getrandbits(32), self.number) for name in names]
        pipes = [writer.pipe for writer in writers]
        select.select(pipes, (), (), 10.0)
        time.sleep(random.random() ** 2 * 0.03)
        for writer in writers:
            writer.kill()
            figures.faults += 1
        begin = time.monotonic()
        with SyncConversationContext(self.make()) as context:
            common = context.get_state("common")
            for writer in writers:
                self._compare(context, writer, before[writer.name], shares[writer.name], common)
            # The next writer gets the locks of the killed ones at once.
            after = Witness(figures, "next")
            after.possible = [observed(context.get_state("next"))]
            error = after.call(context, Step("add_to_history", ("user", f"{self.number}")))
            after.look(context, f"round {self.number}")
            if error is not None:
                figures.lose(f"round {self.number}, the next open: {error}")
            if self.number % 16 == 0:  # the histories need not grow without bound
                for name in (*names, "common", "next"):
                    context.clear_context(name)
        figures.took(time.monotonic() - begin, 5.0, f"the first calls after the kill of round {self.number}")

    def _compare(
        self, context: SyncConversationContext, writer: _Writer, own: Model, portion: Model, common: Any
    ) -> None:
        """What is stored is what was acknowledged to the writer, and perhaps the step that it was killed in."""
        figures = self.figures
        done = writer.reported.count(_DONE)
        begun = writer.reported.count(_BEGUN)
        figures.calls += done
        possible = {writer.name: [own], "common": [portion]}
        steps = writer.steps()
        for index in range(begun):
            place, step = next(steps)
            after = [model.after(step)[0] for model in possible[place]]
            possible[place] = after if index < done else distinct([*possible[place], *after])
        when = f"round {self.number}, {writer.name} killed after {done} of {begun} steps"
        seen = {writer.name: observed(context.get_state(writer.name)), "common": share(common, writer.name)}
        for place, model in seen.items():
            if model not in possible[place] and not (place == "common" and _same(model, possible[place])):
                accuse(figures, model, possible[place], f"{when}, in {place}")


def _look_for_debris(folder: Path, when: str, figures: Figures) -> None:
    """At most a file and an incomplete successor for each conversation."""
    names = [path.name for path in folder.iterdir()]
    strange = [name for name in names if not name.startswith(".") and ".json" not in name]
    spare = [name for name in names if name.endswith(".new")]
    if strange or len(spare) > 6:
        figures.fail_silently(f"{when}: debris {strange} {spare}")


def _same(model: Model, possible: list[Model]) -> bool:
    """Whether a writer's share agrees, whichever writer created the common conversation."""
    return any(model.history == one.history and model.variables == one.variables for one in possible)


def share(state: Any, name: str) -> Model:
    """The part of the common conversation that a writer wrote."""
    if state is None:
        return Model()
    contents = [message["content"] for message in state.history if message["role"] == name]
    variables = {key: value for key, value in state.variables.items() if key.endswith(f"-{name}")}
    return Model(True, 0, contents, variables)
