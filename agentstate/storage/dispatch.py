"""Joins operations that wait together into one `execute`.

A `Job` is a few operations on one context, carried out in order. Jobs of a context run one after the other, in the
order in which they came; jobs of different contexts run together, as many as are waiting, up to a limit. While one
group is being executed the next one gathers: so a pipeline fills up, and a flush serves many, exactly when there is
much to do, and a lone call waits for nobody.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from time import monotonic_ns

from ..errors import StateError, StateOutcomeUnknownError, StateUnavailableError
from ..operations import Commit, Listing, Operation, Outcome, Query
from .processors import ANYWHERE, Seat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any, Final, Protocol, TypeAlias

    from .base import Settle, StateStorage

    class Waker(Protocol):
        """Somebody who sleeps until jobs are done."""

        def wake(self) -> None: ...


Outcomes: TypeAlias = list[Outcome | StateError]
Done: TypeAlias = Callable[[Outcomes], None]

LARGEST_GROUP: Final = 1024
"""Operations; more would make the first of them wait for the last."""

LARGE_GROUP: Final = 128
"""Jobs; where there is so much to do, it does not matter where, and two processors do more than one."""

LONELY: Final = 3
"""After so many groups of one job, a worker need not be near the loop any more: both sleep between the steps of such a
call, and each wakes sooner on a processor of its own."""

PENDING: Final[Any] = object()
"""Stands for an outcome that is not known yet (None is one: an absent context)."""

_BUSY: Final[Any] = object()
"""Stands for an outcome where nothing was carried out, because there was too much to do already."""

IDLE_SECONDS: Final = 10.0
"""A worker thread with nothing to do for so long ends."""


class Job:
    """Operations on one context, in order. `done` is called once, in some thread, when all have outcomes."""

    __slots__ = ("first", "key", "left", "operations", "outcomes")

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self.left = len(operations)
        self.outcomes: Outcomes = [PENDING] * self.left
        self.key = _key(operations[0])
        self.first = 0  # where in the group that it is carried out with its operations begin

    def done(self) -> Waker | None:
        """Tell whoever waits for `outcomes`; or say who must be woken, once for all jobs, before that one looks."""
        raise NotImplementedError  # abstract


class _CallBack(Job):
    """A job that passes its outcomes to a function."""

    __slots__ = ("_function",)

    def __init__(self, operations: Sequence[Operation], function: Done) -> None:
        super().__init__(operations)
        self._function = function

    def done(self) -> None:
        self._function(self.outcomes)


def _key(first: Operation) -> str | int:
    """What jobs must share to be carried out one after the other: the context.

    A listing belongs to no context, and need not wait for another listing.
    """
    return id(first) if type(first) is Listing else first.context_id  # type: ignore[union-attr]


class Dispatcher:
    """The queue in front of one storage. Thread-safe; belongs to no event loop."""

    def __init__(self, storage: StateStorage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._work_to_do = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)
        self._queue: list[Job] = []  # jobs that no worker has looked at yet
        self._held: dict[str | int, list[Job]] = {}  # jobs whose key is busy, which go next when it is free
        self._busy: set[str | int] = set()  # keys with jobs in a group
        self._groups = 0  # how many groups are being executed
        self._jobs = 0  # how many jobs are in these, if a worker executes them
        self._workers = 0
        self._idle = 0
        self._draining = 0
        self._processor = ANYWHERE  # where those run who wait

    def perform(self, operations: Sequence[Operation]) -> Outcomes:
        """Carry out operations on one context, in this thread if the storage is free, and return their outcomes."""
        outcomes: Outcomes = [PENDING] * len(operations)

        def work() -> None:
            began = monotonic_ns()
            try:
                self._execute(operations, outcomes, outcomes.__setitem__)
            finally:
                self._storage.tally.note(operations, outcomes, monotonic_ns() - began)

        if self._in_this_thread(_key(operations[0]), work) is _BUSY:
            return self._wait_for((operations,))[0]
        return outcomes

    def call(self, operation: Commit | Query) -> Outcome:
        """`perform` for one operation, whose error is raised: with less ado, since most are alone."""
        try:
            outcome: Outcome | StateError = self._in_this_thread(
                operation.context_id, partial(self._storage.call, operation)
            )
        except StateError:
            raise
        except Exception as error:
            raise abandoned(self._storage, operation, error) from error
        if outcome is _BUSY:
            outcome = self._wait_for(((operation,),))[0][0]
        if isinstance(outcome, StateError):
            raise outcome
        return outcome

    def _in_this_thread(self, key: str | int, work: Callable[[], Any]) -> Any:
        """`work`, as a group of its own with this key; or `_BUSY` if the storage or the key is."""
        free = False
        try:  # before the lock: a KeyboardInterrupt right after it would leave the key busy for ever
            with self._lock:
                free = self._groups < self._storage.groups and not self._queue and key not in self._busy
                if free:
                    self._groups += 1
                    self._busy.add(key)
            return work() if free else _BUSY
        finally:
            if free:
                with self._lock:
                    # First of all, and by no call: a second interrupt would leave the key busy for ever.
                    self._groups -= 1
                    self._busy.discard(key)
                    if key in self._held:
                        self._queue_held(key)
                    if self._queue or self._draining:
                        self._look_around()

    def perform_each(self, operations: Iterable[Operation]) -> Outcomes:
        """Carry out operations that do not depend on each other, together, and return their outcomes."""
        return [outcomes[0] for outcomes in self._wait_for([(operation,) for operation in operations])]

    def _wait_for(self, each: Sequence[Sequence[Operation]]) -> list[Outcomes]:
        """Queue jobs and wait until workers have carried them all out."""
        finished = threading.Lock()
        if each:
            finished.acquire()
        numbers = count(1)

        def done(_: Outcomes) -> None:
            if next(numbers) == len(each):
                finished.release()

        jobs = [_CallBack(operations, done) for operations in each]
        self.submit_jobs([*jobs])
        try:
            finished.acquire()
        except BaseException:  # KeyboardInterrupt
            for job in jobs:
                self.withdraw(job)
            raise
        return [job.outcomes for job in jobs]

    def submit(self, operations: Sequence[Operation], done: Done) -> Job:
        """Queue operations on one context; `done` will be called from another thread."""
        job = _CallBack(operations, done)
        self.submit_jobs([job])
        return job

    def submit_jobs(self, jobs: list[Job], processor: int = ANYWHERE) -> None:
        """Queue jobs in this order, and empty the list: what is left in it after a KeyboardInterrupt is not queued.

        `processor`: where the thread runs that waits for them, if it does nothing else meanwhile.
        """
        with self._lock:
            self._processor = processor
            self._queue += jobs
            jobs.clear()
            self._wake_a_worker()

    def withdraw(self, job: Job) -> bool:
        """Take a job out of the queue. False if it is being carried out already (or is done)."""
        with self._lock:
            for jobs in (self._queue, self._held.get(job.key, ())):
                if job in jobs:
                    jobs.remove(job)  # type: ignore[union-attr]
                    return True
            return False

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until nothing is queued or being carried out. False if that took longer than `timeout` seconds."""
        with self._lock:
            self._draining += 1
            try:
                return self._drained.wait_for(lambda: not self._queue and not self._busy, timeout)
            finally:
                self._draining -= 1

    def finish(self, jobs: list[Job], unfinished: dict[str | int, int]) -> None:
        """Tell all who wait for these jobs, and free the keys that have no more jobs in their group.

        `unfinished`: of keys with several jobs in the group, how many are not finished.
        """
        with self._lock:
            for job in jobs:
                key = job.key
                if key in unfinished:
                    unfinished[key] -= 1
                    if unfinished[key]:
                        continue
                self._busy.discard(key)
                if key in self._held:
                    self._queue_held(key)
        _tell(jobs)

    # --- the following are called with the lock held ---

    def _wake_a_worker(self) -> None:
        if self._groups >= self._storage.groups:
            return  # who finishes a group takes the next one
        if self._idle:
            self._work_to_do.notify()
        elif self._workers < self._storage.groups:
            self._workers += 1
            try:
                threading.Thread(target=self._work, name="agentstate-worker", daemon=True).start()
            except RuntimeError as error:  # too many threads, too little memory, or the interpreter ends
                self._workers -= 1
                if not self._workers:
                    self._refuse(error)

    def _refuse(self, cause: RuntimeError) -> None:
        """Give what is queued back as not done, for there is nobody to do it."""
        refused, self._queue = self._queue, []
        for job in refused:
            for index, operation in enumerate(job.operations):
                error = StateUnavailableError(
                    f"nothing was done, since no thread could be started: {cause}",
                    context_id=None if isinstance(operation, Listing) else operation.context_id,
                )
                error.__cause__ = cause
                self._storage.tally.failed(error)
                job.outcomes[index] = error
            job.left = 0
        _tell(refused)
        self._look_around()

    def _take_group(self) -> list[Job]:
        """The jobs to carry out next, none of which has a key that is busy. It may be that there are none."""
        share = -(-(len(self._queue) + self._jobs) // self._storage.shares)
        group = self._queue[: min(share, LARGEST_GROUP)]
        del self._queue[: len(group)]
        keys = {job.key for job in group}
        if not self._busy.isdisjoint(keys):
            free = []
            for job in group:
                if job.key in self._busy:
                    self._held.setdefault(job.key, []).append(job)
                else:
                    free.append(job)
            group = free
            keys = {job.key for job in group}
        if group:
            self._busy |= keys
            self._groups += 1
            self._jobs += len(group)
        if self._queue:
            self._wake_a_worker()
        return group

    def _queue_held(self, key: str | int) -> None:
        """Queue the jobs that were held back for a key, which is free now."""
        self._queue[:0] = self._held.pop(key)
        self._wake_a_worker()

    def _look_around(self) -> None:
        """After a group: is there somebody to wake?"""
        if self._queue:
            self._wake_a_worker()
        elif self._draining and not self._busy:
            self._drained.notify_all()

    # --- the following are called without it ---

    def _work(self) -> None:
        """A worker thread: takes one group after the other."""
        seat = Seat()
        lonely = 0  # groups of one job, in a row
        while True:
            with self._lock:
                while not self._queue or self._groups >= self._storage.groups:
                    self._idle += 1
                    woken = self._work_to_do.wait(IDLE_SECONDS)
                    self._idle -= 1
                    if not woken and not self._queue:
                        self._workers -= 1
                        return
                group = self._take_group()
            if group:
                lonely = lonely + 1 if len(group) == 1 else 0
                if len(group) >= LARGE_GROUP or lonely > LONELY:
                    seat.move(ANYWHERE)
                elif not lonely:
                    seat.move(self._processor)
                together = _Group(self, group)
                try:
                    self._execute(together.operations, together.outcomes, together.settle)
                finally:
                    with self._lock:
                        self._groups -= 1
                        self._jobs -= len(group)
                        self._look_around()

    def _execute(self, operations: Sequence[Operation], outcomes: Outcomes, settle: Settle) -> None:
        """Execute, and leave nobody waiting: not after a defect of the backend, nor after a KeyboardInterrupt in a
        thread that was lent by its caller. `settle` puts what it is given into `outcomes`."""
        failure: BaseException | None = None
        try:
            self._storage.execute(operations, settle)
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):
                raise
        finally:
            for index, outcome in enumerate(outcomes):
                if outcome is PENDING:
                    settle(index, abandoned(self._storage, operations[index], failure))


