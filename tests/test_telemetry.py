"""Spans and metrics, with OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv.attributes import db_attributes, error_attributes, server_attributes
from opentelemetry.semconv.metrics.db_metrics import DB_CLIENT_OPERATION_DURATION
from servers import ValkeyServer

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateConfigError,
    StateConflictError,
    StateUnavailableError,
    SyncConversationContext,
    ValkeyStorage,
    get_context_manager,
)
from agentstate.operations import Operation
from agentstate.storage.base import Settle, StateStorage
from agentstate.telemetry import instrument

SECRET = "what nobody else is to read"


class Telemetry:
    """Providers that keep what they are told."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meter_provider = MeterProvider([self._metrics])
        self.tracer = self.tracer_provider.get_tracer("tests")

    def instrument(self, target: Any) -> None:
        instrument(target, tracer_provider=self.tracer_provider, meter_provider=self.meter_provider)

    def spans(self) -> list[ReadableSpan]:
        """Those that ended, in the order in which they did."""
        return list(self._spans.get_finished_spans())

    def points(self, name: str) -> list[Any]:
        """The values of an instrument."""
        data = self._metrics.get_metrics_data()
        if data is None:
            return []
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return [
            point for scope in scopes for one in scope.metrics if one.name == name for point in one.data.data_points
        ]

    def values(self, name: str, attribute: str) -> dict[Any, Any]:
        """The values of an instrument by one of their attributes."""
        return {point.attributes.get(attribute): point.value for point in self.points(name)}

    def everything(self) -> str:
        """All that was told, as text."""
        data = self._metrics.get_metrics_data()
        return "".join(span.to_json() for span in self.spans()) + ("" if data is None else data.to_json())


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracer_provider.shutdown()
    telemetry.meter_provider.shutdown()


@pytest.fixture(params=["memory", "file", "valkey"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateStorage]:
    storage: StateStorage
    if request.param == "memory":
        storage = InMemoryStorage()
    elif request.param == "file":
        storage = FileStorage(tmp_path / "conversations")
    else:
        server: ValkeyServer = request.getfixturevalue("valkey_9")
        storage = ValkeyStorage(server.url, key_prefix=request.getfixturevalue("key_prefix"))
    with closing(storage):
        yield storage


def place_of(storage: StateStorage) -> dict[str, Any]:
    """The attributes that say where it is, by the names that the conventions' own package has."""
    if isinstance(storage, FileStorage):
        return {db_attributes.DB_SYSTEM_NAME: "agentstate.file", db_attributes.DB_NAMESPACE: "conversations"}
    if isinstance(storage, ValkeyStorage):
        host, _, port = repr(storage).partition("//")[2].partition("/")[0].partition(":")
        return {
            db_attributes.DB_SYSTEM_NAME: "valkey",
            db_attributes.DB_NAMESPACE: "0",
            db_attributes.DB_COLLECTION_NAME: storage.key_prefix,
            server_attributes.SERVER_ADDRESS: host,
            server_attributes.SERVER_PORT: int(port),
        }
    return {db_attributes.DB_SYSTEM_NAME: "agentstate.memory"}


def test_a_call_is_a_span_under_the_callers_own(storage: StateStorage, telemetry: Telemetry) -> None:
    context = SyncConversationContext(storage)
    telemetry.instrument(context)
    with telemetry.tracer.start_as_current_span("handler"):
        context.add_to_history("alice", "user", SECRET)
    span, outer = telemetry.spans()
    assert span.kind is trace.SpanKind.CLIENT
    assert span.parent == outer.context
    place = place_of(storage)
    target = place.get(db_attributes.DB_COLLECTION_NAME) or place.get(db_attributes.DB_NAMESPACE)
    assert span.name == ("add_to_history" if target is None else f"add_to_history {target}")
    assert span.status.status_code is trace.StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        **place,
        db_attributes.DB_OPERATION_NAME: "add_to_history",
        "gen_ai.conversation.id": "alice",
        "agentstate.bytes_written": (span.attributes or {})["agentstate.bytes_written"],
        "agentstate.bytes_read": 0,
    }
    assert (span.attributes or {})["agentstate.bytes_written"] > len(SECRET)


def test_tasks_have_spans_of_their_own_although_their_operations_travel_together(
    storage: StateStorage, telemetry: Telemetry
) -> None:
    context = ConversationContext(storage)
    telemetry.instrument(storage)

    async def handler(name: str) -> None:
        with telemetry.tracer.start_as_current_span(name):
            await context.set_variable(name, "key", SECRET)
            await context.get_variable(name, "key")

    async def all_of_them() -> None:
        await asyncio.gather(*(handler(f"task-{number}") for number in range(20)))

    asyncio.run(all_of_them())
    spans = telemetry.spans()
    outer = {span.context.span_id: span.name for span in spans if span.parent is None and span.context}
    inner = [span for span in spans if span.parent is not None]
    assert len(outer) == 20
    assert len(inner) == 40
    for span in inner:
        assert span.parent is not None
        assert outer[span.parent.span_id] == (span.attributes or {})["gen_ai.conversation.id"]


