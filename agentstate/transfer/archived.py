"""Reading an archive."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile
from typing import Any, BinaryIO, Final, NoReturn, TypeVar

from .. import codec
from ..errors import StateCorruptedError, StateError, StateSerializationError
from ..keys import MAX_CONTEXT_ID_BYTES, check_context_id, check_user_id
from ..operations import Snapshot
from ..state import parse_time, to_microseconds
from ..storage.base import now_microseconds
from .archive import ARCHIVE_VERSION, LARGEST_LINE, check_line
from .pieces import GROUP_BYTES, LARGEST_GROUP, PAGE, Abandoned, Context, Pages, Progress, Result, Source

T = TypeVar("T")

_PIECE: Final = 2**20
"""Bytes that are read at a time of a line that is too long."""

_CONTEXT_FIELDS: Final = frozenset(
    (
        *("context_id", "user_id", "created_at", "updated_at", "metadata", "variables", "history", "history_start"),
        *("revision", "expires_at", "messages", "more"),
    )
)


class _BadLine(ValueError):
    """Why a line cannot be used."""


class Archived(Source):
    """The contexts in an archive. Bad lines are reported; the others are used."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.number = 0
        self.blank = True  # so far
        self.open: str | None = None  # the context whose history continues in the next line
        self.buffered: list[bytes] = []  # messages of its first line after the first page
        self.counted = 0  # contexts since the header
        self.expects_end = False
        self.pushed_back: dict[str, Any] | None = None  # a line that was read too early
        self.problem: str | None = None  # with the archive as a whole

    def pieces(self, settle: Progress) -> Iterator[list[Context] | Context]:
        group: list[Context] = []
        size = 0
        for said in self._lines(settle):
            try:
                context = self._context(said)
            except (_BadLine, StateError) as error:
                self._report(settle, error, said.get("context_id", said.get("continues")))
                continue
            if context is None:
                continue
            if context.whole:
                group.append(context)
                size += context.size
            if group and (not context.whole or len(group) >= LARGEST_GROUP or size >= GROUP_BYTES):
                yield group
                group, size = [], 0
            if not context.whole:
                yield context
                self.buffered = []  # what nobody asked for
        yield group

    def _lines(self, settle: Progress) -> Iterator[dict[str, Any]]:
        while (said := self._next(settle)) is not None:
            yield said

    def _next(self, settle: Progress | None = None) -> dict[str, Any] | None:
        """The next line that is not blank. Bad ones are reported to `settle`, or raise _BadLine without it."""
        if self.pushed_back is not None:
            said, self.pushed_back = self.pushed_back, None
            return said
        while True:
            try:
                line = self._line()
            except (EOFError, BadGzipFile, zlib.error):
                self.problem = f"the compressed data is cut off or damaged after line {self.number:,}"
                return None
            if not line:
                if self.blank:
                    self.problem = "it is empty"  # the program that wrote it may have failed at once
                return None
            self.number += 1
            if not line.strip():
                continue
            self.blank = False
            try:
                return _parsed(line)
            except _BadLine as error:
                if not line.endswith(b"\n"):
                    self.problem = f"it is cut off in line {self.number:,}"
                    return None
                if settle is None:
                    raise
                self._report(settle, error, None)

    def _line(self) -> bytes:
        """The next line. One that is too long is only read to its end, and given with its first and last bytes."""
        line = self.file.readline(LARGEST_LINE + 1)
        if len(line) > LARGEST_LINE:
            piece = line[-1:]
            while piece and not piece.endswith(b"\n"):
                piece = self.file.readline(_PIECE)
            line += piece[-1:]
        return line

    def _report(self, settle: Progress, error: Exception, context_id: object) -> None:
        name = (
            context_id
            if isinstance(context_id, str) and len(context_id) <= MAX_CONTEXT_ID_BYTES
            else f"(line {self.number:,})"
        )
        bad = StateCorruptedError(f"line {self.number:,} of the archive: {error}", context_id=name)
        settle(Result(name, "failed", error=bad))

    def _context(self, said: dict[str, Any]) -> Context | None:
        """The context that begins with a line; None for other lines. Raises _BadLine or StateError."""
        if "context_id" in said:
            self.open = None
            self.counted += 1
            return self._begun(said)
        if "agentstate_archive" in said:
            version = said["agentstate_archive"]
            if version != ARCHIVE_VERSION:
                raise _BadLine(f"version {_shown(version)} of the format is unknown: upgrade agentstate")
            if self.expects_end:
                self.problem = f"the part before line {self.number:,} is cut off: its last line is missing"
            self.expects_end, self.counted = True, 0
            return None
        if "end" in said:
            self._ended(said["end"])
            return None
        if "continues" in said:
            self._skipped(said)
            return None
        if "abandoned" in said:
            self.counted -= 1
            self.open = None
            return None
        raise _BadLine(f"its keys must include 'context_id', got {_shown(list(said)[:5])}")

    def _ended(self, end: Any) -> None:
        self.expects_end = False
        expected = end.get("contexts") if isinstance(end, dict) else None
        if expected != self.counted:
            self.problem = (
                f"line {self.number:,} counts {_shown(expected)} contexts, but there are {self.counted:,} (in an "
                "archive that you edited, delete the first and the last line)"
            )

    def _skipped(self, said: dict[str, Any]) -> None:
        """Skip a line that continues a context nobody asked for. Any other one is in the wrong place."""
        if said["continues"] != self.open:
            raise _BadLine(f"it continues {_shown(said['continues'])}, which is not the context before it")
        if not said.get("more"):
            self.open = None

    def _begun(self, said: dict[str, Any]) -> Context:
        context_id = check_context_id(said["context_id"])
        more = said.get("more") is True
        if more:
            self.open = context_id  # first, so that its further lines are recognised even if this one is bad
        unknown = sorted(said.keys() - _CONTEXT_FIELDS)
        if unknown:
            raise _BadLine(f"unknown field {_shown(unknown[0])}")
        messages = _messages(said.get("history"))
        start = _natural(said, "history_start", 0)
        count = _natural(said, "messages", len(messages))
        if count < len(messages) or (count > len(messages) and not more):
            raise _BadLine(f"`messages` must be {len(messages):,}, the length of its history")
        user_id = said.get("user_id")
        now = now_microseconds()
        snapshot = Snapshot(
            None if user_id is None else check_user_id(user_id),
            _moment(said, "created_at", now),
            _moment(said, "updated_at", now),
            max(1, _natural(said, "revision", 1)),
            start,
            start + count,
            _stored_values(said, "variables"),
            _stored_values(said, "metadata"),
            start,
            messages[:PAGE],
            _moment(said, "expires_at", None),
        )
        self.buffered = messages[PAGE:]
        return Context(context_id, snapshot)

    def rest(self, context: Context) -> Pages:
        while self.buffered:
            page, self.buffered = self.buffered[:PAGE], self.buffered[PAGE:]
            yield page
        while self.open is not None:
            try:
                said = self._next()
            except _BadLine as error:
                raise self._broken(context, str(error)) from error
            if said is None:
                raise self._broken(context, "its history is cut off")
            if said.get("abandoned") == self.open:
                self.open = None
                self.counted -= 1
                raise Abandoned
            if said.get("continues") != self.open:
                self.pushed_back = said
                self.open = None
                raise self._broken(context, "its history is incomplete: another line follows")
            try:
                page = _messages(said.get("history"))
            except (_BadLine, StateError) as error:
                raise self._broken(context, str(error)) from error
            if not said.get("more"):
                self.open = None
            yield page

    def _broken(self, context: Context, reason: str) -> StateCorruptedError:
        return StateCorruptedError(
            f"line {self.number:,} of the archive, in {context.context_id!r}: {reason}", context_id=context.context_id
        )

    def again(self, context: Context) -> Context | None:
        raise self._broken(context, "its history has fewer or more messages than its first line says")

    def damage(self) -> StateCorruptedError | None:
        if self.problem is None and self.expects_end:
            self.problem = "it is cut off: its last line is missing"
        return (
            None
            if self.problem is None
            else StateCorruptedError(f"the archive is incomplete or damaged: {self.problem}")
        )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        check_line(line)
    except ValueError as error:
        raise _BadLine(str(error)) from None
    try:
        said = json.loads(line, parse_constant=_refused_constant, object_pairs_hook=_distinct)
    except _BadLine:
        raise
    except UnicodeDecodeError:
        raise _BadLine("it is not valid UTF-8") from None
    except RecursionError:
        raise _BadLine("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _BadLine(f"it is not valid JSON ({error})") from None
    except ValueError:
        raise _BadLine("it has an integer of too many digits") from None
    if not isinstance(said, dict):
        raise _BadLine("it must be a JSON object")
    return said


def _shown(value: Any) -> str:
    """A value of the archive in a message, which must not become as long as the archive."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refused_constant(name: str) -> NoReturn:
    raise _BadLine(f"{name} is not valid JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _BadLine("an object has the same key twice")
    return result


def _messages(history: Any) -> list[bytes]:
    if history is None:
        return []
    if not isinstance(history, list) or not all(isinstance(message, dict) for message in history):
        raise _BadLine("`history` must be a list of objects")
    return [_message(message, f"history[{index}]") for index, message in enumerate(history)]


def _message(given: dict[str, Any], path: str) -> bytes:
    """A message as it is. One with only some of its fields, made by hand, is completed."""
    if given.keys() < {"role", "content", "timestamp", "metadata"}:
        return codec.message_from_mapping(given, path)
    return _stored(given, path)


def _stored_values(said: dict[str, Any], name: str) -> dict[str, bytes]:
    values = said.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _BadLine(f"`{name}` must be an object")
    return {codec.key(key, name): _stored(value, f"{name}.{key}") for key, value in values.items()}


def _stored(value: Any, path: str) -> bytes:
    try:
        return codec.encode(value, path, limit=LARGEST_LINE)
    except StateSerializationError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError) and "surrogate" not in str(error):
            raise
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()  # AgentUp stores them, as escapes


def _natural(said: dict[str, Any], name: str, default: int) -> int:
    value = said.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _BadLine(f"`{name}` must be a whole number, 0 or more")
    return value


def _moment(said: dict[str, Any], name: str, default: T) -> int | T:
    text = said.get(name)
    if text is None:
        return default
    try:
        return to_microseconds(parse_time(text))
    except (TypeError, ValueError, OverflowError):
        raise _BadLine(f"`{name}` must be a time in ISO 8601, such as 2026-01-31T12:00:00+00:00") from None
