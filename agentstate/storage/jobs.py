"""What waits for a storage, one by one and as groups that are carried out together."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from time import monotonic

from ..errors import StateError, StateOutcomeUnknownError, StateUnavailableError
from ..operations import Commit, Listing, Operation, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, Final, Protocol, TypeAlias

    from .base import Answering, Settle, StateStorage
    from .dispatch import Dispatcher

    class Mailbox(Protocol):
        """Where jobs go that are done, many at a time: whoever waits for them is told once."""

        def deliver(self, jobs: Sequence[Any]) -> None: ...

    Outcomes: TypeAlias = list[Outcome | StateError]
    Done: TypeAlias = Callable[[Outcomes], None]

PENDING: Final[Any] = object()
"""Stands for an outcome that is not known yet (None is one: an absent context)."""


class Job:
    """Operations on one context, carried out in order. `outcomes` is empty until all of them are known, and `mailbox`
    is told, in some thread, when they are."""

    __slots__ = ("key", "mailbox", "operations", "outcomes")

    mailbox: Mailbox

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self.outcomes: Outcomes = []
        self.key = key_of(operations[0])


class CallBack(Job):
    """A job that passes its outcomes to a function."""

    __slots__ = ("function",)

    def __init__(self, operations: Sequence[Operation], function: Done) -> None:
        super().__init__(operations)
        self.function = function
        self.mailbox = _CALL_BACKS


class _CallBacks:
    def deliver(self, jobs: Sequence[CallBack]) -> None:
        for job in jobs:
            job.function(job.outcomes)


_CALL_BACKS: Final = _CallBacks()


def key_of(first: Operation) -> str | int:
    """What jobs must share to be carried out one after the other: the context.

    A listing belongs to no context, and need not wait for another listing.
    """
    return id(first) if type(first) is Listing else first.context_id  # type: ignore[union-attr]


def tell(jobs: list[Job]) -> None:
    """Deliver jobs whose outcomes are known."""
    boxes = {job.mailbox for job in jobs}
    if len(boxes) == 1:
        boxes.pop().deliver(jobs)
        return
    for box in boxes:
        box.deliver([job for job in jobs if job.mailbox is box])


class Group:
    """Jobs that a worker carries out together. `settle` is given the outcomes of their operations, as they come.

    A group is either prompt, and tells whoever waits for a job as soon as it is done. Or it tells nobody before its
    end, and then not before the next group is under way: telling them lets the event loop run, for which the worker
    would have to wait while the server has nothing to do.
    """

    __slots__ = (
        "_begins", "_finished", "_firsts", "_holds", "_last", "_numbers", "_several", "_steps", "_untold", "began",
        "descriptor", "dispatcher", "ended", "jobs", "keys", "moved", "operations", "outcomes", "prompt", "until",
    )  # fmt: skip

    # Of one that is on its way:
    descriptor: int  # readable when it can go on
    until: float  # how long answers are waited for (monotonic)
    moved: float  # when it was last gone on with

    def __init__(
        self, dispatcher: Dispatcher, jobs: list[Job], keys: set[str | int], last: Group | None, *, in_steps: bool
    ) -> None:
        self.dispatcher = dispatcher
        self._last = last
        self._begins = in_steps  # whether the storage is still to be asked to carry it out in steps
        self._steps: Iterator[Answering] | None = None
        self._holds = False
        self._finished: list[Job] = []  # of a prompt group: who waits for them is told at the end of an `at_once` block
        self.jobs = jobs
        self.keys = keys
        self.operations = [operation for job in jobs for operation in job.operations]
        self.outcomes: Outcomes = [PENDING] * len(self.operations)
        self.prompt = False
        self.ended = False
        self.began = monotonic()

    def go_on(self) -> bool:
        """Carry it out, or the next step of it. Returns whether it is done, and all outcomes are known.

        Leaves nobody waiting: not even after a defect of the backend.
        """
        storage = self.dispatcher.storage
        failure: BaseException | None = None
        try:
            if self._begins:
                self._begins = False
                self._steps = storage.begin(self.operations, self.settle)
            if self._steps is None:
                storage.execute(self.operations, self.settle)
            else:
                answering = next(self._steps, None)
                if answering is not None:
                    self.descriptor, self.until = answering.fileno(), answering.deadline
                    self.moved = monotonic()
                    self.under_way()
                    return False
        except BaseException as error:  # noqa: BLE001 - those who wait are told of it
            failure = error
        settle_rest(storage, self.operations, self.outcomes, self.settle, failure)
        self.under_way()
        return True

    @property
    def delays_others(self) -> bool:
        """Whether somebody waits for nothing but that this group is under way."""
        return self._last is not None

    def settle(self, index: int, outcome: Outcome | StateError) -> None:
        self.outcomes[index] = outcome
        if self.prompt:
            with self.dispatcher.lock:
                job = self._done(self._numbers[index])
                counted = not self._untold
            if job is not None:
                if counted:
                    self._note()
                self._finished.append(job)
                if not self._holds:
                    self._tell_finished()

    def under_way(self) -> None:
        """All is sent, and only waiting is left: now is the time for those who wait for the group before this one."""
        if self._last is not None:
            with self.dispatcher.lock:
                last, self._last = self._last, None
            if last is not None:
                last.tell()

    def be_prompt(self) -> list[Job]:
        """From now on, tell whoever waits as soon as possible. Returns those that are to be told now. With the lock
        held, by any thread, before the end."""
        counts = [len(job.operations) for job in self.jobs]
        self._firsts = list(accumulate(counts, initial=0))
        self._numbers = [number for number, count in enumerate(counts) for _ in range(count)]
        self._several: dict[str | int, int] = {}  # jobs that are not done, where a context has more than one
        if len(self.keys) < len(self.jobs):
            self._several.update(Counter(job.key for job in self.jobs))
        self._untold = dict(enumerate(self.jobs))
        self.prompt = True  # first: an outcome that is not seen here is one whose `settle` sees this
        done = [job for job in map(self._done, range(len(counts))) if job is not None]
        if not self._untold:
            self._note()
        return done

    def _done(self, number: int) -> Job | None:
        """The job of this number, if this call is the first that finds it done. With the lock held."""
        job = self._untold.get(number)
        if job is None:
            return None
        outcomes = self.outcomes[self._firsts[number] : self._firsts[number + 1]]
        if any(outcome is PENDING for outcome in outcomes):
            return None
        del self._untold[number]
        job.outcomes = outcomes
        left = self._several.get(job.key, 1) - 1
        if left:
            self._several[job.key] = left
        else:
            self.dispatcher.free({job.key})
        return job

    def end(self) -> None:
        """For a group that is not prompt and has all outcomes: hands them out, for `tell`. With the lock held."""
        self.ended = True
        outcomes = self.outcomes
        if len(outcomes) == len(self.jobs):
            for job, outcome in zip(self.jobs, outcomes, strict=True):
                job.outcomes = [outcome]
        else:
            first = 0
            for job in self.jobs:
                job.outcomes = outcomes[first : first + len(job.operations)]
                first += len(job.operations)
        self._note()

    def tell(self) -> None:
        """Tell whoever waits for the jobs of this group, after its end."""
        tell(self.jobs)
        self.dispatcher.told()

    def _note(self) -> None:
        # Before the last who waits is told: who was told of all finds all counted.
        nanoseconds = int((monotonic() - self.began) * 1e9)
        self.dispatcher.storage.tally.note(self.operations, self.outcomes, nanoseconds)

    def __enter__(self) -> None:
        self._holds = True

    def __exit__(self, *exc: object) -> None:
        self._holds = False
        self._tell_finished()

    def _tell_finished(self) -> None:
        finished, self._finished = self._finished, []
        if finished:
            tell(finished)


def at_once(settle: Settle) -> AbstractContextManager[None]:
    """A block in which a backend settles several operations: who waits for them is told at its end, all at once.

    Telling them one by one costs a change of threads for each.
    """
    group = _group_of(settle)
    if group is not None:
        return group
    from contextlib import nullcontext

    return nullcontext()


def under_way(settle: Settle) -> None:
    """To be called by a storage that `says_when_under_way`: when all that it was given is sent, and it will wait."""
    group = _group_of(settle)
    if group is not None:
        group.under_way()


def held_up(settle: Settle) -> None:
    """To be called by a storage that `says_when_under_way`: before it waits for something that may take its time."""
    group = _group_of(settle)
    if group is not None:
        group.dispatcher.crew.held_up(group)


def for_others(settle: Settle) -> bool:
    """Whether what `execute` was given is carried out by a worker, for threads or tasks that wait."""
    return _group_of(settle) is not None


def delays_others(settle: Settle) -> bool:
    """Whether somebody waits for nothing but that what `execute` was given is under way."""
    group = _group_of(settle)
    return group is not None and group.delays_others


def _group_of(settle: Settle) -> Group | None:
    group = getattr(settle, "__self__", None)
    return group if type(group) is Group else None


def settle_rest(
    storage: StateStorage,
    operations: Sequence[Operation],
    outcomes: Outcomes,
    settle: Settle,
    failure: BaseException | None = None,
) -> None:
    """Settle what a backend left without an outcome, because it broke down with `failure`, or forgot it.

    `settle` puts what it is given into `outcomes`.
    """
    for index, outcome in enumerate(outcomes):
        if outcome is PENDING:
            settle(index, abandoned(storage, operations[index], failure))


class _Unsettled(Exception):
    """A backend returned from `execute` without having settled all operations."""


def abandoned(storage: StateStorage, operation: Operation, failure: BaseException | None = None) -> StateError:
    """The outcome of an operation that a backend dropped when it broke down, or forgot."""
    failure = failure or _Unsettled(f"{type(storage).__name__}.execute forgot an operation")
    context_id = None if isinstance(operation, Listing) else operation.context_id
    message = f"the storage broke down: {type(failure).__name__}: {failure}"
    error: StateError
    if isinstance(operation, Commit):
        error = StateOutcomeUnknownError(message, context_id=context_id, commit_id=operation.commit_id)
    else:
        error = StateUnavailableError(message, context_id=context_id)
    error.__cause__ = failure
    return error
