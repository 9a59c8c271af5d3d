"""The worker threads of a dispatcher, and who of them does what.

Where a storage `says_when_under_way`, one worker leads: it alone begins groups, one after the other. A group that is
carried out in steps (`StateStorage.begin`) is on its way between these: the leader waits for the answers to all that
are, and for more to do, at the same time, and so there is always one for the server to go on with. The others are there
for what takes long. A leader that has been at one group for `PATIENCE`, or says that it is held up, is left to it, and
the next worker leads. Of other storages each worker carries out whatever there is to do.
"""

from __future__ import annotations

import threading
from bisect import insort
from operator import attrgetter
from time import monotonic

from .bell import CAN_RING, Bell
from .jobs import Group, tell
from .processors import ANYWHERE, Seat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .dispatch import Dispatcher

AHEAD: Final = 2
"""Groups that are on their way at a time: one for the server to carry out, and one to go on with."""

LONELY: Final = 3
"""After so many groups of one job, a worker need not be near the loop any more: both sleep between the steps of such a
call, and each wakes sooner on a processor of its own."""

PATIENCE: Final = 0.02
"""Seconds. A group that takes longer, or hears nothing for so long, is not waited for by the next one, nor by those
whose outcomes are known."""

IDLE_SECONDS: Final = 10.0
"""A worker thread with nothing to do for so long ends."""

_BEGAN: Final = attrgetter("began")


class Worker:
    """A thread of a crew."""

    def __init__(self) -> None:
        self._seat = Seat()
        self.lonely = 0  # groups of one job, in a row, with nothing before or beside them
        self.bell: Bell | None = None  # once it has waited for answers

    def sit(self, processor: int) -> None:
        """Run near whoever waits there, unless calls come one by one."""
        if self.lonely > LONELY:
            self._seat.move(ANYWHERE)
        elif not self.lonely:
            self._seat.move(processor)

    def close(self) -> None:
        bell, self.bell = self.bell, None
        if bell is not None:
            bell.close()


