"""A conversation as a plain Python object, and random calls on it. Every backend is compared with this model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, NamedTuple

from agentstate import ConversationContext, ConversationState, SyncConversationContext


class Step(NamedTuple):
    """One documented call on one conversation: the method's name and its arguments. A batch's argument is its steps."""

    name: str
    arguments: tuple[Any, ...]


REPAIR: Final = Step("repair", ())
"""A call of the storage, not of a context: it keeps the intact part of a damaged conversation."""


@dataclass
class Model:
    """What must be stored after some steps."""

    exists: bool = False
    start: int = 0
    history: list[Any] = field(default_factory=list)  # the contents
    variables: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def after(self, step: Step) -> tuple[Model, Any]:
        """The model after a step, and what the step returns."""
        model = copy.deepcopy(self)
        return model, model._apply(step)

    def _apply(self, step: Step) -> Any:
        arguments = step.arguments
        match step.name:
            case "add_to_history":
                self.exists = True
                self.history.append(arguments[1])
            case "extend_history":
                self.exists = self.exists or bool(arguments[0])
                self.history += [message["content"] for message in arguments[0]]
            case "set_variable":
                self.exists = True
                self.variables[arguments[0]] = arguments[1]
            case "set_metadata":
                self.exists = True
                self.metadata[arguments[0]] = arguments[1]
            case "delete_variable":
                return self.variables.pop(arguments[0], self) is not self
            case "increment_variable":
                self.exists = True
                self.variables[arguments[0]] = self.variables.get(arguments[0], 0) + arguments[1]
                return self.variables[arguments[0]]
            case "pop_history":
                count = min(arguments[0], len(self.history))
                popped = self.history[len(self.history) - count :]
                del self.history[len(self.history) - count :]
                return popped
            case "trim_history":
                gone = max(0, len(self.history) - arguments[0])
                self.start += gone
                del self.history[:gone]
            case "clear_context":
                existed = self.exists
                self.__init__()  # type: ignore[misc]
                return existed
            case "batch":
                for inner in arguments:
                    self._apply(inner)
            case "repair":  # the model is what is intact
                pass
            case name:
                raise ValueError(name)
        return None


def perform(context: SyncConversationContext, context_id: str, step: Step, commit_id: str | None = None) -> Any:
    """Make the call, and return its result in the form that the model uses."""
    if step.name == "batch":
        with context.batch(context_id, commit_id=commit_id) as batch:
            _fill(batch, step)
        return None
    if step == REPAIR:
        repair: Callable[[str], Any] = context.storage.repair  # type: ignore[attr-defined]
        repair(context_id)
        return None
    method: Callable[..., Any] = getattr(context, step.name)
    return _plain(step, method(context_id, *step.arguments, commit_id=commit_id))


async def perform_async(context: ConversationContext, context_id: str, step: Step, commit_id: str | None = None) -> Any:
    """The same through the awaitable context."""
    if step.name == "batch":
        async with context.batch(context_id, commit_id=commit_id) as batch:
            _fill(batch, step)
        return None
    method: Callable[..., Any] = getattr(context, step.name)
    return _plain(step, await method(context_id, *step.arguments, commit_id=commit_id))


def _fill(batch: Any, step: Step) -> None:
    for inner in step.arguments:
        getattr(batch, inner.name)(*inner.arguments)


def _plain(step: Step, answer: Any) -> Any:
    return [message["content"] for message in answer] if step.name == "pop_history" else answer


def observed(state: ConversationState | None) -> Model:
    """What was read, as a model."""
    if state is None:
        return Model()
    contents = [message["content"] for message in state.history]
    return Model(True, state.history_start, contents, dict(state.variables), dict(state.metadata))


_FILLERS: Final = (0, 1, 20, 300, 5_000)


class Steps:
    """An endless supply of random steps. Contents are unique, so that duplicates are noticed."""

    def __init__(self, random: Random, label: str = "", *, clears: bool = True, large: bool = True) -> None:
        self._random = random
        self._label = label
        self._count = 0
        self._large = large
        names = ["add_to_history"] * 6 + ["increment_variable"] * 3 + ["batch"] * 3
        names += ["extend_history", "set_variable", "set_variable", "set_metadata", "delete_variable", "pop_history"]
        self._names = [*names, "trim_history", *(["clear_context"] if clears else [])]

    def __next__(self) -> Step:
        return self._step(self._random.choice(self._names))

    def __iter__(self) -> Steps:
        return self

    def content(self) -> str:
        """A text that is unique among all steps."""
        self._count += 1
        random = self._random
        filler = random.choice(_FILLERS if self._large else _FILLERS[:3])
        return f"{self._label}{self._count}:" + 'é\n"☃'[random.randrange(4)] * (filler // 2)

    def _message(self) -> dict[str, Any]:
        return {"role": "user", "content": self.content()}

    def _step(self, name: str) -> Step:
        random = self._random
        match name:
            case "add_to_history":
                return Step(name, ("user", self.content()))
            case "extend_history":
                return Step(name, ([self._message() for _ in range(random.randint(1, 4))],))
            case "set_variable" | "set_metadata":
                return Step(name, (random.choice("abc"), self.content()))
            case "delete_variable":
                return Step(name, (random.choice("abc"),))
            case "increment_variable":
                return Step(name, (random.choice("mn"), random.randint(1, 3)))
            case "pop_history":
                return Step(name, (random.randint(1, 3),))
            case "trim_history":
                return Step(name, (random.randint(0, 12),))
            case "batch":
                inner = ("add_to_history", "set_variable", "set_metadata", "increment_variable")
                return Step(name, tuple(self._step(random.choice(inner)) for _ in range(random.randint(2, 4))))
        return Step(name, ())
