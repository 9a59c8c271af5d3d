"""The state of a log in memory: replaying lines, and making the lines that come next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, Final
from zlib import crc32

from ...operations import ALREADY_APPLIED, REMEMBER_CLEARED, REMEMBERED_COMMITS, Answer, Append, Commit, Space
from ..resolve import Effects, Image, ReadMessages
from .logformat import (
    APPEND_LINE,
    SEAL_SIZE,
    Damage,
    Run,
    fields,
    header,
    ids_of,
    ids_text,
    is_sealed,
    object_of,
    quoted_ascii,
    record,
    seal_body,
    seed_of,
    text,
)

_RUN_BYTES: Final = 16 * 1024
"""Bytes of a file that one run may span, all of which are read to find one message."""

_RECENT_MESSAGES: Final = 64
_RECENT_BYTES: Final = 16 * 1024
"""How many of the last messages an image holds."""

_CHECKPOINT_EVERY: Final = 4 * 1024
_CHECKPOINT_SHARE: Final = 4
"""A checkpoint is due after this many bytes, and this many times the size of the last checkpoint."""

_UNREAD_COMMITS: Final = 16
"""Lists of commit ids that may be waiting to be parsed."""

_GARBAGE_UNHEEDED: Final = 64 * 1024
"""Bytes of superseded data below which a file is never rewritten."""

_REMEMBER: Final = int(REMEMBER_CLEARED * 1_000_000)
"""Microseconds for which the commit ids of a context that is gone are kept."""

_NOTHING: Final[dict[str, bytes]] = {}

_STATE: Final = ("exists", "user_id", "created", "updated", "revision", "expires", "start", "end")

_HISTORY_BYTES: Final = 16 * 1024
_RUNS_IN_INDEX: Final = 64
"""Bytes of messages in a line of history, and runs in an index line."""

_LARGE: Final = 64 * 1024
"""Bytes of messages above which a commit is written as lines of history and a record."""

LARGE: Final = b'{"history":'
"""The beginning of what is written for such a commit."""

_READ_TOGETHER: Final = 16


class LogImage(Image):
    """A context as its log describes it, and the state that is needed to append to the log."""

    __slots__ = (
        "_commits",
        "_unread_commits",
        "base",
        "checkpoint_due",
        "checkpoint_size",
        "context_id",
        "forget",
        "listed",
        "listing",
        "live",
        "log_end",
        "older",
        "open_run",
        "recent",
        "recent_bytes",
        "rewrite_due",
        "runs",
        "seal",
        "seed",
        "staged",
    )  # fmt: skip

    def __init__(self, context_id: str) -> None:
        self._commits: dict[str, Answer] = {}
        self._unread_commits: list[tuple[list[str] | str, dict[str, Answer]]] = []  # ids, or what `ids_of` reads
        super().__init__()
        self.context_id = context_id
        self.seed = seed_of(context_id)
        self.log_end = 0  # where the last good line ends; lines of history count once a later line confirms them
        self.staged = False  # whether such lines were replayed that no later line has confirmed
        self.seal = b""  # of that line
        self.base = 0
        self.live = 0
        self.checkpoint_size = 0
        self.checkpoint_due = _CHECKPOINT_EVERY  # when the log has this size
        self.rewrite_due = _GARBAGE_UNHEEDED  # not to be considered before the log has this size
        self.forget: int | None = None
        self.runs: list[Run] = []  # from some position on
        self.listed = 0  # how many of them checkpoints list
        self.listing: tuple[int, int] | None = None  # offset and size of the last line that lists runs
        self.older: tuple[int, int] | None = None  # of the line that lists what is before runs[0]
        self.open_run: Run | None = None  # the last run, if it may grow
        self.recent: list[bytes] = []  # the last messages
        self.recent_bytes = 0

    @property
    def commits(self) -> dict[str, Answer]:
        """The remembered commits, parsed on first use: reads never need them."""
        if self._unread_commits:
            unread, self._unread_commits = self._unread_commits, []
            for ids, answers in unread:
                self._commits.update(dict.fromkeys(ids_of(ids) if isinstance(ids, str) else ids, b""))
                self._commits.update(answers)
            if len(self._commits) >= 2 * REMEMBERED_COMMITS:
                self._commits = dict(list(self._commits.items())[-REMEMBERED_COMMITS:])
        return self._commits

    @commits.setter
    def commits(self, commits: dict[str, Answer]) -> None:
        self._commits = commits

    def take_state(self, other: Image) -> None:
        """Copy the state of `other`, except for the places of its messages."""
        for name in _STATE:
            setattr(self, name, getattr(other, name))
        self.variables, self.metadata = dict(other.variables), dict(other.metadata)
        self.commits = dict(other.commits)

    def after_expiry(self) -> LogImage:
        """The context after it expired or was cleared: absent, with remembered commit ids."""
        left = LogImage(self.context_id)
        left.commits = dict(self.commits)
        left._forget_state()
        left.forget = self.updated + _REMEMBER if self.exists else self.forget
        return left

    # --- replay

    def replay(self, data: bytes, offset: int, *, sealed: bool = False) -> None:
        """Replay the complete lines of `data`, the content at `offset`. Raises Damage at the first bad line.

        `sealed`: the checksum of the first line was verified already.
        """
        begin, seed = 0, self.seed
        while True:
            begin = self._replay_appends(data, begin, offset)
            stop = data.find(b"\n", begin)
            if stop < 0:
                return
            line = data[begin:stop]
            if not sealed and not is_sealed(line, seed, offset + begin):
                raise Damage(offset + begin, "a line's checksum does not match")
            sealed = False
            try:
                self._replay_line(fields(line), offset + begin, len(line) + 1)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Damage(offset + begin, f"a line cannot be parsed ({error})") from error
            begin = stop + 1
            if not self.staged:
                self.log_end = offset + begin
                self.seal = line[-SEAL_SIZE:]

    def _replay_appends(self, data: bytes, begin: int, offset: int) -> int:
        """Replay consecutive appends of one message each, and return where they end.

        Any other line is left to `_replay_line`. Half the time of a cold read is spent here, so what can be done once
        for all lines is done after the loop.
        """
        if not self.exists or self.staged:
            return begin
        seed, view = self.seed + offset, memoryview(data)
        run, runs = self.open_run, self.runs
        said_ids: list[bytes] = []
        messages: list[bytes] = []
        revision = self.revision
        last = trimmed = None
        while (match := APPEND_LINE.match(data, begin)) is not None:
            said, commit_id, start, message, checksum = match.group(1, 3, 5, 6, 7)
            end = match.end()
            if int(checksum, 16) != crc32(view[begin : end - SEAL_SIZE - 1], (seed + begin) & 0xFFFFFFFF):
                break
            if int(said) != revision + 1:
                break
            revision += 1
            if start is not None:
                trimmed = int(start)
            if run is not None and offset + end - run[2] <= _RUN_BYTES:
                run[1] += 1
                run[3] = offset + end - run[2]
            else:
                run = [self.end + len(messages), 1, offset + begin, end - begin]
                runs.append(run)
            said_ids.append(commit_id)
            messages.append(message)
            begin, last = end, match
        if last is None:
            return begin
        self.open_run = run
        self.log_end = offset + begin
        self.seal = data[begin - SEAL_SIZE - 1 : begin - 1]
        at, expires = last.group(2, 4)
        self.revision = revision
        self.updated = int(at)
        self.expires = None if expires is None else int(expires)
        self._remember_all(b" ".join(said_ids).decode().split(" "), {})
        self.end += len(messages)
        self._add_recent(messages)
        if trimmed is not None:
            self._drop_first(trimmed)
        return begin

    def _replay_line(self, said: dict[str, Any], offset: int, size: int) -> None:
        if "rev" in said:
            self.replay_record(said, offset, size)
            self.staged = False
        elif "checkpoint" in said:
            self.replay_checkpoint(said, offset, size)
            self.staged = False
        elif "history" in said:
            self.staged = True
            if not self.runs:
                self.start = self.end = said["history"]
            self._move(self.start, said["history"], said["add"], offset, size)
        elif "index" in said:
            self._list_runs(said["index"], said.get("older"), offset, size)
        elif offset != 0 or "agentstate" not in said:
            raise ValueError("it is of an unknown kind")

    def _remember_all(self, ids: list[str] | str, answers: dict[str, Answer]) -> None:
        if len(self._unread_commits) >= _UNREAD_COMMITS:
            self.commits  # noqa: B018 - reads them
        self._unread_commits.append((ids, answers))

    def _follow(self, revision: int) -> None:
        if not self.exists or revision != self.revision + 1:
            raise ValueError(f"revision {revision} does not follow {self.revision}")
        self.revision = revision

    def replay_record(self, said: dict[str, Any], offset: int, size: int) -> None:
        if "created" in said:
            self._forget_state()
            self.exists, self.forget = True, None
            self.created, self.revision = said["created"], said["rev"]
        else:
            self._follow(said["rev"])
        self.updated = said["at"]
        self.expires = said.get("expires")
        if "owner" in said:
            self.user_id = said["owner"]
        self.remember(said["id"], ALREADY_APPLIED if "unkept" in said else said.get("answer", b""))
        replaces = said.get("replaces", ())
        for name, space in (("set", self.variables), ("meta", self.metadata)):
            if name in replaces:
                space.clear()
            space.update(said.get(name, ()))
            for key in said.get("un" + name, ()):
                space.pop(key, None)
        self._move(said.get("start", self.start), said.get("keep", self.end), said.get("add", []), offset, size)

    def replay_checkpoint(self, said: dict[str, Any], offset: int, size: int) -> None:
        if not (self.exists and self.revision == said["checkpoint"]):  # the lines before it were not replayed
            self._forget_state()
            self.exists = said["checkpoint"] > 0
            self.revision = said["checkpoint"]
            self.forget = said.get("forget")
            self.user_id = said.get("owner")
            self.created, self.updated = said.get("created", 0), said.get("at", 0)
            self.expires = said.get("expires")
            self.variables, self.metadata = said.get("variables", {}), said.get("metadata", {})
            self.start, self.end = said.get("start", 0), said.get("end", 0)
            self._commits, self._unread_commits = {}, []
            unkept = dict.fromkeys(said.get("unkept", ()), ALREADY_APPLIED)
            self._remember_all(said["commits"], {**said.get("answers", {}), **unkept})
        self.live, self.base = said.get("live", 0), said.get("base", 0)
        self._list_runs(said["runs"], said.get("older"), offset, size)
        self._note_checkpoint(offset + size, size)

    def _list_runs(self, runs: list[Run], older: list[int] | None, offset: int, size: int) -> None:
        pointer = None if older is None else (older[0], older[1])
        if not self.runs:
            self.runs = runs
            self.older = pointer
        self.listed = len(self.runs)
        self.listing = (offset, size) if runs else pointer
        self.open_run = None

    # --- history

    def _move(self, start: int, keep: int, added: Sequence[bytes], offset: int, size: int) -> None:
        """Keep the messages [start, keep), and append `added`, which are in the line at `offset`."""
        if keep != self.end:
            self._drop_last(keep)
        if start != self.start:
            self._drop_first(start)
        if not added:
            return
        self._add(added, offset, size)

    def _add(self, added: Sequence[bytes], offset: int, size: int) -> None:
        """Messages were appended by the line at `offset`."""
        count = len(added)
        run = self.open_run
        if run is not None and (spans := offset + size - run[2]) <= _RUN_BYTES:
            run[1] += count
            run[3] = spans
        else:
            self.open_run = run = [self.end, count, offset, size]
            self.runs.append(run)
        self.end += count
        self._add_recent(added)

    def _add_recent(self, added: Sequence[bytes]) -> None:
        recent = self.recent
        recent.extend(added)
        added_bytes = len(added[0]) if len(added) == 1 else sum(map(len, added))
        self.live += added_bytes
        self.recent_bytes = recent_bytes = self.recent_bytes + added_bytes
        if recent_bytes > _RECENT_BYTES or len(recent) > _RECENT_MESSAGES:
            self._forget_recent()

    def _forget_recent(self) -> None:
        """Drop recent messages down to half the limits: in blocks, so that it costs little per message."""
        recent = self.recent[-(_RECENT_MESSAGES // 2) :]
        size = sum(map(len, recent))
        while size > _RECENT_BYTES // 2:
            size -= len(recent.pop(0))
        self.recent, self.recent_bytes = recent, size

    def note_recent(self, messages: Sequence[bytes]) -> None:
        """Hold the last messages, within the limits."""
        self.recent = list(messages[-_RECENT_MESSAGES:])
        self.recent_bytes = sum(map(len, self.recent))
        if self.recent_bytes > _RECENT_BYTES:
            self._forget_recent()

    def _drop_last(self, keep: int) -> None:
        before, gone = self.end - self.start, self.end - keep
        if 0 < gone <= before:
            self.live -= self.live * gone // before
            del self.recent[max(0, len(self.recent) - gone) :]
        else:
            self.live, self.recent = 0, []
        self.recent_bytes = sum(map(len, self.recent))
        while self.runs and self.runs[-1][0] >= keep:
            self.runs.pop()
        self.listed = min(self.listed, len(self.runs))
        self.open_run = None
        self.end = keep
        self.start = min(self.start, keep)

    def _drop_first(self, start: int) -> None:
        before, gone = self.end - self.start, start - self.start
        if 0 < gone < before:
            self.live -= self.live * gone // before
            surplus = len(self.recent) - (self.end - start)
            if surplus > 0:
                self.recent_bytes -= sum(map(len, self.recent[:surplus]))
                del self.recent[:surplus]
        elif gone > 0:
            self.live, self.recent, self.recent_bytes = 0, [], 0
        dead = 0
        for run in self.runs:
            if run[0] + run[1] > start:
                break
            dead += 1
        if dead:
            del self.runs[:dead]
            self.listed = max(0, self.listed - dead)
            if not self.runs:
                self.open_run = None
        self.start = start

    # --- new lines

    def seal_next(self, body: bytes) -> bytes:
        """The next line of the log, which begins with `body`; the image is updated as if it were written."""
        line, self.seal = seal_body(body, self.seed, self.log_end)
        self.log_end += len(line)
        return line

    def header(self, adopted: Sequence[Any] | None = None) -> bytes:
        """The first line of a new log."""
        line = header(self.context_id, adopted)
        self.log_end = len(line)
        return line

    def add(self, commit: Commit, now: int, expires: int | None, flushed: int | None) -> bytes:
        """Apply a commit that `only_adds` and has no answer, and return its lines.

        Nearly all commits do: the result is that of `resolve` and `advance`, in a third of the time.
        """
        first = commit.changes[0]
        if type(first) is Append and len(commit.changes) == 1:
            messages, variables, metadata = first.messages, _NOTHING, _NOTHING
        else:
            messages, variables, metadata = _added(commit.changes)
        if now < self.updated:
            now = self.updated
        self.updated = now
        self.expires = expires
        self.revision = revision = self.revision + 1
        commit_id = commit.commit_id
        body = b'{"rev":%d,"at":%d,"id":%b' % (revision, now, quoted_ascii(commit_id).encode())
        if flushed is not None:
            body += b',"flushed":%d' % flushed
        if expires is not None:
            body += b',"expires":%d' % expires
        if variables:
            body += b',"set":' + object_of(variables)
            self.variables.update(variables)
        if metadata:
            body += b',"meta":' + object_of(metadata)
            self.metadata.update(metadata)
        staged = b""
        if len(messages) == 1:
            body = b'%b,"add":[%b]' % (body, messages[0])
        elif is_large(messages):
            staged, messages = self._stage(self.end, messages, flushed), ()
        elif messages:
            body = b'%b,"count":%d,"add":[%b]' % (body, len(messages), b",".join(messages))
        offset = self.log_end
        line, self.seal = seal_body(body, self.seed, offset)
        size = len(line)
        self.log_end = offset + size
        self.remember(commit_id, b"")
        if messages:
            self._add(messages, offset, size)
        return staged + line if staged else line

    def advance(self, effects: Effects, flushed: int | None) -> bytes:
        """Apply a commit, and return its lines for the end of the log."""
        staged = b""
        if is_large(effects.appended):
            staged = self._stage(effects.keep, effects.appended, flushed)
            effects = copy(effects)
            effects.keep, effects.appended = self.end, []
        offset = self.log_end
        line = self.seal_next(record(self, effects, flushed))
        start, end = self.start, self.end
        self.apply(effects)
        self.forget = None
        self.start, self.end = start, end  # `_move` sees the difference
        self._move(effects.start, effects.keep, effects.appended, offset, len(line))
        return staged + line

    def _stage(self, position: int, messages: Sequence[bytes], flushed: int | None) -> bytes:
        """Lines with the messages of a large commit, which count once its record follows: one line of many messages
        would have to be read as a whole for any of them. Raises ValueError."""
        if any(b"\n" in message for message in messages):
            raise ValueError("a stored value holds a line break")
        flushed = self.log_end if flushed is None else flushed
        lines = []
        for batch in in_batches(messages):
            lines.append(self.history(position, batch, flushed))
            position += len(batch)
            if len(self.runs) - self.listed >= _RUNS_IN_INDEX:
                lines.append(self.index(flushed))
        return b"".join(lines)

    def checkpoint(self, flushed: int | None = None, begun: int | None = None) -> bytes:
        """A checkpoint line for the end of the log. `begun`: the offset at which the write begins that includes it."""
        offset = self.log_end
        line = self.seal_next(self._checkpoint(flushed, begun))
        if self.listed < len(self.runs):
            self.listing = (offset, len(line))
        self.listed = len(self.runs)
        self.open_run = None
        self._note_checkpoint(self.log_end, len(line))
        return line

    def _note_checkpoint(self, end: int, size: int) -> None:
        self.checkpoint_size = size
        self.checkpoint_due = end + max(_CHECKPOINT_EVERY, _CHECKPOINT_SHARE * size)

    def _checkpoint(self, flushed: int | None, begun: int | None) -> bytes:
        parts = [b'{"checkpoint":%d,"at":%d' % (self.revision if self.exists else 0, self.updated)]
        if flushed is not None:
            parts.append(b',"flushed":%d' % flushed)
        if begun is not None and begun != flushed:
            parts.append(b',"begun":%d' % begun)
        if self.forget is not None:
            parts.append(b',"forget":%d' % self.forget)
        if self.exists:
            if self.expires is not None:
                parts.append(b',"expires":%d' % self.expires)
            parts.append(b',"created":%d,"start":%d,"end":%d' % (self.created, self.start, self.end))
            if self.user_id is not None:
                parts.append(b',"owner":' + text(self.user_id))
            if self.variables:
                parts.append(b',"variables":' + object_of(self.variables))
            if self.metadata:
                parts.append(b',"metadata":' + object_of(self.metadata))
        known = self.commits
        parts.append(b',"commits":' + ids_text(list(known)[-REMEMBERED_COMMITS:]))
        if any(known.values()):
            commits = list(known.items())[-REMEMBERED_COMMITS:]
            answers = {commit_id: answer for commit_id, answer in commits if answer and answer != ALREADY_APPLIED}
            unkept = [commit_id for commit_id, answer in commits if answer == ALREADY_APPLIED]
            if answers:
                parts.append(b',"answers":' + object_of(answers))
            if unkept:
                parts.append(b',"unkept":' + text(unkept))
        parts.append(b',"live":%d,"base":%d,"runs":%b' % (self.live, self.base, text(self.runs[self.listed :])))
        if self.listing is not None:
            parts.append(b',"older":[%d,%d]' % self.listing)
        return b"".join(parts)

    def history(self, position: int, messages: Sequence[bytes], flushed: int | None = None) -> bytes:
        """A line of history. A record or a checkpoint must follow."""
        offset = self.log_end
        line = self.seal_next(
            b'{"history":%d,"count":%d%b,"add":[%b]' % (position, len(messages), _flushed(flushed), b",".join(messages))
        )
        if not self.runs:
            self.start = self.end = position
        self._move(self.start, position, messages, offset, len(line))
        return line

    def index(self, flushed: int | None = None) -> bytes:
        """A line that lists the runs that no line lists yet. A record or a checkpoint must follow."""
        offset = self.log_end
        body = b'{"index":' + text(self.runs[self.listed :]) + _flushed(flushed)
        if self.listing is not None:
            body += b',"older":[%d,%d]' % self.listing
        line = self.seal_next(body)
        self.listing = (offset, len(line))
        self.listed = len(self.runs)
        self.open_run = None
        return line

    def wants_rewriting(self) -> bool:
        """Whether superseded data outweighs live data by so much that rewriting the file pays.

        What was written since the last time is at least twice what has to be written now, so that it costs at most
        half as much as what it follows. Ask once the log has grown to `rewrite_due`.
        """
        kept = self.live + self.live // 8 + self.checkpoint_size
        garbage = self.log_end - kept
        self.rewrite_due = self.log_end + max(_GARBAGE_UNHEEDED, self.log_end) // 8
        return garbage > _GARBAGE_UNHEEDED and garbage > 2 * kept and self.log_end > 2 * self.base

    def weight(self) -> int:
        """The approximate size of the image in memory, in bytes."""
        values = sum(map(len, self.variables.values())) + sum(map(len, self.metadata.values()))
        commits = len(self._commits) + sum(
            [ids.count(",") if isinstance(ids, str) else len(ids) for ids, _ in self._unread_commits]
        )
        keys = len(self.variables) + len(self.metadata) + commits
        return 2000 + values + self.recent_bytes + 50 * len(self.recent) + 150 * keys + 200 * len(self.runs)


def _added(changes: Any) -> tuple[tuple[bytes, ...], dict[str, bytes], dict[str, bytes]]:
    """The messages, variables and metadata that are added by changes, each an Append or a Put."""
    messages: list[bytes] = []
    variables: dict[str, bytes] = {}
    metadata: dict[str, bytes] = {}
    for change in changes:
        if type(change) is Append:
            messages += change.messages
        elif change.space is Space.VARIABLES:
            variables.update(change.items)
        else:
            metadata.update(change.items)
    return tuple(messages), variables, metadata


def _flushed(size: int | None) -> bytes:
    return b"" if size is None else b',"flushed":%d' % size


def is_large(messages: Sequence[bytes]) -> bool:
    """Whether the messages of a commit are written as lines of history."""
    return len(messages) > 1 and sum(map(len, messages)) > _LARGE


def in_batches(messages: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The messages, divided into lines of history."""
    batch: list[bytes] = []
    size = 0
    for message in messages:
        batch.append(message)
        size += len(message)
        if size >= _HISTORY_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def whole_log(context_id: str, image: LogImage, adopted: Sequence[Any] | None, read: ReadMessages) -> Iterator[bytes]:
    """The lines of a new log of `image`, without superseded data."""
    new = LogImage(context_id)
    yield new.header(adopted)
    position = image.start
    for batch in in_batches(_messages_of(image, read)):
        yield new.history(position, batch)
        position += len(batch)
        if len(new.runs) - new.listed >= _RUNS_IN_INDEX:
            yield new.index()
    new.take_state(image)
    new.base = new.log_end
    yield new.checkpoint()


def _messages_of(image: LogImage, read: ReadMessages) -> Iterator[bytes]:
    """The messages of the history, read a few at a time: each may be large."""
    for position in range(image.start, image.end, _READ_TOGETHER):
        yield from read(position, min(image.end, position + _READ_TOGETHER))