def test_durations_are_recorded_without_conversations(storage: StateStorage, telemetry: Telemetry) -> None:
    context = SyncConversationContext(storage)
    telemetry.instrument(context)
    for number in range(3):
        context.set_variable(f"c{number}", "key", number)
    context.get_variable("c0", "key")
    points = telemetry.points(DB_CLIENT_OPERATION_DURATION)
    assert {point.attributes[db_attributes.DB_OPERATION_NAME]: point.count for point in points} == {
        "set_variable": 3,
        "get_variable": 1,
    }
    for point in points:
        assert set(point.attributes) == {*place_of(storage), db_attributes.DB_OPERATION_NAME}
        assert 0 < point.sum < 60
        assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


def test_a_failure_is_named_but_not_quoted(storage: StateStorage, telemetry: Telemetry) -> None:
    context = SyncConversationContext(storage)
    telemetry.instrument(context)
    context.set_variable("alice", "key", SECRET)

    def broken(value: str) -> str:
        raise LookupError(value)

    with pytest.raises(StateConflictError):
        context.increment_variable("alice", "key")
    with pytest.raises(LookupError):
        context.update_variable("alice", "key", broken)
    _, conflict, broke = telemetry.spans()
    for span, error in ((conflict, "agentstate.errors.StateConflictError"), (broke, "LookupError")):
        assert (span.attributes or {})[error_attributes.ERROR_TYPE] == error
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.status.description is None
        assert span.events == ()
    errors = [
        point.attributes.get(error_attributes.ERROR_TYPE) for point in telemetry.points(DB_CLIENT_OPERATION_DURATION)
    ]
    assert sorted(filter(None, errors)) == ["LookupError", "agentstate.errors.StateConflictError"]
    assert SECRET not in telemetry.everything()


@pytest.mark.parametrize("max_history", [None, 10])
def test_a_batch_says_how_much_it_holds(telemetry: Telemetry, max_history: int | None) -> None:
    context = SyncConversationContext(InMemoryStorage(max_history=max_history))
    telemetry.instrument(context)
    with context.batch("alice") as batch:
        batch.add_to_history("user", "hello")
        batch.set_variable("key", 1)
        batch.set_metadata("key", 1)
    with context.batch("alice") as batch:
        batch.add_to_history("user", "hello")
    with context.batch("alice") as batch:
        batch.set_variable("key", 1)
        batch.trim_history(1)
    with context.turn("alice") as turn:
        turn.set_variable("key", 1)
        turn.set_variable("key", 2)
    seen = [
        (span.name, (span.attributes or {}).get(db_attributes.DB_OPERATION_BATCH_SIZE)) for span in telemetry.spans()
    ]
    assert seen == [("batch", 3), ("batch", None), ("batch", 2), ("turn", None), ("end of turn", 2)]


def test_a_call_that_asks_the_storage_for_nothing_has_no_span(telemetry: Telemetry) -> None:
    context = SyncConversationContext()
    telemetry.instrument(context)
    context.update_state("alice")
    with pytest.raises(ValueError, match="negative"):
        context.get_history("alice", limit=-1)
    assert telemetry.spans() == []


def test_an_iterator_that_is_left_early_ends_its_span_without_an_error(telemetry: Telemetry) -> None:
    context = SyncConversationContext()
    context.extend_history("alice", [{"role": "user", "content": n} for n in range(5)])
    telemetry.instrument(context)
    iterator = context.iter_history("alice", page_size=2)
    assert next(iterator)["content"] == 0
    del iterator
    gc.collect()
    [span] = telemetry.spans()
    assert (span.name, span.status.status_code) == ("iter_history", trace.StatusCode.UNSET)


def test_a_cancelled_call_says_so(telemetry: Telemetry, start_valkey: Callable[..., ValkeyServer]) -> None:
    server = start_valkey()

    async def cancelled() -> None:
        async with ConversationContext(ValkeyStorage(server.url, deadline=0.5)) as context:
            await context.exists("alice")
            telemetry.instrument(context)
            with server.paused():
                call = asyncio.create_task(context.exists("alice"))
                await asyncio.sleep(0.05)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

    asyncio.run(cancelled())
    [span] = telemetry.spans()
    assert (span.attributes or {})[error_attributes.ERROR_TYPE] == "cancelled"


def test_what_the_storage_counts_is_observed(storage: StateStorage, telemetry: Telemetry) -> None:
    context = SyncConversationContext(storage)
    telemetry.instrument(context)
    context.set_variable("alice", "key", 1)
    context.get_variable("alice", "key")
    found = storage.statistics()
    kinds = telemetry.values("agentstate.operations", "agentstate.operation.kind")
    assert kinds == {"query": 1, "commit": 1, "lease": 0, "listing": 0}
    assert telemetry.values("agentstate.io", "agentstate.io.direction") == {
        "write": found.bytes_written,
        "read": found.bytes_read,
    }
    lookups = telemetry.values("agentstate.cache.lookups", "agentstate.cache.result")
    connections = telemetry.values("db.client.connection.count", "db.client.connection.state")
    assert lookups == ({"hit": 1, "miss": 1} if isinstance(storage, FileStorage) else {})
    assert connections == ({"idle": 1, "used": 0} if isinstance(storage, ValkeyStorage) else {})
    for name in ("agentstate.groups", "agentstate.attempts.repeated", "agentstate.calls.degraded"):
        [point] = telemetry.points(name)
        assert dict(point.attributes) == place_of(storage)


