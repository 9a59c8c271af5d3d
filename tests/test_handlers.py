"""`@stateful`: kinds of handlers, their signatures, their exceptions, and where their state is."""

from __future__ import annotations

import asyncio
import functools
import inspect
import textwrap
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import agentstate.context
from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateConfigError,
    StateConflictError,
    StateUnavailableError,
    SyncConversationContext,
    get_context_manager,
    register_handler,
    register_storage,
    registry,
    stateful,
)
from agentstate.handlers import names

TASK = SimpleNamespace(context_id="alice", id="task-1", metadata=None)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No shared managers, no handlers, no configuration file."""
    shared: dict[Any, Any] = {}
    monkeypatch.setattr(registry, "_shared", shared)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(names, "_handlers", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)
    yield
    for entry in shared.values():
        entry.storage.close()


def configure(text: str) -> None:
    Path("agent_config.yaml").write_text(textwrap.dedent(text))


# --- kinds of handlers ----------------------------------------------------------------------------------------------


def test_a_function_gets_the_blocking_context() -> None:
    @stateful("memory")
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> int:
        assert type(context) is SyncConversationContext
        context.add_to_history(context_id, "user", "hi")
        return context.count_history(context_id)

    assert [handler(TASK), handler(TASK)] == [1, 2]
    assert not inspect.iscoroutinefunction(handler)


def test_a_coroutine_function_gets_the_awaitable_context() -> None:
    @stateful("memory")
    async def handler(task: Any, context: ConversationContext, context_id: str) -> int:
        assert type(context) is ConversationContext
        await context.add_to_history(context_id, "user", "hi")
        return await context.count_history(context_id)

    assert inspect.iscoroutinefunction(handler)
    assert [asyncio.run(handler(TASK)), asyncio.run(handler(TASK))] == [1, 2]


def test_both_twins_work_on_one_storage() -> None:
    @stateful("memory")
    def write(task: Any, context: Any, context_id: str) -> None:
        context.set_variable(context_id, "k", 1)

    @stateful("memory")
    async def read(task: Any, context: Any, context_id: str) -> Any:
        return await context.get_variable(context_id, "k")

    write(TASK)
    assert asyncio.run(read(TASK)) == 1


def test_a_generator_is_driven_as_if_nothing_stood_between() -> None:
    events: list[Any] = []

    @stateful("memory")
    def handler(task: Any, context: SyncConversationContext, context_id: str) -> Generator[Any, Any, str]:
        try:
            events.append((yield context_id))
            try:
                yield "second"
            except KeyError as error:
                yield error
        finally:
            events.append("finished")
        return "returned"

    assert inspect.isgeneratorfunction(handler)
    generator = handler(TASK)
    assert next(generator) == "alice"
    assert generator.send("sent") == "second"
    thrown = KeyError("thrown")
    assert generator.throw(thrown) is thrown
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "returned"
    assert events == ["sent", "finished"]


def test_closing_a_generator_closes_the_handlers() -> None:
    events: list[str] = []

    @stateful("memory")
    def handler(task: Any, context: Any, context_id: str) -> Iterator[int]:
        try:
            yield 1
        finally:
            events.append("closed")

    generator = handler(TASK)
    next(generator)
    generator.close()
    assert events == ["closed"]


def test_an_async_generator_is_driven_as_if_nothing_stood_between() -> None:
    events: list[Any] = []

    @stateful("memory")
    async def handler(task: Any, context: ConversationContext, context_id: str) -> AsyncGenerator[Any, Any]:
        try:
            events.append((yield await context.get_variable(context_id, "k", "first")))
            try:
                yield "second"
            except KeyError as error:
                yield error
        finally:
            await asyncio.sleep(0)
            events.append("finished")

    async def consume() -> None:
        generator = handler(TASK)
        assert await anext(generator) == "first"
        assert await generator.asend("sent") == "second"
        thrown = KeyError("thrown")
        assert await generator.athrow(thrown) is thrown
        with pytest.raises(StopAsyncIteration):
            await anext(generator)

    assert inspect.isasyncgenfunction(handler)
    asyncio.run(consume())
    assert events == ["sent", "finished"]


def test_closing_an_async_generator_closes_the_handlers() -> None:
    events: list[str] = []

    @stateful("memory")
    async def handler(task: Any, context: Any, context_id: str) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            events.append("closed")

    async def consume() -> None:
        generator = handler(TASK)
        async for _ in generator:
            break
        await generator.aclose()

    asyncio.run(consume())
    assert events == ["closed"]


def test_what_is_thrown_into_an_async_generator_comes_out_untouched() -> None:
    @stateful("memory")
    async def handler(task: Any, context: Any, context_id: str) -> AsyncIterator[int]:
        yield 1

    async def consume() -> None:
        generator = handler(TASK)
        await anext(generator)
        error = KeyError("thrown")
        with pytest.raises(KeyError) as caught:
            await generator.athrow(error)
        assert caught.value is error

    asyncio.run(consume())


class Agent:
    """Handlers that belong to a class, in every way they can."""

    def __init__(self) -> None:
        self.name = "agent"

    @stateful("memory")
    def method(self, task: Any, context: Any, context_id: str) -> Any:
        return self.name, context_id, type(context)

    @stateful("memory")
    async def async_method(self, message: Any, context: Any, context_id: str) -> Any:
        return self.name, context_id, type(context)

    @stateful("memory")
    def generator_method(self, task: Any, context: Any, context_id: str) -> Iterator[Any]:
        yield self.name, context_id, type(context)

    @classmethod
    @stateful("memory")
    def class_method(cls, task: Any, context: Any, context_id: str) -> Any:
        return cls.__name__, context_id, type(context)

    @stateful("memory")
    @classmethod
    def outer_class_method(this, message: Any, context: Any, context_id: str) -> Any:  # noqa: N804
        return this.__name__, context_id, type(context)

    @staticmethod
    @stateful("memory")
    def static_method(task: Any, context: Any, context_id: str) -> Any:
        return "static", context_id, type(context)

    @stateful("memory")
    @staticmethod
    def outer_static_method(message: Any, context: Any, context_id: str) -> Any:
        return "static", context_id, type(context)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("method", "agent"),
        ("class_method", "Agent"),
        ("outer_class_method", "Agent"),
        ("static_method", "static"),
        ("outer_static_method", "static"),
    ],
)
def test_methods_find_the_task_behind_their_owner(method: str, name: str) -> None:
    assert getattr(Agent(), method)(TASK) == (name, "alice", SyncConversationContext)


def test_methods_of_all_kinds() -> None:
    assert asyncio.run(Agent().async_method(TASK)) == ("agent", "alice", ConversationContext)
    assert list(Agent().generator_method(TASK)) == [("agent", "alice", SyncConversationContext)]
    assert Agent.class_method(TASK)[0] == "Agent"


def test_a_bound_method_can_be_decorated() -> None:
    class Plain:
        def handle(self, task: Any, context: Any, context_id: str) -> Any:
            return context_id

    assert stateful("memory")(Plain().handle)(TASK) == "alice"


def test_the_instance_is_never_taken_for_the_task() -> None:
    with pytest.raises(StateConfigError, match=r"which parameter of .*Odd.handle\(\) is the task; name it `task`"):

        class Odd:
            context_id = "shared by all"

            @stateful("memory")
            def handle(this, message: Any, context: Any, context_id: str) -> Any:  # noqa: N805
                return context_id

    class Fine:
        context_id = "shared by all"

        @stateful("memory")
        def handle(this, task: Any, context: Any, context_id: str) -> Any:  # noqa: N805
            return context_id

    assert Fine().handle(TASK) == "alice"


def test_callable_objects_and_partials() -> None:
    class Greeter:
        """An object."""

        def __call__(self, task: Any, context: Any, context_id: str) -> Any:
            return "called", context_id, type(context)

    class AsyncCallable:
        async def __call__(self, task: Any, context: Any, context_id: str) -> Any:
            return "awaited", context_id, type(context)

    def greet(greeting: str, task: Any, context: Any, context_id: str) -> Any:
        return greeting, context_id, type(context)

    handler = stateful("memory")(Greeter())
    assert handler(TASK) == ("called", "alice", SyncConversationContext)
    assert handler.__name__ == "Greeter"
    assert handler.__doc__ == "An object."
    assert asyncio.run(stateful("memory")(AsyncCallable())(TASK)) == ("awaited", "alice", ConversationContext)
    handler = stateful("memory")(functools.partial(greet, "hello"))
    assert handler(TASK) == ("hello", "alice", SyncConversationContext)
    assert handler.__name__ == "greet"


def test_a_plain_function_around_a_coroutine_function_is_asynchronous() -> None:
    def noisy(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return "remembered"

        return wrapper

    async def handler(task: Any, context: Any, context_id: str) -> Any:
        return type(context)

    assert asyncio.run(stateful("memory")(noisy(handler))(TASK)) is ConversationContext
    assert asyncio.run(stateful("memory")(remembering(handler))(TASK)) == "remembered"

    async def stream(task: Any, context: Any, context_id: str) -> AsyncIterator[Any]:
        yield type(context)

    async def first(items: AsyncIterator[Any]) -> Any:
        return await anext(items)

    assert asyncio.run(first(stateful("memory")(noisy(stream))(TASK))) is ConversationContext


def test_a_plain_function_around_a_generator_is_what_it_says() -> None:
    def collecting(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: list(function(*args, **kwargs)))

    def handler(task: Any, context: Any, context_id: str) -> Iterator[Any]:
        yield type(context)

    assert stateful("memory")(collecting(handler))(TASK) == [SyncConversationContext]


def test_without_parentheses() -> None:
    @stateful
    async def handler(task: Any, context: Any, context_id: str) -> Any:
        return type(context.storage), context_id

    assert asyncio.run(handler(TASK)) == (FileStorage, "alice")


def test_handlers_run_in_the_context_variables_of_their_caller() -> None:
    variable: ContextVar[str] = ContextVar("variable")

    @stateful("memory", serialize_turns=True)
    async def handler(task: Any, context: Any, context_id: str) -> str:
        await context.get_history(context_id)
        found = variable.get()
        variable.set("changed")
        return found

    async def main() -> None:
        variable.set("mine")
        assert await handler(TASK) == "mine"
        assert variable.get() == "changed"

    asyncio.run(main())


# --- signatures -----------------------------------------------------------------------------------------------------


def test_name_docstring_attributes_and_signature_survive() -> None:
    def plain(task: dict[str, Any], language: str = "en", *, context: Any, context_id: str, tone: str = "dry") -> str:
        """What it does."""
        return language + tone

    plain.schema = {"type": "function"}  # type: ignore[attr-defined]
    handler = stateful("memory")(plain)
    assert handler.__name__ == "plain"
    assert handler.__qualname__ == plain.__qualname__
    assert handler.__module__ == __name__
    assert handler.__doc__ == "What it does."
    assert handler.schema == {"type": "function"}
    assert handler.__wrapped__ is plain
    assert (
        str(inspect.signature(handler))
        == "(task: 'dict[str, Any]', language: 'str' = 'en', *, tone: 'str' = 'dry') -> 'str'"
    )
    assert handler(TASK, "fr", tone="wet") == "frwet"


@pytest.mark.parametrize(
    "handler",
    [
        lambda task, context, context_id: (task, context_id),
        lambda task, *, context, context_id: (task, context_id),
        lambda context, context_id, task: (task, context_id),
        lambda context_id, task, context: (task, context_id),
        lambda *args, context, context_id: (args[0], context_id),
        lambda task, **kwargs: (task, kwargs["context_id"]) if "context" in kwargs else None,
        lambda *args, **kwargs: (args[0], kwargs["context_id"]) if "context" in kwargs else None,
        lambda message, context, context_id: (message, context_id),
    ],
)
def test_the_task_and_what_is_injected_may_stand_anywhere(handler: Any) -> None:
    assert stateful("memory")(handler)(TASK) == (TASK, "alice")


def test_the_task_may_be_a_keyword_argument() -> None:
    assert stateful("memory")(lambda task, context, context_id: context_id)(task=TASK) == "alice"
    assert stateful("memory")(lambda context, context_id, task: context_id)(task=TASK) == "alice"
    assert stateful("memory")(lambda message, context, context_id: context_id)(message=TASK) == "alice"
    assert stateful("memory")(lambda context, context_id, **rest: context_id)(task=TASK) == "alice"


def test_a_handler_gets_only_what_it_names() -> None:
    assert stateful("memory")(lambda task, context_id: context_id)(TASK) == "alice"
    context = stateful("memory")(lambda task, context: context)(TASK)
    assert isinstance(context, SyncConversationContext)
    assert stateful("memory")(lambda task, context, **rest: rest)(TASK, a=1) == {"a": 1}


@pytest.mark.parametrize(
    "handler", [lambda task: None, lambda: None, lambda task, context, /: None, lambda task, ctx: None]
)
def test_a_handler_that_takes_neither_is_refused_when_it_is_decorated(handler: Any) -> None:
    with pytest.raises(StateConfigError, match=r"signature .* must include `context` and `context_id`"):
        stateful("memory")(handler)


def test_decorating_twice_is_refused() -> None:
    with pytest.raises(StateConfigError, match="must include `context`"):

        @stateful("memory")
        @stateful("memory")
        def handler(task: Any, context: Any, context_id: str) -> None: ...


@pytest.mark.parametrize("handler", [3, "memory", Agent, None])
def test_only_functions_can_be_decorated(handler: Any) -> None:
    with pytest.raises(TypeError, match="@stateful must decorate a function or a method"):
        stateful("memory")(handler)


def test_more_arguments_reach_the_handler_as_they_were_given() -> None:
    handler = stateful("memory")(lambda task, *more, context, context_id, **named: (more, named))
    assert handler(TASK, 1, 2, a=3) == ((1, 2), {"a": 3})
    handler = stateful("memory")(lambda context, task, context_id, first, second=2: (task, first, second))
    assert handler(TASK, 1) == (TASK, 1, 2)
    assert handler(TASK, second=3, first=1) == (TASK, 1, 3)
    handler = stateful("memory")(lambda before, /, context, context_id, task: (before, task, context_id))
    assert handler(1, TASK) == (1, TASK, "alice")


def test_wrong_arguments_are_the_errors_that_python_gives() -> None:
    handler = stateful("memory")(lambda context, context_id, task, more=1: more)
    assert handler(TASK, 2) == 2
    for args, kwargs in [((TASK,), {"nothing": 1}), ((TASK, 1, 2), {}), ((TASK,), {"task": TASK})]:
        with pytest.raises(TypeError):
            handler(*args, **kwargs)
    with pytest.raises(TypeError, match="must not be called with `context`"):
        handler(TASK, context=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"storage": 3},
        {"storage": InMemoryStorage},
        {"storage": lambda task, context: None, "ttl": 3},
        {"storage": InMemoryStorage(), "ttl": 3},
        {"context_id": "person"},
        {"context_id": 3},
        {"user_id": "alice"},
        {"user_id": asyncio.sleep},
        {"context_id": asyncio.sleep},
        {"on_unavailable": "ignore"},
    ],
)
def test_wrong_arguments_of_the_decorator_are_errors_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(StateConfigError):
        stateful(**arguments)


def test_the_decorators_own_signature_says_what_is_left_to_the_configuration() -> None:
    assert "url: 'str' = <as configured>" in str(inspect.signature(stateful))


def test_the_reference_documents_import_works() -> None:
    assert agentstate.context.stateful is stateful


# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serialize_turns", [False, True])
@pytest.mark.parametrize("on_unavailable", ["raise", "ephemeral"])
@pytest.mark.parametrize(
    "error", [ValueError("own"), StateUnavailableError("own"), StateConflictError("own"), KeyboardInterrupt("own")]
)
class TestAnExceptionOfTheHandler:
    """Passes through as it is, and the handler has run once."""

    def test_of_a_function(self, error: BaseException, serialize_turns: bool, on_unavailable: Any) -> None:
        runs: list[int] = []

        @stateful("memory", serialize_turns=serialize_turns, on_unavailable=on_unavailable)
        def handler(task: Any, context: Any, context_id: str) -> None:
            runs.append(1)
            raise error

        with pytest.raises(type(error)) as caught:
            handler(TASK)
        assert caught.value is error
        assert error.__cause__ is None
        assert runs == [1]

    def test_of_a_coroutine(self, error: BaseException, serialize_turns: bool, on_unavailable: Any) -> None:
        runs: list[int] = []

        @stateful("memory", serialize_turns=serialize_turns, on_unavailable=on_unavailable)
        async def handler(task: Any, context: Any, context_id: str) -> None:
            runs.append(1)
            raise error

        with pytest.raises(type(error)) as caught:
            asyncio.run(handler(TASK))
        assert caught.value is error
        assert runs == [1]

    def test_of_a_generator(self, error: BaseException, serialize_turns: bool, on_unavailable: Any) -> None:
        runs: list[int] = []

        @stateful("memory", serialize_turns=serialize_turns, on_unavailable=on_unavailable)
        def handler(task: Any, context: Any, context_id: str) -> Iterator[int]:
            runs.append(1)
            yield 1
            raise error

        with pytest.raises(type(error)) as caught:
            list(handler(TASK))
        assert caught.value is error
        assert runs == [1]

    def test_of_an_async_generator(self, error: BaseException, serialize_turns: bool, on_unavailable: Any) -> None:
        runs: list[int] = []

        @stateful("memory", serialize_turns=serialize_turns, on_unavailable=on_unavailable)
        async def handler(task: Any, context: Any, context_id: str) -> AsyncIterator[int]:
            runs.append(1)
            yield 1
            raise error

        async def consume() -> None:
            async for _ in handler(TASK):
                pass

        with pytest.raises(type(error)) as caught:
            asyncio.run(consume())
        assert caught.value is error
        assert runs == [1]


def test_stop_iteration_of_a_function_passes_too() -> None:
    @stateful("memory")
    def handler(task: Any, context: Any, context_id: str) -> None:
        raise StopIteration(3)

    with pytest.raises(StopIteration):
        handler(TASK)


# --- where the state is ---------------------------------------------------------------------------------------------


def storage_of(**arguments: Any) -> Any:
    return stateful(**arguments)(lambda task, context: context.storage)(TASK)


def test_decorator_and_manager_share_one_instance() -> None:
    storage = storage_of(storage="memory", ttl=60)
    assert get_context_manager("memory", ttl=60).storage is storage
    assert storage_of(storage="memory", ttl=61) is not storage


def test_the_file_is_read_at_the_first_call_and_its_errors_are_raised_there() -> None:
    @stateful
    def handler(task: Any, context: Any) -> Any:
        return context.storage

    configure("state: {backend: valkey}")
    for _ in range(2):
        with pytest.raises(StateConfigError, match="needs a url"):
            handler(TASK)
    configure("state: {backend: memory, ttl: 5}")
    storage = handler(TASK)
    assert (type(storage), storage.ttl) == (InMemoryStorage, 5)
    configure("state: {backend: memory, ttl: 6}")
    assert handler(TASK) is storage


def test_with_no_options_the_file_decides_and_without_a_file_it_is_the_file_storage() -> None:
    assert isinstance(storage_of(), FileStorage)
    configure("state_management: {backend: memory, config: {ttl: 5}}")
    assert storage_of().ttl == 5


def test_decorator_options_override_the_file_key_by_key() -> None:
    configure("state: {backend: memory, ttl: 5, max_history: 7}")
    storage = storage_of(ttl=None)
    assert (storage.ttl, storage.max_history) == (None, 7)
    storage = storage_of(storage="memory", max_history=8)
    assert (storage.ttl, storage.max_history) == (5, 8)


def test_another_storage_drops_the_files_keys_of_that_one() -> None:
    configure("state: {backend: valkey, url: 'valkey://localhost', key_prefix: 'x:', ttl: 5}")
    storage = storage_of(storage="file", storage_dir="elsewhere")
    assert isinstance(storage, FileStorage)
    assert storage.ttl == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "valkey"}, "needs a url"),
        ({"storage": "valky"}, "did you mean 'valkey'"),
        ({"storage": "memory", "tll": 3}, "did you mean `ttl`"),
        ({"storage": "memory", "url": "valkey://x"}, "`url` is a key of `backend: valkey`"),
        ({"storage": "memory", "enabled": False}, "'enabled' is a key of the configuration file"),
    ],
)
def test_wrong_options_are_errors_of_the_first_call(arguments: dict[str, Any], message: str) -> None:
    handler = stateful(**arguments)(lambda task, context: None)
    with pytest.raises(StateConfigError, match=message):
        handler(TASK)


def test_a_storage_object_is_used_as_it_is_and_the_file_is_not_read() -> None:
    configure("state: {backend: valkey}")
    storage = InMemoryStorage()
    assert storage_of(storage=storage) is storage


def test_a_third_partys_storage_by_name() -> None:
    class Mine(InMemoryStorage):
        def __init__(self, *, table: str, **options: Any) -> None:
            super().__init__(**options)
            self.table = table

    register_storage("mine", Mine)
    storage = storage_of(storage="mine", table="t", ttl=3)
    assert (storage.table, storage.ttl) == ("t", 3)


def test_a_closed_storage_is_replaced_by_a_new_one() -> None:
    handler = stateful("memory")(lambda task, context, context_id: context.increment_variable(context_id, "n"))
    assert [handler(TASK), handler(TASK)] == [1, 2]
    get_context_manager("memory", blocking=True).close()
    assert handler(TASK) == 1


def test_a_closed_storage_object_stays_closed() -> None:
    storage = InMemoryStorage()
    handler = stateful(storage)(lambda task, context, context_id: context.exists(context_id))
    assert handler(TASK) is False
    storage.close()
    with pytest.raises(StateUnavailableError, match="closed"):
        handler(TASK)


def test_the_event_loop_does_not_wait_while_the_first_call_opens_the_store() -> None:
    go_on = threading.Event()

    class SlowToOpen(InMemoryStorage):
        def __init__(self, **options: Any) -> None:
            assert go_on.wait(60)
            super().__init__(**options)

    @stateful("slow")
    async def handler(task: Any, context_id: str) -> None: ...

    async def main() -> None:
        call = asyncio.create_task(handler(TASK))
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert not call.done()
        go_on.set()
        await call

    register_storage("slow", SlowToOpen)
    asyncio.run(main())


def test_settings_for_single_handlers_go_by_their_name() -> None:
    configure(
        """
        state:
          backend: memory
          ttl: 5
          skill_overrides:
            planner: {ttl: 6}
            by_function: {ttl: 7}
            beneath: {ttl: 8}
        """
    )

    @register_handler("planner")
    @stateful
    def handler(task: Any, context: Any) -> Any:
        return context.storage.ttl

    @stateful
    def by_function(task: Any, context: Any) -> Any:
        return context.storage.ttl

    def loud(function: Any) -> Any:
        return functools.wraps(function)(lambda *args: function(*args))

    @register_handler("beneath")
    @loud
    @stateful
    def inner(task: Any, context: Any) -> Any:
        return context.storage.ttl

    @stateful
    def other(task: Any, context: Any) -> Any:
        return context.storage.ttl

    assert [handler(TASK), by_function(TASK), inner(TASK), other(TASK)] == [6, 7, 8, 5]


def test_switched_off_is_an_error_for_a_handler_that_needs_state() -> None:
    configure("state: {enabled: false, backend: memory}")
    with pytest.raises(StateConfigError, match="state management is disabled"):
        stateful("memory")(lambda task, context: None)(TASK)


def test_switched_off_a_handler_with_defaults_runs_without_state() -> None:
    configure("state: {enabled: false, backend: memory}")

    @stateful
    def handler(task: Any, context: Any = None, context_id: str | None = None) -> Any:
        return context, context_id

    @stateful
    async def only_context(task: Any, context: Any = None) -> Any:
        return context

    assert handler(TASK) == (None, None)
    assert handler(TASK, context_id="mine") == (None, "mine")
    assert asyncio.run(only_context(TASK, context_id="mine")) is None


def test_one_handler_serves_many_threads_and_event_loops() -> None:
    @stateful("memory")
    async def handler(task: Any, context: ConversationContext, context_id: str) -> None:
        await context.increment_variable(context_id, "n")

    async def many() -> None:
        await asyncio.gather(*(handler(TASK) for _ in range(25)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_context_manager("memory", blocking=True).get_variable("alice", "n") == 100
