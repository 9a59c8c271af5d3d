"""The operations of a storage, as data.

A documented call compiles to one or a few of these small immutable values, and a storage's `execute` executes them.
Values, messages and metadata are opaque here: each is UTF-8 JSON text (`bytes`) made by `agentstate.codec`, so a
storage never needs to parse what a user stored. Times are whole microseconds since 1970 (UTC); durations are seconds;
`deadline` is a reading of `time.monotonic()` after which no attempt may start.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeAlias

NEVER: Final = float("inf")

LONGEST: Final = 3.2e9
"""Seconds, a hundred years. Longer durations are reduced to this, which every clock, lock and server can represent."""

MOST: Final = 2**53
"""Messages. Larger counts are reduced to this, which every server and its scripts can represent."""


Answer: TypeAlias = bytes
"""The JSON text of a change's answer; ``b""`` for none."""


class Space(Enum):
    """The two key-value spaces of a context."""

    VARIABLES = "variables"
    METADATA = "metadata"


# --- changes: the parts of a Commit, applied in order ---------------------------------------------------------------


class Create(NamedTuple):
    """Make the context exist. Claims an ownerless one for `user_id`; another owner is a `StateAccessError`.

    An existing context that is not claimed is not changed: neither `updated_at` nor the revision.
    """

    user_id: str | None = None


class Restore(NamedTuple):
    """Create a context with the past of another one (fork, import). Must be the first change of its commit.

    `start` becomes `history_start`. `created`, `updated` and `revision` are set as given; None means now, now and 1.
    `expires` is when the context expires if nothing is written to it; None means that the storage's ttl applies.

    A history that is too long for one commit continues in further ones that begin with the same change: on an existing
    context it only sets the owner, `updated` and `expires`.
    """

    user_id: str | None
    start: int = 0
    created: int | None = None
    updated: int | None = None
    revision: int | None = None
    expires: int | None = None


class Own(NamedTuple):
    """Set the owner, whoever owned it before (`update_state(user_id=...)`).

    A context that the same commit of a bound caller creates belongs to that user whatever this says.
    """

    user_id: str | None


class Append(NamedTuple):
    """Append messages to the history. At least one."""

    messages: tuple[bytes, ...]


class Put(NamedTuple):
    """Set keys of a space. With `replace`, all other keys are removed."""

    space: Space
    items: tuple[tuple[str, bytes], ...]
    replace: bool = False


class Drop(NamedTuple):
    """Remove one key of a space. Answers true if it existed. Does not create the context."""

    space: Space
    key: str


class Increment(NamedTuple):
    """Add the JSON number `by` to a variable, with Python's arithmetic; absent counts as 0. Answers the new value.

    A variable that is not a number is a `StateConflictError`.
    """

    key: str
    by: bytes


class Trim(NamedTuple):
    """Keep only the last `keep` messages: raises `history_start`. Does not create the context."""

    keep: int


class Pop(NamedTuple):
    """Remove the last `n` messages. Answers them, oldest first, as a JSON list. Does not create the context."""

    n: int


class Delete(NamedTuple):
    """Remove the context with all its data, except remembered commit ids. Answers true if it existed."""


Change: TypeAlias = Create | Restore | Own | Append | Put | Drop | Increment | Trim | Pop | Delete

CREATING: Final = (Create, Restore, Own, Append, Put, Increment)
"""The changes that create an absent context. A commit of only other changes leaves it absent."""


# --- operations -----------------------------------------------------------------------------------------------------


class Commit(NamedTuple):
    """One atomic change to one context. Outcome: the `Answer` of the last change that has one, else `answer`.

    Checked in this order, all in the same atomic step as the change: the owner, a remembered `commit_id` (the first
    outcome is answered again), the fence, `absent`, `idle_for`, `expect`, and then the conditions of each change.
    A commit is applied completely, or raises and changes nothing. A commit without changes only looks its id up.
    """

    context_id: str
    changes: tuple[Change, ...]
    commit_id: str
    user: str | None = None  # the caller is bound to this user: another owner, or none, is refused
    fence: str | None = None  # the token of the turn; another or no current lease is a TurnLostError
    absent: bool = False  # an existing context is a StateConflictError
    idle_for: float | None = None  # seconds; a context updated more recently is left alone: answers false
    expect: tuple[str, bytes | None] | None = None  # this variable has this value (None: is absent), else CHANGED
    answer: Answer = b""  # what a commit without an answering change answers, now and when its id comes again
    deadline: float = NEVER
    fresh: bool = False  # the id was made for this call: no other commit can have had it before


