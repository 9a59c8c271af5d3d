"""What a transfer is made of: contexts, where they come from and where they go, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, NamedTuple, TypeAlias

from ..errors import StateConflictError, StateCorruptedError, StateError, StateTimeoutError, StateUnavailableError
from ..operations import Snapshot

PAGE: Final = 500
"""Messages that are read, compared and written at a time: those of one line of an archive, and of one commit."""

LARGEST_GROUP: Final = 128
GROUP_BYTES: Final = 8 * 2**20
"""How many contexts travel together, and about how many bytes that may be."""

_ATTEMPTS: Final = 5
"""How often a long context is read anew that somebody else writes to."""

_PATIENCE: Final = 20
"""How many contexts in a row may fail because the storage cannot be reached, until the transfer ends."""

_MAX_PROBLEMS: Final = 100


# --- what comes of it -----------------------------------------------------------------------------------------------

Fate: TypeAlias = Literal["copied", "unchanged", "conflict", "failed", "gone"]
"""What became of a context: written; there already, and equal; there, and different; not written for an error; not
found any more in the source when its turn came (cleared or expired meanwhile)."""


class Result(NamedTuple):
    """What became of one context. `size` is the bytes of its values and messages."""

    context_id: str
    fate: Fate
    messages: int = 0
    size: int = 0
    error: StateError | None = None


@dataclass
class Report:
    """What became of all contexts. `problems` are those that failed or conflicted, the first 100 of them.

    `damage` is what is wrong with an archive as a whole: that it is cut off, for example.
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
        """How many contexts were looked at."""
        return self.copied + self.unchanged + self.conflict + self.failed + self.gone

    @property
    def complete(self) -> bool:
        """Whether everything that was to be transferred is there now."""
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
    """A context to be transferred. `snapshot.messages` are all of them, or the first ones of a long history."""

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
    """The context is not any more what its first page said."""


class Abandoned(Changed):
    """And so the archive takes it back; it may come again."""


class Source:
    """Gives contexts: lists of whole ones, and one long one at a time."""

    repeatable: ClassVar[bool] = False
    """Whether a context can be read a second time."""

    def pieces(self, settle: Progress) -> Iterator[list[Context] | Context]:
        raise NotImplementedError

    def rest(self, context: Context) -> Pages:
        """The further pages of a long context. Raises StateError or Changed."""
        raise NotImplementedError

    def again(self, context: Context) -> Context | None:
        """The context as it is now, after it changed while it was read."""
        raise NotImplementedError

    def damage(self) -> StateCorruptedError | None:
        """What is wrong with the source as a whole, once everything was read."""
        return None


class Sink:
    """Takes contexts."""

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        raise NotImplementedError

    def take_long(self, context: Context, pages: Pages, *, repeatable: bool) -> Result:
        """Take a long context. Raises what `pages` raises, and has forgotten the context then.

        May raise Changed to be given the context once more, if it is `repeatable`.
        """
        raise NotImplementedError

    def end(self, report: Report) -> None: ...


def transfer(source: Source, target: Sink, progress: Progress) -> Report:
    """Take everything from `source` to `target`. `progress` is told of every context. Raises StateError."""
    report = Report()
    failures = 0

    def settle(result: Result) -> None:
        nonlocal failures
        report.add(result)
        progress(result)
        # One context may be out of reach for reasons of its own; when so many follow each other, the storage is.
        failures = failures + 1 if isinstance(result.error, StateUnavailableError | StateTimeoutError) else 0
        if failures >= _PATIENCE and result.error is not None:
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
    """What became of a long context; None if the archive takes it back."""
    changing: Context | None = context
    for _ in range(_ATTEMPTS):
        if changing is None:
            return Result(context.context_id, "gone")
        try:
            if changing.whole:  # by now
                return next(target.take_whole([changing]))
            return target.take_long(changing, source.rest(changing), repeatable=source.repeatable)
        except Abandoned:
            return None
        except Changed:
            changing = source.again(context)
    raise StateConflictError(
        f"{context.context_id!r} kept changing while it was read, {_ATTEMPTS} times: stop what writes to it, or try "
        "again later",
        context_id=context.context_id,
    )
