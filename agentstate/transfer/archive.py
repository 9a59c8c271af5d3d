"""Contexts into an archive.

It is JSON Lines. The first line is a header, the last one says how many contexts there are::

    {"agentstate_archive": 1, "created_at": "2026-01-31T12:00:00.000000+00:00"}
    {"context_id": "alice", "user_id": null, "created_at": ..., "history": [...], "history_start": 0, "revision": 7}
    {"end": {"contexts": 1, "messages": 2}}

A context is what `ConversationState.to_dict` gives, and `expires_at` where it expires. The history of a long one goes
on in further lines, ``{"continues":"alice","history":[...]}``: each line but the last says ``"more":true``, and the
first one how many `messages` there are. A line ``{"abandoned":"alice"}`` takes back what was written of a context that
changed meanwhile. Archives can be edited, cut and put together; lines of contexts alone, without header and end, are an
archive too, of which nobody can tell whether it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import BinaryIO, Final

from ..codec import encode
from ..errors import StateError
from ..state import from_microseconds
from ..storage.base import now_microseconds
from .compare import Measured, result_of
from .pieces import PAGE, Changed, Context, Pages, Report, Result, Sink

ARCHIVE_VERSION: Final = 1


class Archive(Sink):
    """An archive that is being written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._line(b'{"agentstate_archive":%d,"created_at":%b}' % (ARCHIVE_VERSION, _time_text(now_microseconds())))

    def take_whole(self, contexts: list[Context]) -> Iterator[Result]:
        for context in contexts:
            self._line(_context_line(context, more=False))
            yield result_of(context, "copied")

    def take_long(self, context: Context, pages: Pages, *, repeatable: bool) -> Result:
        snapshot = context.snapshot
        left = snapshot.end - snapshot.start - len(snapshot.messages)
        measured = Measured()
        messages = measured.watching(snapshot.messages, pages)
        self._line(_context_line(context, more=True))
        for _ in islice(messages, len(snapshot.messages)):
            pass
        try:
            while left:
                page = list(islice(messages, min(left, PAGE)))
                if not page:
                    raise Changed
                left -= len(page)
                more = b',"more":true' if left else b""
                self._line(b'{"continues":%b,"history":%b%b}' % (_text(context.context_id), _list(page), more))
        except (StateError, Changed):
            self._line(b'{"abandoned":%b}' % _text(context.context_id))
            raise
        return result_of(context, "copied", measured)

    def end(self, report: Report) -> None:
        self._line(b'{"end":{"contexts":%d,"messages":%d}}' % (report.copied, report.messages))

    def _line(self, line: bytes) -> None:
        self.file.write(line + b"\n")


def _context_line(context: Context, *, more: bool) -> bytes:
    snapshot = context.snapshot
    fields = {
        "context_id": _text(context.context_id),
        "user_id": _text(snapshot.user_id),
        "created_at": _time_text(snapshot.created),
        "updated_at": _time_text(snapshot.updated),
        "metadata": _object(snapshot.metadata),
        "variables": _object(snapshot.variables),
        "history": _list(snapshot.messages),
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
