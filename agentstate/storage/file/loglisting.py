"""Pages of the contexts in a folder of log files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ...errors import StateConflictError, StateCorruptedError, StateError, StateUnavailableError
from ...operations import Listing, Page
from ..base import check_deadline, concerns_one_context, now_microseconds
from ..resolve import Image
from .documentfile import DOCUMENT, context_of_document, is_log_there
from .filesystem import NEW
from .folder import NamePages
from .logfile import SUFFIX, context_of_log, log_file
from .logimage import LogImage
from .logreader import LogReader

if TYPE_CHECKING:
    from .loglayout import LogLayout

_logger = logging.getLogger("agentstate.storage.file")


class LogListing:
    """The listing of one folder: of the contexts in logs, and of those in documents that AgentUp left."""

    def __init__(self, layout: LogLayout) -> None:
        self._layout = layout
        self._names = NamePages(layout.folder, (SUFFIX, DOCUMENT))

    def page(self, listing: Listing) -> Page:
        """Raises StateUnavailableError."""
        if not listing.cursor and listing.idle_for is not None:
            self._sweep()
        names, cursor = self._names.page(listing.cursor, listing.size)
        ids = (self._listed(name, listing) for name in names)
        return Page(tuple(context_id for context_id in ids if context_id is not None), cursor)

    def _listed(self, name: str, listing: Listing) -> str | None:
        """The id of the context in the file `name`, if it belongs into the listing."""
        check_deadline(listing)
        try:
            context_id = self._context_in(name)
            if context_id is None:
                return None
            image = self._glance(name, context_id) if listing.user is None else None
            if image is None:
                log = log_file(self._layout.folder, context_id)
                try:
                    image = log.refresh()
                finally:
                    log.reader.close()
        except (StateCorruptedError, StateConflictError, StateUnavailableError) as error:
            if not concerns_one_context(error):
                raise
            # It is there, so it is listed; but whose it is and how old, nobody can say.
            if listing.user is None and listing.idle_for is None and error.context_id is not None:
                return error.context_id
            _logger.warning("passed over in a listing: %s", error)
            return None
        return context_id if _belongs(image, listing) else None

    def _glance(self, name: str, context_id: str) -> Image | None:
        """What the last line tells, which is mostly enough: that it exists, when it was updated and expires."""
        if name.endswith(DOCUMENT):
            return None
        folder = self._layout.folder
        reader = LogReader(folder, folder.file(name), context_id)
        try:
            reader.open()
            said = reader.last_line()
        except OSError:
            return None  # the thorough look says why
        finally:
            reader.close()
        if said is None or not ("rev" in said or said.get("checkpoint", 0) > 0):
            return None
        image = Image()
        image.exists, image.updated, image.expires = True, said["at"], said.get("expires")
        return image

    def _context_in(self, name: str) -> str | None:
        """Whose log or document the file is; None for a document whose log is there (and listed) as well."""
        if name.endswith(DOCUMENT):
            context_id = context_of_document(self._layout.folder, name[: -len(DOCUMENT)])
            return None if context_id is None or is_log_there(self._layout.folder, context_id) else context_id
        return context_of_log(self._layout.folder, name[: -len(SUFFIX)])

    def _sweep(self) -> None:
        """Remove what killed processes left behind: leases that ended, files that never got their name."""
        layout = self._layout
        folder = layout.folder
        try:
            layout.leases.remove_ended(layout.access.holding)
            for name in [name for name in folder.fs.names(folder.path) if name.endswith(SUFFIX + NEW)]:
                with layout.access.holding(name[: -len(SUFFIX + NEW)]) as mine:
                    if mine:
                        folder.fs.unlink(folder.file(name))
        except FileNotFoundError:
            pass
        except (OSError, StateError) as error:
            _logger.warning("%s could not be tidied: %s", folder.path, error)


def _belongs(image: Image, listing: Listing) -> bool:
    now = now_microseconds()
    if not image.lives(now):
        if listing.idle_for is None or (image.exists and image.user_id != listing.user and listing.user is not None):
            return False
        return image.exists or not isinstance(image, LogImage) or (image.forget or 0) <= now
    if listing.user is not None and image.user_id != listing.user:
        return False
    return listing.idle_for is None or image.updated <= now - listing.idle_for * 1_000_000
