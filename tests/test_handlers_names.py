"""Handlers by name."""

from __future__ import annotations

import asyncio
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from agentstate import (
    InMemoryStorage,
    StateConfigError,
    StateError,
    get_handler,
    list_handlers,
    register_handler,
    stateful,
)
from agentstate.handlers import HandlerNotFoundError, names

TASK = {"id": "alice"}


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_handlers", {})


@pytest.fixture
def storage() -> Iterator[InMemoryStorage]:
    storage = InMemoryStorage()
    yield storage
    storage.close()


def handler(task: Any) -> str:
    return "plain"


def other(task: Any) -> str:
    return "other"


def test_a_handler_is_found_by_its_name() -> None:
    assert register_handler("one")(handler) is handler
    register_handler("two")(handler)
    register_handler("three")(other)
    assert get_handler("one") is get_handler("two") is handler
    assert list_handlers() == ["one", "three", "two"]


def test_above_stateful(storage: InMemoryStorage) -> None:
    @register_handler("memory_assistant")
    @stateful(storage)
    async def assistant(task: Any, context: Any, context_id: str) -> str:
        return context_id

    assert get_handler("memory_assistant") is assistant
    assert asyncio.run(get_handler("memory_assistant")(TASK)) == "alice"


def test_below_stateful(storage: InMemoryStorage) -> None:
    @stateful(storage)
    @register_handler("memory_assistant")
    @register_handler("second_name")
    async def assistant(task: Any, context: Any, context_id: str) -> str:
        return context_id

    assert get_handler("memory_assistant") is get_handler("second_name") is assistant
    assert asyncio.run(get_handler("memory_assistant")(TASK)) == "alice"


@pytest.mark.parametrize("error", [StateError, LookupError, HandlerNotFoundError])
def test_an_unknown_handler_is_an_error(error: type[Exception]) -> None:
    with pytest.raises(error, match="unknown handler 'x'; none is registered: has its module been imported"):
        get_handler("x")


def test_the_error_names_the_nearest_handler() -> None:
    register_handler("memory_assistant")(handler)
    register_handler("planner")(handler)
    with pytest.raises(
        HandlerNotFoundError, match="unknown handler 'memory_asistant'; did you mean 'memory_assistant'"
    ):
        get_handler("memory_asistant")
    with pytest.raises(HandlerNotFoundError, match="registered are 'memory_assistant', 'planner'") as caught:
        get_handler("xyz")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_name_belongs_to_one_handler() -> None:
    register_handler("one")(handler)
    register_handler("one")(handler)
    with pytest.raises(
        StateConfigError, match=r"the handler name 'one' is already used by .*\.handler; choose another"
    ):
        register_handler("one")(other)
    assert get_handler("one") is handler


def test_a_reloaded_handler_replaces_the_one_before() -> None:
    def again(task: Any) -> str:
        return "again"

    again.__qualname__ = handler.__qualname__
    register_handler("one")(handler)
    register_handler("one")(again)
    assert get_handler("one") is again


def test_objects_are_not_taken_for_each_other() -> None:
    first, second = functools.partial(handler), functools.partial(handler)
    register_handler("one")(first)
    register_handler("one")(first)
    with pytest.raises(StateConfigError, match=r"already used by functools\.partial object at"):
        register_handler("one")(second)


@pytest.mark.parametrize("name", ["", None, handler])
def test_a_handler_is_registered_under_a_name(name: Any) -> None:
    with pytest.raises(TypeError, match="register_handler needs a name"):
        register_handler(name)