def test_a_storage_that_nobody_has_any_more_is_not_observed(telemetry: Telemetry) -> None:
    storage = InMemoryStorage()
    telemetry.instrument(storage)
    assert telemetry.points("agentstate.groups")
    del storage
    gc.collect()
    assert not telemetry.points("agentstate.groups")


def test_instrumenting_again_is_telling_somebody_else(telemetry: Telemetry) -> None:
    context = SyncConversationContext()
    others = Telemetry()
    others.instrument(context)
    telemetry.instrument(context)
    context.exists("alice")
    assert [span.name for span in telemetry.spans()] == ["exists"]
    assert telemetry.points("agentstate.groups")
    assert others.spans() == []
    assert not others.points("agentstate.groups")


def test_no_secret_and_no_content_is_told(valkey_password: ValkeyServer, telemetry: Telemetry, key_prefix: str) -> None:
    with SyncConversationContext(ValkeyStorage(valkey_password.url, key_prefix=key_prefix)) as context:
        telemetry.instrument(context)
        context.set_variable("alice", "key", SECRET)
        context.add_to_history("alice", "user", SECRET, {"note": SECRET})
        assert context.get_state("alice") is not None
    assert valkey_password.password is not None
    told = telemetry.everything()
    assert "add_to_history" in told
    assert SECRET not in told
    assert valkey_password.password not in told


def test_an_outage_is_an_error_of_the_span(start_valkey: Callable[..., ValkeyServer], telemetry: Telemetry) -> None:
    server = start_valkey()
    server.kill()
    with SyncConversationContext(ValkeyStorage(server.url, deadline=0.2)) as context:
        telemetry.instrument(context)
        with pytest.raises(StateUnavailableError):
            context.exists("alice")
    [span] = telemetry.spans()
    assert (span.attributes or {})[error_attributes.ERROR_TYPE] == "agentstate.errors.StateUnavailableError"


def test_the_configuration_file_switches_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, telemetry: Telemetry
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", telemetry.tracer_provider)
    monkeypatch.setattr(metrics._internal, "_METER_PROVIDER", telemetry.meter_provider)
    Path("agent_config.yaml").write_text("state: {backend: memory, telemetry: true}\n")
    get_context_manager(force_new=True, blocking=True).exists("alice")
    get_context_manager(force_new=True, blocking=True, telemetry=False).exists("alice")
    assert [span.name for span in telemetry.spans()] == ["exists"]
    shared = get_context_manager("memory", blocking=True, telemetry=False)
    assert get_context_manager("memory", blocking=True) is not shared


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
import agentstate
agentstate.get_context_manager("memory", force_new=True)  # no telemetry, no package
agentstate.get_context_manager("memory", force_new=True, telemetry=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pip install opentelemetry-api" in ended.stderr.splitlines()[-1]
    assert StateConfigError.__name__ in ended.stderr.splitlines()[-1]


def test_who_does_not_want_it_does_not_import_it() -> None:
    code = """
import sys, agentstate
context = agentstate.SyncConversationContext()
context.exists("alice")
context.storage.statistics()
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_a_call_about_no_conversation_names_none(telemetry: Telemetry) -> None:
    context = SyncConversationContext(InMemoryStorage())
    telemetry.instrument(context)
    list(context.list_contexts())
    (span,) = telemetry.spans()
    assert "gen_ai.conversation.id" not in dict(span.attributes or {})


def test_what_is_not_sampled_is_counted_all_the_same(telemetry: Telemetry) -> None:
    context = SyncConversationContext(InMemoryStorage())
    tracer_provider = TracerProvider(ALWAYS_OFF)
    instrument(context, tracer_provider=tracer_provider, meter_provider=telemetry.meter_provider)
    context.add_to_history("alice", "user", "hi")
    (point,) = telemetry.points(DB_CLIENT_OPERATION_DURATION)
    assert point.count == 1
    tracer_provider.shutdown()


def test_a_storage_of_a_third_party_goes_by_the_name_of_its_class() -> None:
    class DrawerStorage(StateStorage):
        def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
            raise AssertionError("nobody asks it for anything")

    assert DrawerStorage().telemetry_attributes() == {db_attributes.DB_SYSTEM_NAME: "agentstate.drawer"}


def test_a_unix_socket_has_no_port() -> None:
    with closing(ValkeyStorage("unix:///run/valkey.sock?db=3", key_prefix="p:")) as storage:
        assert storage.telemetry_attributes() == {
            db_attributes.DB_SYSTEM_NAME: "valkey",
            db_attributes.DB_NAMESPACE: "3",
            db_attributes.DB_COLLECTION_NAME: "p:",
            server_attributes.SERVER_ADDRESS: "/run/valkey.sock",
        }
