"""`ConversationContext` and `SyncConversationContext` are one API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from agentstate import ConversationContext, SyncConversationContext, calls
from agentstate.aio import AsyncBatch, AsyncTurn
from agentstate.blocking import SyncBatch, SyncTurn

# What only one of them can have.
AWAITABLE_ONLY = {"aclose"}

BATCHES = ("batch", "turn")
ITERATORS = ("list_contexts", "iter_history")


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    return {name: getattr(cls, name) for name in public(cls) if callable(getattr(cls, name))}


NAMES = sorted(methods(SyncConversationContext))
CALLS = sorted(set(NAMES) - {*BATCHES, "close", "holding"})


def test_both_have_the_same_names() -> None:
    assert public(ConversationContext) - AWAITABLE_ONLY == public(SyncConversationContext)


def test_nothing_documented_is_missing() -> None:
    documented = """
        get_or_create add_to_history get_history get_variable set_variable get_metadata set_metadata clear_context
        cleanup_old_contexts get_state exists update_state extend_history count_history iter_history trim_history
        pop_history clear_history get_variables set_variables delete_variable increment_variable update_variable
        get_all_metadata delete_metadata list_contexts fork_context close batch turn
    """
    assert set(documented.split()) <= public(SyncConversationContext)
    assert set(documented.split()) | {"aclose"} <= public(ConversationContext)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_same(name: str) -> None:
    blocking = inspect.signature(getattr(SyncConversationContext, name)).parameters
    awaitable = inspect.signature(getattr(ConversationContext, name)).parameters
    assert [*blocking] == [*awaitable]
    for mine, other in zip(blocking.values(), awaitable.values(), strict=True):
        assert (mine.kind, mine.default, mine.annotation) == (other.kind, other.default, other.annotation)


def test_the_parameters_of_the_constructors_are_the_same() -> None:
    assert inspect.signature(ConversationContext) == inspect.signature(SyncConversationContext)


@pytest.mark.parametrize("name", CALLS)
def test_docstrings_and_names_are_the_same(name: str) -> None:
    blocking, awaitable = getattr(SyncConversationContext, name), getattr(ConversationContext, name)
    assert blocking.__doc__
    assert blocking.__doc__ == awaitable.__doc__ == getattr(calls, name).__doc__
    assert blocking.__name__ == awaitable.__name__ == name


@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_same_once_they_are_awaited(name: str) -> None:
    blocking = inspect.signature(getattr(SyncConversationContext, name)).return_annotation
    awaitable = inspect.signature(getattr(ConversationContext, name)).return_annotation
    assert blocking
    if name in ITERATORS:
        assert awaitable == f"Async{blocking}"
    else:
        assert awaitable == blocking


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_awaited_or_iterated_over(name: str) -> None:
    method = getattr(ConversationContext, name)
    assert inspect.isasyncgenfunction(method) if name in ITERATORS else inspect.iscoroutinefunction(method)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_and_turns_are_documented_alike(name: str) -> None:
    def words(cls: type) -> list[str]:
        text = inspect.getdoc(getattr(cls, name)) or ""
        return text.replace("an ``async with``", "a ``with``").split()

    blocking, awaitable = words(SyncConversationContext), words(ConversationContext)
    assert blocking
    # The one place where they differ: who it is that takes turns.
    assert [word for word in blocking if word not in ("threads,", "tasks,")] == [
        word for word in awaitable if word not in ("threads,", "tasks,")
    ]


@pytest.mark.parametrize(("blocking", "awaitable"), [(SyncBatch, AsyncBatch), (SyncTurn, AsyncTurn)])
def test_the_writes_of_batches_and_turns_are_the_very_same(blocking: type, awaitable: type) -> None:
    assert methods(blocking) == methods(awaitable)


def test_a_batch_writes_as_its_context_does() -> None:
    left_out = {"timestamp", "commit_id"}
    for name, write in methods(SyncBatch).items():
        plain = inspect.signature(getattr(SyncConversationContext, name)).parameters
        mine = inspect.signature(write).parameters
        assert [key for key in plain if key not in ("context_id", *left_out)] == [
            key for key in mine if key not in left_out
        ]
