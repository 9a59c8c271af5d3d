"""History: appending, paging, trimming, popping, and positions that never change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ..codec import decode
from ..errors import StateSerializationError
from ..operations import Query, Snapshot, Window
from .harness import Connect, Context, Harness, contents, fill


class HistoryTests(Harness):
    def test_a_message_has_role_content_timestamp_and_metadata(self, context: Context) -> None:
        before = datetime.now(UTC)
        context.add_to_history("a", "user", "Hello!")
        context.add_to_history("a", "assistant", "Hi there!", {"model": "m", "tokens": 12})
        first, second = context.get_history("a")
        assert set(first) == {"role", "content", "timestamp", "metadata"}
        assert (first["role"], first["content"], first["metadata"]) == ("user", "Hello!", {})
        assert (second["role"], second["content"]) == ("assistant", "Hi there!")
        assert second["metadata"] == {"model": "m", "tokens": 12}
        time = datetime.fromisoformat(first["timestamp"])
        assert time.utcoffset() == timedelta(0)
        assert before <= time <= datetime.now(UTC)

    def test_content_may_be_any_json_value(self, context: Context) -> None:
        parts = [{"type": "text", "text": "hi"}, {"type": "image", "url": None}]
        values: list[Any] = ["", parts, {}, None, 5, True, 1.5]
        for value in values:
            context.add_to_history("a", "user", value)
        assert contents(context, "a") == values

    def test_messages_are_extended_as_one_commit(self, context: Context) -> None:
        stamp = "2026-01-31T12:00:00.000000+00:00"
        context.extend_history(
            "a",
            [
                {"role": "user", "content": "a", "timestamp": stamp, "metadata": {"k": 1}},
                {"role": "assistant", "content": "b"},
            ],
        )
        state = context.get_state("a")
        assert state is not None
        assert state.revision == 1
        assert state.history[0] == {"role": "user", "content": "a", "timestamp": stamp, "metadata": {"k": 1}}
        assert state.history[1]["content"] == "b"

    @pytest.mark.parametrize(
        "bad",
        [
            {"role": "user"},
            {"content": "x"},
            {"role": "user", "content": "x", "unknown": 1},
            {"role": 1, "content": "x"},
            {"role": "user", "content": {1, 2}},
            "text",
        ],
    )
    def test_a_bad_message_refuses_all_of_them(self, context: Context, bad: Any) -> None:
        with pytest.raises(StateSerializationError, match=r"messages\[1\]|message|role"):
            context.extend_history("a", [{"role": "user", "content": "fine"}, bad])
        assert not context.exists("a")

    def test_a_role_is_text(self, context: Context) -> None:
        role: Any = None
        with pytest.raises(StateSerializationError, match="role"):
            context.add_to_history("a", role, "x")
        assert not context.exists("a")

    def test_history_is_oldest_first_and_limited_to_the_last(self, context: Context) -> None:
        fill(context, "a", 10)
        assert contents(context, "a") == list(range(10))
        assert [m["content"] for m in context.get_history("a", 3)] == [7, 8, 9]
        assert [m["content"] for m in context.get_history("a", limit=10)] == list(range(10))
        assert [m["content"] for m in context.get_history("a", limit=11)] == list(range(10))

    def test_any_number_may_be_asked_for(self, context: Context) -> None:
        fill(context, "a", 5)
        for much in (2**63, 2**70):
            assert len(context.get_history("a", limit=much)) == 5
            assert len(context.get_history("a", limit=much, before=much)) == 5
            assert len(context.get_history("a", limit=3, before=much)) == 3
            assert len(list(context.iter_history("a", page_size=much))) == 5
            state = context.get_state("a", history_limit=much)
            assert state is not None
            assert len(state.history) == 5
            context.trim_history("a", much)
        assert len(context.pop_history("a", 2**70)) == 5

    def test_limit_zero_is_nothing_and_a_negative_one_an_error(self, context: Context) -> None:
        fill(context, "a", 3)
        assert context.get_history("a", limit=0) == []
        for limit in (-1, -10):
            with pytest.raises(ValueError):
                context.get_history("a", limit=limit)
        with pytest.raises(ValueError):
            context.get_history("a", before=-1)
        for nonsense in ("3", 1.5, True):
            with pytest.raises(TypeError):
                context.get_history("a", limit=nonsense)  # type: ignore[arg-type]

    def test_before_reads_only_older_messages(self, context: Context) -> None:
        fill(context, "a", 10)
        assert [m["content"] for m in context.get_history("a", before=4)] == [0, 1, 2, 3]
        assert [m["content"] for m in context.get_history("a", limit=2, before=4)] == [2, 3]
        assert context.get_history("a", before=0) == []
        assert len(context.get_history("a", before=99)) == 10

    def test_paging_backwards_neither_skips_nor_repeats_while_others_append_and_trim(self, context: Context) -> None:
        fill(context, "a", 20)
        state = context.get_state("a", history_limit=5)
        assert state is not None
        seen = [message["content"] for message in state.history]
        position = 20 - 5
        while page := context.get_history("a", limit=5, before=position):
            seen = [message["content"] for message in page] + seen
            position -= len(page)
            context.add_to_history("a", "user", "later")
            context.trim_history("a", keep=19 + 1)  # the oldest go, one for each that came
        assert seen == list(range(seen[0], 20))
        assert seen[0] <= 3

    def test_positions_stay_when_messages_are_trimmed(self, context: Context) -> None:
        fill(context, "a", 10)
        context.trim_history("a", keep=4)
        state = context.get_state("a")
        assert state is not None
        assert state.history_start == 6
        assert contents(context, "a") == [6, 7, 8, 9]
        assert context.count_history("a") == 4
        assert [m["content"] for m in context.get_history("a", before=8)] == [6, 7]
        assert context.get_history("a", before=6) == []
        context.trim_history("a", keep=99)
        assert context.count_history("a") == 4

    def test_clearing_the_history_keeps_the_rest_and_the_positions(self, context: Context) -> None:
        fill(context, "a", 4)
        context.set_variable("a", "x", 1)
        context.clear_history("a")
        assert contents(context, "a") == []
        assert context.get_variables("a") == {"x": 1}
        context.add_to_history("a", "user", "next")
        state = context.get_state("a")
        assert state is not None
        assert state.history_start == 4
        assert [m["content"] for m in context.get_history("a", before=5)] == ["next"]

    def test_pop_removes_the_newest_and_returns_them_oldest_first(self, context: Context) -> None:
        fill(context, "a", 6)
        assert [m["content"] for m in context.pop_history("a")] == [5]
        assert [m["content"] for m in context.pop_history("a", 2)] == [3, 4]
        assert contents(context, "a") == [0, 1, 2]
        assert context.pop_history("a", n=0) == []
        context.add_to_history("a", "user", "again")
        assert [m["content"] for m in context.get_history("a", before=4)] == [0, 1, 2, "again"]

    def test_pop_gives_what_there_is(self, context: Context) -> None:
        fill(context, "a", 6)
        context.trim_history("a", keep=2)
        assert [m["content"] for m in context.pop_history("a", 99)] == [4, 5]
        assert context.pop_history("a", 99) == []
        state = context.get_state("a")
        assert state is not None
        assert state.history_start == 4
        context.add_to_history("a", "user", "next")
        assert [m["content"] for m in context.get_history("a", before=5)] == ["next"]

    def test_counts_must_not_be_negative(self, context: Context) -> None:
        fill(context, "a", 3)
        with pytest.raises(ValueError):
            context.trim_history("a", keep=-1)
        with pytest.raises(ValueError):
            context.pop_history("a", -1)
        with pytest.raises(ValueError):
            list(context.iter_history("a", page_size=0))
        assert contents(context, "a") == [0, 1, 2]

    @pytest.mark.parametrize("page_size", [1, 3, 10, 100])
    def test_iter_history_yields_all_messages_in_order(self, context: Context, page_size: int) -> None:
        fill(context, "a", 12)
        context.trim_history("a", keep=10)
        assert [m["content"] for m in context.iter_history("a", page_size=page_size)] == list(range(2, 12))

    def test_iter_history_sees_what_is_appended_meanwhile(self, context: Context) -> None:
        fill(context, "a", 4)
        seen = []
        for message in context.iter_history("a", page_size=2):
            seen.append(message["content"])
            if message["content"] == 1:
                context.add_to_history("a", "user", "new")
        assert seen == [0, 1, 2, 3, "new"]

    def test_max_history_keeps_the_last_messages(self, connect: Connect) -> None:
        context = connect(max_history=3)
        for number in range(5):
            context.add_to_history("a", "user", number)
        assert contents(context, "a") == [2, 3, 4]
        fill(context, "a", 10)
        assert contents(context, "a") == [7, 8, 9]
        with context.batch("a") as batch:
            for number in range(4):
                batch.add_to_history("user", number)
        assert contents(context, "a") == [1, 2, 3]
        state = context.get_state("a")
        assert state is not None
        assert state.history_start == 5 + 10 + 4 - 3
        context.update_state("a", history=[{"role": "user", "content": n} for n in range(6)])
        assert contents(context, "a") == [3, 4, 5]

    def test_without_max_history_nothing_is_dropped(self, context: Context) -> None:
        for start in range(0, 300, 100):
            context.extend_history("a", [{"role": "user", "content": n} for n in range(start, start + 100)])
        assert contents(context, "a") == list(range(300))

    @pytest.mark.parametrize(
        ("window", "first", "expected"),
        [
            (Window(), 2, [2, 3, 4, 5]),
            (Window(limit=2), 4, [4, 5]),
            (Window(before=4), 2, [2, 3]),
            (Window(limit=1, before=4), 3, [3]),
            (Window(first=0), 2, [2, 3, 4, 5]),
            (Window(first=3), 3, [3, 4, 5]),
            (Window(first=3, limit=2), 3, [3, 4]),
            (Window(first=3, before=4), 3, [3]),
            (Window(first=3, before=9, limit=9), 3, [3, 4, 5]),
            (Window(limit=0), None, []),
            (Window(before=1), None, []),
            (Window(first=6), None, []),
            (Window(first=9, before=3), None, []),
        ],
    )
    def test_a_query_shows_the_messages_of_its_window(
        self, context: Context, window: Window, first: int | None, expected: list[int]
    ) -> None:
        fill(context, "a", 6)
        context.trim_history("a", keep=4)
        snapshot = context.storage.call(Query("a", history=window))
        assert isinstance(snapshot, Snapshot)
        assert (snapshot.start, snapshot.end) == (2, 6)
        assert [decode(text)["content"] for text in snapshot.messages] == expected
        if first is not None:
            assert snapshot.first == first
