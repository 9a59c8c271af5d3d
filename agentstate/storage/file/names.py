"""The names in the folder of a store, in pages."""

from __future__ import annotations

from collections import OrderedDict
from heapq import nsmallest
from typing import Final

from .filesystem import unavailable
from .folder import Folder

_NAMES_AT_A_TIME: Final = 8192
_LISTINGS_AT_A_TIME: Final = 8
_MOST_PASSES: Final = 10


class NamePages:
    """Pages of the names in a folder, in their order. The cursor of a page is the last name of the one before.

    A folder itself has no order, so every so many names it is read as a whole; what is needed of the names until then
    is kept in memory, for a few listings at a time.
    """

    def __init__(self, folder: Folder, suffixes: tuple[str, ...]) -> None:
        self._folder = folder
        self._suffixes = suffixes
        self._known: OrderedDict[str, tuple[list[str], bool]] = OrderedDict()  # by cursor: what follows; is that all?

    def page(self, cursor: str, size: int) -> tuple[list[str], str | None]:
        """Names with one of the suffixes, and the next cursor. Raises StateUnavailableError."""
        known = self._known.pop(cursor, None)
        if known is None:
            names = self._read(cursor)
            known = names, len(names) < _NAMES_AT_A_TIME
        names, complete = known
        page, rest = names[:size], names[size:]
        if rest:
            self._known[page[-1]] = rest, complete
            while len(self._known) > _LISTINGS_AT_A_TIME:
                self._known.popitem(last=False)
        return page, None if complete and not rest else page[-1]

    def _read(self, cursor: str) -> list[str]:
        folder = self._folder
        folder.check()
        try:
            return self._first_names(cursor)
        except FileNotFoundError:
            folder.check()
            return []
        except OSError as error:
            raise unavailable(error, "list", folder.path) from error

    def _first_names(self, cursor: str) -> list[str]:
        """The first names after `cursor`, those included that are replaced meanwhile.

        Where a file that gets the name of another one takes a new place in the folder (btrfs, tmpfs), reading the
        folder once may pass it by. So it is read again, until a pass finds everything that is known and still there.
        """
        known = self._pass(cursor)
        for _ in range(_MOST_PASSES):
            found = self._pass(cursor)
            passed_by = self._passed_by(known, found)
            known = nsmallest(_NAMES_AT_A_TIME, {*known, *found})
            if not passed_by:
                break
        return known

    def _pass(self, cursor: str) -> list[str]:
        names = self._folder.fs.names(self._folder.path)
        return nsmallest(_NAMES_AT_A_TIME, (name for name in names if name > cursor and name.endswith(self._suffixes)))

    def _passed_by(self, known: list[str], found: list[str]) -> bool:
        """Whether a pass that found these names missed one that is known and still there."""
        missing = set(known).difference(found)
        if len(found) == _NAMES_AT_A_TIME:
            missing = {name for name in missing if name < found[-1]}
        return any(self._exists(name) for name in missing)

    def _exists(self, name: str) -> bool:
        try:
            self._folder.fs.stat(self._folder.file(name))
        except FileNotFoundError:
            return False
        return True
