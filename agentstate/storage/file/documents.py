"""The layout "document": one plain JSON document per context, exactly as AgentUp writes it."""

from __future__ import annotations

import logging
import time
from typing import Any

from ...errors import StateConflictError, StateError, StateOutcomeUnknownError
from ...keys import document_stem, file_stem
from ...operations import Listing, Page
from ..document import DocumentStorage, DocumentUpdate
from .access import Access
from .documentfile import DOCUMENT, context_of_document, is_log_there, read_document_file
from .filesystem import unavailable, write_whole
from .names import NamePages

_logger = logging.getLogger("agentstate.storage.file")


class DocumentFiles(DocumentStorage):
    """The documents of one folder. AgentUp takes no locks: only agentstate's own writers are kept from each other."""

    def __init__(self, access: Access, fsync: str, **options: Any) -> None:
        super().__init__(**options)
        self._access = access
        self._folder = access.folder
        self._names = NamePages(access.folder, (DOCUMENT,))
        self._syncs = fsync != "no"

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        if self._access.exclusive:
            self._access.open(deadline)
        return self._load(document_stem(context_id), context_id)

    def _load(self, stem: str, context_id: str) -> bytes | None:
        self._folder.check()
        data = read_document_file(self._folder, stem, context_id)
        if is_log_there(self._folder, context_id):
            raise StateConflictError(
                f"{context_id!r} has a log in {self._folder.path}: it was converted to layout='log'; "
                "use that layout, or export the conversation and import it into a folder of its own",
                context_id=context_id,
            )
        return data

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        self._access.open(deadline)
        self._access.lock(file_stem(context_id)).run(deadline, context_id, self._replace, context_id, update)

    def _replace(self, context_id: str, update: DocumentUpdate) -> None:
        stem = document_stem(context_id)
        current = self._load(stem, context_id)
        new = update(current)
        if new is not current:
            self._store(self._folder.file(stem + DOCUMENT), new, context_id)
        if new is not None or current is not None:
            self._sync_names(context_id)

    def _store(self, path: str, new: bytes | None, context_id: str) -> None:
        try:
            if new is None:
                self._folder.fs.unlink(path)
            else:
                write_whole(self._folder.fs, path, (new,), owner=self._folder.owner)
        except OSError as error:
            raise unavailable(error, "replace", path, context_id) from error

    def _sync_names(self, context_id: str) -> None:
        """Make the names survive power loss; those of others too, from whose documents a commit was answered."""
        if not self._syncs:
            return
        try:
            self._folder.sync()
        except OSError as error:
            reason = unavailable(error, "flush", self._folder.path)
            raise StateOutcomeUnknownError(
                f"{reason}: whether it is stored durably is not known; "
                "the same call again with the same commit_id is applied at most once",
                context_id=context_id,
            ) from error

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        if self._access.exclusive:
            self._access.open(deadline)
        names, following = self._names.page(cursor, size)
        stems = (name[: -len(DOCUMENT)] for name in names)
        ids = (context_of_document(self._folder, stem) for stem in stems)
        return Page(tuple(id_ for id_ in ids if id_ is not None and not is_log_there(self._folder, id_)), following)

    def _list(self, listing: Listing) -> Page:
        if listing.idle_for is not None and not listing.cursor and self._folder.check() is not None:
            self._access.open(listing.deadline)
            self._tidy()
        return super()._list(listing)

    def _tidy(self) -> None:
        """Remove what killed processes did not get to give its name."""
        try:
            self._access.remove_unfinished(DOCUMENT, _stem_of_lock)
        except (OSError, StateError) as error:
            _logger.warning("%s could not be tidied: %s", self._folder.path, error)

    def close(self) -> None:
        deadline = time.monotonic() + self.deadline
        super().close()
        self._access.close(deadline)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._access.after_fork()


def _stem_of_lock(stem: str) -> str:
    """The `file_stem` of the context whose `document_stem` this is: a hashed one is the same for both."""
    return file_stem(stem) if document_stem(stem) == stem else stem
