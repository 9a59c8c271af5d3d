"""Verifying whole logs, and repairing damaged ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Final, NamedTuple

from ...errors import (
    ContextNotFoundError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateUnavailableError,
)
from ..base import concerns_one_context
from .documentfile import DOCUMENT, context_of_document
from .filesystem import unavailable, write_whole
from .folder import Folder
from .leftbehind import LeftDocument
from .logfile import LogFile
from .logformat import Damage, fields, is_sealed, seal_ends
from .logimage import LogImage
from .logreader import LogReader
from .logview import SUFFIX, LogView, context_of_log
from .names import NamePages

DAMAGED: Final = ".damaged"
"""The suffix of a damaged log that was repaired: the original is kept under this name."""

NO_PART: Final = "{} is a single JSON document, of which no part can be recovered automatically; repair it by hand"

_PIECE: Final = 1 << 20
_PAGE: Final = 500


class Problem(NamedTuple):
    """A fault in a store."""

    context_id: str | None
    path: str
    reason: str


class Repair(NamedTuple):
    """The result of a repair."""

    context_id: str
    messages: int
    """The number of messages after the repair."""
    lost_bytes: int
    """The number of bytes that could not be recovered."""
    original: str | None
    """The path of the damaged original; None if there was no damage and nothing was changed."""


def problems(folder: Folder) -> Iterator[Problem]:
    """The faults of all files in a folder, of both layouts. Raises StateUnavailableError."""
    names = NamePages(folder, (SUFFIX, DOCUMENT))
    cursor: str | None = ""
    while cursor is not None:
        page, cursor = names.page(cursor, _PAGE)
        for name in page:
            context_id = None
            try:
                if name.endswith(DOCUMENT):
                    context_id = context_of_document(folder, name[: -len(DOCUMENT)])
                    reason = None if context_id is None else _examine_document(folder, context_id)
                else:
                    context_id = context_of_log(folder, name[: -len(SUFFIX)])
                    reason = None if context_id is None else examine(LogView(folder, context_id))
            except (StateCorruptedError, StateUnavailableError) as error:
                if not concerns_one_context(error):
                    raise
                reason = str(error)
            if reason is not None:
                yield Problem(context_id, folder.file(name), reason)


def _examine_document(folder: Folder, context_id: str) -> str | None:
    try:
        LeftDocument(folder, context_id).read()
    except (StateCorruptedError, StateConflictError) as error:
        return str(error)
    return None


def examine(log: LogView) -> str | None:
    """Read a whole log and describe its first fault; None if there is none. Raises StateUnavailableError."""
    try:
        return _damage_of(log)
    except StateConflictError as error:
        return str(error)


def _damage_of(log: LogView) -> str | None:
    """Like `examine`, but raises StateConflictError where a document of another program is beside the log."""
    try:
        image = log.refresh()
        if log.identity is None:
            return None
        whole = _replayed(log.reader, image.log_end)
        if _state(whole) != _state(image):
            return "the last checkpoint does not agree with the lines before it"
        for first in range(image.start, image.end, _PAGE):
            stop = min(image.end, first + _PAGE)
            if log.reader.messages(image, first, stop) != log.reader.messages(whole, first, stop):
                return f"the checkpoints do not list message {first} and those after it correctly"
    except Damage as damage:
        return str(damage)
    except StateCorruptedError as error:
        return str(error)
    except OSError as error:
        if isinstance(error, StateError):
            raise
        raise unavailable(error, "read", log.path, log.context_id) from error
    finally:
        log.reader.close()
    return None


def _replayed(reader: LogReader, end: int) -> LogImage:
    """The image after replaying all lines, checkpoints ignored."""
    image = LogImage(reader.context_id)
    offset = 0
    for piece in reader.lines(end):
        image.replay(piece, offset)
        offset += len(piece)
    return image


def _state(image: LogImage) -> tuple[Any, ...]:
    return (
        image.exists, image.user_id, image.created, image.updated, image.revision, image.expires,
        image.start, image.end, image.variables, image.metadata, image.forget,
    )  # fmt: skip


def repair(log: LogFile) -> Repair:
    """Replace a damaged log by its intact part, and keep the damaged file beside it.

    What damaged lines said is lost, what all others say is kept; messages after the damage keep their positions
    wherever a later checkpoint tells them. Hold the log's locks. Raises StateUnavailableError; StateConflictError where
    it is not the log that is wrong, StateCorruptedError where it is a document, which has no parts;
    StateOutcomeUnknownError where it may not survive a power cut.
    """
    if _damage_of(log) is None:
        image = log.current
        if log.identity is None:
            raise ContextNotFoundError(f"there is no log of {log.context_id!r}", context_id=log.context_id)
        _flush_names(log)  # a repair may have been interrupted before this
        return Repair(log.context_id, image.end - image.start, 0, None)
    try:
        try:
            log.reader.open()
        except FileNotFoundError as error:  # so what is damaged is a document
            raise StateCorruptedError(NO_PART.format(log.left.path), context_id=log.context_id) from error
        data = b"".join(_all_of(log.reader))
        original = _name_beside(log, data)
        write_whole(log.folder.fs, original, (data,), owner=log.folder.owner)
        log.folder.sync()  # or a power cut could undo this name, and not that of the log that is to take its place
    except OSError as error:
        raise unavailable(error, "set aside", log.path, log.context_id) from error
    finally:
        log.forget()
    salvage = _Salvage(log.context_id)
    intact = 0
    for line, offset in _intact_lines(data, log.reader.seed):
        intact += len(line) + 1
        salvage.take(line, offset)
    image, messages = salvage.image, salvage.messages
    log.replace_with(image, salvage.adopted, lambda first, stop: messages[first - image.start : stop - image.start])
    _flush_names(log)
    return Repair(log.context_id, len(messages), len(data) - intact, original)


def _name_beside(log: LogFile, data: bytes) -> str:
    """The path under which to keep a damaged log, different from those of earlier repairs."""
    names = (log.path + DAMAGED + (str(number) if number > 1 else "") for number in count(1))
    return next(path for path in names if _content(log, path) in (data, None))  # equal: an interrupted repair


def _content(log: LogFile, path: str) -> bytes | None:
    reader = LogReader(log.folder, path, "")
    try:
        reader.open()
        return b"".join(_all_of(reader))
    except FileNotFoundError:
        return None
    finally:
        reader.close()


def _flush_names(log: LogFile) -> None:
    try:
        log.folder.sync()
    except OSError as error:
        reason = unavailable(error, "flush", log.folder.path)
        raise StateOutcomeUnknownError(
            f"{str(reason).removesuffix('; nothing was done')}: whether the repair survives a power cut is not known; "
            "repair again",
            context_id=log.context_id,
        ) from error


def _all_of(reader: LogReader) -> Iterator[bytes]:
    offset = 0
    while piece := reader.read(offset, _PIECE):
        yield piece
        offset += len(piece)


def _intact_lines(data: bytes, seed: int) -> Iterator[tuple[bytes, int]]:
    """The lines whose checksums are right, with their offsets; including those whose newline is damaged."""
    begin = 0
    while begin < len(data):
        newline = data.find(b"\n", begin)
        stop = len(data) if newline < 0 else newline
        line = data[begin:stop]
        end = next((end for end in seal_ends(line) if is_sealed(line[:end], seed, begin)), None)
        if end is None:
            begin = stop + 1
        else:
            yield line[:end], begin
            begin += end + 1


class _Salvage:
    """Rebuilds a context from the intact lines of its log."""

    def __init__(self, context_id: str) -> None:
        self.image = LogImage(context_id)
        self.messages: list[bytes] = []
        self.adopted: list[Any] | None = None

    def take(self, line: bytes, offset: int) -> None:
        try:
            said = fields(line)
        except ValueError:  # the checksum is right, but it is not JSON: agentstate did not write it
            return
        self.adopted = said.get("adopted", self.adopted)
        if "rev" in said:
            self._record(said, offset, len(line) + 1)
        elif "checkpoint" in said:
            self._checkpoint(said, offset, len(line) + 1)
        elif "history" in said:
            self._move_to(said["history"])
            self._add(said["add"])

    def _record(self, said: dict[str, Any], offset: int, size: int) -> None:
        image = self.image
        if "created" in said:
            self.messages = []
        elif not image.exists:  # what came before is lost
            said["created"] = said["at"]
        else:
            image.revision = said["rev"] - 1
            keep = said.pop("keep", image.end)
            start = said.pop("start", image.start)
            del self.messages[max(0, min(keep, image.end) - image.start) :]
            image.end = image.start + len(self.messages)
            dropped = max(0, min(start, image.end) - image.start)
            del self.messages[:dropped]
            image.start += dropped
        added = said.pop("add", [])
        start, end = image.start, image.end
        image.replay_record(said, offset, size)
        if "created" in said:
            image.start = image.end = said.get("keep", 0)
        else:
            image.start, image.end = start, end
        self._add(added)

    def _checkpoint(self, said: dict[str, Any], offset: int, size: int) -> None:
        start, end = self.image.start, self.image.end
        stop = said.get("end", 0)
        self.image.revision = -1  # so that its state replaces ours
        self.image.replay_checkpoint(said, offset, size)
        self.image.start, self.image.end = start, end
        if not self.image.exists:
            self.messages = []
            self.image.start = self.image.end = 0
        elif stop >= end:
            self._move_to(stop)

    def _move_to(self, position: int) -> None:
        """Give the next message this position; those before it move by the number that was lost."""
        self.image.end = position
        self.image.start = position - len(self.messages)

    def _add(self, messages: list[bytes]) -> None:
        self.messages += messages
        self.image.end += len(messages)