class Window(NamedTuple):
    """Which messages: those at positions `first` <= p < `before`.

    Of these at most `limit`: the first ones where `first` is given, the last ones otherwise.
    """

    limit: int | None = None
    before: int | None = None
    first: int | None = None


class Query(NamedTuple):
    """What to read of one context, in one consistent view. Outcome: `Snapshot`, or None where it does not exist.

    `variables` and `metadata`: the keys to read, or None for all of them; `history` None for none.
    """

    context_id: str
    variables: tuple[str, ...] | None = ()
    metadata: tuple[str, ...] | None = ()
    history: Window | None = None
    user: str | None = None
    deadline: float = NEVER


class Lease(NamedTuple):
    """Take, renew or release the lease of a context's turn. Outcome: whether `token` holds it, or held it.

    ``take`` succeeds if the lease is free or `token` holds it. The lease is not state: it does not create the context
    and changes neither `updated_at` nor ttl nor revision.
    """

    context_id: str
    action: Literal["take", "renew", "release"]
    token: str
    seconds: float
    user: str | None = None
    deadline: float = NEVER


class Listing(NamedTuple):
    """A page of about `size` ids of existing contexts. Outcome: `Page`. No order.

    A context that exists all along is seen.
    `user`: only contexts of that owner. `idle_for`: only those not updated for so many seconds (and expired ones that
    still take up room).
    """

    cursor: str = ""
    size: int = 500
    user: str | None = None
    idle_for: float | None = None
    deadline: float = NEVER


Operation: TypeAlias = Commit | Query | Lease | Listing


# --- outcomes -------------------------------------------------------------------------------------------------------

ALREADY_APPLIED: Final[Answer] = b"!"
"""Replaces the answer of a remembered commit that was too large to keep."""


CHANGED: Final[Answer] = b"?"
"""The answer of a commit whose `expect` was not met: nothing was changed, and its id is not remembered."""


class Snapshot(NamedTuple):
    """The result of a `Query`. `messages` are those at positions `first`, `first` + 1, ...; the history is
    [`start`, `end`). `expires` is when the context expires, None for never."""

    user_id: str | None
    created: int
    updated: int
    revision: int
    start: int
    end: int
    variables: dict[str, bytes]
    metadata: dict[str, bytes]
    first: int
    messages: Sequence[bytes]
    expires: int | None = None


class Page(NamedTuple):
    """A page of a listing. `cursor` asks for the next one; None at the end."""

    context_ids: tuple[str, ...]
    cursor: str | None


Outcome: TypeAlias = Answer | Snapshot | Page | bool | None


# --- rules that every backend shares --------------------------------------------------------------------------------

REMEMBERED_COMMITS: Final = 64
"""The number of last commit ids that a context remembers at least."""

REMEMBER_CLEARED: Final = 600.0
"""Seconds for which the commit ids of a cleared context are remembered."""

LARGEST_KEPT_ANSWER: Final = 4096
"""Bytes; a larger answer is remembered as `ALREADY_APPLIED`."""


def kept_answer(answer: Answer) -> Answer:
    """The form in which an answer is remembered."""
    return answer if len(answer) <= LARGEST_KEPT_ANSWER else ALREADY_APPLIED


def visible(window: Window, start: int, end: int) -> tuple[int, int]:
    """The positions [first, stop) that a window shows of a history [start, end)."""
    stop = end if window.before is None else max(start, min(window.before, end))
    first = start if window.first is None else max(start, min(window.first, stop))
    if window.limit is not None:
        if window.first is None:
            first = max(first, stop - window.limit)
        else:
            stop = min(stop, first + window.limit)
    return first, stop
