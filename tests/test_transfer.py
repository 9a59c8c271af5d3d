"""Contexts from one storage to another: exactly as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import KINDS, Stores, fill, many, restore, store, whole

from agentstate.codec import decode, encode
from agentstate.context import SyncConversationContext
from agentstate.errors import (
    StateAccessError,
    StateConflictError,
    StateCorruptedError,
    StateError,
    StateOutcomeUnknownError,
    StateSerializationError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.operations import Append, Commit, Delete, Operation, Page, Put, Query, Snapshot, Space
from agentstate.storage.base import Settle, StateStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.transfer import Result, count_contexts, migrate
from agentstate.transfer.stored import UNFINISHED

__all__ = ["store"]

SECOND = 1_000_000
NOON = 1_769_860_800 * SECOND + 123_456  # 2026-01-31


def comparable(snapshot: Snapshot | None) -> Any:
    """A snapshot with its texts decoded: storages may write the same JSON in different ways."""
    if snapshot is None:
        return None
    return snapshot._replace(
        variables={key: decode(text) for key, text in snapshot.variables.items()},
        metadata={key: decode(text) for key, text in snapshot.metadata.items()},
        messages=[decode(text) for text in snapshot.messages],
        expires=None,
    )


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("origin", KINDS)
def test_everything_arrives_as_it_was(store: Stores, origin: str, to: str) -> None:
    source, target = store(origin), store(to)
    names = fill(source)
    report = migrate(source, target)
    assert report.complete, report.problems
    assert report.copied == report.contexts == len(names) == count_contexts(target)
    assert report.messages == 20 + 1080 + 1200
    for name in names:
        assert comparable(whole(target, name)) == comparable(whole(source, name))
    again = migrate(source, target)
    assert (again.unchanged, again.copied, again.conflict) == (len(names), 0, 0)


@pytest.mark.parametrize("to", KINDS)
def test_owner_times_revision_positions_and_expiry_are_kept(store: Stores, to: str) -> None:
    source, target = store("memory"), store(to, ttl=60)
    expires = (time.time_ns() // 1_000_000 + 3600_000) * 1000
    messages = [encode({"role": "user", "content": "hi", "timestamp": "t", "metadata": {}}, "m")]
    restore(source, "a", Snapshot("alice", NOON, NOON + 7, 41, 1000, 1001, {}, {}, 1000, messages, expires))
    assert migrate(source, target).complete
    found = whole(target, "a")
    assert found is not None
    assert found[:6] == ("alice", NOON, NOON + 7, 41, 1000, 1001)
    assert found.expires == expires


@pytest.mark.parametrize("to", KINDS)
def test_an_expiry_is_kept_through_many_commits(store: Stores, to: str) -> None:
    source, target = store("memory"), store(to)
    expires = (time.time_ns() // 1_000_000 + 3600_000) * 1000
    messages = [encode({"role": "user", "content": number}, "m") for number in range(1700)]
    restore(source, "a", Snapshot(None, NOON, NOON + 7, 4000, 0, 1700, {"v": b"1"}, {}, 0, messages, expires))
    assert migrate(source, target).complete
    found = whole(target, "a")
    assert found is not None
    assert comparable(found) == comparable(whole(source, "a"))
    assert found.expires == expires


@pytest.mark.parametrize("to", KINDS)
def test_a_context_without_expiry_gets_the_ttl_of_its_new_storage(store: Stores, to: str) -> None:
    source, target = store("memory"), store(to, ttl=3600)
    SyncConversationContext(source).set_variable("a", "x", 1)
    assert migrate(source, target).complete
    found = whole(target, "a")
    assert found is not None
    assert found.expires == pytest.approx((time.time() + 3600) * SECOND, abs=60 * SECOND)


def test_an_expired_context_is_not_copied(store: Stores) -> None:
    source, target = store("memory"), store("memory")
    restore(source, "a", Snapshot(None, NOON, NOON, 1, 0, 0, {}, {}, 0, (), time.time_ns() // 1000 + 20_000))
    time.sleep(0.05)
    assert migrate(source, target).contexts == 0


@pytest.mark.parametrize("revision", [1, 2, 3, 4, 500, 100_000])
@pytest.mark.parametrize("count", [499, 500, 501, 1000, 1001, 2600])
def test_a_history_of_any_length_keeps_its_revision(revision: int, count: int) -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    messages = [b'{"n":%d}' % number for number in range(count)]
    snapshot = Snapshot("bob", NOON, NOON + 1, revision, 33, 33 + count, {}, {"m": b"1"}, 33, messages)
    restore(source, "a", snapshot)
    assert migrate(source, target).complete
    assert whole(target, "a") == snapshot


def test_one_owner_can_be_migrated_alone(store: Stores) -> None:
    source, target = store("memory"), store("memory")
    fill(source)
    assert migrate(source, target, user_id="alice").contexts == 1
    assert whole(target, "owned") is not None
    assert count_contexts(target) == 1


def test_nothing_of_the_source_is_changed(store: Stores) -> None:
    source = store("memory")
    names = fill(source)
    before = [whole(source, name) for name in names]
    migrate(source, store("memory"), replace=True)
    assert [whole(source, name) for name in names] == before


# --- what is there already ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("name", ["owned", "long", "one commit"])
def test_an_existing_different_context_is_not_changed_and_reported(store: Stores, to: str, name: str) -> None:
    source, target = store("memory"), store(to)
    names = fill(source, contexts=3)
    assert migrate(source, target).complete
    SyncConversationContext(target).set_variable(name, "by", "somebody else")
    before = whole(target, name)
    report = migrate(source, target)
    assert (report.conflict, report.unchanged, report.copied) == (1, len(names) - 1, 0)
    assert not report.complete
    assert [problem.context_id for problem in report.problems] == [name]
    assert isinstance(report.problems[0].error, StateConflictError)
    assert whole(target, name) == before


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("name", ["owned", "long", "one commit"])
def test_replace_replaces_different_contexts(store: Stores, to: str, name: str) -> None:
    source, target = store("memory"), store(to)
    fill(source, contexts=3)
    assert migrate(source, target).complete
    SyncConversationContext(target).set_variable(name, "by", "somebody else")
    assert migrate(source, target, replace=True).complete
    assert comparable(whole(target, name)) == comparable(whole(source, name))


def test_a_long_context_of_which_a_message_differs_is_replaced() -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    fill(source, contexts=0, long=3000)
    assert migrate(source, target).complete
    target._contexts["long"].messages[1500] = b'{"role":"user","content":"another"}'
    assert migrate(source, target, replace=True, dry_run=True).copied == 1
    assert whole(target, "long") != whole(source, "long")
    assert migrate(source, target, replace=True).copied == 1
    assert whole(target, "long") == whole(source, "long")


@pytest.mark.parametrize("change", ["user_id", "created", "updated", "revision", "start", "variables", "messages"])
def test_every_difference_counts(change: str) -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    plain = Snapshot("a", NOON, NOON, 5, 0, 1, {"v": b"1"}, {"m": b"1"}, 0, [b'{"n":1}'])
    other: dict[str, Any] = {
        "user_id": {"user_id": None},
        "created": {"created": NOON + 1},
        "updated": {"updated": NOON + 1},
        "revision": {"revision": 6},
        "start": {"start": 1, "end": 2, "first": 1},
        "variables": {"variables": {"v": b"1.0"}},
        "messages": {"messages": [b'{"n":2}']},
    }[change]
    restore(source, "x", plain)
    restore(target, "x", plain._replace(**other))
    assert migrate(source, target).conflict == 1


def test_another_json_text_of_the_same_value_is_equal() -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    plain = Snapshot(None, NOON, NOON, 5, 0, 1, {"v": b'{"a":1,"b":"\xc3\xa9"}'}, {}, 0, [b'{"a":1,"b":2}'])
    restore(source, "x", plain)
    restore(target, "x", plain._replace(variables={"v": b'{"b": "\\u00e9", "a": 1}'}, messages=[b'{"b":2,"a":1}']))
    assert migrate(source, target).unchanged == 1


@pytest.mark.parametrize("to", KINDS)
def test_a_dry_run_writes_nothing_and_reports_what_would_be_done(store: Stores, to: str) -> None:
    source, target = store("memory"), store(to)
    names = fill(source, contexts=3)
    report = migrate(source, target, dry_run=True)
    assert (report.copied, report.messages) == (len(names), 3 + 1080 + 1200)
    assert count_contexts(target) == 0
    assert migrate(source, target).complete
    SyncConversationContext(target).set_variable("owned", "by", "somebody else")
    SyncConversationContext(target).set_variable("long", "by", "somebody else")
    report = migrate(source, target, dry_run=True)
    assert (report.copied, report.unchanged, report.conflict) == (0, len(names) - 2, 2)
    report = migrate(source, target, dry_run=True, replace=True)
    assert (report.copied, report.unchanged, report.conflict) == (2, len(names) - 2, 0)
    assert SyncConversationContext(target).get_variable("owned", "by") == "somebody else"


# --- interruptions --------------------------------------------------------------------------------------------------


class Intercepted(InMemoryStorage):
    """Carries out operations one by one, each by `intercept`, which a test overrides."""

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        for index, operation in enumerate(operations):
            try:
                outcome = self.intercept(operation)
            except StateError as error:
                outcome = error
            settle(index, outcome)

    def intercept(self, operation: Operation) -> Any:
        return self.directly(operation)

    def directly(self, operation: Operation) -> Any:
        """Carry out an operation without interception. Raises its error."""
        outcomes: list[Any] = []
        super().execute((operation,), lambda index, outcome: outcomes.append(outcome))
        if isinstance(outcomes[0], StateError):
            raise outcomes[0]
        return outcomes[0]


class Failing(Intercepted):
    """Fails where a test says so."""

    def __init__(self, before: Callable[[Operation], None] = lambda operation: None, **options: Any) -> None:
        super().__init__(**options)
        self.before = before

    def intercept(self, operation: Operation) -> Any:
        self.before(operation)
        return self.directly(operation)


def test_an_interrupt_within_a_long_context_leaves_nothing_of_it() -> None:
    source = InMemoryStorage()
    fill(source, contexts=0, long=5000)
    commits = 0

    def interrupt(operation: Operation) -> None:
        nonlocal commits
        if isinstance(operation, Commit) and operation.context_id == "long" and Delete() not in operation.changes:
            commits += 1
            if commits == 4:
                raise KeyboardInterrupt

    target = Failing(interrupt)
    with pytest.raises(KeyboardInterrupt):
        migrate(source, target)
    assert commits == 4
    assert whole(target, "long") is None
    target.before = lambda operation: None
    assert migrate(source, target).complete


def test_an_unfinished_copy_of_a_killed_migration_is_written_again() -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    fill(source, contexts=0, long=3000)
    SyncConversationContext(target).set_metadata("long", UNFINISHED, True)
    SyncConversationContext(target).set_metadata("owned", UNFINISHED, True)
    assert migrate(source, target).complete
    assert whole(target, "long") == whole(source, "long")
    assert whole(target, "owned") == whole(source, "owned")


def test_an_unfinished_copy_is_not_copied() -> None:
    source = InMemoryStorage()
    SyncConversationContext(source).set_metadata("a", UNFINISHED, True)
    report = migrate(source, InMemoryStorage())
    assert report.failed == 1
    assert "unfinished" in str(report.problems[0].error)


def test_a_source_that_changes_while_a_long_context_is_read_is_read_again() -> None:
    changes = 0

    def change(operation: Operation) -> None:
        nonlocal changes
        if isinstance(operation, Query) and operation.history and operation.history.first == 1000 and changes < 3:
            changes += 1
            assert source.directly(Commit("a", (Append((b"{}",)),), f"change {changes}")) == b""

    source, target = Failing(), InMemoryStorage()
    SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(3000)])
    source.before = change
    assert migrate(source, target).complete
    assert changes == 3
    assert whole(target, "a") == whole(source, "a")


def test_a_source_that_never_stops_changing_is_reported_and_leaves_nothing_behind() -> None:
    changes = 0

    def change(operation: Operation) -> None:
        nonlocal changes
        if isinstance(operation, Query) and operation.history and operation.history.first == 1000:
            changes += 1
            source.directly(Commit("a", (Put(Space.VARIABLES, (("v", b"1"),)),), f"change {changes}"))

    source, target = Failing(), InMemoryStorage()
    for _ in range(3):
        SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(1000)])
    source.before = change
    report = migrate(source, target)
    assert report.failed == 1
    assert "changed each of the 5 times" in str(report.problems[0].error)
    assert whole(target, "a") is None


def test_a_context_that_is_cleared_while_it_is_read_is_gone() -> None:
    def clear(operation: Operation) -> None:
        if isinstance(operation, Query) and operation.history and operation.history.first == 1000:
            source.directly(Commit("a", (Delete(),), "clear"))

    source = Failing()
    SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(3000)])
    source.before = clear
    report = migrate(source, InMemoryStorage())
    assert (report.gone, report.failed) == (1, 0)


def test_a_damaged_context_does_not_prevent_the_others() -> None:
    def damage(operation: Operation) -> None:
        if isinstance(operation, Query) and operation.context_id == "c000003":
            raise StateCorruptedError("damaged", context_id="c000003")

    source, target = Failing(), InMemoryStorage()
    many(source, 300)
    source.before = damage
    report = migrate(source, target)
    assert (report.copied, report.failed) == (299, 1)
    assert [problem.context_id for problem in report.problems] == ["c000003"]


def test_an_unreachable_storage_ends_the_migration() -> None:
    def refuse(operation: Operation) -> None:
        raise StateUnavailableError("it is down")

    source = InMemoryStorage()
    many(source, 300)
    results: list[Result] = []
    with pytest.raises(StateUnavailableError, match="it is down"):
        migrate(source, Failing(refuse), progress=results.append)
    assert len(results) == 20


def test_a_value_that_is_too_large_for_the_target_is_refused() -> None:
    source, target = InMemoryStorage(), InMemoryStorage(max_value_bytes=1000)
    context = SyncConversationContext(source)
    context.set_variable("a", "v", "x" * 2000)
    context.set_variable("b", "v", "x")
    for number in range(3000):
        context.add_to_history("c", "user", "x" * (2000 if number == 2500 else 1))
    report = migrate(source, target)
    assert (report.copied, report.failed) == (1, 2)
    assert all(isinstance(problem.error, StateSerializationError) for problem in report.problems)
    assert count_contexts(target) == 1


def test_a_target_that_changes_what_it_stores_is_noticed() -> None:
    class Lossy(Intercepted):
        def intercept(self, operation: Operation) -> Any:
            outcome = self.directly(operation)
            if isinstance(outcome, Snapshot) and outcome.messages:
                return outcome._replace(messages=[*outcome.messages[:-1], b'{"n":"changed"}'])
            return outcome

    source = InMemoryStorage()
    fill(source, contexts=2)
    report = migrate(source, Lossy())
    assert report.failed == 4  # all that have messages
    assert "reading it back" in str(report.problems[0].error)


class Doubled(Intercepted):
    """Lists everything twice, as Valkey may while it rehashes its keys."""

    def intercept(self, operation: Operation) -> Any:
        outcome = self.directly(operation)
        return outcome._replace(context_ids=outcome.context_ids * 2) if isinstance(outcome, Page) else outcome


def test_a_context_that_is_listed_twice_is_copied_once() -> None:
    source = Doubled()
    many(source, 300)
    assert migrate(source, InMemoryStorage()).copied == 300


class Counting(InMemoryStorage):
    """Knows how many contexts were read at a time at most, and of how many bytes."""

    largest = 0

    def execute(self, operations: Any, settle: Settle) -> None:
        size = 0

        def counting(index: int, outcome: Any) -> None:
            nonlocal size
            if isinstance(outcome, Snapshot):
                size += sum(map(len, outcome.messages)) + sum(map(len, outcome.variables.values()))
            settle(index, outcome)

        super().execute(operations, counting)
        self.largest = max(self.largest, size)


def test_memory_holds_a_group_of_contexts_at_a_time() -> None:
    source = Counting()
    context = SyncConversationContext(source)
    for number in range(400):
        context.set_variable(f"c{number}", "v", "x" * 1_000_000)
    for _ in range(60):
        context.extend_history("long", [{"role": "user", "content": "x" * 10_000}] * 100)
    source.largest = 0
    assert migrate(source, Forgetful(), dry_run=True).copied == 401
    assert source.largest < 40_000_000  # of 460 million


class Forgetful(StateStorage):
    """Has nothing and keeps nothing."""

    def execute(self, operations: Any, settle: Settle) -> None:
        for index in range(len(operations)):
            settle(index, None)


def test_progress_is_called_for_every_context(store: Stores) -> None:
    source = store("memory")
    names = fill(source)
    results: list[Result] = []
    report = migrate(source, store("memory"), progress=results.append)
    assert sorted(result.context_id for result in results) == sorted(names)
    assert sum(result.messages for result in results) == report.messages
    assert sum(result.size for result in results) == report.size


# --- errors of storages ----------------------------------------------------------------------------------------------


class Unsettled(Intercepted):
    """Answers operations with errors of its own, before or after it has carried them out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.errors: list[tuple[bool, Callable[[Operation], bool], Exception]] = []

    def fail(self, error: StateError, when: Callable[[Operation], bool], *, afterwards: bool = False) -> None:
        self.errors.append((afterwards, when, error))

    def intercept(self, operation: Operation) -> Any:
        failure = next((each for each in self.errors if each[1](operation)), None)
        if failure is None:
            return self.directly(operation)
        self.errors.remove(failure)
        if failure[0]:
            self.directly(operation)
        raise failure[2]


