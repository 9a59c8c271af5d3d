"""What a commit does to a context: the pure rules that the memory, file and document backends share.

`resolve` looks at an `Image` of the context and says what changes, as `Effects`: the net result, without conditions,
that a backend makes durable and then applies to its image. (Valkey's script implements the same rules on the server;
`agentstate.testing.StorageContract` holds both to one behaviour.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Final, NoReturn

from ..codec import MAX_INTEGER_DIGITS, decode
from ..errors import StateAccessError, StateConflictError, TurnLostError
from ..operations import (
    ALREADY_APPLIED,
    CHANGED,
    CREATING,
    REMEMBERED_COMMITS,
    Answer,
    Append,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Own,
    Pop,
    Put,
    Query,
    Restore,
    Snapshot,
    Space,
    Trim,
    kept_answer,
    visible,
)

TRUE: Final[Answer] = b"true"
FALSE: Final[Answer] = b"false"

ReadMessages = Callable[[int, int], Sequence[bytes]]
"""The stored messages at positions [first, stop) of the context at hand."""


class Image:
    """A context as a backend knows it: everything but the messages themselves. Values are stored JSON texts.

    One that does not `exist` may still remember commit ids (of a context that was cleared). `expires` is in
    microseconds since 1970; None is never.
    """

    __slots__ = (
        "commits", "created", "end", "exists", "expires", "metadata", "revision", "start", "updated", "user_id",
        "variables",
    )  # fmt: skip

    def __init__(self) -> None:
        self.exists = False
        self.commits: dict[str, Answer] = {}  # in order of their commits
        self._forget_state()

    def _forget_state(self) -> None:
        self.user_id: str | None = None
        self.created = 0
        self.updated = 0
        self.revision = 0
        self.variables: dict[str, bytes] = {}
        self.metadata: dict[str, bytes] = {}
        self.start = 0
        self.end = 0
        self.expires: int | None = None
        self.forget_answers()

    def forget_answers(self) -> None:
        """Keep of the remembered commits what does not tell what the context held."""
        if any(self.commits.values()):
            self.commits = {commit_id: without_content(answer) for commit_id, answer in self.commits.items()}

    def lives(self, now: int) -> bool:
        """Whether the context exists and has not expired."""
        return self.exists and (self.expires is None or self.expires > now)

    def expire(self, now: int) -> None:
        """Make an expired context one that does not exist. Its commit ids stay remembered, their answers do not."""
        if self.exists and not self.lives(now):
            self.exists = False
            self._forget_state()

    def apply(self, effects: Effects) -> None:
        """Become what the context is after `effects`."""
        if effects.deletes:
            self._forget_state()
        self.exists = effects.exists
        self.remember(effects.commit_id, kept_answer(effects.answer))
        if not effects.exists:
            return
        self.user_id = effects.user_id
        self.created = effects.created
        self.updated = effects.updated
        self.revision = effects.revision
        self.expires = effects.expires
        self.start = effects.start
        self.end = effects.end
        _update(self.variables, effects.variables, effects.replaces_variables)
        _update(self.metadata, effects.metadata, effects.replaces_metadata)

    def remembered(self, commit_id: str) -> Answer | None:
        """What the commit of that id answered; None where it is not remembered."""
        return self.commits.get(commit_id)

    def remember(self, commit_id: str, answer: Answer) -> None:
        commits = self.commits
        commits[commit_id] = answer
        if len(commits) >= 2 * REMEMBERED_COMMITS:  # in blocks, so that forgetting costs nothing per commit
            self.commits = dict(list(commits.items())[-REMEMBERED_COMMITS:])

    def snapshot(self, query: Query, read: ReadMessages) -> Snapshot:
        """What `query` asks of this (living) context."""
        _, variables, metadata, window, _, _ = query
        first, messages = self.end, ()  # type: tuple[int, Sequence[bytes]]
        if window is not None:
            first, stop = visible(window, self.start, self.end)
            messages = read(first, stop) if first < stop else ()
        return Snapshot(
            self.user_id,
            self.created,
            self.updated,
            self.revision,
            self.start,
            self.end,
            {} if variables == () else _selected(self.variables, variables),
            {} if metadata == () else _selected(self.metadata, metadata),
            first,
            messages,
            self.expires,
        )


class Effects:
    """What one commit changes, resolved: the state after it, and the differences that led there.

    History: of the messages before, those at positions [`start`, `keep`) stay, and `appended` follow. `variables` and
    `metadata` hold the changed keys (None: removed); with `replaces_...` nothing else stays. With `deletes` nothing at
    all of the state before stays, the messages included; `exists` says whether the commit made a new one.
    """

    __slots__ = (
        "answer", "appended", "commit_id", "created", "deletes", "exists", "expires", "keep", "metadata",
        "replaces_metadata", "replaces_variables", "revision", "start", "updated", "user_id", "variables",
    )  # fmt: skip

    def __init__(self, image: Image, commit_id: str) -> None:
        self.commit_id = commit_id
        self.answer: Answer = b""
        self.deletes = False
        self.exists = image.exists
        self.user_id = image.user_id
        self.created = image.created
        self.updated = image.updated
        self.revision = image.revision
        self.expires = image.expires
        self.start = image.start
        self.keep = image.end
        self.appended: list[bytes] = []
        self.variables: dict[str, bytes | None] = {}
        self.metadata: dict[str, bytes | None] = {}
        self.replaces_variables = False
        self.replaces_metadata = False

    @property
    def end(self) -> int:
        """The position after the last message."""
        return self.keep + len(self.appended)


def resolve(
    image: Image, commit: Commit, *, now: int, ttl: float | None, lease: str | None, read: ReadMessages
) -> Effects | Answer:
    """What `commit` does to the context of `image` at `now`, or the answer of one that changes nothing.

    `lease` is the token that holds the context's turn now. Call `image.expire(now)` first. Raises StateAccessError,
    TurnLostError or StateConflictError; changes nothing itself.
    """
    check_owner(image, commit.user, commit.context_id)
    remembered = image.remembered(commit.commit_id)
    if remembered is not None:
        return _answer_again(remembered, commit)
    if commit.fence is not None and commit.fence != lease:
        raise TurnLostError(
            f"the turn on {commit.context_id!r} lost its lease; nothing was changed", context_id=commit.context_id
        )
    if commit.absent and image.exists:
        raise StateConflictError(f"the context {commit.context_id!r} exists already", context_id=commit.context_id)
    if commit.idle_for is not None and (not image.exists or image.updated > now - commit.idle_for * 1_000_000):
        return FALSE
    if commit.expect is not None and image.variables.get(commit.expect[0]) != commit.expect[1]:
        return CHANGED
    return _Resolution(image, commit, now, ttl, read).run()


def only_adds(commit: Commit, image: Image) -> bool:
    """Whether a commit takes effect whatever else the context holds, and only appends messages and sets keys.

    So of an existing context, without any condition, and not applied before: `resolve` would find the same.
    """
    _, changes, commit_id, user, fence, absent, idle_for, expect, _, _, fresh = commit
    if (
        not image.exists
        or fence is not None
        or expect is not None
        or absent
        or idle_for is not None
        or (user is not None and user != image.user_id)
        or (not fresh and image.remembered(commit_id) is not None)
    ):
        return False
    for change in changes:
        if not (isinstance(change, Append) or (isinstance(change, Put) and not change.replace)):
            return False
    return bool(changes)


def without_content(answer: Answer) -> Answer:
    """What is remembered of an answer once the context is gone: nothing that was stored in it."""
    return answer if answer in (b"", TRUE, FALSE) else ALREADY_APPLIED


def expiry(now: int, ttl: float | None) -> int | None:
    """When a context expires that was written to at `now`."""
    return None if ttl is None else now + int(ttl * 1_000_000)


def check_owner(image: Image, user: str | None, context_id: str) -> None:
    """Raise StateAccessError where the caller is bound to another user than the one who owns the context."""
    if user is not None and image.exists and image.user_id != user:
        raise access_error(context_id)


def access_error(context_id: str) -> StateAccessError:
    return StateAccessError(f"the context {context_id!r} does not belong to this user", context_id=context_id)


def added(current: bytes | None, by: bytes, key: str, context_id: str) -> bytes:
    """The sum of a variable's stored value and a stored number, as stored. Raises StateConflictError."""
    value = 0 if current is None else _number(current)
    if value is None:
        raise StateConflictError(f"the variable {key!r} is not a number", context_id=context_id)
    try:
        total = value + decode(by)
        text = repr(total)  # which is how JSON has numbers, but for those that are refused below
    except (OverflowError, ValueError):
        total, text = float("inf"), ""
    if (isinstance(total, float) and not isfinite(total)) or len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise StateConflictError(f"incrementing {key!r} leaves the range of stored numbers", context_id=context_id)
    return text.encode()


