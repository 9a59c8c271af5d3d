"""Whole contexts from one storage to another, or to an archive and back: exactly as they are, and verified.

    with open("backup.jsonl", "wb") as file:
        export_contexts(storage, file)

    report = migrate(FileStorage(), ValkeyStorage(url="valkey://localhost:6379"))

Owner, times, revision, positions and expiry go along. Every context that was written is read back and compared. What
is there already and equal is left alone, so a transfer that was interrupted is simply started again; what is there and
differs is left alone too, and reported. Memory holds a group of contexts at a time, and of a long history a page.

`pieces` says what a transfer is made of, `stored` reads storages and `target` writes them, `archived` reads archives
and `archive` writes them; `compare` tells whether two contexts are the same.
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


def _unheeded(result: Result) -> None: ...


def migrate(
    source: StateStorage,
    target: StateStorage,
    *,
    user_id: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = _unheeded,
) -> Report:
    """Copy all contexts, or those of one owner, from a storage to another. The source is only read.

    With `replace`, a context that differs in the target is deleted there and written anew. `dry_run` reads and compares
    and writes nothing. `progress` is told of every context. Contexts that fail are reported, and the others go on;
    raises StateError only where the source cannot be listed, or a storage cannot be reached any more.
    """
    return transfer(Stored(source, pages_of_ids(source, user_id)), Target(target, replace, dry_run), progress)


def export_contexts(
    source: StateStorage,
    file: BinaryIO,
    *,
    context_ids: Iterable[str] | None = None,
    user_id: str | None = None,
    progress: Progress = _unheeded,
) -> Report:
    """Write an archive of all contexts, of those with the given ids, or of those of one owner.

    A context is archived as it is at one moment; two of them may be of different moments. Errors as with `migrate`.
    """
    groups = pages_of_ids(source, user_id) if context_ids is None else iter([list(context_ids)])
    return transfer(Stored(source, groups), Archive(file), progress)


def import_contexts(
    file: BinaryIO,
    target: StateStorage,
    *,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = _unheeded,
) -> Report:
    """Write the contexts of an archive into a storage. Options and errors as with `migrate`.

    What is good in a damaged archive is imported; `Report.damage` says what is wrong with it as a whole.
    """
    return transfer(Archived(file), Target(target, replace, dry_run), progress)
