"""Writing to the log file of one context: to its end, or anew as a whole; and flushing it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, Final

from ...errors import (
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateSerializationError,
    StateUnavailableError,
)
from ...operations import REMEMBER_CLEARED, Answer, Commit
from ..resolve import Effects, expiry, only_adds, resolve
from .filesystem import FILE_MODE, write_whole
from .folder import Folder
from .logformat import Damage
from .logimage import LARGE, LogImage, is_large, whole_log
from .logview import SUSPECT, LogView

_REMEMBER: Final = int(REMEMBER_CLEARED * 1_000_000)  # microseconds
_PIECE: Final = 1 << 20

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


class LogFile(LogView):
    """A log that is written to. Hold the context's file lock as well as `lock`.

    After an error that leaves something in doubt, nothing is known: the next operation reads the file anew.
    """

    __slots__ = ("_pending", "line_end", "names_checked", "unflushed")

    def __init__(self, folder: Folder, context_id: str, *, trusted: bool = False) -> None:
        self._pending: list[bytes] = []  # lines that the image knows, and the file not yet
        self.unflushed = False  # written lazily, and waiting for its flush
        super().__init__(folder, context_id, trusted=trusted)

    def forget(self) -> None:
        super().forget()
        self._pending.clear()
        self.names_checked: int | None = None  # `folder.names` when no document was beside the log
        self.line_end = 0  # where the last commit's line ends, or will

    def forget_unwritten(self) -> None:
        """After an error: forget everything, if the image is ahead of the file."""
        if self._pending:
            self.forget()

    def read(self, first: int, stop: int) -> list[bytes]:
        if self._pending and first < self.current.end - len(self.current.recent):
            self.write()
        return super().read(first, stop)

    # --- writing to the end

    def ready(self) -> LogImage:
        """`refresh`, before a write and with the lock held: also repairs what crashes left undone."""
        image = self.image if self.trusted else None  # which is what `refresh` would return
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
        """Check that there is no document beside the log."""
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
        """Resolve a commit and apply it to the image; `write` must follow. Raises as `resolve` does, and LookAgain."""
        image = self.image
        assert image is not None
        flushed = self.flushed if lazily else self._begun(image) if self._pending else None
        expired = image.expires is not None and image.expires <= now and image.exists
        if not expired and not commit.answer and only_adds(commit, image):
            if self.document is not None:
                image = self._adopt(image)
            try:
                lines = image.add(commit, now, expiry(now, ttl), flushed)
            except ValueError as error:
                raise self._unwritable(error) from error
            self._take(image, lines, lazily)
            return b""
        # The image stays what the file says: if this clock is wrong, the context lives on unless something is written.
        before = image.after_expiry() if expired else image
        effects = resolve(before, commit, now=now, ttl=ttl, lease=lease, read=self.read)
        if not isinstance(effects, Effects):
            if commit.idle_for is not None and not before.exists and self.identity is not None:
                self._clean_up(before, now, flush=not lazily)
            return effects
        if effects.deletes or expired or (not image.exists and is_large(effects.appended)):
            self._begin_anew(effects, now, flush=not lazily or effects.exists)
            return effects.answer
        if self.document is not None:
            image = self._adopt(image)
        if image.log_end == 0:
            self._pending.append(image.header())
        try:
            lines = image.advance(effects, flushed)
        except ValueError as error:
            raise self._unwritable(error) from error
        self._take(image, lines, lazily)
        return effects.answer

    def _unwritable(self, reason: object) -> StateSerializationError:
        """What to raise where a commit cannot be written, and the image may be ahead of the file."""
        self.forget()
        return StateSerializationError(str(reason), context_id=self.context_id)

    def _begun(self, image: LogImage) -> int:
        """The offset at which the next write begins."""
        return image.log_end - sum(map(len, self._pending))

    def _take(self, image: LogImage, lines: bytes, lazily: bool) -> None:
        """Have what one commit adds to the log written; and a checkpoint, where one is due."""
        self._pending.append(lines)
        self.line_end = end = image.log_end
        if lines.find(b"\n") != len(lines) - 1:
            if lines.startswith(LARGE):
                return
            raise self._unwritable("a stored value holds a line break")
        # A checkpoint vouches for all that is written with it. After a large commit, see `add_checkpoint`.
        if end >= image.checkpoint_due and not any(part.startswith(LARGE) for part in self._pending):
            begun = self._begun(image)
            self._pending.append(image.checkpoint(self.flushed if lazily else begun, begun))

    def add_checkpoint(self) -> None:
        """After a large commit: write the checkpoint by itself, so that no reader has to check the lines before it.

        The commit is done without it, so a failure is only logged; then the next commit writes it.
        """
        image = self.current
        self._pending.append(image.checkpoint(self.flushed, image.log_end))
        try:
            self.write()
        except WriteFailed as failure:
            _logger.warning("%s: a checkpoint could not be written: %s", self.path, failure.error)

    def write(self) -> int:
        """Append the pending lines, and return their size. Raises WriteFailed, StateOutcomeUnknownError."""
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
            complete = self._take_back(written, image.log_end - size)
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
            raise self.unknown(
                f"another process wrote to {self.path} at the same time (locks do not work on this file system)"
            )

    def _appending(self, image: LogImage) -> int:
        """The descriptor, open for appending; the file is created if there is none. Raises OSError."""
        reader = self.reader
        if self.identity is None:
            self.entry = self.folder.syncs_begun
            reader.create()
            status = reader.status()
            self.identity = (status.st_dev, status.st_ino)
        elif reader.fd < 0 and not self._reopen(image):
            raise FileNotFoundError(2, "it was replaced while its lock was held")
        if not reader.writable:
            reader.open_for_appending()  # its mode may have been changed since; otherwise this raises the reason
        return reader.fd

    def _take_back(self, written: int, offset: int) -> int:
        """Cut off what a failed write left of a commit. Returns where the complete ones end, which readers may know."""
        fs, fd = self.folder.fs, self.reader.fd
        complete = max(end for end in accumulate(map(len, self._pending), initial=0) if end <= written)
        try:
            if offset == 0 and complete == 0 and fd >= 0:
                fs.unlink(self.path)
            elif written > complete:
                fs.truncate(fd, offset + complete)
        except OSError as error:
            _logger.warning(
                "%s: the rest of a failed write could not be cut off; the next writer cuts it: %s", self.path, error
            )
        return offset + complete

    # --- flushing

    def is_flushed(self) -> bool:
        """Whether everything is known to be on disk. (What other processes wrote is not known to be.)"""
        return self.identity is None or (self.synced == self.current.log_end and self.folder.syncs_done > self.entry)

    def flush(self) -> None:
        """Make everything survive power loss. Raises StateOutcomeUnknownError."""
        try:
            self._flush()
        except OSError as error:
            raise self.flush_failed(error) from error

    def flush_lazily(self) -> None:
        """`flush` without the file's lock. Raises StateError; then the next writer rewrites the file."""
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
        """Note that everything that was written is on disk."""
        self.synced = self.flushed = self.current.log_end

    def flush_failed(self, error: OSError) -> StateOutcomeUnknownError:
        """Mark the file for all processes, and rewrite it: nothing unflushed can be trusted. Returns what to raise."""
        reason = self._unavailable(error, "flush")
        try:
            self._mark_suspect()
            self._write_again()
        except StateError as again:
            _logger.warning("%s: its flush failed, and it could not be rewritten yet: %s", self.path, again)
        self.forget()
        return self.unknown(reason)

    def _mark_suspect(self) -> None:
        """Mark the file for all writers: what it shows may not be on disk."""
        self.suspect = True
        try:
            self.folder.fs.change_mode(self.path, FILE_MODE | SUSPECT)
        except OSError as error:
            _logger.warning(
                "%s: its flush failed, and it could not be marked for other processes: %s", self.path, error
            )

    def _write_again(self) -> None:
        """Replace the file by a new one with its intact content. Raises StateError."""
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
            raise self._unavailable(error, "rewrite") from error

    # --- writing as a whole

    def _begin_anew(self, effects: Effects, now: int, *, flush: bool) -> None:
        """Replace the file by one without what was before, except for the commit ids.

        Without `flush`, a power cut may leave an empty file, which is no context.
        """
        self.write()
        adopted = self.document or self.adopted
        if adopted is not None:
            self.left.remove_adopted()
        image = self.current.after_expiry()
        had_document = self.document is not None
        if is_large(effects.appended):
            image.apply(effects)
            first = effects.keep
            self.replace_with(image, adopted, lambda start, stop: effects.appended[start - first : stop - first])
        else:
            self._replace(self._lines_anew(image, effects, adopted, now), image, flush=flush)
            self.line_end = image.log_end
            self.adopted = adopted
        if had_document:
            try:
                self.left.remove()
            except StateUnavailableError as error:
                self.forget()
                raise self.unknown(error) from error
        if self.image is None:
            try:
                self._load()
            except StateError as error:
                raise self.unknown(error) from error

    def _lines_anew(self, image: LogImage, effects: Effects, adopted: list[Any] | None, now: int) -> list[bytes]:
        """The lines of a log in which nothing came before `effects` but commit ids; `image` becomes what they say."""
        image.forget = None
        lines = [image.header(adopted)]
        if not effects.exists:
            image.remember(effects.commit_id, effects.answer)
            image.forget = now + _REMEMBER
        if image.commits:
            lines.append(image.checkpoint())
        if effects.exists:
            lines.append(image.advance(effects, None))
        return lines

    def _clean_up(self, absent: LogImage, now: int, *, flush: bool) -> None:
        """Remove what is left of an absent context, except for commit ids that must still be remembered."""
        if (absent.forget or 0) <= now:
            self._remove()
        elif self.current.exists:
            tombstone = LogImage(self.context_id)
            tombstone.commits, tombstone.forget = absent.commits, absent.forget
            self._replace([tombstone.header(self.adopted), tombstone.checkpoint(None)], tombstone, flush=flush)

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
        """Convert the document to a log: the log gets its name atomically, and then the document is renamed."""
        messages, start = image.recent, image.start
        self.replace_with(image, self.document, lambda first, stop: messages[first - start : stop - start])
        self.left.put_away()
        return self._load()

    def _finish_adoption(self, image: LogImage) -> None:
        """Finish a conversion that a crash interrupted."""
        if image.exists:
            self.left.put_away()
        else:
            self.left.remove()

    def rewrite(self) -> None:
        """Rewrite the file without superseded data. Raises StateError."""
        image = self.current
        try:
            if self.reader.fd < 0 and not self._reopen(image):
                return
        except OSError as error:
            raise self._unavailable(error, "read") from error
        self.replace_with(image, self.adopted, partial(self.reader.messages, image))

    def replace_with(self, image: LogImage, adopted: list[Any] | None, read: Any) -> None:
        """Replace the file by a new log of `image`. `read` returns its messages."""
        try:
            self._replace(whole_log(self.context_id, image, adopted, read), None)
        except Damage as damage:
            raise self.corrupted(damage) from damage

    def _replace(self, lines: Iterable[bytes], image: LogImage | None, *, flush: bool = True) -> None:
        """Atomically put a new file in the place of this one, flushed before it gets the name unless not `flush`.

        With `image`, what is known of the new file; without, it is read when it is needed. Raises
        StateUnavailableError; StateOutcomeUnknownError; and Damage, where `lines` does.
        """
        if os.name == "nt":
            self.reader.close()
        entry = self.folder.syncs_begun
        try:
            status = write_whole(self.folder.fs, self.path, _pieces(lines), owner=self.folder.owner, flush=flush)
        except OSError as error:
            raise self._unavailable(error, "replace") from error
        finally:
            self.forget()
        self.folder.tally.wrote(status.st_size)
        self.entry = entry
        if image is None:
            return
        try:
            self.reader.open()
            self._note(self.reader.status())
        except OSError as error:
            self.forget()
            raise self.unknown(self._unavailable(error, "open")) from error
        self.identity = (status.st_dev, status.st_ino)
        self.image = image
        self.synced = self.flushed = image.log_end if flush else 0

    # --- errors

    def unknown(self, reason: object) -> StateOutcomeUnknownError:
        """What to raise from `reason` where it is not known whether a commit is stored durably."""
        return StateOutcomeUnknownError(
            f"{str(reason).removesuffix('; nothing was done')}: whether it is stored durably is not known; "
            "the same call again with the same commit_id is applied at most once",
            context_id=self.context_id,
        )


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines joined into large writes."""
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
