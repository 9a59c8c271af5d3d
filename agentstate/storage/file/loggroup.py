"""Operations on many logs together: each file is written and flushed once for all that waits for it.

The commits of a group are written under the locks of their contexts. Locks that are free are taken first, and what
they guard is written, flushed and settled; then the group comes back for those that were held by others.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ...errors import StateError, StateOutcomeUnknownError
from ...operations import Commit, Operation, Outcome, Query
from ..base import Settle, check_deadline, now_microseconds
from .filesystem import can_sync_all
from .locks import FileLock, lock_timeout
from .logfile import LogFile, WriteFailed
from .logoperations import LogOperations

_SYNC_ALL_FROM: Final = 4  # files

_SHORTEST_PAUSE: Final = 0.0005  # seconds
_LONGEST_PAUSE: Final = 0.01


class _Unit:
    """The operations on one context in a group, in order, and their outcomes."""

    __slots__ = ("ends", "found", "indexes", "log", "operations", "outcomes", "written")

    def __init__(self) -> None:
        self.indexes: list[int] = []
        self.operations: list[Any] = []
        self.outcomes: list[Outcome | StateError] = []
        self.ends: list[int] = []  # after each operation, where the line of the last commit ends
        self.written = False
        self.found: LogFile | None = None  # the log of the context, as the cache has it
        self.log: LogFile | None = None  # the same, once it is locked

    def settle_all(self, settle: Settle) -> None:
        for index, outcome in zip(self.indexes, self.outcomes, strict=True):
            settle(index, outcome)

    def fail_all(self, error: StateError) -> None:
        self.outcomes = [_for_operation(error, operation) for operation in self.operations]

    def give_up_late(self, now: float, path: str, settle: Settle) -> None:
        """Settle the operations whose deadline has passed, and leave the others."""
        for index, operation in list(zip(self.indexes, self.operations, strict=True)):
            if operation.deadline <= now:
                settle(index, lock_timeout(path, operation.context_id))
                self.indexes.remove(index)
                self.operations.remove(operation)


class Flushing:
    """Which way to flush several files is the quicker one: each, or the whole file system.

    On an idle disk one flush of everything costs as much as two of a file each; on one to which others write much, it
    may take seconds. So it is measured.
    """

    def __init__(self) -> None:
        self._each = 0.000_15  # seconds for a file
        self._everything = 0.0  # seconds; forgotten by and by while it is not tried

    def everything(self, files: int) -> bool:
        """Whether to flush the whole file system for so many files."""
        if files < _SYNC_ALL_FROM or not can_sync_all():
            return False
        if self._everything < files * self._each:
            return True
        self._everything *= 0.9
        return False

    def took_everything(self, seconds: float) -> None:
        self._everything = seconds

    def took_each(self, seconds: float) -> None:
        self._each += (seconds - self._each) / 4


class LogGroups:
    """Carries out groups of operations on the logs of one folder."""

    def __init__(self, operations: LogOperations) -> None:
        self._operations = operations
        self._access = operations.access
        self._folder = operations.folder
        self._cache = operations.cache
        self._flushing = Flushing()

    def execute(self, operations: Sequence[tuple[int, Any]], settle: Settle) -> None:
        """Carry out commits, leases and queries, given with their indexes."""
        units: dict[str, _Unit] = {}
        for index, operation in operations:
            unit = units.get(operation.context_id)
            if unit is None:
                unit = units[operation.context_id] = _Unit()
            unit.indexes.append(index)
            unit.operations.append(operation)
        waiting: dict[FileLock, list[_Unit]] = {}
        for context_id, unit in units.items():
            if all(isinstance(operation, Query) for operation in unit.operations):
                unit.outcomes = [_outcome_of(self._operations.carry_out, operation) for operation in unit.operations]
                unit.settle_all(settle)
            else:
                unit.found = log = self._cache.log_of(context_id)
                waiting.setdefault(log.file_lock or self._operations.lock_of(log), []).append(unit)
        try:
            if waiting and not self._access.is_open:
                self._access.open(min(unit.operations[0].deadline for units in waiting.values() for unit in units))
            self._write(waiting, settle)
        except StateError as error:
            for unit in (unit for units in waiting.values() for unit in units):
                unit.fail_all(error)
                unit.settle_all(settle)

    def _write(self, waiting: dict[FileLock, list[_Unit]], settle: Settle) -> None:
        """Carry out what waits for locks, and empty `waiting`. Raises StateUnavailableError."""
        pause = 0.0
        while waiting:
            if self._write_unlocked(waiting, settle):
                pause = 0.0
                continue
            # All that is left is held by others: wait for whatever is released first, holding nothing meanwhile.
            pause = min(pause * 1.5 + _SHORTEST_PAUSE, _LONGEST_PAUSE)
            time.sleep(pause)
            self._give_up_late(waiting, settle)

    def _write_unlocked(self, waiting: dict[FileLock, list[_Unit]], settle: Settle) -> bool:
        """Commit what can be locked without waiting, up to a number of files. Whether there was any."""
        held: dict[FileLock, list[_Unit]] = {}
        files = 0
        self._folder.look_at_names()
        try:
            for lock in list(waiting):
                try:
                    if not lock.try_acquire():
                        continue
                except StateError as error:
                    for unit in waiting.pop(lock):
                        unit.fail_all(error)
                        unit.settle_all(settle)
                    continue
                held[lock] = waiting.pop(lock)
                for unit in held[lock]:
                    self._take_in(unit)
                files += len(held[lock])
                if files >= self._cache.most_open // 2:
                    break
            any_held = bool(held)
            self._flush_and_settle(held, settle)
            return any_held
        finally:
            for lock in list(held):
                self._let_go(lock, held)

    def _give_up_late(self, waiting: dict[FileLock, list[_Unit]], settle: Settle) -> None:
        now = time.monotonic()
        for lock, units in list(waiting.items()):
            for unit in units:
                unit.give_up_late(now, lock.path, settle)
            units[:] = [unit for unit in units if unit.operations]
            if not units:
                del waiting[lock]

    def _let_go(self, lock: FileLock, held: dict[FileLock, list[_Unit]]) -> None:
        """Release a lock, and the logs that it guards."""
        try:
            for unit in held[lock]:
                log, unit.log = unit.log, None
                if log is not None:
                    try:
                        self._cache.keep(log)
                    finally:
                        log.lock.release()
        finally:
            del held[lock]
            lock.release()

    def _take_in(self, unit: _Unit) -> None:
        """Write a unit's commits to their file. Its log stays locked until they are flushed."""
        log = unit.found
        assert log is not None
        log.lock.acquire()
        while log.discarded:
            log.lock.release()
            log = self._cache.log_of(log.context_id)
            log.lock.acquire()
        unit.log = log
        if log.in_use:
            log.forget()
        log.in_use = True
        try:
            log.ready()
            for operation in unit.operations:
                identity = log.identity
                try:
                    if time.monotonic() >= operation.deadline:
                        check_deadline(operation)
                    if log.image is None:  # after an error
                        log.ready()
                    unit.outcomes.append(self._operations.apply(log, operation))
                except StateError as error:
                    unit.outcomes.append(_for_operation(error, operation))
                unit.ends.append(log.line_end)
                if log.identity != identity:  # what was before is in the new file, or superseded by it
                    unit.ends = [0] * len(unit.ends)
                    unit.written = True
            written = log.write()
            unit.written = unit.written or written > 0
            self._cache.grew(written)
        except WriteFailed as failure:
            self._undo(unit, log, failure)
        except StateError as error:
            log.forget_unwritten()
            unit.fail_all(error)

    def _undo(self, unit: _Unit, log: LogFile, failure: WriteFailed) -> None:
        """A write failed: commits whose lines are whole stay, the others are not done."""
        outcomes, unit.outcomes = unit.outcomes, []
        unit.written = True
        for number, operation in enumerate(unit.operations):
            if number < len(outcomes) and unit.ends[number] <= failure.complete:
                unit.outcomes.append(outcomes[number])
            elif isinstance(operation, Query):
                unit.outcomes.append(_outcome_of(lambda query: log.snapshot(query, now_microseconds()), operation))
            else:
                unit.outcomes.append(_for_operation(failure.error, operation))
        try:
            log.ready()
        except StateError as error:
            _make_unknown(unit, error)

    # --- flushing

    def _flush_and_settle(self, held: dict[FileLock, list[_Unit]], settle: Settle) -> None:
        """Flush the files that were written to, and settle the operations on each as soon as it is done."""
        unflushed: set[_Unit] = set()
        if self._operations.durable:
            written = [unit for units in held.values() for unit in units]
            unflushed.update(unit for unit in written if unit.log is not None and not unit.log.is_flushed())
            if self._flush_everything(unflushed):
                unflushed.clear()
        spent = 0.0
        for lock, units in list(held.items()):
            for unit in units:
                if unit in unflushed:
                    begun = time.monotonic()
                    self._flush(unit)
                    spent += time.monotonic() - begun
                self._finish(unit)
            self._let_go(lock, held)
            for unit in units:
                unit.settle_all(settle)
        if len(unflushed) > 1:
            self._flushing.took_each(spent / len(unflushed))

    def _flush(self, unit: _Unit) -> None:
        assert unit.log is not None
        try:
            self._operations.flush(unit.log, written=unit.written)
        except StateError as error:
            _make_unknown(unit, error)

    def _finish(self, unit: _Unit) -> None:
        """After the flush of a log that was written to."""
        log = unit.log
        if log is None:
            return
        if log.image is not None and unit.written:
            if self._operations.lazy is not None:
                self._operations.lazy.add(log)
            self._operations.tidy(log)
        log.in_use = False

    def _flush_everything(self, units: set[_Unit]) -> bool:
        """Flush the file system instead of each file, where that is quicker; whether it was done."""
        folder = self._folder
        logs = [unit.log for unit in units if unit.log is not None]
        devices = {log.identity[0] for log in logs if log.identity is not None}
        if not (self._flushing.everything(len(units)) and folder.holds_all_of(devices)):
            return False
        begun = time.monotonic()
        number = folder.begin_sync()
        try:
            folder.fs.sync_all(folder.opened)
        except OSError as error:
            for unit in units:
                assert unit.log is not None
                _make_unknown(unit, unit.log.flush_failed(error))
        else:
            folder.end_sync(number)
            for log in logs:
                log.note_flushed()
        self._flushing.took_everything(time.monotonic() - begun)
        return True


def _outcome_of(function: Callable[[Any], Outcome], operation: Any) -> Outcome | StateError:
    try:
        return function(operation)
    except StateError as error:
        return error


def _for_operation(error: StateError, operation: Operation) -> StateError:
    """A copy of a shared error for one operation: each is raised separately, with its own traceback."""
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    own.context_id = getattr(operation, "context_id", None)
    if isinstance(own, StateOutcomeUnknownError) and isinstance(operation, Commit):
        own.commit_id = operation.commit_id
    return own


def _make_unknown(unit: _Unit, error: StateError) -> None:
    """A flush failed: whether any of the commits is stored durably is not known."""
    for number, operation in enumerate(unit.operations):
        if isinstance(operation, Commit) and not isinstance(unit.outcomes[number], StateError):
            unit.outcomes[number] = _for_operation(error, operation)
