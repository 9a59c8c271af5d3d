"""What is no document is an error and left as it is, and the hooks of a backend may fail."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from documenttools import SECOND, Documents, contents
from hypothesis import given
from hypothesis import strategies as st

from agentstate.context import SyncConversationContext
from agentstate.errors import (
    StateAccessError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.operations import (
    Append,
    Commit,
    Create,
    Delete,
    Increment,
    Lease,
    Listing,
    Page,
    Query,
    Snapshot,
    Window,
)
from agentstate.storage.document import DocumentUpdate
from agentstate.storage.documentformat import Document, document_id, parse_document


@pytest.fixture
def storage() -> Documents:
    return Documents()


@pytest.fixture
def context(storage: Documents) -> SyncConversationContext:
    return SyncConversationContext(storage)


# --- what is no document --------------------------------------------------------------------------------------------

GOOD = {
    "context_id": "a",
    "user_id": None,
    "created_at": "2025-01-01T00:00:00",
    "updated_at": "2025-01-01T00:00:00",
    "metadata": {},
    "variables": {"x": 1},
    "history": [{"role": "user", "content": "hi"}],
}
OURS = {
    "document_version": 1,
    "revision": 1,
    "updated": 1_735_689_600_000_000,
    "start": 0,
    "end": 1,
    "last": 0,
    "commits": {"c": "true"},
}


def changed(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def without(field: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != field}).encode()


def ours(**fields: Any) -> bytes:
    return changed(metadata={"agentstate": {**OURS, **fields}})


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "white space": b"  \n",
    "a NUL": b"\0",
    "zeros": b"\0" * 4096,
    "text": b"hello",
    "binary": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\x00\x00",
    "pickle": b"\x80\x04\x95",
    "a number": b"5",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"a"',
    "an empty object": b"{}",
    "foreign json": b'{"name": "package", "version": "1.0"}',
    "half of it": json.dumps(GOOD).encode()[:80],
    "two of it": json.dumps(GOOD).encode() * 2,
    "more behind it": json.dumps(GOOD).encode() + b"\n{}",
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "utf-32": json.dumps(GOOD).encode("utf-32"),
    "latin-1": changed(variables={"x": "XX"}).replace(b"XX", b"\xe4\xf6"),
    "overlong utf-8": changed(variables={"x": "XX"}).replace(b"XX", b"\xc0\xaf"),
    "surrogates in utf-8": changed(variables={"x": "XXX"}).replace(b"XXX", b"\xed\xa0\x80"),
    "a raw newline in text": changed(variables={"x": "XX"}).replace(b"XX", b"\n\n"),
    "single quotes": json.dumps(GOOD).replace('"', "'").encode(),
    "a trailing comma": json.dumps(GOOD).encode()[:-1] + b",}",
    "a comment": b"// hi\n" + json.dumps(GOOD).encode(),
    "no id": without("context_id"),
    "an id of another type": changed(context_id=5),
    "no created_at": without("created_at"),
    "no updated_at": without("updated_at"),
    "a time that is none": changed(created_at="yesterday"),
    "a time as a number": changed(updated_at=1735689600),
    "a time out of range": changed(updated_at="0001-01-01T00:00:00+14:00"),
    "a user of another type": changed(user_id=5),
    "a user that is no unicode": changed(user_id="\ud800"),
    "metadata of another type": changed(metadata=[]),
    "metadata as false": changed(metadata=False),
    "variables of another type": changed(variables="x"),
    "a key that is no unicode": changed(variables={"\ud800": 1}),
    "history of another type": changed(history={}),
    "history as text": changed(history=""),
    "a message of another type": changed(history=["hi"]),
    "not a number": changed(variables={"x": float("nan")}),
    "infinity": changed(history=[{"content": float("-inf")}]),
    "a float that is too large": changed(variables={"x": 5}).replace(b"5}", b"1e999}"),
    "a float too large in the history": changed(history=[{"c": 77}]).replace(b"77", b"-1e999"),
    "an integer that is too large": changed(variables={"x": 77}).replace(b"77", b"7" * 5000),
    "a key twice": json.dumps(GOOD).encode()[:-1] + b', "variables": {}}',
    "a variable twice": changed(variables={"x": 1}).replace(b'"x": 1', b'"x": 1, "x": 2'),
    "a key twice in a message": changed(history=[{"c": 77}]).replace(b'"c": 77', b'"c": 1, "c": 1'),
    "deep": changed(variables={"x": 77}).replace(b"77", b"[" * 500 + b"]" * 500),
    "deep objects": changed(history=[{"c": 77}]).replace(b"77", b'{"a":' * 300 + b"1" + b"}" * 300),
    "very deep": changed(variables={"x": 77}).replace(b"77", b"[" * 100_000 + b"]" * 100_000),
    "only brackets": b"[" * 1_000_000,
    "a version of another type": ours(document_version="1"),
    "bookkeeping without revision": ours(revision=None),
    "a negative revision": ours(revision=-1),
    "a revision that is true": ours(revision=True),
    "a start of another type": ours(start=0.5),
    "an end of another type": ours(end="1"),
    "commits of another type": ours(commits=["c"]),
    "an answer of another type": ours(commits={"c": 5}),
    "an expiry of another type": ours(expires="never"),
    "a lease of another type": ours(lease="token"),
    "a lease without a token": ours(lease={"expires": 5}),
    "a lease without an end": ours(lease={"token": "t"}),
    "an updated of another type": ours(updated="2025-01-01"),
    "a forget_at of another type": ours(forget_at=None),
}


def test_the_good_document_is_good() -> None:
    assert parse_document(changed(), "a").variables == {"x": b"1"}
    assert parse_document(ours(), "a").commits == {"c": b"true"}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_document_is_an_error_and_left_as_it_is(
    storage: Documents, context: SyncConversationContext, name: str
) -> None:
    storage.stored["a"] = HOSTILE[name]
    calls: tuple[Callable[[], Any], ...] = (
        lambda: context.get_state("a"),
        lambda: context.exists("a"),
        lambda: context.get_or_create("a"),
        lambda: context.add_to_history("a", "user", "hi"),
        lambda: context.set_variable("a", "x", 1),
        lambda: context.clear_context("a"),
        lambda: context.turn("a", timeout=0).__enter__(),
        lambda: storage.call(Commit("a", (Delete(),), "c", idle_for=0.0)),
    )
    for call in calls:
        with pytest.raises(StateCorruptedError) as caught:
            call()
        assert caught.value.context_id == "a"
        assert "left as it is" in str(caught.value)
        assert len(str(caught.value)) < 500
    assert storage.stored == {"a": HOSTILE[name]}
    assert storage.writes == 0


def test_the_document_of_a_newer_version_is_refused_and_left_as_it_is(
    storage: Documents, context: SyncConversationContext
) -> None:
    storage.stored["a"] = newer = ours(document_version=2)
    for call in (
        lambda: context.get_state("a"),
        lambda: context.add_to_history("a", "user", "hi"),
        lambda: context.clear_context("a"),
    ):
        with pytest.raises(StateConflictError, match=r"version 2.*update agentstate"):
            call()
    assert list(context.list_contexts()) == ["a"]
    assert storage.stored == {"a": newer}


def test_what_is_no_document_is_listed_but_not_taken_for_anybodys(
    storage: Documents, context: SyncConversationContext, caplog: pytest.LogCaptureFixture
) -> None:
    context.get_or_create("b", "alice")
    storage.stored["a"] = b"garbage"
    storage.now += 100 * 3600 * SECOND
    assert sorted(context.list_contexts()) == ["a", "b"]
    with caplog.at_level(logging.WARNING, logger="agentstate"):
        assert list(context.list_contexts("alice")) == ["b"]
        assert context.cleanup_old_contexts(24) == 1
    assert storage.stored["a"] == b"garbage"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "'a'" in caplog.text


def test_the_document_of_another_context_is_a_conflict(storage: Documents, context: SyncConversationContext) -> None:
    storage.stored["A"] = changed(context_id="a")
    for call in (
        lambda: context.get_state("A"),
        lambda: context.set_variable("A", "x", 1),
        lambda: context.clear_context("A"),
    ):
        with pytest.raises(StateConflictError, match="'a'"):
            call()
    assert storage.stored == {"A": changed(context_id="a")}


def test_the_id_of_a_document_can_be_had_alone() -> None:
    assert document_id(changed(context_id="é/ü")) == "é/ü"
    for name in ("text", "a list", "foreign json", "no id", "an id of another type", "binary", "very deep"):
        with pytest.raises(StateCorruptedError):
            document_id(HOSTILE[name])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["2025-01-01T00:00:00", "a", "\ud800", "9999-12-31T23:59:59-14:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *((field,) for field in GOOD),
    ("history", 0),
    ("history", 0, "content"),
    ("variables", "x"),
    ("metadata", "agentstate"),
    *(("metadata", "agentstate", field) for field in (*OURS, "expires", "lease", "forget_at", "metadata")),
    ("metadata", "agentstate", "commits", "c"),
    ("new",),
]


@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_any_damage_is_an_error_of_ours_or_does_not_matter(damages: list[tuple[tuple[Any, ...], Any]]) -> None:
    fields: Any = json.loads(ours(lease={"token": "t", "expires": 5}))
    for path, value in damages:
        target = fields
        with suppress(KeyError, IndexError, TypeError):
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = value
    data = json.dumps(fields).encode()
    try:
        document = parse_document(data, "a")
    except (StateCorruptedError, StateConflictError):
        return
    rendered = document.render(0)
    if rendered is not None:
        again = parse_document(rendered, "a")
        for slot in ("exists", "user_id", "variables", "metadata", "history", "extra", "start", "end", "commits"):
            assert repr(getattr(again, slot)) == repr(getattr(document, slot))


@given(st.binary(max_size=40), st.integers(0, 300), st.integers(0, 40))
def test_any_bytes_are_an_error_of_ours_or_a_document(noise: bytes, position: int, removed: int) -> None:
    data = ours()
    data = data[:position] + noise + data[position + removed :]
    with suppress(StateCorruptedError, StateConflictError):
        parse_document(data, "a").render(0)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON.filter(lambda v: "nan" not in repr(v))))
def test_values_survive_documents(values: dict[str, Any]) -> None:
    values = {key: value for key, value in values.items() if "inf" not in repr(value)}
    data = changed(variables=values, history=[{"content": value} for value in values.values()])
    first = parse_document(data, "a")
    rendered = first.render(0)
    assert rendered is not None
    second = parse_document(rendered, "a")
    for document in (first, second):
        assert repr({key: json.loads(text) for key, text in document.variables.items()}) == repr(values)
        assert repr([message["content"] for message in document.history]) == repr(list(values.values()))
        for text in document.variables.values():
            assert b"\n" not in text  # fit for a line of a log


# --- the hooks ------------------------------------------------------------------------------------------------------


def test_what_waits_together_is_one_replacement_and_one_read(storage: Documents) -> None:
    outcomes: dict[int, Any] = {}
    increment = Increment("n", b"1")
    group = [Commit("a", (increment,), f"c{number}") for number in range(50)]
    storage.execute(group, outcomes.__setitem__)
    assert [outcomes[index] for index in range(50)] == [str(n + 1).encode() for n in range(50)]
    assert (storage.writes, storage.reads) == (1, 0)
    storage.execute([Query("a", variables=("n",)) for _ in range(50)], outcomes.__setitem__)
    assert (storage.writes, storage.reads) == (1, 1)
    mixed = [group[0], Query("a"), Query("a"), Commit("a", (increment,), "new"), Commit("b", (increment,), "new")]
    storage.execute(mixed, outcomes.__setitem__)
    assert (storage.writes, storage.reads) == (3, 2)


class CompareAndSet(Documents):
    """Calls the update again when the document changed in between, as an optimistic store does."""

    interfere: Callable[[], None] | None = None

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        while True:
            before = self.stored.get(context_id)
            after = update(before)
            if self.interfere:
                interfere, self.interfere = self.interfere, None
                interfere()
            if self.stored.get(context_id) is before:
                if after is None:
                    self.stored.pop(context_id, None)
                else:
                    self.stored[context_id] = after
                return


def test_an_update_may_be_called_again() -> None:
    storage = CompareAndSet()
    context = SyncConversationContext(storage)
    context.set_variable("a", "n", 1)

    def interfere() -> None:
        context.set_variable("a", "n", 10)

    storage.interfere = interfere
    assert context.storage.call(Commit("a", (Increment("n", b"1"),), "c")) == b"11"

    def clear() -> None:
        context.clear_context("a")

    storage.interfere = clear
    storage.call(Commit("a", (Append((b'{"role":"user","content":1}',)),), "d"))
    assert (context.get_variables("a"), contents(context)) == ({}, [1])


class Failing(Documents):
    def __init__(self, error: StateError, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        if context_id == "bad":
            raise self.error
        return super().read_document(context_id, deadline=deadline)

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        super().replace_document(context_id, update, deadline=deadline)
        if context_id == "bad":
            raise self.error


def test_an_error_of_a_hook_is_the_outcome_of_what_it_was_about() -> None:
    cause = OSError(5, "disk")
    error = StateOutcomeUnknownError("no answer")
    error.__cause__ = cause
    storage = Failing(error)
    outcomes: dict[int, Any] = {}
    group = [
        Commit("good", (Increment("n", b"1"),), "c"),
        Commit("bad", (Increment("n", b"1"),), "c1"),
        Commit("bad", (Increment("n", b"1"),), "c2"),
        Lease("bad", "take", "t", 30.0),
        Query("bad"),
        Commit("good", (Increment("n", b"1"),), "d"),
    ]
    storage.execute(group, outcomes.__setitem__)
    assert (outcomes[0], outcomes[5]) == (b"1", b"2")
    for index, commit_id in ((1, "c1"), (2, "c2"), (3, None)):
        failure = outcomes[index]
        assert isinstance(failure, StateOutcomeUnknownError)
        assert (failure.commit_id, failure.context_id) == (commit_id, "bad")
        assert failure.__cause__ is error
        assert str(failure) == "no answer"
    assert len({id(outcomes[index]) for index in (1, 2, 3, 4)}) == 4
    # The same calls again, with the ids from the errors: what happened is not done twice.
    assert storage.document("bad")["variables"] == {"n": 2}
    for commit_id in ("c1", "c2"):
        with pytest.raises(StateOutcomeUnknownError):
            storage.call(Commit("bad", (Increment("n", b"1"),), commit_id))
    assert storage.document("bad")["variables"] == {"n": 2}


def test_a_store_that_cannot_be_read_is_not_an_absent_context() -> None:
    context = SyncConversationContext(Failing(StateUnavailableError("down")))
    for call in (context.get_state, context.exists, context.get_history, context.get_variables):
        with pytest.raises(StateUnavailableError, match="down") as caught:
            call("bad")
        assert caught.value.context_id == "bad"


class Slow(Documents):
    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        time.sleep(0.1)  # a lock that somebody else held
        super().replace_document(context_id, update, deadline=deadline)


def test_what_waited_past_its_deadline_is_not_done() -> None:
    storage = Slow()
    outcomes: dict[int, Any] = {}
    soon = time.monotonic() + 0.05
    group = [
        Commit("a", (Increment("n", b"1"),), "c1", deadline=soon),
        Commit("a", (Increment("n", b"1"),), "c2"),
        Lease("a", "take", "t", 30.0, deadline=soon),
    ]
    storage.execute(group, outcomes.__setitem__)
    assert isinstance(outcomes[0], StateTimeoutError)
    assert outcomes[1] == b"1"
    assert isinstance(outcomes[2], StateTimeoutError)
    storage.execute([Commit("b", (Create(),), "c1", deadline=time.monotonic() + 0.05)], outcomes.__setitem__)
    assert isinstance(outcomes[0], StateTimeoutError)
    assert "b" not in storage.stored


def test_a_defect_in_an_update_writes_nothing(storage: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Document, "render", lambda self, now: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.call(Commit("a", (Create(),), "c"))
    assert storage.stored == {}


def test_a_listing_that_cannot_be_had_is_an_error() -> None:
    class Unlistable(Documents):
        def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
            raise StateUnavailableError("down")

    with pytest.raises(StateUnavailableError, match="down"):
        Unlistable().call(Listing())


def test_a_listing_passes_over_what_was_removed_meanwhile() -> None:
    class Vanishing(Documents):
        def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
            return Page(("gone", *self.stored), None)

    storage = Vanishing()
    storage.call(Commit("a", (Create(),), "c"))
    assert storage.call(Listing()) == Page(("a",), None)


def test_the_owner_of_a_document_is_checked(storage: Documents) -> None:
    storage.stored["a"] = changed(user_id="bob")
    for operation in (
        Query("a", user="alice"),
        Commit("a", (Create(),), "c", user="alice"),
        Lease("a", "take", "t", 30.0, user="alice"),
    ):
        with pytest.raises(StateAccessError):
            storage.call(operation)
    assert isinstance(storage.call(Query("a", user="bob", history=Window())), Snapshot)
    assert storage.stored["a"] == changed(user_id="bob")


def test_a_store_that_fails_within_a_listing_is_told() -> None:
    class Failing(Documents):
        def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
            raise StateUnavailableError("not today")

    storage = Failing()
    storage.stored["a"] = b"{}"
    with pytest.raises(StateUnavailableError, match="not today"):
        storage.call(Listing(user="alice"))
