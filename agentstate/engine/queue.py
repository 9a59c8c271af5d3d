"""The queue in front of one storage, and its worker threads. The package's docstring explains how they work."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import StateConflictError, StateError, StateUnavailableError
from ..operations import Commit, Listing, Operation, Outcome, Query
from ..storage.base import PENDING, StateStorage, abandoned, alive

if TYPE_CHECKING:
    from logging import Logger

Outcomes: TypeAlias = list[Outcome | StateError]

IDLE_SECONDS: Final = 10.0
"""A worker thread with nothing to do for so long ends."""

PATIENCE: Final = 0.01
"""Seconds. Whoever has waited so long looks whether a group takes longer, and lets another worker serve its lane."""

_BUSY: Final[Any] = object()
"""Returned instead of an outcome where a call has to be queued."""


class Job:
    """Operations on one context, carried out in order.

    The oldest job of a context that is not done stands for the context in the queue: `Engine._contexts` has it, and
    it keeps the younger ones. So a context that has only one, as nearly all have, costs no object of its own.
    """

    __slots__ = ("behind", "done", "first", "key", "lane", "left", "operations", "outcomes", "running")

    first: int
    """The index of its first operation in its group."""

    lane: _Lane

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self.outcomes: Outcomes = []  # empty until all of them are known
        self.done = False
        self.key = _key_of(operations[0])
        self.left = len(operations)  # operations without an outcome
        # If it stands for its context:
        self.behind: list[Job] | None = None  # jobs that are not in a group yet
        self.running = 0  # jobs in a group that are not done, itself perhaps among them; 0: none is in a group

    def deliver(self) -> None:
        """Pass the outcomes on to whoever waits for them: in the thread that learned the last one, once; twice only
        after a failure in that thread."""
        raise NotImplementedError


class CallBack(Job):
    """A job that is passed to a function when it is done."""

    __slots__ = ("function",)

    def __init__(self, operations: Sequence[Operation], function: Callable[[Job], object]) -> None:
        super().__init__(operations)
        self.function = function

    def deliver(self) -> None:
        self.function(self)


class _Lane:
    """Operations that compete for the same workers."""

    __slots__ = ("ready", "requested", "running")

    def __init__(self) -> None:
        self.ready: deque[Job] = deque()  # that stand for contexts with nothing running, or did (see `withdraw`)
        self.running: set[object] = set()  # groups, and calls in their callers' threads
        self.requested = False  # a worker was asked for, and has not come yet

    def groups(self) -> list[_Group]:
        """Those that are running."""
        return [each for each in self.running if isinstance(each, _Group)]


class Engine:
    """The queue in front of one storage. Thread-safe, and not tied to an event loop."""

    def __init__(self, storage: StateStorage) -> None:
        self.storage = storage
        self._has_lanes = type(storage).lane is not StateStorage.lane
        self._begin_anew()
        storage.before_close.append(self._close)

    def _begin_anew(self) -> None:
        """As at the beginning; also in the child of a fork, where the parent's threads and calls do not exist."""
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)
        self._contexts: dict[Hashable, Job] = {}
        self._lane = _Lane()
        self._lanes: dict[Hashable, _Lane] = {None: self._lane}
        self._requests: SimpleQueue[_Lane | None] = SimpleQueue()  # lanes that need a worker; None: end, if not needed
        self._threads: set[threading.Thread] = set()
        self._serving: set[threading.Thread] = set()  # of these, those that have a lane
        self._refused: list[Job] = []  # not delivered yet
        self._inside: dict[int, None] = {}  # threads inside a call (a set, but one that is changed by an assignment)

    # --- calls that block ---

    def call(self, operation: Commit | Query) -> Outcome:
        """Carry out one operation, in this thread if the storage is free. Returns its outcome or raises its error.

        What is raised in this thread by others, such as a signal handler, passes through untouched.
        """
        outcome = self._in_this_thread(operation, self.storage.call, operation)
        if outcome is _BUSY:
            outcome = self._wait_for([(operation,)])[0][0]
            if isinstance(outcome, StateError):
                raise outcome
        return outcome  # type: ignore[no-any-return]

    def perform(self, operations: Sequence[Operation]) -> Outcomes:
        """`call` for several operations on one context, in order. Returns their outcomes, errors as values."""
        outcomes = self._in_this_thread(operations[0], self.storage.carry_out, operations)
        if outcomes is _BUSY:
            return self._wait_for([operations])[0]
        return outcomes  # type: ignore[no-any-return]

    def perform_each(self, operations: Iterable[Operation]) -> Outcomes:
        """Carry out independent operations together. Returns their outcomes, errors as values."""
        return [outcomes[0] for outcomes in self._wait_for([(operation,) for operation in operations])]

    def _in_this_thread(self, first: Operation, work: Callable[[Any], Any], argument: Any) -> Any:
        """`work(argument)`, as if by a worker; `_BUSY` where it has to be queued."""
        job = Job((first,))
        lane = self._lane_of(first)
        free = False
        me = self._check_entry()
        self._inside[me] = None  # by an assignment, not by a call: no signal handler can run before the `try`
        try:
            with self._lock:
                free = not lane.ready and len(lane.running) < self.storage.concurrency and job.key not in self._contexts
                if free:
                    job.lane, job.running = lane, 1
                    self._contexts[job.key] = job
                    lane.running.add(job)
            return work(argument) if free else _BUSY
        finally:
            try:
                if free:
                    self._leave(job)
            except BaseException:  # of a signal handler: once more, for it must be done
                self._leave(job)
                raise
            finally:
                del self._inside[me]
            if self._refused:
                self._deliver_refused()

    def _leave(self, job: Job) -> None:
        """A call that `_in_this_thread` has carried out is over. Doing it twice does no harm."""
        with self._lock:
            job.lane.running.discard(job)
            if self._contexts.get(job.key) is job:
                self._end_of_run(job)
            self._request(job.lane)

    def _wait_for(self, each: Sequence[Sequence[Operation]]) -> list[Outcomes]:
        """Queue jobs, and wait until workers have carried them all out."""
        finished = threading.Lock()
        waiting: set[Job] = set()

        def done(job: Job) -> None:
            waiting.discard(job)
            if not waiting and finished.locked():
                finished.release()

        jobs = [CallBack(operations, done) for operations in each]
        if jobs:
            waiting.update(jobs)
            finished.acquire()
        try:
            for job in jobs:
                self.submit(job)
            while not finished.acquire(timeout=PATIENCE):
                self.look_after()
        except BaseException:  # KeyboardInterrupt, or what a signal handler raised: what has not begun need not
            for job in jobs:
                self.withdraw(job)
            raise
        return [job.outcomes for job in jobs]

    # --- the queue ---

    def submit(self, job: Job) -> None:
        """Queue a job. Does not wait. Where no thread can be started, the job is delivered as not done."""
        lane = self._lane_of(job.operations[0])
        me = self._check_entry()
        self._inside[me] = None
        try:
            with self._lock:
                oldest = self._contexts.get(job.key)
                if oldest is None:
                    job.lane = lane
                    self._contexts[job.key] = job
                    lane.ready.append(job)
                    self._request(lane)
                elif oldest.behind is None:
                    oldest.behind = [job]
                else:
                    oldest.behind.append(job)
        finally:
            del self._inside[me]
        if self._refused:
            self._deliver_refused()

    def withdraw(self, job: Job) -> bool:
        """Take a job back that is still waiting: it will never be carried out. False if it is running or done."""
        with self._lock:
            oldest = self._contexts.get(job.key)
            if oldest is job and not job.running:
                self._end_of_run(job)  # what it leaves in its lane is passed over
                return True
            if oldest is not None and oldest.behind and job in oldest.behind:
                oldest.behind.remove(job)
                return True
            return False

    def look_after(self) -> bool:
        """Let another worker serve each lane in which a group takes longer than `PATIENCE`. False: there is no job."""
        with self._lock:
            long_ago = monotonic() - PATIENCE
            for lane in self._lanes.values():
                if any(group.began < long_ago for group in lane.groups()):
                    self._request_one_more(lane)
            return bool(self._contexts)

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until nothing is waiting or running. False if that took longer than `timeout` seconds."""
        with self._lock:
            return self._drained.wait_for(self._is_drained, timeout)

    def _close(self) -> None:
        """Before the storage closes: finish what was begun, and end the workers."""
        self._check_entry()
        self.wait_until_empty(self.storage.deadline)
        for _ in range(len(self._threads)):
            self._requests.put(None)

    def _check_entry(self) -> int:
        me = threading.get_ident()
        if me in self._inside:
            raise StateConflictError(
                "this thread is inside a call to the same storage already: a signal handler or a finalizer that"
                " interrupts a call cannot make another one; let it set a flag, and make the call later"
            )
        return me

    def _lane_of(self, operation: Operation) -> _Lane:
        if not self._has_lanes:
            return self._lane
        name = self.storage.lane(operation)
        return self._lanes.get(name) or self._lanes.setdefault(name, _Lane())

    def _deliver_refused(self) -> None:
        refused, self._refused = self._refused, []
        for job in refused:
            _deliver(job)

    # --- the following are called with the lock held ---

    def _request(self, lane: _Lane) -> None:
        """See to it that a worker serves the lane if anything waits there. One that does so already goes on with it."""
        if not lane.groups():
            self._request_one_more(lane)

    def _request_one_more(self, lane: _Lane) -> None:
        if lane.ready and not lane.requested and len(lane.running) < self.storage.concurrency:
            self._requests.put(lane)
            # Last: if a signal handler raises before, there is a request too many, but no job that nobody comes for.
            lane.requested = self._start_threads(1 + sum(lane.requested for lane in self._lanes.values()))

    def _refuse_all(self, cause: RuntimeError) -> None:
        """Give all that waits back as not done, for there is nobody to do it."""
        for lane in self._lanes.values():
            lane.requested = False
            while lane.ready:
                oldest = lane.ready.popleft()
                if self._contexts.get(oldest.key) is not oldest or oldest.running:
                    continue
                del self._contexts[oldest.key]
                for job in (oldest, *(oldest.behind or ())):
                    job.outcomes = [self._not_done(operation, cause) for operation in job.operations]
                    self._refused.append(job)

    def _not_done(self, operation: Operation, cause: RuntimeError) -> StateError:
        error = StateUnavailableError(
            f"nothing was done, since no thread could be started: {cause}",
            context_id=None if isinstance(operation, Listing) else operation.context_id,
        )
        error.__cause__ = cause
        self.storage.tally.failed(error)
        return error

    def _end_of_run(self, oldest: Job) -> None:
        """Nothing of its context is running any more. The next job, if there is one, stands for the context."""
        # In an order that leaves an exception in between without harm: it is then done once more.
        lane, behind = oldest.lane, oldest.behind
        if behind:
            job = behind[0]
            job.lane, job.behind = lane, behind[1:]
            lane.ready.append(job)
            self._contexts[job.key] = job
        elif self._contexts.pop(oldest.key, None) and not self._contexts:
            self._look_whether_drained()
        oldest.running = 0
        self._request(lane)

    def _start_threads(self, requests: int) -> bool:
        """Start a thread for each request that no idle one is left for. False where there is no thread at all."""
        while len(self._threads) - len(self._serving) < requests:
            thread = threading.Thread(
                target=_work, args=(weakref.ref(self), self._requests), name="agentstate-worker", daemon=True
            )
            self._threads.add(thread)
            try:
                thread.start()
            except BaseException as error:
                if not thread.is_alive():
                    self._threads.discard(thread)
                if not isinstance(error, RuntimeError):
                    raise
                if not self._threads:  # too many threads, too little memory, or the interpreter ends
                    self._refuse_all(error)
                return bool(self._threads)
        return True

    def _look_whether_drained(self) -> None:
        if self._is_drained():
            self._drained.notify_all()

    def _is_drained(self) -> bool:
        return not self._contexts and not any(lane.running for lane in self._lanes.values())

    # --- the following are called by worker threads, without it ---

    def _serve(self, lane: _Lane) -> None:
        """Carry out one group of the lane after the other, until nothing waits."""
        thread = threading.current_thread()
        with self._lock:
            self._serving.add(thread)
            lane.requested = False
        while _Group(self, lane, thread).run():
            pass
        with self._lock:
            self._serving.discard(thread)
        if self._refused:
            self._deliver_refused()

    def _end_worker(self, thread: threading.Thread) -> None:
        """The thread ends, or failed at whatever line. Others do what is left."""
        with self._lock:
            self._threads.discard(thread)
            self._serving.discard(thread)
            for lane in self._lanes.values():
                lane.running -= {group for group in lane.running if type(group) is _Group and group.thread is thread}
                lane.requested = False
                self._request(lane)
            self._look_whether_drained()
        self._deliver_refused()


class _Group:
    """Jobs that are carried out together: those of all contexts of a lane that are ready, up to a limit."""

    def __init__(self, engine: Engine, lane: _Lane, thread: threading.Thread) -> None:
        self.thread = thread
        self.began = monotonic()
        self._engine = engine
        self._lane = lane
        self._taking: Job | None = None  # the last one that was taken, or is being taken
        self._jobs: list[Job] = []
        self._operations: list[Operation] = []
        self._outcomes: list[Any] = []
        self._owners: list[Job] = []  # whose each operation is
        self._unsettled = 0

    def run(self) -> bool:
        """Take what is ready and carry it out. Leaves no job of it open, whatever happens. False: nothing was ready."""
        try:
            with self._engine._lock:
                self._take()
            if self._jobs:
                self._execute()
        except BaseException as error:  # noqa: BLE001 - those who wait learn of it, and the worker goes on
            self._recover(error)
            return True
        finally:
            with self._engine._lock:
                self._lane.running.discard(self)
                self._engine._look_whether_drained()
        return bool(self._jobs)

    def settle(self, index: int, outcome: Outcome | StateError) -> None:
        """The outcome of an operation is known."""
        if self._outcomes[index] is not PENDING:
            return  # the backend has settled it before
        self._outcomes[index] = outcome
        self._unsettled -= 1
        if not self._unsettled:  # counted before the last job is delivered: then everybody finds it counted
            self._engine.storage.tally.note(self._operations, self._outcomes, int((monotonic() - self.began) * 1e9))
        job = self._owners[index]
        job.left -= 1
        if not job.left:
            self._finish(job)

    def _take(self) -> None:
        """With the lock held: the next jobs, of contexts that nobody else is at."""
        engine, lane = self._engine, self._lane
        if not lane.ready or len(lane.running) >= engine.storage.concurrency:
            return
        lane.running.add(self)
        jobs = self._jobs
        most = engine.storage.largest_group
        while lane.ready and len(jobs) < most:
            oldest = lane.ready[0]
            if engine._contexts.get(oldest.key) is oldest and not oldest.running:  # else it was withdrawn
                self._taking = oldest
                behind = oldest.behind or []
                some = (oldest, *behind[: most - len(jobs) - 1])
                oldest.running = len(some)
                jobs += some
                oldest.behind = behind[len(some) - 1 :]
            lane.ready.popleft()

    def _execute(self) -> None:
        storage = self._engine.storage
        self._prepare()
        if len(self._operations) == 1:
            try:
                outcome: Any = storage.execute_one(self._operations[0])
            except StateError as error:
                outcome = error
            self.settle(0, outcome)
        else:
            storage.execute(self._operations, self.settle)
        if self._unsettled:
            self._abandon(None)

    def _prepare(self) -> None:
        self._operations = [operation for job in self._jobs for operation in job.operations]
        self._owners = self._jobs
        if len(self._operations) > len(self._jobs):
            self._owners = [job for job in self._jobs for _ in job.operations]
            first = 0
            for job in self._jobs:
                job.first = first
                first += len(job.operations)
        else:
            for first, job in enumerate(self._jobs):
                job.first = first
        self._unsettled = len(self._operations)
        self._outcomes = [PENDING] * len(self._operations)

    def _finish(self, job: Job) -> None:
        """All outcomes of the job are known: its context goes on, and whoever waits for it learns of them."""
        job.outcomes = self._outcomes[job.first : job.first + len(job.operations)]
        engine = self._engine
        oldest = engine._contexts[job.key]
        if oldest.running == 1:
            with engine._lock:
                engine._end_of_run(oldest)
        else:
            oldest.running -= 1
        _deliver(job)
        job.done = True

    def _abandon(self, failure: BaseException | None) -> None:
        """Settle what the backend left open."""
        for index, outcome in enumerate(self._outcomes):
            if outcome is PENDING:
                self.settle(index, abandoned(self._engine.storage, self._operations[index], failure))

    def _recover(self, failure: BaseException) -> None:
        """After a defect of the backend, or an exception at whatever line of this class (no memory, for example)."""
        engine = self._engine
        mine = set(self._jobs)
        with engine._lock:
            if self._taking is not None and self._taking not in mine:
                self._taking.running = 0
                self._lane.ready.append(self._taking)
            self._count_anew(mine)
        try:
            if len(self._outcomes) < len(mine):
                self._prepare()
            self._abandon(failure)
        finally:
            with engine._lock:
                for oldest in mine:
                    if oldest.running and engine._contexts.get(oldest.key) is oldest:
                        engine._end_of_run(oldest)
            for job in self._jobs:
                if not job.done:
                    job.outcomes = self._outcomes[job.first : job.first + len(job.operations)]
                    _deliver(job)

    def _count_anew(self, mine: set[Job]) -> None:
        """Make what the queue knows of the group's contexts agree with its jobs. With the lock held."""
        left = Counter(job.key for job in mine if not job.done)
        for oldest in mine:
            if self._engine._contexts.get(oldest.key) is oldest:
                oldest.running = left[oldest.key]
                oldest.behind = [job for job in oldest.behind or () if job not in mine]


