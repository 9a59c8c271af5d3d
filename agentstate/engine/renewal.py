"""Keeps the leases of running turns alive, from one thread per process."""

from __future__ import annotations

import os
import threading
import time

from ..errors import StateUnavailableError
from ..operations import Lease
from .queue import CallBack, Job, engine_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..storage.base import StateStorage


class Renewal:
    """The renewing of one lease, until it is stopped or lost."""

    __slots__ = ("due", "lease", "storage")

    def __init__(self, storage: StateStorage, lease: Lease) -> None:
        self.storage = storage
        self.lease = lease
        self.due = time.monotonic() + lease.seconds / 3

    def stop(self) -> None:
        """Renew no more."""
        _keeper.forget(self)

    def renew(self) -> None:
        # Three chances before the lease ends; a failed one is not made up for at once, lest a dead server be hammered.
        now = time.monotonic()
        self.due = now + self.lease.seconds / 3
        lease = self.lease._replace(deadline=now + min(self.lease.seconds / 3, self.storage.deadline))
        engine_of(self.storage).submit(CallBack((lease,), self._renewed))

    def _renewed(self, job: Job) -> None:
        if job.outcomes[0] is False:  # taken over: the commit of the turn will find out
            self.stop()


class _Keeper:
    """One daemon thread that renews what is due; it ends when nothing is left to renew."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._renewals: set[Renewal] = set()
        self._running = False

    def keep(self, renewal: Renewal) -> None:
        with self._condition:
            if not self._running:
                try:
                    threading.Thread(target=self._run, name="agentstate-leases", daemon=True).start()
                except RuntimeError as error:
                    raise StateUnavailableError(
                        f"no thread could be started to renew the lease of a turn: {error}",
                        context_id=renewal.lease.context_id,
                    ) from error
                self._running = True
            self._renewals.add(renewal)
            self._condition.notify()

    def forget(self, renewal: Renewal) -> None:
        with self._condition:
            self._renewals.discard(renewal)

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._renewals:
                    self._running = False
                    return
                now = time.monotonic()
                due = [renewal for renewal in self._renewals if renewal.due <= now]
                if not due:
                    self._condition.wait(min(renewal.due for renewal in self._renewals) - now)
            for renewal in due:
                renewal.renew()


_keeper = _Keeper()


def keep_renewing(storage: StateStorage, lease: Lease) -> Renewal:
    """Renew `lease` (a ``renew`` operation) three times per its seconds, until `stop`."""
    renewal = Renewal(storage, lease)
    _keeper.keep(renewal)
    return renewal


def _after_fork_in_child() -> None:
    """The parent's turns are not the child's."""
    global _keeper
    _keeper = _Keeper()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
