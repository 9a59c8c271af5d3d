"""Pages of the contexts in a folder of log files."""

from __future__ import annotations

import logging

from ...errors import StateConflictError, StateCorruptedError, StateError, StateUnavailableError
from ...operations import Listing, Page
from ..base import check_deadline, concerns_one_context, now_microseconds
from ..resolve import Image
from .access import Access
from .documentfile import DOCUMENT, context_of_document, is_log_there
from .leases import Leases
from .logimage import LogImage
from .logreader import LogReader
from .logview import SUFFIX, LogView, context_of_log
from .names import NamePages

_logger = logging.getLogger("agentstate.storage.file")


class LogListing:
    """The listing of one folder: of the contexts in logs, and of those in documents that AgentUp left."""

    def __init__(self, access: Access, leases: Leases) -> None:
        self._access = access
        self._folder = access.folder
        self._leases = leases
        self._names = NamePages(access.folder, (SUFFIX, DOCUMENT))

    def page(self, listing: Listing) -> Page:
        """Raises StateUnavailableError."""
        access = self._access
        if access.exclusive or (listing.idle_for is not None and self._folder.check() is not None):
            access.open(listing.deadline)
        if not listing.cursor and listing.idle_for is not None and access.is_open:
            self._tidy()
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
            image = self._glance(name, context_id)
            if image is None or (image.exists and listing.user is not None):
                view = LogView(self._folder, context_id)
                try:
                    image = view.refresh()
                finally:
                    view.reader.close()
        except (StateCorruptedError, StateConflictError, StateUnavailableError) as error:
            if not concerns_one_context(error):
                raise
            # It is there, so it is listed; but its owner and its age are not known.
            if listing.user is None and listing.idle_for is None and error.context_id is not None:
                return error.context_id
            _logger.warning("skipped in a listing: %s", error)
            return None
        return context_id if _belongs(image, listing) else None

    def _glance(self, name: str, context_id: str) -> Image | None:
        """What the last line says, which is mostly enough: whether it exists, when it was updated and expires."""
        if name.endswith(DOCUMENT):
            return None
        reader = LogReader(self._folder, self._folder.file(name), context_id)
        try:
            reader.open()
            said = reader.last_line()
        except OSError:
            return None  # reading the log reports why
        finally:
            reader.close()
        if said is None or not ("rev" in said or "checkpoint" in said):
            return None
        image = LogImage(context_id)
        image.exists = "rev" in said or said["checkpoint"] > 0
        image.updated, image.expires, image.forget = said["at"], said.get("expires"), said.get("forget")
        return image

    def _context_in(self, name: str) -> str | None:
        """Whose log or document the file is; None for a document whose log is there (and listed) as well."""
        if name.endswith(DOCUMENT):
            context_id = context_of_document(self._folder, name[: -len(DOCUMENT)])
            return None if context_id is None or is_log_there(self._folder, context_id) else context_id
        return context_of_log(self._folder, name[: -len(SUFFIX)])

    def _tidy(self) -> None:
        """Remove what killed processes left behind: leases that ended, files that never got their name."""
        try:
            self._leases.remove_ended(self._access.lock)
            self._access.remove_unfinished(SUFFIX, lambda stem: stem)
        except FileNotFoundError:
            pass
        except (OSError, StateError) as error:
            _logger.warning("%s could not be tidied: %s", self._folder.path, error)


def _belongs(image: Image, listing: Listing) -> bool:
    now = now_microseconds()
    if not image.lives(now):
        if listing.idle_for is None or (image.exists and image.user_id != listing.user and listing.user is not None):
            return False
        return image.exists or not isinstance(image, LogImage) or (image.forget or 0) <= now
    if listing.user is not None and image.user_id != listing.user:
        return False
    return listing.idle_for is None or image.updated <= now - listing.idle_for * 1_000_000
