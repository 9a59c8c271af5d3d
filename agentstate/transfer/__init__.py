"""Copies whole contexts from one storage to another, or to an archive and back, and verifies each copy.

    with open("backup.jsonl", "wb") as file:
        export_contexts(storage, file)

    report = migrate(FileStorage(), ValkeyStorage(url="valkey://localhost:6379"))

Owner, times, revision, positions and expiry are kept. Every context that was written is read back and compared. One
that exists and is equal is skipped, so an interrupted transfer can be started again; one that exists and differs is not
changed, and reported. Memory holds a group of contexts at a time, and one page of a long history.

`pieces` defines the parts of a transfer, `stored` reads storages and `target` writes them, `archived` reads archives
and `archive` writes them, `compare` compares contexts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from ..storage.base import StateStorage
from .archive import Archive
from .archived import Archived
from .pieces import Fate, Progress, Report, Result, transfer
from .stored import Stored, count_contexts, pages_of_ids, perform, read_contexts
from .target import Target

__all__ = [
    "Fate",
    "Progress",
    "Report",
    "Result",
    "count_contexts",
    "export_contexts",
    "import_contexts",
    "migrate",
    "pages_of_ids",
    "perform",
    "read_contexts",
]


def _ignored(result: Result) -> None: ...


def migrate(
    source: StateStorage,
    target: StateStorage,
    *,
    user_id: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = _ignored,
) -> Report:
    """Copy all contexts, or those of one owner, from one storage to another. The source is only read.

    With `replace`, a context that differs in the target is deleted and written again, in two steps. `dry_run` reads and
    compares only. `progress` is called with the result of every context. A context that fails is reported, and the
    others are copied; raises StateError only where the source cannot be listed or a storage cannot be reached any more.
    """
    return transfer(Stored(source, pages_of_ids(source, user_id)), Target(target, replace, dry_run), progress)


def export_contexts(
    source: StateStorage,
    file: BinaryIO,
    *,
    context_ids: Iterable[str] | None = None,
    user_id: str | None = None,
    progress: Progress = _ignored,
) -> Report:
    """Write an archive of all contexts, of those with the given ids, or of those of one owner.

    Each context is archived as it is at one moment, but not all at the same one. Errors as of `migrate`.
    """
    groups = pages_of_ids(source, user_id) if context_ids is None else iter([list(context_ids)])
    return transfer(Stored(source, groups), Archive(file), progress)


def import_contexts(
    file: BinaryIO,
    target: StateStorage,
    *,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = _ignored,
) -> Report:
    """Write the contexts of an archive to a storage. Options and errors as of `migrate`.

    The intact contexts of a damaged archive are imported; `Report.damage` says what is wrong with it as a whole.
    Memory is bounded: lines of more than 64 MiB, or whose values would take more than 512 MiB, are refused.
    """
    return transfer(Archived(file), Target(target, replace, dry_run), progress)