def is_commit(operation: Operation) -> bool:
    return isinstance(operation, Commit) and not isinstance(operation.changes[0], Delete)


def is_commit_of(operation: Operation, changes: int) -> bool:
    return isinstance(operation, Commit) and is_commit(operation) and len(operation.changes) == changes


def is_delete(operation: Operation) -> bool:
    return isinstance(operation, Commit) and isinstance(operation.changes[0], Delete)


def test_operations_that_time_out_in_a_group_are_retried_alone() -> None:
    source, target = InMemoryStorage(), Unsettled()
    many(source, 10)
    for _ in range(4):
        target.fail(StateTimeoutError("too late"), is_commit)
    assert migrate(source, target).copied == 10


@pytest.mark.parametrize("afterwards", [True, False])
def test_an_unknown_outcome_becomes_known_by_reading_back(afterwards: bool) -> None:
    source, target = InMemoryStorage(), Unsettled()
    many(source, 1)
    target.fail(StateOutcomeUnknownError("lost"), is_commit, afterwards=afterwards)
    report = migrate(source, target)
    assert (report.copied, report.failed) == ((1, 0) if afterwards else (0, 1))
    assert migrate(source, target).complete


@pytest.mark.parametrize("afterwards", [True, False])
def test_an_unknown_outcome_within_a_long_context_is_retried_and_never_applied_twice(afterwards: bool) -> None:
    source, target = InMemoryStorage(), Unsettled()
    for _ in range(4):
        SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(500)])
    for changes in (2, 3):  # of the first commit and of the last one
        condition = partial(is_commit_of, changes=changes)
        target.fail(StateOutcomeUnknownError("lost"), condition, afterwards=afterwards)
    assert migrate(source, target).complete
    assert not target.errors
    assert whole(target, "a") == whole(source, "a")


