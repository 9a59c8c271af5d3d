"""Reading log files: only the part that is needed, and only lines whose checksum is right."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from typing import Any, Final
from zlib import crc32

from .filesystem import APPEND, CREATE_NEW, FILE_MODE, READ, open_for
from .folder import Folder
from .logformat import (
    APPEND_LINE,
    CHECKPOINT_START,
    SEAL_SIZE,
    Damage,
    Run,
    begin_of_write,
    fields,
    is_sealed,
    is_torn,
    messages_of,
    read_header,
    seed_of,
)
from .logimage import LogImage

_TAIL: Final = 8 * 1024
"""Bytes at the end of a file that are read first; they usually contain the last checkpoint."""
HEAD: Final = 8 * 1024
"""Bytes; no header is longer."""
_PIECE: Final = 1 << 20

_NOT_WRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)

_first_position = itemgetter(0)


class LogReader:
    """A log file, open or closed. Methods raise OSError, and Damage where the content is not that of a log."""

    __slots__ = ("context_id", "fd", "folder", "path", "seed", "writable")

    def __init__(self, folder: Folder, path: str, context_id: str) -> None:
        self.folder = folder
        self.path = path
        self.context_id = context_id
        self.seed = seed_of(context_id)
        self.fd = -1
        self.writable = False

    def open(self) -> None:
        """Open the file for appending, or for reading only where it is not writable."""
        try:
            self.open_for_appending()
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            self.fd, self.writable = self.folder.fs.open(self.path, READ), False
            self.folder.open_files += 1

    def open_for_appending(self) -> None:
        """Reopen the file for reading and appending."""
        self.close()
        self.fd, self.writable = self.folder.fs.open(self.path, APPEND, FILE_MODE), True
        self.folder.open_files += 1

    def create(self) -> None:
        """Create the file, and open it for appending."""
        self.close()
        self.fd = open_for(self.folder.owner, self.folder.fs.open, self.path, CREATE_NEW)
        self.writable = True
        self.folder.open_files += 1

    def close(self) -> None:
        fd, self.fd, self.writable = self.fd, -1, False
        if fd >= 0:
            self.folder.open_files -= 1
            with suppress(OSError):  # a failed write is reported by the flush
                self.folder.fs.close(fd)

    def status(self) -> os.stat_result:
        return self.folder.fs.descriptor_stat(self.fd)

    def holds(self, seal: bytes, end: int) -> bool:
        """Whether the line before `end` has this seal.

        The number of a file that was removed may be given to a new one, which has another line at this place.
        """
        return self.read(max(0, end - SEAL_SIZE - 1), SEAL_SIZE + 1) == seal + b"\n"

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at this place: fewer than `size` only at the end of the file."""
        read_at = self.folder.fs.read_at
        data = read_at(self.fd, size, offset)
        if len(data) < size and data:
            parts = [data]
            missing = size - len(data)
            while missing > 0 and (data := read_at(self.fd, missing, offset + size - missing)):
                parts.append(data)
                missing -= len(data)
            data = b"".join(parts)
        self.folder.tally.read(len(data))
        return data

    # --- the image

    def image(self, size: int) -> tuple[LogImage, list[Any] | None]:
        """The image after the first `size` bytes, and the document that the log was made from."""
        begin = max(0, size - _TAIL)
        data = self.read(begin, size - begin)
        while (start := _last_checkpoint(data)) < 0 and begin > 0:
            more = min(begin, 3 * len(data))
            begin -= more
            data = self.read(begin, more) + data
        start = max(start, 0)
        image = LogImage(self.context_id)
        adopted = None
        try:
            adopted = self._header(data if begin == 0 else self.read(0, HEAD))
            sealed = begin + start > 0 and self._check_write(
                begin + start, data[start : data.index(b"\n", start)], data, begin
            )
            image.log_end = begin + start
            image.replay(data[start:], image.log_end, sealed=sealed)
            good_end, damage = image.log_end, None
        except Damage as error:
            good_end, damage = error.offset, error
        if good_end < size:
            self.check_torn(good_end, size, damage)
        # Lines before the checkpoint never reached the disk, or the record of a large commit is missing.
        if good_end < begin + start or image.staged:
            return self.image(good_end) if good_end > 0 else (LogImage(self.context_id), None)
        return image, adopted

    def _header(self, data: bytes) -> list[Any] | None:
        said = read_header(data, self.seed)
        if said["id"] != self.context_id:
            raise Damage(0, f"it is the log of {said['id']!r}")
        adopted: list[Any] | None = said.get("adopted")
        return adopted

    def _check_write(self, offset: int, checkpoint: bytes, data: bytes, begin: int) -> bool:
        """Check the lines that were written together with a checkpoint: it may be on disk while they are not.
        `data`, which stands at `begin`, was read already. False if the checkpoint itself is not sealed.

        (With fsync "no" that holds for lines long before it too. It is noticed when they are read.)
        """
        if not is_sealed(checkpoint, self.seed, offset):
            return False
        position = begin_of_write(checkpoint, offset)
        known = position >= begin
        lines = data[position - begin : offset - begin] if known else self.read(position, offset - position)
        for line in lines.split(b"\n")[:-1]:
            if not is_sealed(line, self.seed, position):
                raise Damage(position, "a line's checksum does not match")
            position += len(line) + 1
        return True

    def catch_up(self, image: LogImage, size: int) -> None:
        """Replay what was appended since `image` was read, after checking that the last known line is still there."""
        known = len(image.seal) + 1 if image.seal else 0
        begin = image.log_end - known
        data = self.read(begin, size - begin)
        if data[:known] != image.seal + b"\n"[:known]:
            raise Damage(begin, "the last line that was known is not there any more")
        damage = None
        try:
            image.replay(data[known:], image.log_end)
        except Damage as error:
            damage = error
        if image.log_end < size:
            self.check_torn(image.log_end, size, damage)
        if image.staged:
            raise Damage(image.log_end, "the record of a large commit is missing")

    def check_torn(self, offset: int, size: int, damage: Damage | None = None) -> None:
        """Raise Damage unless the bytes [offset, size) are what a crash leaves behind."""
        if not is_torn(self.read(offset, size - offset), self.seed, offset):
            raise damage or Damage(offset, "the newline of the last line is damaged")

    def last_line(self) -> dict[str, Any] | None:
        """The fields of the last line; None if it is longer than a few kilobytes or is not complete."""
        size = self.status().st_size
        begin = max(0, size - HEAD)
        data = self.read(begin, size - begin)
        start = data.rfind(b"\n", 0, -1) + 1
        if start == 0 or data[-1:] != b"\n" or not is_sealed(data[start:-1], self.seed, begin + start):
            return None
        try:
            return fields(data[start:-1])
        except ValueError:
            return None

    # --- messages

    def messages(self, image: LogImage, first: int, stop: int) -> list[bytes]:
        """The messages at positions [first, stop), which are within the history."""
        runs = image.runs
        while image.older is not None and (not runs or runs[0][0] > first):
            self._read_older_runs(image, image.older)
        index = bisect_right(runs, first, key=_first_position) - 1
        messages: list[bytes] = []
        position = first
        while position < stop:
            if index < 0 or index >= len(runs):
                raise Damage(0, f"no line lists message {position}")
            end = runs[index + 1][0] if index + 1 < len(runs) else image.end
            messages += self._run(runs[index], position, min(stop, end))
            position = min(stop, end)
            index += 1
        return messages

    def _read_older_runs(self, image: LogImage, place: tuple[int, int]) -> None:
        offset, size = place
        line = self.read(offset, size)[:-1]
        if not is_sealed(line, self.seed, offset):
            raise Damage(offset, "a checkpoint's checksum does not match")
        try:
            # Only numbers follow this field, so its last occurrence is the field.
            said = fields(b"{" + line[line.rindex(b',"runs":') + 1 :] if b',"runs":' in line else line)
            runs: list[Run] = said["runs"] if "runs" in said else said["index"]
            older = said.get("older")
            if older is not None and older[0] >= offset:
                raise ValueError("it names a later line as the previous one")
        except (ValueError, KeyError, TypeError) as error:
            raise Damage(offset, f"a checkpoint cannot be parsed ({error})") from error
        stop = image.runs[0][0] if image.runs else image.end
        runs = [run for run in runs if run[0] < stop]  # the others were popped
        image.runs[:0] = runs
        image.listed += len(runs)
        image.older = None if older is None else (older[0], older[1])

    def _run(self, run: Run, first: int, stop: int) -> list[bytes]:
        """The messages [first, stop) of a run."""
        begin, count, offset, size = run
        data = self.read(offset, size)
        wanted = begin + count - first
        messages = self._usual_lines(data, 0 if first == begin else _last_lines(data, wanted), offset)
        if messages is not None and len(messages) == wanted:
            return messages[: stop - first]
        return self._part_of_run(data, run, first, stop)

    def _usual_lines(self, data: bytes, begin: int, offset: int) -> list[bytes] | None:
        """The messages from `begin` to the end of `data`; None unless all lines are appends of one message."""
        messages = []
        seed, view, match_line = self.seed + offset, memoryview(data), APPEND_LINE.match
        while (match := match_line(data, begin)) is not None:
            message, checksum = match.group(6, 7)
            end = match.end()
            if int(checksum, 16) != crc32(view[begin : end - SEAL_SIZE - 1], (seed + begin) & 0xFFFFFFFF):
                return None
            messages.append(message)
            begin = end
        return messages if begin == len(data) else None

    def _part_of_run(self, data: bytes, run: Run, first: int, stop: int) -> list[bytes]:
        """The messages [first, stop) of a run, read from its last line backwards: usually the last ones are wanted."""
        begin, count, offset, _ = run
        limit = len(data) - 1
        if limit < 0 or data[limit] != 10:
            raise Damage(offset, "a line is cut short")
        end = begin + count
        parts: list[list[bytes]] = []
        while end > first:
            start = data.rfind(b"\n", 0, max(limit, 0)) + 1
            added = self._messages_in(data, start, limit, offset)
            limit = start - 1
            if not added:
                continue
            begin = end - len(added)
            if begin < stop:
                parts.append(added[max(0, first - begin) : stop - begin] if begin < first or end > stop else added)
            end = begin
        parts.reverse()
        return [message for part in parts for message in part]

    def _messages_in(self, data: bytes, start: int, limit: int, offset: int) -> list[bytes]:
        """The messages of the line data[start:limit]; `offset` is the place of `data` in the file."""
        match = APPEND_LINE.match(data, start)
        if match is not None:
            body = data[start : limit - SEAL_SIZE]
            if int(match[7], 16) == crc32(body, (self.seed + offset + start) & 0xFFFFFFFF):
                return [match[6]]
        line = data[start:limit]
        if limit <= 0 or not is_sealed(line, self.seed, offset + start):
            raise Damage(offset + start, "a line's checksum does not match")
        return messages_of(line)

    # --- all of it

    def lines(self, end: int) -> Iterator[bytes]:
        """The file up to `end`, in pieces of whole lines whose checksums are verified."""
        offset, rest = 0, b""
        while offset < end:
            data = self.read(offset + len(rest), min(_PIECE, end - offset - len(rest)))
            if not data:
                raise Damage(offset, "a line is cut short")
            data = rest + data
            begin = 0
            while (stop := data.find(b"\n", begin)) >= 0:
                if not is_sealed(data[begin:stop], self.seed, offset + begin):
                    raise Damage(offset + begin, "a line's checksum does not match")
                begin = stop + 1
            yield data[:begin]
            offset += begin
            rest = data[begin:]


def _last_lines(data: bytes, count: int) -> int:
    """Where the last `count` lines begin."""
    begin = len(data)
    while count > 0 and begin > 0:
        begin = data.rfind(b"\n", 0, begin - 1) + 1
        count -= 1
    return begin


def _last_checkpoint(data: bytes) -> int:
    """Where the last complete checkpoint line in `data` begins, or -1."""
    position = data.rfind(CHECKPOINT_START)
    while position >= 0 and data.find(b"\n", position + 1) < 0:
        position = data.rfind(CHECKPOINT_START, 0, position)
    return position + 1 if position >= 0 else -1
