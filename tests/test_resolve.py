"""What a commit does to a context. Two implementations of the rules are compared: ours, and a naive one.

`agentstate.testing` holds every backend to the rules from outside; here are the details of `Effects`, which the file
and document backends write down, and long random commits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.errors import StateAccessError, StateConflictError, TurnLostError
from agentstate.operations import (
    ALREADY_APPLIED,
    CHANGED,
    REMEMBERED_COMMITS,
    Append,
    Change,
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
    Space,
    Trim,
    Window,
    kept_answer,
    visible,
)
from agentstate.storage.resolve import FALSE, TRUE, Effects, Image, added, resolve

NOW = 1_000_000_000


class Stored:
    """An image with its messages, as the simplest backend would keep them."""

    def __init__(self) -> None:
        self.image = Image()
        self.messages: list[bytes] = []
        self.commits = 0

    def read(self, first: int, stop: int) -> Sequence[bytes]:
        assert self.image.start <= first <= stop <= self.image.end, "asked for messages that are not stored"
        return self.messages[first - self.image.start : stop - self.image.start]

    def commit(self, *changes: Change, now: int = NOW, ttl: float | None = None, **fields: Any) -> Effects | bytes:
        self.commits += 1
        commit = Commit("c", changes, fields.pop("commit_id", f"id-{self.commits}"), **fields)
        self.image.expire(now)
        effects = resolve(self.image, commit, now=now, ttl=ttl, lease="held", read=self.read)
        if isinstance(effects, Effects):
            start = 0 if effects.deletes else self.image.start
            kept = [] if effects.deletes else self.messages[effects.start - start : effects.keep - start]
            self.messages = kept + effects.appended
            self.image.apply(effects)
            assert len(self.messages) == self.image.end - self.image.start
        return effects


def put(**items: Any) -> Put:
    return Put(Space.VARIABLES, tuple((key, json.dumps(value).encode()) for key, value in items.items()))


def append(*numbers: int) -> Append:
    return Append(tuple(b"%d" % number for number in numbers))


def answer(outcome: Effects | bytes) -> bytes:
    return outcome.answer if isinstance(outcome, Effects) else outcome


# --- a naive twin ---------------------------------------------------------------------------------------------------


class Naive:
    """The rules once more, step by step on plain Python values."""

    def __init__(self) -> None:
        self.exists = False
        self.forget()

    def forget(self) -> None:
        self.user: str | None = None
        self.spaces: dict[Space, dict[str, bytes]] = {Space.VARIABLES: {}, Space.METADATA: {}}
        self.history: dict[int, bytes] = {}
        self.next = 0
        self.start = 0

    def change(self, change: Change) -> bytes | None:
        if isinstance(change, Create | Own | Append | Put | Increment):
            self.exists = True
        match change:
            case Create(user):
                if user is not None:
                    if self.user not in (None, user):
                        raise StateAccessError("another user")
                    self.user = user
            case Own(user):
                self.user = user
            case Append(messages):
                for message in messages:
                    self.history[self.next] = message
                    self.next += 1
            case Put(space, items, replace):
                if replace:
                    self.spaces[space].clear()
                self.spaces[space].update(items)
            case Drop(space, key):
                return b"true" if self.spaces[space].pop(key, None) is not None else b"false"
            case Increment(key, by):
                value = json.loads(self.spaces[Space.VARIABLES].get(key, b"0"))
                if not isinstance(value, int | float) or isinstance(value, bool):
                    raise StateConflictError("not a number")
                self.spaces[Space.VARIABLES][key] = text = json.dumps(value + json.loads(by)).encode()
                return text
            case Trim(keep):
                while self.next - self.start > keep:
                    self.history.pop(self.start)
                    self.start += 1
            case Pop(n):
                popped = []
                while n > len(popped) and self.next > self.start:
                    self.next -= 1
                    popped.append(self.history.pop(self.next))
                return b"[" + b",".join(reversed(popped)) + b"]"
            case Delete():
                existed, self.exists = self.exists, False
                self.forget()
                return b"true" if existed else b"false"
        return None


KEYS = st.sampled_from(["x", "y", "n", ""])
SPACES = st.sampled_from(Space)
TEXTS = st.sampled_from([b"1", b"2.5", b'"text"', b"null", b"[]", b"18446744073709551616"])
CHANGES = st.one_of(
    st.builds(Create, st.sampled_from([None, "alice", "bob"])),
    st.builds(Own, st.sampled_from([None, "alice"])),
    st.builds(Append, st.lists(st.integers(0, 99).map(lambda n: b"%d" % n), min_size=1, max_size=4).map(tuple)),
    st.builds(Put, SPACES, st.dictionaries(KEYS, TEXTS, max_size=3).map(lambda d: tuple(d.items())), st.booleans()),
    st.builds(Drop, SPACES, KEYS),
    st.builds(Increment, KEYS, st.sampled_from([b"1", b"-3", b"0.5", b"9223372036854775807"])),
    st.builds(Trim, st.integers(0, 4)),
    st.builds(Pop, st.integers(0, 4)),
    st.just(Delete()),
)


@given(st.lists(st.lists(CHANGES, min_size=1, max_size=8), max_size=12))
def test_random_commits_do_what_their_changes_do_one_by_one(commits: list[list[Change]]) -> None:
    ours, twin = Stored(), Naive()
    for changes in commits:
        attempt = Naive()
        attempt.__dict__.update(
            {
                **twin.__dict__,
                "spaces": {space: dict(items) for space, items in twin.spaces.items()},
                "history": dict(twin.history),
            }
        )
        try:
            answers = [attempt.change(change) for change in changes]
        except (StateAccessError, StateConflictError) as expected:
            before = ours.image.revision
            with pytest.raises(type(expected)):
                ours.commit(*changes)
            assert ours.image.revision == before
        else:
            outcome = ours.commit(*changes)
            assert answer(outcome) == next((one for one in reversed(answers) if one is not None), b"")
            twin = attempt
        assert ours.image.exists == twin.exists
        if twin.exists:
            assert ours.image.user_id == twin.user
            assert ours.image.variables == twin.spaces[Space.VARIABLES]
            assert ours.image.metadata == twin.spaces[Space.METADATA]
            assert (ours.image.start, ours.image.end) == (twin.start, twin.next)
            assert ours.messages == [twin.history[position] for position in range(twin.start, twin.next)]
        else:
            assert (ours.image.variables, ours.image.metadata, ours.messages) == ({}, {}, [])


# --- conditions -----------------------------------------------------------------------------------------------------


def test_conditions_are_checked_in_their_order() -> None:
    stored = Stored()
    stored.commit(Own("bob"), put(x=1), commit_id="known")
    every: dict[str, Any] = {
        "user": "alice",
        "fence": "lost",
        "absent": True,
        "idle_for": 1e9,
        "expect": ("x", b"9"),
    }
    text = Stored()
    text.commit(Own("bob"), put(n="text"))
    bad = Increment("n", b"1")
    with pytest.raises(StateAccessError):
        stored.commit(put(x=2), commit_id="known", **every)
    with pytest.raises(StateAccessError):
        text.commit(bad, **every)
    del every["user"]
    assert stored.commit(put(x=2), commit_id="known", **every) == b""
    with pytest.raises(TurnLostError):
        text.commit(bad, **every)
    every["fence"] = "held"
    with pytest.raises(StateConflictError, match="exists"):
        text.commit(bad, **every)
    del every["absent"]
    assert text.commit(bad, **every) == FALSE
    del every["idle_for"]
    assert text.commit(bad, **every) == CHANGED
    every["expect"] = ("n", b'"text"')
    with pytest.raises(StateConflictError, match="not a number"):
        text.commit(bad, **every)
    assert text.image.variables == {"n": b'"text"'}


def test_an_ownerless_context_is_nobodys_for_a_bound_caller() -> None:
    stored = Stored()
    stored.commit(put(x=1))
    with pytest.raises(StateAccessError):
        stored.commit(Create("alice"), user="alice")
    stored.commit(Delete())
    stored.commit(put(x=1), user="alice")
    assert stored.image.user_id == "alice"


def test_a_bound_caller_owns_what_it_creates_and_may_give_up_what_it_has() -> None:
    for changes in ((Own(None),), (Own("bob"), put(x=1)), (put(x=1), Own(None)), (Delete(), Own(None))):
        stored = Stored()
        stored.commit(*changes, user="alice")
        assert stored.image.user_id == "alice"
    stored.commit(Own(None), user="alice")
    assert stored.image.user_id is None
    stored = Stored()
    stored.commit(put(x=1), user="alice")
    stored.commit(Delete(), put(x=1), Own("bob"), user="alice")
    assert stored.image.user_id == "alice"


def test_a_commit_without_changes_looks_its_id_up() -> None:
    stored = Stored()
    assert stored.commit(commit_id="id", answer=CHANGED) == CHANGED
    stored.commit(Increment("n", b"2"), commit_id="id")
    assert stored.commit(commit_id="id", answer=CHANGED) == b"2"
    assert stored.commit(commit_id="other", answer=CHANGED) == CHANGED
    assert stored.image.revision == 1


def test_a_bound_caller_creates_for_its_user_whatever_comes_first() -> None:
    for changes in ((append(1),), (Delete(), put(x=1)), (Trim(1), Create(None)), (Pop(1), Increment("n", b"1"))):
        stored = Stored()
        stored.commit(*changes, user="alice")
        assert stored.image.user_id == "alice"


def test_idle_for_looks_at_the_last_update() -> None:
    stored = Stored()
    stored.commit(put(x=1), now=NOW)
    assert stored.commit(Delete(), idle_for=10.0, now=NOW + 9_999_999) == FALSE
    assert answer(stored.commit(Delete(), idle_for=10.0, now=NOW + 10_000_000)) == TRUE
    assert stored.commit(Delete(), idle_for=0.0) == FALSE


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_a_refusal_and_an_unmet_expectation_are_not_remembered() -> None:
    stored = Stored()
    stored.commit(put(n="text"), commit_id="a")
    with pytest.raises(StateConflictError):
        stored.commit(Increment("n", b"1"), commit_id="b")
    assert stored.commit(put(x=1), commit_id="c", expect=("x", b"0")) == CHANGED
    assert stored.commit(Delete(), commit_id="d", idle_for=1e6) == FALSE
    assert list(stored.image.commits) == ["a"]


def test_what_came_to_nothing_is_not_remembered() -> None:
    stored = Stored()
    assert stored.commit(Delete()) == FALSE
    assert stored.commit(Drop(Space.VARIABLES, "x")) == FALSE
    assert stored.commit(Pop(1)) == b"[]"
    assert stored.commit(Trim(1)) == b""
    assert not stored.image.commits
    assert not stored.image.exists
    stored.commit(Create("alice"))
    assert stored.commit(Create("alice")) == b""
    assert stored.commit(Create(None)) == b""
    assert len(stored.image.commits) == 1
    assert stored.image.revision == 1


def test_at_least_the_last_64_are_remembered_and_not_many_more() -> None:
    stored = Stored()
    for number in range(1000):
        stored.commit(put(x=number))
        assert min(number + 1, REMEMBERED_COMMITS) <= len(stored.image.commits) < 2 * REMEMBERED_COMMITS
        newest = [f"id-{n}" for n in range(max(1, number + 2 - REMEMBERED_COMMITS), number + 2)]
        assert list(stored.image.commits)[-len(newest) :] == newest


def test_a_large_answer_is_not_kept() -> None:
    assert kept_answer(b"x" * 4096) == b"x" * 4096
    assert kept_answer(b"x" * 4097) == ALREADY_APPLIED
    stored = Stored()
    stored.commit(Append((b'"%s"' % (b"x" * 5000),)))
    assert len(answer(stored.commit(Pop(1), commit_id="large"))) > 5000
    with pytest.raises(StateConflictError, match="already applied"):
        stored.commit(Pop(1), commit_id="large")


def test_an_expired_context_is_gone_but_its_commits_are_known() -> None:
    stored = Stored()
    stored.commit(Own("bob"), put(x=1), append(1, 2), ttl=1.0, commit_id="first")
    assert stored.image.expires == NOW + 1_000_000
    assert stored.image.lives(NOW + 999_999)
    assert not stored.image.lives(NOW + 1_000_000)
    later = NOW + 1_000_000
    stored.messages = []
    assert stored.commit(Delete(), now=later) == FALSE
    stored.commit(put(x=1), now=later, commit_id="first")
    assert not stored.image.exists
    stored.commit(put(y=1), now=later, absent=True, user="alice", ttl=2.0)
    assert (stored.image.user_id, stored.image.variables) == ("alice", {"y": b"1"})
    assert stored.image.expires == later + 2_000_000
    assert (stored.image.start, stored.image.revision) == (0, 1)


# --- times and revisions --------------------------------------------------------------------------------------------


def test_updated_never_goes_back_when_the_clock_does() -> None:
    stored = Stored()
    stored.commit(put(x=1), now=NOW)
    stored.commit(put(x=2), now=NOW - 500)
    assert (stored.image.created, stored.image.updated, stored.image.revision) == (NOW, NOW, 2)


def test_a_restored_context_has_the_past_it_was_given() -> None:
    stored = Stored()
    restore = Restore("alice", start=10, created=1, updated=2, revision=30)
    effects = stored.commit(restore, append(1, 2, 3), Trim(2), put(x=1), absent=True, ttl=1.0)
    assert isinstance(effects, Effects)
    assert (effects.start, effects.keep, effects.appended) == (11, 11, [b"2", b"3"])
    image = stored.image
    assert (image.user_id, image.created, image.updated, image.revision) == ("alice", 1, 2, 30)
    assert (image.start, image.end, image.expires) == (11, 13, NOW + 1_000_000)
    plain = Stored()
    plain.commit(Restore(None), absent=True)
    assert (plain.image.created, plain.image.updated, plain.image.revision) == (NOW, NOW, 1)


# --- effects --------------------------------------------------------------------------------------------------------


def test_effects_name_the_net_change_only() -> None:
    stored = Stored()
    stored.commit(append(0, 1, 2, 3), put(x=1, y=2))
    effects = stored.commit(append(4, 5), Pop(3), Trim(2), append(6), Drop(Space.VARIABLES, "x"), put(z=1))
    assert isinstance(effects, Effects)
    assert (effects.start, effects.keep, effects.appended, effects.end) == (1, 3, [b"6"], 4)
    assert effects.variables == {"x": None, "z": b"1"}
    assert not effects.deletes
    assert not effects.replaces_variables
    assert stored.messages == [b"1", b"2", b"6"]


def test_a_trim_may_reach_into_what_the_commit_itself_appends() -> None:
    stored = Stored()
    stored.commit(append(0, 1))
    effects = stored.commit(append(2, 3, 4), Trim(2))
    assert isinstance(effects, Effects)
    assert (effects.start, effects.keep, effects.appended) == (3, 3, [b"3", b"4"])
    assert (stored.image.start, stored.image.end, stored.messages) == (3, 5, [b"3", b"4"])


def test_a_pop_reads_only_what_it_takes_from_the_store() -> None:
    stored = Stored()
    stored.commit(append(*range(100)))
    asked: list[tuple[int, int]] = []

    def read(first: int, stop: int) -> Sequence[bytes]:
        asked.append((first, stop))
        return stored.read(first, stop)

    commit = Commit("c", (append(100), Pop(3)), "pop")
    effects = resolve(stored.image, commit, now=NOW, ttl=None, lease=None, read=read)
    assert asked == [(98, 100)]
    assert answer(effects) == b"[98,99,100]"


def test_replacing_and_dropping_in_one_commit() -> None:
    stored = Stored()
    stored.commit(put(x=1, y=2))
    replace = Put(Space.VARIABLES, (("z", b"3"),), replace=True)
    effects = stored.commit(put(w=0), replace, Drop(Space.VARIABLES, "x"))
    assert answer(effects) == FALSE
    assert stored.image.variables == {"z": b"3"}
    assert answer(stored.commit(replace, Drop(Space.VARIABLES, "z"))) == TRUE
    assert stored.image.variables == {}
    assert answer(stored.commit(put(x=1), Delete(), Increment("x", b"5"))) == b"5"


# --- arithmetic and windows -----------------------------------------------------------------------------------------

NUMBERS = st.integers() | st.integers(-(10**400), 10**400) | st.floats(allow_nan=False, allow_infinity=False)


@given(NUMBERS, NUMBERS)
def test_sums_are_pythons(value: int | float, by: int | float) -> None:
    try:
        expected = repr(value + by)
    except OverflowError:
        expected = "inf"
    if "inf" in expected:
        with pytest.raises(StateConflictError):
            added(json.dumps(value).encode(), json.dumps(by).encode(), "n", "c")
    else:
        assert added(json.dumps(value).encode(), json.dumps(by).encode(), "n", "c").decode() == expected


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_sum_has_at_most_4300_digits_and_its_sign_is_none(sign: str) -> None:
    nines = (sign + "9" * 4300).encode()
    less = (sign + "9" * 4299 + "8").encode()
    one = (sign + "1").encode()
    assert added(less, one, "n", "c") == nines
    with pytest.raises(StateConflictError):
        added(nines, one, "n", "c")


@given(
    st.builds(Window, *[st.none() | st.integers(0, 12)] * 3),
    st.integers(0, 10),
    st.integers(0, 10),
)
def test_a_window_shows_what_its_words_say(window: Window, start: int, length: int) -> None:
    end = start + length
    positions = [
        position
        for position in range(start, end)
        if (window.first is None or position >= window.first) and (window.before is None or position < window.before)
    ]
    if window.limit is not None:
        keep_first = window.first is not None
        positions = positions[: window.limit] if keep_first else positions[max(0, len(positions) - window.limit) :]
    first, stop = visible(window, start, end)
    assert list(range(first, stop)) == positions
    assert start <= first <= stop <= end or first == stop


def test_a_snapshot_holds_what_was_asked_for() -> None:
    stored = Stored()
    stored.commit(put(x=1, y=2), append(0, 1, 2))
    image = stored.image
    nothing = image.snapshot(Query("c"), stored.read)
    assert (nothing.variables, nothing.metadata, nothing.messages) == ({}, {}, ())
    some = image.snapshot(Query("c", variables=("y", "z"), history=Window(limit=1)), stored.read)
    assert (some.variables, some.first, list(some.messages)) == ({"y": b"2"}, 2, [b"2"])
    everything = image.snapshot(Query("c", variables=None), stored.read)
    everything.variables.clear()
    assert image.variables == {"x": b"1", "y": b"2"}
