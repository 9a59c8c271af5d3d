"""Writing an archive.

It is JSON Lines. The first line is a header, the last one counts the contexts::

    {"agentstate_archive": 1, "created_at": "2026-01-31T12:00:00.000000+00:00"}
    {"context_id": "alice", "user_id": null, "created_at": ..., "history": [...], "history_start": 0, "revision": 7}
    {"end": {"contexts": 1, "messages": 2}}

A context is what `ConversationState.to_dict` returns, with `expires_at` if it expires. A long history continues in
further lines, ``{"continues":"alice","history":[...]}``: each of its lines except the last has ``"more":true``, and the
first one has the number of `messages`. A line ``{"abandoned":"alice"}`` revokes what was written of a context that
changed while it was read. Archives can be edited, split and concatenated. Lines of contexts without header and end are
an archive too; it cannot be checked for completeness.

No line is longer or more complex than `check_line` allows, which limits the memory that reading an archive takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import BinaryIO, Final

from ..codec import encode
from ..errors import StateError, StateSerializationError
from ..state import from_microseconds
from ..storage.base import now_microseconds
from .compare import Measured, result_of
from .pieces import PAGE, Changed, Context, Pages, Report, Result, Sink

ARCHIVE_VERSION: Final = 1


LARGEST_LINE: Final = 64 * 2**20
"""Bytes of a line, its newline included."""

_LINE_BYTES: Final = 8 * 2**20
"""About how many bytes of messages are written to one line."""

_MOST_MEMORY: Final = 512 * 2**20


def check_line(line: bytes) -> None:
    """Raise ValueError for a line that is too long, or whose values would take too much memory when it is decoded.

    In a few bytes JSON can describe objects of hundreds, and a compressed archive can hold thousands of times its size.
    """
    if len(line) > LARGEST_LINE:
        raise ValueError(f"it has more than {LARGEST_LINE:,} bytes")
    # What CPython takes: about 64 bytes for a value, 200 for a dict with its first key.
    if len(line) + 64 * line.count(b",") + 200 * (line.count(b"{") + line.count(b"[")) > _MOST_MEMORY:
        raise ValueError(f"its values would take more than {_MOST_MEMORY:,} bytes of memory")


class Archive(Sink):
    """An archive that is being written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._line(b'{"agentstate_archive":%d,"created_at":%b}' % (ARCHIVE_VERSION, _time_text(now_microseconds())))

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        for context in contexts:
            try:
                self._write(context, iter(context.snapshot.messages))
            except StateError as error:
                yield Result(context.context_id, "failed", error=error)
            else:
                yield result_of(context, "copied")

    def take_long(self, context: Context, pages: Pages, *, repeatable: bool) -> Result:
        measured = Measured()
        self._write(context, measured.watching(context.snapshot.messages, pages))
        return result_of(context, "copied", measured)

    def _write(self, context: Context, messages: Iterator[bytes]) -> None:
        """Write the lines of a context. Raises StateError and Changed, after taking back what was written."""
        name = _text(context.context_id)
        left = context.snapshot.end - context.snapshot.start
        chunks = _chunks(messages, left)
        chunk = next(chunks, [])
        left -= len(chunk)
        self._checked_line(_context_line(context, chunk, more=left > 0), context)
        try:
            for chunk in chunks:
                left -= len(chunk)
                more = b',"more":true' if left else b""
                self._checked_line(b'{"continues":%b,"history":%b%b}' % (name, _list(chunk), more), context)
            if left:
                raise Changed
        except (StateError, Changed):
            self._line(b'{"abandoned":%b}' % name)
            raise

    def _checked_line(self, line: bytes, context: Context) -> None:
        try:
            check_line(line + b"\n")
        except ValueError as error:
            raise StateSerializationError(
                f"{context.context_id!r} does not fit into a line of an archive: {error}; copy it with migrate",
                context_id=context.context_id,
            ) from None
        self._line(line)

    def end(self, report: Report) -> None:
        self._line(b'{"end":{"contexts":%d,"messages":%d}}' % (report.copied, report.messages))

    def _line(self, line: bytes) -> None:
        self.file.write(line + b"\n")


def _chunks(messages: Iterator[bytes], most: int) -> Iterator[list[bytes]]:
    """The first `most` messages, in the portions that are written to one line each."""
    chunk: list[bytes] = []
    size = 0
    for message in islice(messages, most):
        if chunk and (len(chunk) == PAGE or size + len(message) > _LINE_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += len(message)
    if chunk:
        yield chunk


def _context_line(context: Context, history: Sequence[bytes], *, more: bool) -> bytes:
    snapshot = context.snapshot
    fields = {
        "context_id": _text(context.context_id),
        "user_id": _text(snapshot.user_id),
        "created_at": _time_text(snapshot.created),
        "updated_at": _time_text(snapshot.updated),
        "metadata": _object(snapshot.metadata),
        "variables": _object(snapshot.variables),
        "history": _list(history),
        "history_start": b"%d" % snapshot.start,
        "revision": b"%d" % snapshot.revision,
    }
    if snapshot.expires is not None:
        fields["expires_at"] = _time_text(snapshot.expires)
    if more:
        fields |= {"messages": b"%d" % (snapshot.end - snapshot.start), "more": b"true"}
    return _object(fields)


def _object(texts: dict[str, bytes]) -> bytes:
    return b"{" + b",".join(_text(key) + b":" + text for key, text in texts.items()) + b"}"


def _list(texts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(texts) + b"]"


def _text(value: str | None) -> bytes:
    return b"null" if value is None else encode(value, "text")


def _time_text(microseconds: int) -> bytes:
    return b'"' + from_microseconds(microseconds).isoformat(timespec="microseconds").encode() + b'"'
