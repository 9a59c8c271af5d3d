"""`ConversationState`, and exact times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.state import ConversationState, from_microseconds, parse_time, to_microseconds

TIMES = st.datetimes(timezones=st.just(UTC))


@given(TIMES)
def test_microseconds_are_exact(time: datetime) -> None:
    assert from_microseconds(to_microseconds(time)) == time
    assert parse_time(time.isoformat()) == time


def test_the_epoch_is_zero() -> None:
    assert to_microseconds(datetime(1970, 1, 1, tzinfo=UTC)) == 0
    assert to_microseconds(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)) == -1
    assert from_microseconds(1_000_001).isoformat() == "1970-01-01T00:00:01.000001+00:00"


def test_a_time_without_an_offset_is_in_utc_as_agentup_wrote_it() -> None:
    assert parse_time("2025-06-01T10:20:30.123456") == datetime(2025, 6, 1, 10, 20, 30, 123456, tzinfo=UTC)


def test_another_offset_is_the_same_moment_in_utc() -> None:
    time = parse_time("2025-06-01T12:00:00+02:00")
    assert time == datetime(2025, 6, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert time.tzinfo is UTC


@pytest.mark.parametrize("text", ["", "yesterday", "2025-13-01", "1700000000.5"])
def test_what_is_no_time_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


def test_a_state_is_the_same_after_to_dict_and_from_dict() -> None:
    time = datetime(2026, 1, 31, 12, tzinfo=UTC)
    state = ConversationState(
        "a",
        "alice",
        time,
        time + timedelta(microseconds=1),
        {"x": [1]},
        {"m": None},
        [{"role": "user", "content": "hi", "timestamp": time.isoformat(), "metadata": {}}],
        history_start=41,
        revision=7,
    )
    assert ConversationState.from_dict(state.to_dict()) == state
    agentups = ["context_id", "user_id", "created_at", "updated_at", "metadata", "variables", "history"]
    assert list(state.to_dict())[:7] == agentups


def test_a_document_of_agentup_can_be_read() -> None:
    state = ConversationState.from_dict(
        {
            "context_id": "a",
            "user_id": None,
            "created_at": "2025-06-01T10:20:30",
            "updated_at": "2025-06-01T10:20:30.5",
            "metadata": None,
        }
    )
    assert (state.variables, state.metadata, state.history, state.history_start) == ({}, {}, [], 0)
    assert state.updated_at - state.created_at == timedelta(seconds=0.5)
    with pytest.raises(KeyError):
        ConversationState.from_dict({"context_id": "a"})