class Crew:
    """The worker threads of one dispatcher, whose lock they share."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.processor = ANYWHERE  # where those run who wait
        self._dispatcher = dispatcher
        self._storage = dispatcher.storage
        self._lock = dispatcher.lock
        self._work_to_do = threading.Condition(dispatcher.lock)
        self._workers: list[Worker] = []
        self._idle = 0
        self._leader: Worker | None = None  # who will soon be back, and see to all that waits
        self._at_work: Group | None = None  # what the leader is at; None while it waits for answers
        self._since = 0.0  # since when
        self._asleep = False  # whether the leader waits for answers, and has to be woken for what else there is
        self._watched = False  # whether a worker looks how long the leader takes
        self._on_their_way: list[Group] = []  # in the order in which they began; whoever leads goes on with them
        self._jobs = 0  # how many jobs are being carried out

    def held_up(self, group: Group) -> None:
        """Do not wait for the worker that is at this group: it waits for something else."""
        self._give_up_on(group)
        with self._lock:
            if self._dispatcher.queue or self._on_their_way:
                self.wake()

    def forget(self) -> None:
        """In the child of a fork: the threads are the parent's."""
        for worker in self._workers:
            worker.close()

    # --- the following are called with the lock held ---

    def wake(self) -> None:
        """There is something to do: see to it that somebody does it. Raises RuntimeError where nobody can."""
        if self._leader is not None:
            if self._asleep:
                self._ring()
                return
            if self._watched:
                return  # the leader will see to it, or whoever takes its place
        elif self._dispatcher.groups >= self._storage.groups:
            return  # who finishes a group takes the next one
        if self._idle:
            self._work_to_do.notify()
        elif len(self._workers) < self._storage.groups:
            worker = Worker()
            self._workers.append(worker)
            try:
                threading.Thread(target=self._work, args=(worker,), name="agentstate-worker", daemon=True).start()
            except RuntimeError:  # too many threads, too little memory, or the interpreter ends
                self._workers.remove(worker)
                if not self._workers:
                    raise

    def _ring(self) -> None:
        self._asleep = False
        assert self._leader is not None
        assert self._leader.bell is not None
        self._leader.bell.ring()

    def _has_a_leader(self) -> bool:
        return self._storage.says_when_under_way and self._storage.groups > 1

    def _take_group(self, worker: Worker, last: Group | None) -> Group | None:
        """The next group for this worker to begin, or to go on with.

        `last`: the one that it has carried out, whose jobs are not told of yet; they are likely to be followed by as
        many.
        """
        if self._leader is not None and self._leader is not worker:
            return None
        if self._are_enough():
            if last is None and len(self._on_their_way) == AHEAD:  # there is nothing else to wait for than the oldest
                self._leader = worker
                return self._resume(self._on_their_way[0])
            return None
        expected = self._jobs if last is None else self._jobs + len(last.jobs)
        jobs, keys = self._dispatcher.take_jobs(expected)
        if not jobs:
            return None
        self._jobs += len(jobs)
        alone = len(jobs) == 1 and last is None and not self._on_their_way
        worker.lonely = worker.lonely + 1 if alone else 0
        leads = self._has_a_leader()
        # One that is alone again has nothing to be joined by: that is done without steps, since it is faster.
        group = Group(self._dispatcher, jobs, keys, last, in_steps=CAN_RING and leads and worker.lonely < 2)
        if leads:
            self._leader, self._at_work, self._since = worker, group, group.began
        else:
            group.be_prompt()
        if self._dispatcher.queue or last is not None or self._on_their_way:
            self.wake()
        return group

    def _resume(self, group: Group) -> Group:
        """For the leader, which is at this group from now on."""
        self._on_their_way.remove(group)
        self._at_work, self._since = group, monotonic()
        if self._on_their_way:
            self.wake()  # somebody has to see to the others if it takes long
        return group

    def _are_enough(self) -> bool:
        """Whether there are as many groups on their way as should be. (Those that take long have no part in it.)"""
        return sum(not group.prompt for group in self._on_their_way) >= AHEAD

    def _groups_to_wait_for(self, worker: Worker, last: Group | None) -> list[Group]:
        """For a worker that has no group to begin: those on their way, if it leads from now on."""
        leads = self._leader is worker
        if last is not None:
            if leads:  # while it tells those who wait for this one
                self._at_work, self._since = last, monotonic()
            return []
        self._dispatcher.look_whether_drained()
        if self._on_their_way and (leads or self._leader is None):
            self._leader, self._at_work = worker, None
            worker.bell = worker.bell or Bell()
            self._asleep = True
            return [*self._on_their_way]
        if leads:
            self._leader = self._at_work = None
        return []

    def _ended(self, worker: Worker, group: Group) -> Group | None:
        """This worker has carried a group out. Returns it if nobody was told of it yet."""
        self._jobs -= len(group.jobs)
        self._dispatcher.group_ended(told=group.prompt)
        if self._leader is worker:
            self._at_work = None
        elif self._leader is not None and self._dispatcher.queue:
            self.wake()  # this one was in the way
        if group.prompt:
            return None
        group.end()  # here, for whoever loses patience with the next group tells those who wait for this one
        self._dispatcher.free(group.keys)
        return group

    def _may_begin(self) -> bool:
        """Whether there is something to do for a worker that does not lead."""
        if self._leader is not None:
            return False
        return bool(self._on_their_way) or self._dispatcher.may_begin()

    # --- the following are called without it ---

    def _work(self, worker: Worker) -> None:
        """What a worker thread does."""
        last: Group | None = None  # carried out; nobody was told of it yet
        try:
            while True:
                with self._lock:  # without a gap, or another worker would come in
                    group = self._take_group(worker, last)
                    groups = [] if group is not None else self._groups_to_wait_for(worker, last)
                if group is not None:
                    worker.sit(self.processor)
                    last = self._go_on(worker, group)
                elif last is not None:
                    last.tell()
                    last = None
                elif groups:
                    group = self._wait_for_answers(worker, groups)
                    if group is not None:
                        last = self._go_on(worker, group)
                elif not self._wait_for_work(worker):
                    return
        finally:
            worker.close()

    def _go_on(self, worker: Worker, group: Group) -> Group | None:
        """Carry a group out, or a step of it. Returns it if it ended, and nobody was told of it yet."""
        is_done = group.go_on()
        with self._lock:
            if is_done:
                return self._ended(worker, group)
            insort(self._on_their_way, group, key=_BEGAN)  # the server answers in this order
            if self._leader is worker:
                self._at_work = None
            elif self._asleep:
                self._ring()  # whoever leads now: to wait for this one too
            return None

    def _wait_for_answers(self, worker: Worker, groups: list[Group]) -> Group | None:
        """For the leader: wait until one of these groups can go on, which is returned, or there is more to begin."""
        assert worker.bell is not None
        until = min(group.until if group.prompt else min(group.moved + PATIENCE, group.until) for group in groups)
        ready = worker.bell.wait([group.descriptor for group in groups], until - monotonic())
        chosen: Group | None = None
        jobs = []
        with self._lock:
            self._asleep = False
            now = monotonic()
            for group in groups:
                if group.descriptor in ready or now >= group.until:
                    chosen = chosen or group
                elif not group.prompt and now >= group.moved + PATIENCE:
                    jobs += group.be_prompt()
            if chosen is not None:
                if self._dispatcher.may_begin() and not self._are_enough():
                    chosen = None  # first give the server something to go on with
                else:
                    self._resume(chosen)
        if jobs:
            tell(jobs)
        return chosen

    def _wait_for_work(self, worker: Worker) -> bool:
        """For a worker with nothing to do. False: it was nothing for long, and this worker is not needed any more."""
        dispatcher = self._dispatcher
        with self._lock:
            while not self._may_begin():
                at_work = self._at_work
                self._idle += 1
                if (
                    at_work is not None
                    and not self._watched
                    and (dispatcher.queue or self._on_their_way or at_work.delays_others)
                ):
                    self._watched = True
                    self._work_to_do.wait(self._since + PATIENCE - monotonic())
                    self._watched = False
                    woken = True
                else:
                    woken = self._work_to_do.wait(IDLE_SECONDS)
                self._idle -= 1
                if not woken and not dispatcher.queue and not self._on_their_way:
                    self._workers.remove(worker)
                    return False
                at_work = self._at_work
                if at_work is not None and monotonic() >= self._since + PATIENCE:
                    break
            else:
                return True
        self._give_up_on(at_work)
        return True

    def _give_up_on(self, group: Group) -> None:
        """Do not wait any longer for the worker at a group: let another one lead, and tell those whose outcomes are
        known."""
        jobs = []
        with self._lock:
            if self._at_work is not group:
                return
            self._leader = self._at_work = None
            if not group.prompt and not group.ended:
                jobs = group.be_prompt()
        group.under_way()
        if jobs:
            tell(jobs)
