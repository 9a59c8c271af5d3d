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
from time import monotonic_ns

from ..errors import StateError, StateUnavailableError
from ..operations import Commit, Listing, Operation, Outcome, Query
from .crew import Crew
from .jobs import PENDING, CallBack, Job, abandoned, key_of, settle_rest, tell
from .processors import ANYWHERE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeVar

    from .base import StateStorage
    from .jobs import Done, Outcomes

    A = TypeVar("A")

_BUSY: Final[Any] = object()
"""Stands for an outcome where nothing was carried out, because there was too much to do already."""


class Dispatcher:
    """The queue in front of one storage. Thread-safe; belongs to no event loop."""

    def __init__(self, storage: StateStorage) -> None:
        self.storage = storage
        self.lock = threading.Lock()
        self._drained = threading.Condition(self.lock)
        self.queue: list[Job] = []  # jobs that no worker has looked at yet
        self._held: dict[str | int, list[Job]] = {}  # jobs whose key is busy, which go next when it is free
        self._busy: set[str | int] = set()  # keys with jobs in a group
        self.groups = 0  # how many groups are being carried out
        self._untold = 0  # how many groups of workers have jobs for which nobody was told yet
        self._draining = 0
        self.crew = Crew(self)

    def perform(self, operations: Sequence[Operation]) -> Outcomes:
        """Carry out operations on one context, in this thread if the storage is free, and return their outcomes."""
        outcomes: Outcomes = [PENDING] * len(operations)

        def work(operations: Sequence[Operation]) -> None:
            began = monotonic_ns()
            try:
                self._execute(operations, outcomes)
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
                free = not self.queue and key not in self._busy and self.groups < self.storage.groups
                if free:
                    self.groups += 1
                    self._busy.add(key)
            return work(argument) if free else _BUSY
        finally:
            if free:
                with self.lock:
                    # First of all, and by no call: a second interrupt would leave the key busy for ever.
                    self.groups -= 1
                    self._busy.discard(key)
                    if key in self._held:
                        self._queue_held(key)
                    if self.queue or self._draining:
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
            self.crew.processor = processor
            self.queue += jobs
            jobs.clear()
            self._wake()

    def withdraw(self, job: Job) -> bool:
        """Take a job out of the queue. False if it is being carried out already (or is done)."""
        with self.lock:
            for jobs in (self.queue, self._held.get(job.key, ())):
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

    def told(self) -> None:
        """Everybody who waited for a group was told."""
        with self.lock:
            self._untold -= 1
            self._look_around()

    # --- the following are called with the lock held ---

    def free(self, keys: set[str | int]) -> None:
        """The operations on these contexts are done: the next ones may begin."""
        self._busy -= keys
        if self._held:
            for key in keys & self._held.keys():
                self._queue_held(key)

    def may_begin(self) -> bool:
        """Whether there is something to do, and not too much being done."""
        return bool(self.queue) and self.groups < self.storage.groups

    def take_jobs(self, expected: int) -> tuple[list[Job], set[str | int]]:
        """Jobs to carry out next as one group, and their keys, none of which is busy.

        `expected`: how many are likely to come after others that are not done (or told of) yet.
        """
        while self.may_begin():
            share = -(-(len(self.queue) + expected) // self.storage.shares)
            jobs = self.queue[: min(share, self.storage.largest_group)]
            del self.queue[: len(jobs)]
            keys = {job.key for job in jobs}
            if not self._busy.isdisjoint(keys):
                for job in jobs:
                    if job.key in self._busy:
                        self._held.setdefault(job.key, []).append(job)
                jobs = [job for job in jobs if job.key not in self._busy]
                keys -= self._busy
            if jobs:
                self._busy |= keys
                self.groups += 1
                self._untold += 1
                return jobs, keys
        return [], set()

    def group_ended(self, *, told: bool) -> None:
        """A group of `take_jobs` was carried out. `told`: and so was everybody who waited for it."""
        self.groups -= 1
        self._untold -= told

    def look_whether_drained(self) -> None:
        """Tell those who wait for nothing to be left."""
        if self._draining and self._is_drained():
            self._drained.notify_all()

    def _is_drained(self) -> bool:
        return not self.queue and not self._busy and not self._untold

    def _wake(self) -> None:
        try:
            self.crew.wake()
        except RuntimeError as error:
            self._refuse(error)

    def _refuse(self, cause: RuntimeError) -> None:
        """Give what is queued back as not done, for there is nobody to do it."""
        refused, self.queue = self.queue, []
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

    def _queue_held(self, key: str | int) -> None:
        """Queue the jobs that were held back for a key, which is free now."""
        self.queue[:0] = self._held.pop(key)
        self._wake()

    def _look_around(self) -> None:
        """After a group: is there somebody to wake?"""
        if self.queue:
            self._wake()
        else:
            self.look_whether_drained()

    # --- the following is called without it ---

    def _execute(self, operations: Sequence[Operation], outcomes: Outcomes) -> None:
        """Execute, and leave no outcome open: not after a defect of the backend, nor after a KeyboardInterrupt in this
        thread, which its caller has lent."""
        failure: BaseException | None = None
        try:
            self.storage.execute(operations, outcomes.__setitem__)
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):
                raise
        finally:
            settle_rest(self.storage, operations, outcomes, outcomes.__setitem__, failure)