def engine_of(storage: StateStorage) -> Engine:
    """The engine of a storage, made when it is asked for first."""
    engine: Engine | None = storage.__dict__.get("_engine")
    if engine is None:
        engine = storage.__dict__.setdefault("_engine", Engine(storage))
    return engine


def _key_of(first: Operation) -> Hashable:
    """What jobs must share to be carried out one after the other: the context. Listings need not wait for another."""
    return id(first) if type(first) is Listing else first.context_id  # type: ignore[union-attr]


def _deliver(job: Job) -> None:
    for _ in range(2):  # it may have been for want of memory
        try:
            job.deliver()
        except Exception:  # noqa: BLE001 - logged
            _logger().exception("an outcome could not be delivered")
        else:
            return


def _logger() -> Logger:
    from logging import getLogger  # late: most programs never need it

    return getLogger("agentstate.engine")


def _work(reference: weakref.ref[Engine], requests: SimpleQueue[_Lane | None]) -> None:
    """What a worker thread does. While it waits it does not keep the storage alive."""
    try:
        while True:
            lane = _next_request(requests)
            engine = reference()
            if engine is None:
                return
            if lane is None:
                engine._end_worker(threading.current_thread())
                return
            engine._serve(lane)
            del engine
    except BaseException:  # noqa: BLE001 - logged
        engine = reference()
        if engine is not None:
            engine._end_worker(threading.current_thread())
        _logger().exception("a worker thread failed, and is replaced")


def _next_request(requests: SimpleQueue[_Lane | None]) -> _Lane | None:
    try:
        return requests.get(timeout=IDLE_SECONDS)
    except Empty:
        return None


def _after_fork_in_child() -> None:
    for storage in list(alive):
        engine: Engine | None = storage.__dict__.get("_engine")
        if engine is not None:
            engine._begin_anew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
