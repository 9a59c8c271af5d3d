"""The log file of one context: what is known of it, and writing to its end or anew as a whole."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ...errors import (
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateSerializationError,
    StateUnavailableError,
)
from ...keys import file_stem
from ...operations import REMEMBER_CLEARED, Answer, Commit, Outcome, Query
from ..resolve import Effects, check_owner, expiry, only_adds, resolve
from .filesystem import APPEND, CREATE, FILE_MODE, unavailable, write_whole
from .folder import Folder
from .leftbehind import LeftDocument
from .logformat import Damage, fields
from .logimage import LogImage, whole_log
from .logreader import HEAD, LogReader

if TYPE_CHECKING:
    from .locks import FileLock

SUFFIX: Final = ".jsonl"

_REMEMBER: Final = int(REMEMBER_CLEARED * 1_000_000)  # microseconds
_PIECE: Final = 1 << 20

_SUSPECT: Final = stat.S_ISVTX
"""The mode bit of a file whose flush failed; it means nothing else on files. All processes see it at once, and a look
at the file, which every operation takes anyway, shows it at no cost."""

_logger = logging.getLogger("agentstate.storage.file")


class WriteFailed(Exception):
    """A write failed.

    The file holds complete lines up to `complete`, and the line of the last commit would have ended at `line_end`;
    `error` is what to raise for all that is not complete.
    """

    def __init__(self, error: StateUnavailableError, complete: int, line_end: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.complete = complete
        self.line_end = line_end


class LookAgain(Exception):
    """What was known of the file was not true any more when more of it was read: begin the operation anew."""


class LogFile:
    """The file of one context, and what is known of it.

    Not thread-safe: hold `lock`; and for everything but `refresh` and `snapshot` the context's file lock as well.
    After an error that leaves something in doubt, nothing is known: the next operation reads the file anew.
    """

    __slots__ = (
        "_left", "_pending", "adopted", "context_id", "discarded", "document", "entry", "file_lock", "flushed",
        "folder", "identity", "image", "lapsed", "left_beside", "line_end", "lock", "modified", "names_checked", "path",
        "reader", "size", "stem", "suspect", "synced", "trusted", "weight",
    )  # fmt: skip

    def __init__(self, folder: Folder, context_id: str, stem: str, *, trusted: bool) -> None:
        self.folder = folder
        self.context_id = context_id
        self.stem = stem
        self.path = folder.file(stem + SUFFIX)
        self.lock = threading.Lock()
        self.file_lock: FileLock | None = None
        self.trusted = trusted  # nobody else writes: what is known stays true
        self.discarded = False  # the cache let go of it; another object may stand for the file now
        self.reader = LogReader(folder, self.path, context_id)
        self._pending: list[bytes] = []  # lines that the image knows, and the file not yet
        self._left: LeftDocument | None = None
        self.forget()

    def forget(self) -> None:
        """Know nothing about the file any more, and close it."""
        self.reader.close()
        self._pending.clear()
        self.image: LogImage | None = None
        self.identity: tuple[int, int] | None = None  # None: there is no file
        self.size = 0
        self.modified = 0
        self.suspect = False
        self.weight = 0
        self.names_checked: int | None = None  # `folder.names` when no document was beside the log
        self.left_beside = False  # whether the document that the log was made from has yet to be put away
        self.line_end = 0  # where the last commit's line ends, or will
        self.entry = 0  # which flush of the folder was the last that may not cover the file's name
        self.flushed = 0  # up to where the file is taken to be on disk, where one does not wait for it
        self.synced = 0  # up to where we saw to that ourselves
        self.lapsed: int | None = None  # the file holds a context that has expired, and this was its last update
        self.adopted: list[Any] | None = None  # the document that the log was made from
        self.document: list[Any] | None = None  # the one that stands in for a log that there is not yet

    def forget_unwritten(self) -> None:
        """After an error: forget everything, if the image is ahead of the file."""
        if self._pending:
            self.forget()

    # --- reading

    def refresh(self, *, to_write: bool = False) -> LogImage:
        """What the file says now. Raises StateUnavailableError, StateCorruptedError, StateConflictError."""
        image = self.image
        if image is not None:
            if self.trusted:
                return image
            if self.identity is not None and self._is_current(image, to_write):
                return image
            self.forget()
        return self._load()

    def _is_current(self, image: LogImage, to_write: bool) -> bool:
        """Whether `image` is what the file says, after taking in what others appended."""
        reader = self.reader
        try:
            if to_write and reader.fd < 0:  # one look is enough: it is opened anyway
                if not self._reopen(image):
                    return False
                status = reader.status()
            else:
                status = self.folder.fs.stat(self.path)
            if (status.st_dev, status.st_ino) != self.identity or status.st_size < image.log_end:
                return False
            self.suspect = bool(status.st_mode & _SUSPECT)
            if status.st_size == image.log_end:  # else a write that was not to the end: somebody put it in its place
                return status.st_size == self.size and status.st_mtime_ns == self.modified
            if reader.fd < 0 and not self._reopen(image):
                return False
            reader.catch_up(image, status.st_size)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unavailable(error, "read") from error
        except Damage:
            return False  # somebody put another log's content into this file; or it is damaged, as reading it will show
        self._note(status)
        return True

    def _load(self) -> LogImage:
        entry, reader = self.folder.syncs_begun, self.reader
        self.folder.tally.add(cache_misses=1)
        try:
            reader.open()
            status = reader.status()
            if not stat.S_ISREG(status.st_mode):
                raise Damage(0, "it is not a regular file")
            try:
                image, self.adopted = reader.image(status.st_size)
            except Damage:  # or somebody cut a torn end and wrote on, while it was being read
                status = reader.status()
                image, self.adopted = reader.image(status.st_size)
            if image.log_end > 0:
                self.left_beside = self.left.is_there(self.adopted)
            else:
                image = self._load_document()
        except FileNotFoundError:
            self.image = self._load_document()
            return self.image
        except IsADirectoryError:
            raise self.corrupted(Damage(0, "it is a folder")) from None
        except OSError as error:
            self.forget()
            if isinstance(error, StateError):
                raise
            raise self._unavailable(error, "read") from error
        except Damage as damage:
            self.forget()
            raise self.corrupted(damage) from damage
        except BaseException:
            self.forget()
            raise
        self.image = image
        self.identity = (status.st_dev, status.st_ino)
        self.entry = entry
        self.flushed = image.log_end
        self._note(status)
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
            self.folder.check_there()
            return image
        document, self.document = found
        image.take_state(document)
        image.forget = None if document.exists else document.forget_at
        image.recent = document.read(image.start, image.end)
        return image

    def _note(self, status: os.stat_result) -> None:
        self.size = status.st_size
        self.modified = status.st_mtime_ns
        self.suspect = bool(status.st_mode & _SUSPECT)

    def _reopen(self, image: LogImage) -> bool:
        """Open the file that `image` was read from; False if it is not there any more. Raises OSError."""
        self.reader.open()
        status = self.reader.status()
        written = image.log_end - sum(map(len, self._pending))
        if (status.st_dev, status.st_ino) == self.identity and (
            self._pending or self.reader.holds(image.seal, written) or written == 0
        ):
            return True
        self.reader.close()
        return False

    def snapshot(self, query: Query, now: int) -> Outcome:
        """What `query` asks. Raises LookAgain, StateAccessError and what `refresh` raises."""
        return self.answer(query, self.refresh(), now)

    def answer(self, query: Query, image: LogImage, now: int) -> Outcome:
        """What `query` asks of an image that is current."""
        if not image.exists or (image.expires is not None and image.expires <= now):
            return None
        check_owner(image, query.user, self.context_id)
        return image.snapshot(query, self.read)

    def read(self, first: int, stop: int) -> list[bytes]:
        """The messages at positions [first, stop), which are within the history. Raises LookAgain."""
        image = self.current
        known = image.end - len(image.recent)
        if first >= known:
            return image.recent[first - known : stop - known]
        if self._pending:
            self.write()
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
        """What `refresh` or `ready` returned, as it is by now."""
        assert self.image is not None
        return self.image

    # --- writing to the end

    def ready(self) -> LogImage:
        """Like `refresh`, for the holder of the lock who is about to write: puts right what crashes left undone."""
        image = self.image if self.trusted else None  # which is what `refresh` would say
        if image is None:
            image = self.refresh()
        untroubled = self.size == image.log_end and not self.suspect and not self.left_beside
        if self.identity is None or (self.trusted and untroubled):
            return image
        if self.suspect:
            self._write_again()
            image = self.refresh()
        if self.size > image.log_end:
            self._cut(image)
        if image.log_end > 0 and (self.names_checked is None or self.names_checked != self.folder.names):
            self._check_names(image)
        return image

    def _check_names(self, image: LogImage) -> None:
        """See that there is no document beside the log."""
        names = self.folder.names
        try:
            if self.left.is_there(self.adopted):
                self._finish_adoption(image)
        except StateConflictError:
            self.forget()  # so that readers look at it too
            raise
        self.names_checked = names
        self.left_beside = False

    def _cut(self, image: LogImage) -> None:
        _logger.warning(
            "%s: the last %d bytes, from byte %d on, were left by a crash in the middle of a write that was never "
            "acknowledged; they are cut off",
            self.path, self.size - image.log_end, image.log_end,
        )  # fmt: skip
        try:
            fd = self._appending(image)
            self.folder.fs.truncate(fd, image.log_end)
            self._note(self.reader.status())
        except OSError as error:
            self.forget()
            raise self._unavailable(error, "cut the torn end of") from error

    def commit(self, commit: Commit, now: int, ttl: float | None, lease: str | None, lazily: bool) -> Answer:
        """Resolve a commit and take it in; `write` must follow. Raises what `resolve` raises, and LookAgain."""
        image = self.image
        assert image is not None
        if image.expires is not None and image.expires <= now and image.exists:
            self.lapsed = image.updated
            image.expire(now)
        flushed = self.flushed if lazily else self._begun(image) if self._pending else None
        if only_adds(commit, image) and not commit.answer:
            if self.document is not None:
                image = self._adopt(image)
            self._take(image, image.add(commit, now, expiry(now, ttl), flushed), lazily)
            return b""
        effects = resolve(image, commit, now=now, ttl=ttl, lease=lease, read=self.read)
        if not isinstance(effects, Effects):
            if commit.idle_for is not None and not image.exists and self.identity is not None:
                self._clean_up(image, now)
            return effects
        if effects.deletes or self.lapsed is not None:
            self._begin_anew(effects, now)
            return effects.answer
        if self.document is not None:
            image = self._adopt(image)
        if image.log_end == 0:
            self._pending.append(image.header())
        self._take(image, image.advance(effects, flushed), lazily)
        return effects.answer

    def _begun(self, image: LogImage) -> int:
        """Where the write begins that is to follow."""
        return image.log_end - sum(map(len, self._pending))

    def _take(self, image: LogImage, line: bytes, lazily: bool) -> None:
        self._pending.append(line)
        self.line_end = end = image.log_end
        if line.find(b"\n") != len(line) - 1:
            self.forget()
            raise StateSerializationError("a stored value holds a line break", context_id=self.context_id)
        if end >= image.checkpoint_due:
            begun = self._begun(image)
            self._pending.append(image.checkpoint(self.flushed if lazily else begun, begun))

    def write(self) -> int:
        """Append what was taken in, and say how many bytes. Raises WriteFailed, StateOutcomeUnknownError."""
        pending = self._pending
        if not pending:
            return 0
        image = self.image
        assert image is not None
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        size = len(data)
        reader = self.reader
        write = self.folder.fs.write
        written = 0
        try:
            fd = reader.fd if reader.writable else self._appending(image)
            written = write(fd, data)
            while written < size:
                written += write(fd, data[written:])
        except OSError as error:
            failure = self._unavailable(error, "write to")
            failure.__cause__ = error
            complete = self._take_back(data, written, image.log_end - size)
            line_end = self.line_end
            self.forget()
            raise WriteFailed(failure, complete, line_end) from error
        self.folder.tally.wrote(size)
        pending.clear()
        self.size = image.log_end
        if not self.trusted:
            self._note_written(image)
        return size

    def _note_written(self, image: LogImage) -> None:
        try:
            self._note(self.reader.status())
        except OSError as error:
            self.forget()
            raise self.unknown(self._unavailable(error, "look at")) from error
        if self.size != image.log_end:
            self.forget()
            raise self.unknown(f"somebody else wrote to {self.path} at the same time (its locks do not work)")

    def _appending(self, image: LogImage) -> int:
        """The file, open for appending; made if there is none. Raises OSError."""
        reader = self.reader
        if self.identity is None:
            self.entry = self.folder.syncs_begun
            reader.open_for_appending(CREATE)
            status = reader.status()
            self.identity = (status.st_dev, status.st_ino)
        elif reader.fd < 0 and not self._reopen(image):
            raise FileNotFoundError(2, "it was replaced while its lock was held")
        if not reader.writable:
            reader.open_for_appending(APPEND)  # its mode may have been changed since; else this fails, with the reason
        return reader.fd

    def _take_back(self, data: bytes, written: int, offset: int) -> int:
        """After a failed write: leave no fragment. Says where complete lines, which readers may know, end."""
        fs, fd = self.folder.fs, self.reader.fd
        complete = data.rfind(b"\n", 0, written) + 1
        try:
            if offset == 0 and complete == 0 and fd >= 0:
                fs.unlink(self.path)
            elif written > complete:
                fs.truncate(fd, offset + complete)
        except OSError as error:
            _logger.warning(
                "%s: what a failed write left could not be cut off, the next writer will: %s", self.path, error
            )
        return offset + complete

    # --- flushing

    def is_flushed(self) -> bool:
        """Whether everything is known to be on disk. (Nobody knows that of what others wrote.)"""
        return self.identity is None or (self.synced == self.current.log_end and self.folder.syncs_done > self.entry)

    def flush(self) -> None:
        """Make everything survive power loss. Raises StateOutcomeUnknownError."""
        try:
            self._flush()
        except OSError as error:
            raise self.flush_failed(error) from error

    def flush_lazily(self) -> None:
        """For one who does not hold the file's lock. Raises StateError; then the next writer heals the file."""
        try:
            self.refresh()
            if self.identity is not None:
                self._flush()
        except OSError as error:
            if isinstance(error, StateError):
                raise
            self._mark_suspect()
            raise self._unavailable(error, "flush") from error

    def _flush(self) -> None:
        folder, reader, image = self.folder, self.reader, self.current
        if self.synced != image.log_end:
            if reader.fd < 0 and not self._reopen(image):
                raise FileNotFoundError(2, "it was replaced while its lock was held")
            folder.fs.sync(reader.fd)
            self.synced = self.flushed = image.log_end
        if folder.syncs_done <= self.entry:
            folder.sync()

    def note_flushed(self) -> None:
        """Everything that was written is on disk."""
        self.synced = self.flushed = self.current.log_end

    def flush_failed(self, error: OSError) -> StateOutcomeUnknownError:
        """Believe nothing that was not flushed: mark the file for all, and write it again. Returns what to raise."""
        reason = self._unavailable(error, "flush")
        try:
            self._mark_suspect()
            self._write_again()
        except StateError as again:
            _logger.warning("%s: its flush failed, and it could not be written again yet: %s", self.path, again)
        self.forget()
        return self.unknown(reason)

    def _mark_suspect(self) -> None:
        """Tell all who are to write to the file that what it shows may not be on disk."""
        self.suspect = True
        try:
            self.folder.fs.change_mode(self.path, FILE_MODE | _SUSPECT)
        except OSError as error:
            _logger.warning("%s: its flush failed, and other processes could not be told: %s", self.path, error)

    def _write_again(self) -> None:
        """Write the intact content of the file to a new one that takes its place. Raises StateError."""
        image = self.current
        try:
            if self.reader.fd < 0:
                self.reader.open()
            self._replace(self.reader.lines(image.log_end), None)
            self.folder.sync()
        except Damage as damage:
            raise self.corrupted(damage) from damage
        except OSError as error:
            if isinstance(error, StateError):
                raise
            raise self._unavailable(error, "write again") from error

    # --- writing as a whole

    def _begin_anew(self, effects: Effects, now: int) -> None:
        """Replace the file by one that holds nothing of what was before, but the commit ids."""
        self.write()
        adopted = self.document or self.adopted
        if adopted is not None:
            self.left.remove_adopted()
        image = LogImage(self.context_id)
        image.commits = dict(self.current.commits)
        lines = [image.header(adopted)]
        if not effects.exists:
            image.remember(effects.commit_id, effects.answer)
            image.forget = now + _REMEMBER
        if image.commits:
            lines.append(image.checkpoint())
        if effects.exists:
            lines.append(image.advance(effects, None))
        had_document = self.document is not None
        self._replace(lines, image)
        self.line_end = image.log_end
        self.adopted = adopted
        if had_document:
            try:
                self.left.remove()
            except StateUnavailableError as error:
                self.forget()
                raise self.unknown(error) from error

    def _clean_up(self, image: LogImage, now: int) -> None:
        """Remove what is left of a context that does not exist, but for commit ids that must be remembered yet."""
        forget = (image.forget or 0) if self.lapsed is None else self.lapsed + _REMEMBER
        if forget <= now:
            self._remove()
        elif self.lapsed is not None:
            tombstone = LogImage(self.context_id)
            tombstone.commits = dict(image.commits)
            tombstone.forget = forget
            self._replace([tombstone.header(self.adopted), tombstone.checkpoint(None)], tombstone)

    def _remove(self) -> None:
        try:
            self.folder.fs.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unavailable(error, "remove") from error
        finally:
            self.forget()

    def _adopt(self, image: LogImage) -> LogImage:
        """Make a log of the document: it gets its name in one step, and only then the document loses its."""
        messages, start = image.recent, image.start
        self.replace_with(image, self.document, lambda first, stop: messages[first - start : stop - start])
        self.left.put_away()
        return self._load()

    def _finish_adoption(self, image: LogImage) -> None:
        """Do what a crash in the middle of it prevented."""
        if image.exists:
            self.left.put_away()
        else:
            self.left.remove()

    def rewrite(self) -> None:
        """Write the file as a whole, without what is superseded. Raises StateError."""
        image = self.current
        try:
            if self.reader.fd < 0 and not self._reopen(image):
                return
        except OSError as error:
            raise self._unavailable(error, "read") from error
        self.replace_with(image, self.adopted, partial(self.reader.messages, image))

    def replace_with(self, image: LogImage, adopted: list[Any] | None, read: Any) -> None:
        """Put a log that says what `image` does in the place of this one. `read` gives the messages."""
        try:
            self._replace(whole_log(self.context_id, image, adopted, read), None)
        except Damage as damage:
            raise self.corrupted(damage) from damage

    def _replace(self, lines: Iterable[bytes], image: LogImage | None) -> None:
        """Atomically put a new file in the place of this one, flushed before it gets the name; `flush` may follow.

        With `image`, what is known of the new file; without, it is read when it is needed. Raises
        StateUnavailableError; and Damage, where `lines` does.
        """
        if os.name == "nt":
            self.reader.close()
        entry = self.folder.syncs_begun
        try:
            status = write_whole(self.folder.fs, self.path, _pieces(lines))
        except OSError as error:
            raise self._unavailable(error, "replace") from error
        finally:
            self.forget()
        self.folder.tally.wrote(status.st_size)
        self.entry = entry
        if image is not None:
            self.image = image
            self.identity = (status.st_dev, status.st_ino)
            self._note(status)
            self.synced = self.flushed = image.log_end

    # --- errors

    def _unavailable(self, error: OSError, doing: str) -> StateUnavailableError:
        return unavailable(error, doing, self.path, self.context_id)

    def unknown(self, reason: object) -> StateOutcomeUnknownError:
        """What to raise from `reason`, where a commit may be stored for good or not."""
        return StateOutcomeUnknownError(
            f"{str(reason).removesuffix('; nothing was done')}: whether it is stored for good is not known; "
            "the same call again with the same commit_id is applied at most once",
            context_id=self.context_id,
        )

    def corrupted(self, damage: Damage) -> StateCorruptedError:
        """What to raise from `damage`."""
        return StateCorruptedError(
            f"{self.path} is damaged: {damage}. It was left as it is; "
            "`agentstate verify --repair` saves what is intact",
            context_id=self.context_id,
        )


def log_file(folder: Folder, context_id: str, *, trusted: bool = False) -> LogFile:
    """The log file of a context, not yet looked at. `trusted`: nobody else writes to it."""
    return LogFile(folder, context_id, file_stem(context_id), trusted=trusted)


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


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines joined to pieces worth a write."""
    gathered: list[bytes] = []
    size = 0
    for line in lines:
        gathered.append(line)
        size += len(line)
        if size >= _PIECE:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)