class _Group:
    """Jobs that are being carried out together. `settle` finishes them, as their outcomes come."""

    __slots__ = (
        "_began", "_dispatcher", "_finished", "_holds", "_owners", "_unfinished", "_unsettled", "operations", "outcomes"
    )  # fmt: skip

    def __init__(self, dispatcher: Dispatcher, jobs: list[Job]) -> None:
        self._dispatcher = dispatcher
        self.operations: list[Operation] = []
        self._owners: list[Job] = []  # of each operation
        for job in jobs:
            job.first = len(self.operations)
            self.operations += job.operations
            if job.left == 1:
                self._owners.append(job)
            else:
                self._owners += (job,) * job.left
        keys = Counter(job.key for job in jobs) if len({job.key for job in jobs}) < len(jobs) else {}
        self._unfinished: dict[str | int, int] = {key: times for key, times in keys.items() if times > 1}
        self.outcomes: Outcomes = [PENDING] * len(self.operations)
        self._unsettled = len(self.operations)
        self._finished: list[Job] = []  # whose waiters are not told yet
        self._holds = False
        self._began = monotonic_ns()

    def settle(self, index: int, outcome: Outcome | StateError) -> None:
        self.outcomes[index] = outcome
        self._unsettled -= 1
        if not self._unsettled:  # before the last who waits is told: who was told of all finds all counted
            tally = self._dispatcher._storage.tally
            tally.note(self.operations, self.outcomes, monotonic_ns() - self._began)
        job = self._owners[index]
        job.outcomes[index - job.first] = outcome
        job.left -= 1
        if not job.left:
            self._finished.append(job)
            if not self._holds:
                self._tell()

    def _tell(self) -> None:
        finished, self._finished = self._finished, []
        self._dispatcher.finish(finished, self._unfinished)

    def __enter__(self) -> None:
        self._holds = True

    def __exit__(self, *exc: object) -> None:
        self._holds = False
        if self._finished:
            self._tell()


def _tell(finished: list[Job]) -> None:
    """Tell all who wait for these jobs."""
    sleepers = {job.done() for job in finished}
    for sleeper in sleepers:
        if sleeper is not None:
            sleeper.wake()


def at_once(settle: Settle) -> AbstractContextManager[None]:
    """A block in which a backend settles several operations: who waits for them is told at its end, all at once.

    Telling them one by one costs a change of threads for each.
    """
    from contextlib import nullcontext

    group = getattr(settle, "__self__", None)
    return group if isinstance(group, _Group) else nullcontext()


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
