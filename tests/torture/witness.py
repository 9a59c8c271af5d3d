"""Makes calls on one conversation, and derives from their outcomes what may be stored."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from agentstate import SyncConversationContext
from agentstate.errors import StateConflictError, StateError, StateOutcomeUnknownError

from .figures import Figures, moment
from .model import Model, Step, observed, perform

_RETRIES: Final = 50


class Witness:
    """The only writer of a conversation. What is `possible` is what its calls' outcomes allow to be stored.

    `clock`: by what its calls are timed.
    """

    def __init__(self, figures: Figures, context_id: str, *, clock: Callable[[], float] = moment) -> None:
        self.figures = figures
        self.context_id = context_id
        self.clock = clock
        self.possible = [Model()]

    def call(self, context: SyncConversationContext, step: Step, *, insist: bool = False) -> StateError | None:
        """Make a call. With `insist`, one with an unknown outcome is made again with its commit id until it is known.

        Returns the error it ended with.
        """
        error = self._attempt(context, step, None)
        if insist and isinstance(error, StateOutcomeUnknownError):
            return self.retry(context, step, error)
        return error

    def retry(
        self, context: SyncConversationContext, step: Step, unknown: StateOutcomeUnknownError
    ) -> StateError | None:
        """Make a call whose outcome is unknown again, with its commit id, until it is known: it takes effect once."""
        before = self._before_unknown
        commit_id = unknown.commit_id
        if commit_id is None:
            self.figures.fail_silently(f"{step.name}: an unknown outcome without commit id")
            return unknown
        error: StateError | None = unknown
        for _ in range(_RETRIES):
            error = self._attempt(context, step, commit_id)
            if error is None:
                self._settled(step, before, self._answer)
                return None
            if is_applied(error):
                self.possible = distinct([model.after(step)[0] for model in before])
                return None
            if not isinstance(error, StateOutcomeUnknownError):
                time.sleep(0.02)  # this call did nothing; the outcome of the first is still unknown
        return error

    def _attempt(self, context: SyncConversationContext, step: Step, commit_id: str | None) -> StateError | None:
        begin = self.clock()
        try:
            self._answer = perform(context, self.context_id, step, commit_id)
        except StateOutcomeUnknownError as error:
            self.figures.unknown += 1
            if commit_id is None:
                self._before_unknown = self.possible
                self.possible = distinct([*self.possible, *(model.after(step)[0] for model in self.possible)])
            return error
        except StateError as error:
            if commit_id is None and is_applied(error):
                self.possible = distinct([model.after(step)[0] for model in self.possible])
                return None
            return error
        finally:
            self.figures.took(self.clock() - begin, context.storage.deadline, step.name)
        if commit_id is None:
            self._settled(step, self.possible, self._answer)
        return None

    def _settled(self, step: Step, before: list[Model], answer: Any) -> None:
        """The step took effect exactly once on one of the states `before`."""
        outcomes = [model.after(step) for model in before]
        agreeing = [model for model, expected in outcomes if expected == answer]
        if not agreeing:
            self.figures.fail_silently(
                f"{step.name}{str(step.arguments)[:80]} answered {str(answer)[:80]}, not {str(outcomes[0][1])[:80]}"
            )
        self.possible = distinct(agreeing or [model for model, _ in outcomes])

    def look(self, context: SyncConversationContext, when: str = "") -> StateError | None:
        """Read everything and compare. Returns the error, if reading ended with one."""
        begin = self.clock()
        try:
            seen = observed(context.get_state(self.context_id))
        except StateError as error:
            return error
        finally:
            self.figures.took(self.clock() - begin, context.storage.deadline, "get_state")
        self.saw(seen, when)
        return None

    def saw(self, seen: Model, when: str = "") -> None:
        """Compare what was read with what is possible."""
        if seen not in self.possible:
            accuse(self.figures, seen, self.possible, f"{self.context_id} {when}")
        self.possible = [seen]


def is_applied(error: StateError) -> bool:
    """Whether the commit took effect and only its (large) answer was lost."""
    return type(error) is StateConflictError and "already applied" in str(error)


def distinct(models: list[Model]) -> list[Model]:
    """Without duplicates."""
    kept: list[Model] = []
    for model in models:
        if model not in kept:
            kept.append(model)
    return kept


def accuse(figures: Figures, seen: Model, possible: list[Model], when: str) -> None:
    """Count in which way what was read differs from all that is possible."""
    expected = min(possible, key=lambda model: _distance(model, seen))
    counts = Counter(map(str, seen.history))
    doubled = [content for content, count in counts.items() if count > 1]
    missing = [content for content in map(str, expected.history) if content not in counts]
    more = any(_number(seen, key) > _number(expected, key) for key in "mn")
    fewer = any(_number(seen, key) < _number(expected, key) for key in "mn")
    detail = f"{when}: {_short(seen)} instead of {_short(expected)} ({len(possible)} possible)"
    if doubled or more:
        figures.double(detail)
    elif missing or fewer or (expected.exists and not seen.exists):
        figures.lose(detail)
    else:
        figures.fail_silently(detail)


def _distance(one: Model, other: Model) -> int:
    return len(set(map(str, one.history)) ^ set(map(str, other.history))) + (one.variables != other.variables)


def _number(model: Model, key: str) -> float:
    value = model.variables.get(key, 0)
    return value if isinstance(value, int | float) else 0


def _short(model: Model) -> str:
    history = [str(content)[:12] for content in model.history[-6:]]
    variables = {key: str(value)[:12] for key, value in model.variables.items()}
    return f"<{model.exists} {model.start}+{len(model.history)} ..{history} {variables}>"