def _number(text: bytes) -> int | float | None:
    if text[:1] not in b"-0123456789":
        return None
    value: int | float = decode(text)
    return value


def _answer_again(remembered: Answer, commit: Commit) -> Answer:
    if remembered == ALREADY_APPLIED:
        already_applied(commit)
    return remembered


def already_applied(commit: Commit) -> NoReturn:
    raise StateConflictError(
        f"the commit {commit.commit_id!r} is already applied; its answer was not kept "
        "(it was too large, or the context is gone since)",
        context_id=commit.context_id,
    )


def _selected(stored: dict[str, bytes], keys: tuple[str, ...] | None) -> dict[str, bytes]:
    if keys is None:
        return dict(stored)
    found = {}
    for key in keys:  # mostly one, for which a comprehension takes half as long again
        value = stored.get(key)
        if value is not None:
            found[key] = value
    return found


def _update(stored: dict[str, bytes], changes: dict[str, bytes | None], replaces: bool) -> None:
    if replaces:
        stored.clear()
    for key, value in changes.items():
        if value is None:
            stored.pop(key, None)
        else:
            stored[key] = value


class _Resolution:
    """One run through the changes of a commit."""

    __slots__ = ("before", "commit", "effects", "image", "now", "read", "touched", "ttl")

    def __init__(self, image: Image, commit: Commit, now: int, ttl: float | None, read: ReadMessages) -> None:
        self.image = image
        self.commit = commit
        self.now = now
        self.ttl = ttl
        self.read = read
        self.effects = Effects(image, commit.commit_id)
        self.effects.answer = commit.answer
        self.touched = False  # whether anything came to pass that makes this a commit of the context

    def run(self) -> Effects | Answer:
        for change in self.commit.changes:
            if not self.effects.exists and isinstance(change, CREATING):
                self._create()
            _RULES[type(change)](self, change)
        effects = self.effects  # not before: a Delete starts them anew
        if not self.touched:
            return effects.answer
        if effects.exists:
            effects.revision += 1
            effects.updated = max(self.now, effects.updated)
            effects.expires = expiry(self.now, self.ttl)
            first = self.commit.changes[0]
            if isinstance(first, Restore):
                self._backdate(first)
        return effects

    def _backdate(self, restore: Restore) -> None:
        effects = self.effects
        if restore.updated is not None:
            effects.updated = restore.updated
        if restore.expires is not None:
            effects.expires = restore.expires
        if not self.image.exists:
            if restore.created is not None:
                effects.created = restore.created
            if restore.revision is not None:
                effects.revision = restore.revision

    def _create(self) -> None:
        effects = self.effects
        effects.exists = True
        effects.created = self.now
        effects.user_id = self.commit.user
        self.touched = True

    def _value(self, space: Space, key: str) -> bytes | None:
        """What a key holds at this point of the commit."""
        effects = self.effects
        if space is Space.VARIABLES:
            changed, replaced, stored = effects.variables, effects.replaces_variables, self.image.variables
        else:
            changed, replaced, stored = effects.metadata, effects.replaces_metadata, self.image.metadata
        if key in changed:
            return changed[key]
        return None if replaced or effects.deletes else stored.get(key)

    def create(self, change: Create) -> None:
        effects = self.effects
        if change.user_id is None or change.user_id == effects.user_id:
            return
        if effects.user_id is not None:
            raise access_error(self.commit.context_id)
        effects.user_id = change.user_id
        self.touched = True

    def restore(self, change: Restore) -> None:
        self.touched = True
        self.effects.user_id = change.user_id
        if not self.image.exists:
            self.effects.start = self.effects.keep = change.start

    def own(self, change: Own) -> None:
        self.touched = True
        if self.commit.user is None or (self.image.exists and not self.effects.deletes):
            self.effects.user_id = change.user_id  # else a bound caller makes the context, and owns what it makes

    def append(self, change: Append) -> None:
        self.touched = True
        self.effects.appended.extend(change.messages)

    def put(self, change: Put) -> None:
        self.touched = True
        effects = self.effects
        if change.space is Space.VARIABLES:
            if change.replace:
                effects.replaces_variables, effects.variables = True, {}
            effects.variables.update(change.items)
        else:
            if change.replace:
                effects.replaces_metadata, effects.metadata = True, {}
            effects.metadata.update(change.items)

    def drop(self, change: Drop) -> None:
        self.touched = self.touched or self.effects.exists
        present = self._value(change.space, change.key) is not None
        self.effects.answer = TRUE if present else FALSE
        if present:
            space = self.effects.variables if change.space is Space.VARIABLES else self.effects.metadata
            space[change.key] = None

    def increment(self, change: Increment) -> None:
        self.touched = True
        current = self._value(Space.VARIABLES, change.key)
        total = added(current, change.by, change.key, self.commit.context_id)
        self.effects.variables[change.key] = self.effects.answer = total

    def trim(self, change: Trim) -> None:
        self.touched = self.touched or self.effects.exists
        effects = self.effects
        start = max(effects.start, effects.end - change.keep)
        if start > effects.keep:
            del effects.appended[: start - effects.keep]
            effects.keep = start
        effects.start = start

    def pop(self, change: Pop) -> None:
        self.touched = self.touched or self.effects.exists
        effects = self.effects
        count = min(change.n, effects.end - effects.start)
        fresh = min(count, len(effects.appended))
        popped = effects.appended[len(effects.appended) - fresh :]
        del effects.appended[len(effects.appended) - fresh :]
        if count > fresh:
            stored = self.read(effects.keep - (count - fresh), effects.keep)
            effects.keep -= count - fresh
            popped = [*stored, *popped]
        effects.answer = b"[" + b",".join(popped) + b"]"

    def delete(self, change: Delete) -> None:
        existed = self.effects.exists
        self.touched = self.touched or existed
        self.effects = Effects(Image(), self.commit.commit_id)
        self.effects.deletes = True
        self.effects.answer = TRUE if existed else FALSE


_RULES: Final[dict[type, Callable[[_Resolution, Any], None]]] = {
    Create: _Resolution.create,
    Restore: _Resolution.restore,
    Own: _Resolution.own,
    Append: _Resolution.append,
    Put: _Resolution.put,
    Drop: _Resolution.drop,
    Increment: _Resolution.increment,
    Trim: _Resolution.trim,
    Pop: _Resolution.pop,
    Delete: _Resolution.delete,
}
