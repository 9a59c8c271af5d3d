"""The statistics of a storage."""

from __future__ import annotations

import json
import threading

import pytest

from ..errors import StateConflictError, StateUnavailableError
from ..operations import REMEMBERED_COMMITS, Append, Commit, Query
from .harness import Connect, Context, Harness, together


class StatisticsTests(Harness):
    """`statistics()`: the counts that are exact on every storage."""

    def test_a_new_storage_has_done_nothing(self, connect: Connect) -> None:
        found = connect().storage.statistics()
        assert found.operations == {"query": 0, "commit": 0, "lease": 0, "listing": 0}
        assert found.errors == {}
        assert found.group_sizes.count == 0
        assert found.attempts_repeated == found.degraded_calls == 0

    def test_operations_are_counted_by_kind(self, context: Context) -> None:
        context.add_to_history("alice", "user", "hello")
        context.get_history("alice")
        context.get_variable("nobody", "key")
        with context.turn("alice") as turn:
            turn.set_variable("key", 1)
        list(context.list_contexts())
        context.get_or_create("bob")
        found = context.storage.statistics()
        listings = found.operations.pop("listing")
        assert listings >= 1  # one for each page
        assert found.operations == {"query": 3, "commit": 3, "lease": 2}
        assert found.errors == {}

    def test_errors_are_counted_by_class(self, context: Context) -> None:
        context.set_variable("alice", "name", "Alice")
        for _ in range(2):
            with pytest.raises(StateConflictError):
                context.increment_variable("alice", "name")
        found = context.storage.statistics()
        assert found.errors == {"StateConflictError": 2}
        assert found.operations["commit"] == 3

    def test_what_came_after_close_is_counted_as_what_it_was(self, context: Context) -> None:
        context.storage.close()
        with pytest.raises(StateUnavailableError):
            context.get_history("alice")
        assert context.storage.statistics().errors == {"StateUnavailableError": 1}

    def test_operations_that_travel_together_are_counted_each(self, context: Context) -> None:
        storage = context.storage
        commits = [Commit(f"c{number}", (Append((b"{}",)),), f"id-{number}") for number in range(40)]
        storage.carry_out(commits)
        storage.carry_out([Query(commit.context_id) for commit in commits[:3]])
        found = storage.statistics()
        assert found.operations == {"query": 3, "commit": 40, "lease": 0, "listing": 0}
        assert dict(zip(found.group_sizes.below, found.group_sizes.counts, strict=True)) == {
            4: 1,
            8: 0,
            16: 0,
            32: 0,
            64: 1,
        }
        assert found.group_sizes.total == 43
        assert found.latency_nanoseconds["commit"].count == 40

    def test_no_call_of_any_thread_is_lost(self, context: Context) -> None:
        calls = 4 * REMEMBERED_COMMITS

        def work(name: str) -> None:
            for number in range(calls):
                context.storage.call(Query(name))
                if number % 8 == 0:
                    context.storage.statistics()  # reading it changes nothing

        threads = [threading.Thread(target=work, args=(f"c{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert context.storage.statistics().operations["query"] == 4 * calls

    def test_calls_made_at_the_same_time_are_counted_each(self, context: Context) -> None:
        together(context, *(lambda each, name=name: each.exists(f"c{name}") for name in range(20)))
        assert context.storage.statistics().operations["query"] == 20

    def test_times_are_plausible(self, context: Context) -> None:
        context.set_variable("alice", "key", 1)
        found = context.storage.statistics()
        taken = found.latency_nanoseconds["commit"]
        assert taken.count == 1
        assert 0 < taken.total <= found.seconds * 1e9
        assert taken.total < taken.quantile(0.5) <= 2 * taken.total

    def test_statistics_are_json(self, context: Context) -> None:
        context.set_variable("alice", "key", 1)
        found = context.storage.statistics()
        plain = found.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["operations"]["commit"] == 1
        assert plain["latency_nanoseconds"]["commit"]["counts"] == [1]
