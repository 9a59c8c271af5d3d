"""The parts of a transfer: contexts, their source, their sink, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, NamedTuple, TypeAlias

from ..errors import StateConflictError, StateCorruptedError, StateError, StateTimeoutError, StateUnavailableError
from ..operations import Snapshot

PAGE: Final = 500
"""Messages that are read, compared and written at a time: of a line of an archive, and of a commit."""

LARGEST_GROUP: Final = 128
GROUP_BYTES: Final = 8 * 2**20
"""How many contexts are read and written together, and about how many bytes they may have."""

_ATTEMPTS: Final = 5
"""How often a long context is read that changes while it is read."""

_MOST_FAILURES: Final = 20
"""How many contexts in a row may fail because the storage cannot be reached, before the transfer fails."""

_MAX_PROBLEMS: Final = 100


# --- the report -----------------------------------------------------------------------------------------------------

Fate: TypeAlias = Literal["copied", "unchanged", "conflict", "failed", "gone"]
"""The result for a context: written; exists and is equal; exists and is different; not written because of an error; no
longer in the source when it was to be read (cleared or expired)."""


class Result(NamedTuple):
    """The result for one context. `size` is the bytes of its values and messages."""

    context_id: str
    fate: Fate
    messages: int = 0
    size: int = 0
    error: StateError | None = None


@dataclass
class Report:
    """The numbers of contexts by result. `problems` are the first 100 that failed or conflicted.

    `damage` is what is wrong with an archive as a whole, for example that it is cut off.
    """

    copied: int = 0
    unchanged: int = 0
    conflict: int = 0
    failed: int = 0
    gone: int = 0
    messages: int = 0
    size: int = 0
    problems: list[Result] = field(default_factory=list)
    damage: StateCorruptedError | None = None

    @property
    def contexts(self) -> int:
        """The number of all contexts."""
        return self.copied + self.unchanged + self.conflict + self.failed + self.gone

    @property
    def complete(self) -> bool:
        """Whether everything that was to be transferred is in the target now."""
        return not self.conflict and not self.failed and self.damage is None

    def add(self, result: Result) -> None:
        setattr(self, result.fate, getattr(self, result.fate) + 1)
        self.messages += result.messages
        self.size += result.size
        if result.fate in ("conflict", "failed") and len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(result)


Progress: TypeAlias = Callable[[Result], None]


# --- pieces ---------------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """A context to transfer. `snapshot.messages` are all of its messages, or the first page of a long history."""

    context_id: str
    snapshot: Snapshot

    @property
    def whole(self) -> bool:
        return self.snapshot.start + len(self.snapshot.messages) == self.snapshot.end

    @property
    def size(self) -> int:
        values = (*self.snapshot.variables.values(), *self.snapshot.metadata.values(), *self.snapshot.messages)
        return sum(map(len, values))


Pages: TypeAlias = Iterator[Sequence[bytes]]


class Changed(Exception):
    """The context changed since its first page was read."""


class Abandoned(Changed):
    """The archive revokes the context, which may follow again."""


class Source:
    """Where contexts come from: lists of whole ones, and long ones one at a time."""

    repeatable: ClassVar[bool] = False
    """Whether a context can be read a second time."""

    def pieces(self, settle: Progress) -> Iterator[list[Context] | Context]:
        raise NotImplementedError

    def rest(self, context: Context) -> Pages:
        """The further pages of a long context. Raises StateError or Changed."""
        raise NotImplementedError

    def again(self, context: Context) -> Context | None:
        """The context as it is now, after it changed; None where it does not exist any more."""
        raise NotImplementedError

    def damage(self) -> StateCorruptedError | None:
        """What is wrong with the source as a whole, after everything was read."""
        return None


class Sink:
    """Where contexts go to."""

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        raise NotImplementedError

    def take_long(self, context: Context, pages: Pages, *, repeatable: bool) -> Result:
        """Take a long context. Raises what `pages` raises, after removing what was written of the context.

        May raise Changed to get the context again, if it is `repeatable`.
        """
        raise NotImplementedError

    def end(self, report: Report) -> None: ...


def transfer(source: Source, target: Sink, progress: Progress) -> Report:
    """Copy everything from `source` to `target`. `progress` is called for every context. Raises StateError."""
    report = Report()
    failures = 0

    def settle(result: Result) -> None:
        nonlocal failures
        report.add(result)
        progress(result)
        # A single context can be unreachable for reasons of its own; so many in a row mean that the storage is.
        failures = failures + 1 if isinstance(result.error, StateUnavailableError | StateTimeoutError) else 0
        if failures >= _MOST_FAILURES and result.error is not None:
            raise result.error

    for piece in source.pieces(settle):
        if isinstance(piece, list):
            for result in target.take_whole(piece):
                settle(result)
            continue
        try:
            if (outcome := _take_long(piece, source, target)) is not None:
                settle(outcome)
        except StateError as error:
            settle(Result(piece.context_id, "failed", error=error))
    target.end(report)
    report.damage = source.damage()
    return report


def _take_long(context: Context, source: Source, target: Sink) -> Result | None:
    """The result for a long context; None if the archive revokes it."""
    changing: Context | None = context
    for _ in range(_ATTEMPTS):
        if changing is None:
            return Result(context.context_id, "gone")
        try:
            if changing.whole:  # meanwhile
                return next(target.take_whole([changing]))
            return target.take_long(changing, source.rest(changing), repeatable=source.repeatable)
        except Abandoned:
            return None
        except Changed:
            changing = source.again(context)
    raise StateConflictError(
        f"{context.context_id!r} changed each of the {_ATTEMPTS} times it was read: stop what writes to it",
        context_id=context.context_id,
    )
