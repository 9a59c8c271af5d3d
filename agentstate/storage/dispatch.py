"""Joins operations that wait together into one `execute`.

A `Job` is a few operations on one context, carried out in order. Jobs of a context run one after the other, in the
order in which they came; jobs of different contexts run together, as many as are waiting, up to a limit. While one
group is being executed the next one gathers: so a pipeline fills up, and a flush serves many, exactly when there is
much to do, and a lone call waits for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from time import monotonic, monotonic_ns

from ..errors import StateError, StateUnavailableError
from ..operations import Commit, Listing, Operation, Outcome, Query
from .jobs import PENDING, CallBack, Group, Job, abandoned, key_of, tell
from .processors import ANYWHERE, Seat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeVar

    from .base import Settle, StateStorage
    from .jobs import Done, Outcomes

    A = TypeVar("A")

LARGEST_GROUP: Final = 1024
"""Operations; more would make the first of them wait for the last."""

LONELY: Final = 3
"""After so many groups of one job, a worker need not be near the loop any more: both sleep between the steps of such a
call, and each wakes sooner on a processor of its own."""

_BUSY: Final[Any] = object()
"""Stands for an outcome where nothing was carried out, because there was too much to do already."""

PATIENCE: Final = 0.02
"""Seconds. A group that takes longer is not waited for by the next one, nor by those whose outcomes are known."""

IDLE_SECONDS: Final = 10.0
"""A worker thread with nothing to do for so long ends."""


class Dispatcher:
    """The queue in front of one storage. Thread-safe; belongs to no event loop."""

    def __init__(self, storage: StateStorage) -> None:
        self.storage = storage
        self.lock = threading.Lock()
        self._work_to_do = threading.Condition(self.lock)
        self._drained = threading.Condition(self.lock)
        self._queue: list[Job] = []  # jobs that no worker has looked at yet
        self._held: dict[str | int, list[Job]] = {}  # jobs whose key is busy, which go next when it is free
        self._busy: set[str | int] = set()  # keys with jobs in a group
        self._groups = 0  # how many groups are being executed
        self._jobs = 0  # how many jobs are in these, if a worker executes them
        self._expected: Group | None = None  # whose worker will soon be back, and take all that waits
        self._watched = False  # whether a worker looks how long that takes
        self._telling = 0  # how many groups of workers have jobs for which nobody was told yet
        self._workers = 0
        self._idle = 0
        self._draining = 0
        self._processor = ANYWHERE  # where those run who wait

    def perform(self, operations: Sequence[Operation]) -> Outcomes:
        """Carry out operations on one context, in this thread if the storage is free, and return their outcomes."""
        outcomes: Outcomes = [PENDING] * len(operations)

        def work(operations: Sequence[Operation]) -> None:
            began = monotonic_ns()
            try:
                self._execute(operations, outcomes, outcomes.__setitem__)
            finally:
                self.storage.tally.note(operations, outcomes, monotonic_ns() - began)

        if self._in_this_thread(key_of(operations[0]), work, operations) is _BUSY:
            return self._wait_for((operations,))[0]
        return outcomes

    def call(self, operation: Commit | Query) -> Outcome:
        """`perform` for one operation, whose error is raised: with less ado, since most are alone."""
        try:
            outcome: Any = self._in_this_thread(operation.context_id, self.storage.call, operation)
        except StateError:
            raise
        except Exception as error:
            raise abandoned(self.storage, operation, error) from error
        if outcome is _BUSY:
            outcome = self._wait_for(((operation,),))[0][0]
            if isinstance(outcome, StateError):
                raise outcome
        result: Outcome = outcome
        return result

    def _in_this_thread(self, key: str | int, work: Callable[[A], Any], argument: A) -> Any:
        """`work` on its argument, as a group of its own with this key; or `_BUSY` if the storage or the key is."""
        free = False
        try:  # before the lock: a KeyboardInterrupt right after it would leave the key busy for ever
            with self.lock:
                free = not self._queue and key not in self._busy and self._groups < self.storage.groups
                if free:
                    self._groups += 1
                    self._busy.add(key)
            return work(argument) if free else _BUSY
        finally:
            if free:
                with self.lock:
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

        jobs = [CallBack(operations, done) for operations in each]
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
        job = CallBack(operations, done)
        self.submit_jobs([job])
        return job

    def submit_jobs(self, jobs: list[Job], processor: int = ANYWHERE) -> None:
        """Queue jobs in this order, and empty the list: what is left in it after a KeyboardInterrupt is not queued.

        `processor`: where the thread runs that waits for them, if it does nothing else meanwhile.
        """
        with self.lock:
            self._processor = processor
            self._queue += jobs
            jobs.clear()
            self._wake_a_worker()

    def withdraw(self, job: Job) -> bool:
        """Take a job out of the queue. False if it is being carried out already (or is done)."""
        with self.lock:
            for jobs in (self._queue, self._held.get(job.key, ())):
                if job in jobs:
                    jobs.remove(job)  # type: ignore[union-attr]
                    return True
            return False

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until nothing is queued or being carried out. False if that took longer than `timeout` seconds."""
        with self.lock:
            self._draining += 1
            try:
                return self._drained.wait_for(self._is_drained, timeout)
            finally:
                self._draining -= 1

    def give_up_on(self, group: Group) -> None:
        """Do not wait any longer for a group to end: let others go ahead, and tell those whose outcomes are known."""
        with self.lock:
            if self._expected is not group:
                return
            self._expected = None
            finished = group.be_prompt()
            if self._queue:
                self._wake_a_worker()
        group.under_way()
        if finished:
            tell(finished)

    def told(self) -> None:
        """Everybody who waited for a group was told."""
        with self.lock:
            self._telling -= 1
            self._look_around()

    # --- the following are called with the lock held ---

    def free(self, keys: set[str | int]) -> None:
        """The operations on these contexts are done: the next ones may begin."""
        self._busy -= keys
        if self._held:
            for key in keys & self._held.keys():
                self._queue_held(key)

    def _is_drained(self) -> bool:
        return not self._queue and not self._busy and not self._telling

    def _may_begin(self) -> bool:
        """Whether a worker should carry out what is queued, rather than leave it to one who will soon be back."""
        return bool(self._queue) and self._groups < self.storage.groups and self._expected is None

    def _wake_a_worker(self) -> None:
        if self._watched if self._expected is not None else self._groups >= self.storage.groups:
            return  # who finishes a group takes the next one
        if self._idle:
            self._work_to_do.notify()
        elif self._workers < self.storage.groups:
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
            job.outcomes = [self._not_done(operation, cause) for operation in job.operations]
        tell(refused)
        self._look_around()

    def _not_done(self, operation: Operation, cause: RuntimeError) -> StateError:
        error = StateUnavailableError(
            f"nothing was done, since no thread could be started: {cause}",
            context_id=None if isinstance(operation, Listing) else operation.context_id,
        )
        error.__cause__ = cause
        self.storage.tally.failed(error)
        return error

    def _take_group(self, last: Group | None) -> Group | None:
        """The jobs to carry out next, none of which has a key that is busy. `last`: the group that this worker had
        before, whose jobs are not told of yet; they are likely to be followed by as many."""
        returning = 0 if last is None else len(last.jobs)
        while self._may_begin():
            share = -(-(len(self._queue) + self._jobs + returning) // self.storage.shares)
            jobs = self._queue[: min(share, LARGEST_GROUP)]
            del self._queue[: len(jobs)]
            keys = {job.key for job in jobs}
            if not self._busy.isdisjoint(keys):
                for job in jobs:
                    if job.key in self._busy:
                        self._held.setdefault(job.key, []).append(job)
                jobs = [job for job in jobs if job.key not in self._busy]
                keys -= self._busy
            if jobs:
                self._busy |= keys
                self._groups += 1
                self._jobs += len(jobs)
                self._telling += 1
                group = Group(self, jobs, keys, last)
                if self.storage.says_when_under_way and self.storage.groups > 1:
                    self._expected = group
                else:
                    group.be_prompt()
                if self._queue or last is not None:
                    self._wake_a_worker()
                return group
        return None

    def _ended(self, group: Group) -> Group | None:
        """A worker has carried a group out. Returns it if nobody was told of it yet."""
        self._groups -= 1
        self._jobs -= len(group.jobs)
        if self._expected is not group:
            self._telling -= 1
            return None
        group.end()  # here, for whoever loses patience with the next group tells those who wait for this one
        self.free(group.keys)
        self._expected = None
        return group

    def _queue_held(self, key: str | int) -> None:
        """Queue the jobs that were held back for a key, which is free now."""
        self._queue[:0] = self._held.pop(key)
        self._wake_a_worker()

    def _look_around(self) -> None:
        """After a group: is there somebody to wake?"""
        if self._queue:
            self._wake_a_worker()
        elif self._draining and self._is_drained():
            self._drained.notify_all()

    # --- the following are called without it ---

    def _work(self) -> None:
        """A worker thread: takes one group after the other."""
        seat = Seat()
        lonely = 0  # groups of one job, in a row
        last: Group | None = None  # of which nobody was told yet
        group: Group | None = None  # to be carried out next
        while True:
            if group is None:
                if last is not None:
                    last.tell()
                    last = None
                elif not self._wait_for_work():
                    return
                with self.lock:
                    group = self._take_group(None)
                continue
            lonely = lonely + 1 if len(group.jobs) == 1 and last is None else 0
            if lonely > LONELY:
                seat.move(ANYWHERE)
            elif not lonely:
                seat.move(self._processor)
            self._execute(group.operations, group.outcomes, group.settle, lent=False)
            group.under_way()
            with self.lock:  # without a gap, or another worker would come in
                last = self._ended(group)
                group = self._take_group(last)
                if group is None:
                    self._look_around()

    def _wait_for_work(self) -> bool:
        """For a worker with nothing to do. False: it was nothing for long, and this worker is not needed any more."""
        with self.lock:
            while not self._may_begin():
                expected = self._expected
                self._idle += 1
                if expected is not None and not self._watched and (self._queue or expected.delays_others):
                    self._watched = True
                    self._work_to_do.wait(expected.began + PATIENCE - monotonic())
                    self._watched = False
                    woken = True
                else:
                    woken = self._work_to_do.wait(IDLE_SECONDS)
                self._idle -= 1
                if not woken and not self._queue:
                    self._workers -= 1
                    return False
                expected = self._expected
                if expected is not None and monotonic() >= expected.began + PATIENCE:
                    break
            else:
                return True
        self.give_up_on(expected)
        return True

    def _execute(
        self, operations: Sequence[Operation], outcomes: Outcomes, settle: Settle, *, lent: bool = True
    ) -> None:
        """Execute, and leave nobody waiting: not after a defect of the backend, nor after a KeyboardInterrupt in a
        thread that was `lent` by its caller. `settle` puts what it is given into `outcomes`."""
        failure: BaseException | None = None
        try:
            self.storage.execute(operations, settle)
        except BaseException as error:
            failure = error
            if lent and not isinstance(error, Exception):
                raise
        finally:
            for index, outcome in enumerate(outcomes):
                if outcome is PENDING:
                    settle(index, abandoned(self.storage, operations[index], failure))
