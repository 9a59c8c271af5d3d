"""What is known of the log file of one context, and reading it."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from ...errors import StateConflictError, StateCorruptedError, StateError, StateUnavailableError
from ...keys import file_stem
from ...operations import Outcome, Query
from ..resolve import check_owner
from .filesystem import unavailable
from .folder import Folder
from .leftbehind import LeftDocument
from .logformat import Damage, NewerVersion, fields
from .logimage import LogImage
from .logreader import HEAD, LogReader

if TYPE_CHECKING:
    from .locks import FileLock

SUFFIX: Final = ".jsonl"

SUSPECT: Final = stat.S_ISVTX
"""The mode bit of a file whose flush failed; it means nothing else on files. All processes see it at once, and a look
at the file, which every operation takes anyway, shows it at no cost."""

_MOST_TO_CATCH_UP: Final = 256 * 1024
"""Bytes that others appended. Where there are more of them, the end of the file is read anew, which costs less."""


# Unlike the time of the last write, that of the last change to anything about a file cannot be set by a program.
# (Windows has no such time.)
_changed: Final[Callable[[os.stat_result], int]] = attrgetter("st_mtime_ns" if os.name == "nt" else "st_ctime_ns")


class LookAgain(Exception):
    """What was known of the file was not true any more when more of it was read: begin the operation anew."""


class LogView:
    """The file of one context, and what is known of it.

    Not thread-safe: hold `lock`. What is known can be half updated when an exception ends an operation. So an operation
    sets `in_use`, and resets it only where what is known is true; the next one calls `forget` where it is still set.

    What is known is trusted as long as the file's descriptor is open and the name still stands for the same file: the
    number of a file that is open is not given to another one. After the descriptor was closed, the last line that is
    known has to be found in the file again.
    """

    __slots__ = (
        "_left", "adopted", "changed", "context_id", "discarded", "document", "entry", "file_lock", "flushed", "folder",
        "identity", "image", "in_use", "left_beside", "lock", "path", "reader", "size", "stem", "suspect", "synced",
        "trusted", "weight",
    )  # fmt: skip

    def __init__(self, folder: Folder, context_id: str, *, trusted: bool = False) -> None:
        self.folder = folder
        self.context_id = context_id
        self.stem = file_stem(context_id)
        self.path = folder.file(self.stem + SUFFIX)
        self.lock = threading.Lock()
        self.file_lock: FileLock | None = None
        self.trusted = trusted  # nobody else writes: what is known stays true
        self.discarded = False  # the cache dropped it; another object may stand for the file now
        self.in_use = False  # by an operation; or it is not known what the last one left behind
        self.reader = LogReader(folder, self.path, context_id)
        self._left: LeftDocument | None = None
        self.forget()

    def forget(self) -> None:
        """Know nothing about the file any more, and close it."""
        self.image: LogImage | None = None  # first: without it, nothing else is looked at
        self.identity: tuple[int, int] | None = None  # None: there is no file
        self.size = 0
        self.changed = 0  # when the file was changed last
        self.suspect = False
        self.weight = 0
        self.left_beside = False  # whether the document that the log was made from has yet to be put away
        self.entry = 0  # which flush of the folder was the last that may not cover the file's name
        self.flushed = 0  # up to where the file is taken to be on disk, where one does not wait for it
        self.synced = 0  # up to where this object flushed it
        self.adopted: list[Any] | None = None  # the document that the log was made from
        self.document: list[Any] | None = None  # the one that stands in for a log that there is not yet
        self.reader.close()

    # --- what the file says

    def refresh(self) -> LogImage:
        """What the file says now. Raises StateUnavailableError, StateCorruptedError, StateConflictError."""
        image = self.image
        if image is not None and (self.trusted or (self.identity is not None and self._is_current(image))):
            return image
        return self._load()

    def _is_current(self, image: LogImage) -> bool:
        """Whether `image` is what the file says, after taking in what others appended."""
        reader = self.reader
        try:
            if reader.fd < 0:
                if not self._reopen(image):
                    return False
                status = reader.status()
                unchanged = status.st_size == image.log_end
            else:
                status = self.folder.fs.stat(self.path)
                if (status.st_dev, status.st_ino) != self.identity:
                    return False
                if status.st_size == self.size and _changed(status) == self.changed:
                    return True
                unchanged = False
            if not unchanged:
                if not 0 < status.st_size - image.log_end <= _MOST_TO_CATCH_UP:
                    return False
                reader.catch_up(image, status.st_size)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unavailable(error, "read") from error
        except Damage:
            return False  # it was replaced in place, or it is damaged, as reading it anew will show
        self._note(status)
        return True

    def _load(self) -> LogImage:
        self.forget()
        entry, reader = self.folder.syncs_begun, self.reader
        self.folder.tally.add(cache_misses=1)
        try:
            reader.open()
            status = reader.status()
            if not stat.S_ISREG(status.st_mode):
                raise Damage(0, "it is not a regular file")
            self.folder.check()
            try:
                image, adopted = reader.image(status.st_size)
            except NewerVersion:
                raise
            except Damage:  # or another process cut a torn end and wrote on, while it was being read
                status = reader.status()
                image, adopted = reader.image(status.st_size)
            if image.log_end > 0:
                self.adopted = adopted
                self.left_beside = self.left.is_there(adopted)
            else:
                image = self._load_document()
        except FileNotFoundError:
            self.image = self._load_document()
            return self.image
        except IsADirectoryError:
            raise self.corrupted(Damage(0, "it is a folder")) from None
        except OSError as error:
            if isinstance(error, StateError):
                raise
            raise self._unavailable(error, "read") from error
        except Damage as damage:
            raise self.corrupted(damage) from damage
        self.identity = (status.st_dev, status.st_ino)
        self.entry = entry
        self.flushed = image.log_end
        self._note(status)
        self.image = image
        return image

    @property
    def left(self) -> LeftDocument:
        """The document that AgentUp left, if it did."""
        if self._left is None:
            self._left = LeftDocument(self.folder, self.context_id)
        return self._left

    def _load_document(self) -> LogImage:
        """What is known of a context without log: what its document says, if there is one."""
        image = LogImage(self.context_id)
        found = self.left.read()
        if found is None:
            self.folder.check()
            return image
        document, self.document = found
        image.take_state(document)
        image.forget = None if document.exists else document.forget_at
        image.recent = document.read(image.start, image.end)
        return image

    def _note(self, status: os.stat_result) -> None:
        self.size = status.st_size
        self.changed = _changed(status)
        self.suspect = bool(status.st_mode & SUSPECT)

    def _reopen(self, image: LogImage) -> bool:
        """Open the file that `image` was read from; False if it is not there any more. Raises OSError."""
        self.reader.open()
        status = self.reader.status()
        if (status.st_dev, status.st_ino) == self.identity and self.reader.holds(image.seal, image.log_end):
            return True
        self.reader.close()
        return False

    # --- answers

    def snapshot(self, query: Query, now: int) -> Outcome:
        """What `query` asks. Raises LookAgain, StateAccessError and what `refresh` raises."""
        return self.answer(query, self.refresh(), now)

    def answer(self, query: Query, image: LogImage, now: int) -> Outcome:
        """What `query` asks of an image that is current."""
        if not image.lives(now):
            return None
        check_owner(image, query.user, self.context_id)
        return image.snapshot(query, self.read)

    def read(self, first: int, stop: int) -> list[bytes]:
        """The messages at positions [first, stop), which are within the history. Raises LookAgain."""
        image = self.current
        known = image.end - len(image.recent)
        if first >= known:
            return image.recent[first - known : stop - known]
        try:
            if self.reader.fd < 0 and not self._reopen(image):
                raise FileNotFoundError
            messages = self.reader.messages(image, first, min(known, stop))
            if stop > known:
                messages += image.recent[: stop - known]
            if stop == image.end:
                image.note_recent(messages)
            return messages
        except FileNotFoundError:
            self.forget()
            raise LookAgain from None
        except OSError as error:
            raise self._unavailable(error, "read") from error
        except Damage as damage:
            self._shorten(damage)
            raise LookAgain from None

    def _shorten(self, damage: Damage) -> None:
        """Know only what is before a line that turns out to have never reached the disk. Raises StateCorruptedError.

        With fsync "no", a checkpoint may have reached it long before lines that it builds on.
        """
        try:
            self.reader.check_torn(damage.offset, self.size, damage)
            self.image, _ = self.reader.image(damage.offset)
        except Damage as worse:
            self.forget()
            raise self.corrupted(worse) from worse
        except OSError as error:
            self.forget()
            raise self._unavailable(error, "read") from error

    @property
    def current(self) -> LogImage:
        """What `refresh` returned, as it is by now."""
        assert self.image is not None
        return self.image

    # --- errors

    def _unavailable(self, error: OSError, doing: str) -> StateUnavailableError:
        return unavailable(error, doing, self.path, self.context_id)

    def corrupted(self, damage: Damage) -> StateError:
        """What to raise from `damage`."""
        if isinstance(damage, NewerVersion):
            return StateConflictError(
                f"{self.path} is {damage.reason}; update agentstate on this host. The file was left as it is",
                context_id=self.context_id,
            )
        return StateCorruptedError(
            f"{self.path} is damaged: {damage}. It was left as it is; "
            "`agentstate verify --repair` saves what is intact",
            context_id=self.context_id,
        )


def context_of_log(folder: Folder, stem: str) -> str | None:
    """Whose log the file of this name is; None where there is none, or one of another name.

    Raises StateUnavailableError, and StateCorruptedError where only the header tells, and it does not.
    """
    if "~" not in stem:
        return stem if stem.isascii() and file_stem(stem) == stem else None
    path = folder.file(stem + SUFFIX)
    reader = LogReader(folder, path, "")
    try:
        reader.open()
        line = reader.read(0, HEAD).partition(b"\n")[0]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unavailable(error, "read", path) from error
    finally:
        reader.close()
    try:
        context_id = str(fields(line)["id"])
    except (ValueError, KeyError) as error:
        raise StateCorruptedError(f"{path} does not begin with the header of a log; it was left as it is") from error
    return context_id if file_stem(context_id) == stem else None