@pytest.mark.parametrize("name", ["owned", "long"])
def test_a_context_that_cannot_be_replaced_is_reported_and_kept(name: str) -> None:
    source, target = InMemoryStorage(), Unsettled()
    fill(source, contexts=0)
    assert migrate(source, target).complete
    SyncConversationContext(target).set_variable(name, "by", "somebody else")
    before = whole(target, name)
    target.fail(StateAccessError("not yours"), is_delete)
    report = migrate(source, target, replace=True)
    assert (report.failed, report.complete) == (1, False)
    assert whole(target, name) == before


def test_an_unfinished_copy_that_cannot_be_deleted_is_left_for_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    source, target = InMemoryStorage(), Unsettled()
    for _ in range(5):
        SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(500)])
    target.fail(StateUnavailableError("it is down"), partial(is_commit_of, changes=2))
    target.fail(StateUnavailableError("it is down"), is_delete)
    assert migrate(source, target).failed == 1
    assert "left behind" in caplog.text
    left = whole(target, "a")
    assert left is not None
    assert UNFINISHED in left.metadata
    assert migrate(source, target).complete


def test_a_target_that_cannot_be_read_is_reported() -> None:
    source, target = InMemoryStorage(), Unsettled()
    fill(source, contexts=1)
    for _ in range(5):
        target.fail(StateCorruptedError("damaged"), lambda operation: isinstance(operation, Query))
    assert migrate(source, target).failed == 5


def test_a_context_that_expires_during_the_migration_is_gone() -> None:
    source, target = InMemoryStorage(), Unsettled()
    expires = time.time_ns() // 1000 + 300_000
    restore(source, "a", Snapshot(None, NOON, NOON, 1, 0, 0, {}, {}, 0, (), expires))

    def late(operation: Operation) -> bool:
        if isinstance(operation, Query):
            time.sleep(0.4)
        return False

    target.fail(StateCorruptedError("never"), late)
    report = migrate(source, target)
    assert (report.gone, report.failed) == (1, 0)


# --- all that can be stored -----------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
values = st.dictionaries(st.text(), json_values, max_size=4)
states = st.lists(
    st.tuples(values, values, st.lists(json_values, max_size=5), st.integers(0, 9), st.integers(1, 50)), max_size=6
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states)
def test_every_state_survives_a_migration_and_back(store: Stores, given_states: list[Any]) -> None:
    source, middle, target = InMemoryStorage(), store("file documents"), store("file")
    for number, (variables, metadata, contents, start, revision) in enumerate(given_states):
        messages = [encode({"role": "user", "content": content}, "m") for content in contents]
        snapshot = Snapshot(
            None, NOON, NOON, revision, start, start + len(messages),
            {key: encode(value, "v") for key, value in variables.items()},
            {key: encode(value, "m") for key, value in metadata.items()}, start, messages,
        )  # fmt: skip
        restore(source, f"c{number}", snapshot)
    assert migrate(source, middle).complete
    assert migrate(middle, target).complete
    assert migrate(target, source).unchanged == len(given_states)
    for storage in (source, middle, target):
        storage_contexts = SyncConversationContext(storage)
        for name in list(storage_contexts.list_contexts()):
            storage_contexts.clear_context(name)


def test_the_pages_of_a_listing_may_be_many() -> None:
    class Paged(InMemoryStorage):
        def _list(self, listing: Any) -> Any:
            names = sorted(super()._list(listing).context_ids)
            first = int(listing.cursor or 0)
            return (
                super()
                ._list(listing)
                ._replace(
                    context_ids=tuple(names[first : first + 7]),
                    cursor=str(first + 7) if first + 7 < len(names) else None,
                )
            )

    source = Paged()
    many(source, 100)
    assert migrate(source, InMemoryStorage()).copied == 100
