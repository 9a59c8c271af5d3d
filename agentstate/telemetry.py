"""Spans and metrics for OpenTelemetry, in the names of its semantic conventions for database clients.

    from agentstate.telemetry import instrument

    instrument(storage)  # or a context; `telemetry: true` in the configuration file does the same

Every call of a context is a span of kind CLIENT under the caller's current span, and a value of the histogram
``db.client.operation.duration``. What the storage counts (`StateStorage.statistics`) is observed when metrics are
collected; names that are not in the conventions begin with ``agentstate.``. Contents and secrets are never recorded.
The id of a conversation is recorded in spans only, as ``gen_ai.conversation.id``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .caller import check_storage
from .errors import StateConfigError
from .operations import Append
from .storage.base import StateStorage
from .version import __version__

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
except ImportError as error:
    raise StateConfigError("telemetry needs the package opentelemetry-api: pip install opentelemetry-api") from error

if TYPE_CHECKING:
    from .caller import Caller
    from .calllog import Call
    from .storage.statistics import StorageStatistics

Found: TypeAlias = Iterator[tuple[int, dict[str, str]]]

_NAME: Final = "agentstate"
_CANCELLED: Final = "cancelled"
_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Seconds, as the conventions recommend for this histogram."""


def instrument(
    target: StateStorage | Caller,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> None:
    """Emit spans and metrics for all calls of contexts on this storage (or on the storage of this context).

    The providers default to the global ones. Instrumenting a storage again replaces its providers. Raises
    StateConfigError if `target` is neither a storage nor a context.
    """
    storage = check_storage(getattr(target, "storage", target))
    storage.telemetry = Telemetry(storage, tracer_provider, meter_provider)


class Telemetry:
    """Records the calls on one storage (see `agentstate.calllog`)."""

    def __init__(
        self,
        storage: StateStorage,
        tracer_provider: trace.TracerProvider | None,
        meter_provider: metrics.MeterProvider | None,
    ) -> None:
        self._storage = weakref.ref(storage)
        self._max_history = storage.max_history
        self._attributes = storage.telemetry_attributes()
        # The conventions leave the numeric index of a database out of the name of a span.
        namespace = str(self._attributes.get("db.namespace", ""))
        target = self._attributes.get("db.collection.name") or ("" if namespace.isdigit() else namespace)
        self._target = f" {target}" if target else ""
        self._tracer = trace.get_tracer(_NAME, __version__, tracer_provider)
        meter = metrics.get_meter(_NAME, __version__, meter_provider)
        self._duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        for name, unit, find in _COUNTERS:
            meter.create_observable_counter(name, [self._observer(find)], unit)
        for name, unit, find in _GAUGES:
            meter.create_observable_up_down_counter(name, [self._observer(find)], unit)

    # --- calls

    def begin(self, call: Call) -> None:
        """Called with the first operation of a call."""
        attributes: dict[str, Any] = {**self._attributes, "db.operation.name": call.name}
        if call.context_id is not None:
            attributes["gen_ai.conversation.id"] = call.context_id
        call.span = self._tracer.start_span(
            f"{call.name}{self._target}", kind=trace.SpanKind.CLIENT, attributes=attributes
        )

    def end(self, call: Call) -> None:
        """Called when a call has ended. A call without any operation is not recorded."""
        span: trace.Span | None = call.span
        if span is None:
            return
        attributes: dict[str, Any] = {**self._attributes, "db.operation.name": call.name}
        if call.error is not None:
            attributes["error.type"] = error_type(call.error)
        self._duration.record(call.seconds, attributes, trace.set_span_in_context(span))
        if span.is_recording():
            self._describe(call, span, attributes.get("error.type"))
        span.end()

    def _describe(self, call: Call, span: trace.Span, error: str | None) -> None:
        span.set_attribute("agentstate.bytes_written", call.bytes_written)
        span.set_attribute("agentstate.bytes_read", call.bytes_read)
        if call.changes:
            # Without the trim that `max_history` adds to every append.
            trimmed = self._max_history is not None and any(type(change) is Append for change in call.changes)
            size = len(call.changes) - trimmed
            if size > 1:
                span.set_attribute("db.operation.batch.size", size)
        if error is not None:
            # Without the message and the traceback: an exception of a caller's function may quote contents.
            span.set_attribute("error.type", error)
            span.set_status(trace.StatusCode.ERROR)

    # --- what the storage counts

    def _observer(
        self, find: Callable[[StorageStatistics], Found]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            storage = self._storage()
            if storage is None or storage.telemetry is not self:  # collected, or instrumented again
                return
            for value, attributes in find(storage.statistics()):
                yield Observation(value, {**self._attributes, **attributes})

        return observe


def error_type(error: BaseException) -> str:
    """The value of ``error.type``: the name of the class, with its module unless it is a built-in one."""
    if isinstance(error, GeneratorExit):  # the call was closed because its task was cancelled
        return _CANCELLED
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _operations(found: StorageStatistics) -> Found:
    for kind, count in found.operations.items():
        yield count, {"agentstate.operation.kind": kind}


def _groups(found: StorageStatistics) -> Found:
    yield found.group_sizes.count, {}


def _repeated(found: StorageStatistics) -> Found:
    yield found.attempts_repeated, {}


def _degraded(found: StorageStatistics) -> Found:
    yield found.degraded_calls, {}


def _bytes(found: StorageStatistics) -> Found:
    yield found.bytes_written, {"agentstate.io.direction": "write"}
    yield found.bytes_read, {"agentstate.io.direction": "read"}


def _lookups(found: StorageStatistics) -> Found:
    if found.cache is not None:
        yield found.cache.hits, {"agentstate.cache.result": "hit"}
        yield found.cache.misses, {"agentstate.cache.result": "miss"}


def _evictions(found: StorageStatistics) -> Found:
    if found.cache is not None:
        yield found.cache.evictions, {}


def _cache_size(found: StorageStatistics) -> Found:
    if found.cache is not None:
        yield found.cache.size_bytes, {}


def _open_files(found: StorageStatistics) -> Found:
    if found.cache is not None:
        yield found.cache.open_files, {}


def _connections(found: StorageStatistics) -> Found:
    if found.connections is not None:
        yield found.connections.idle, {"db.client.connection.pool.name": _NAME, "db.client.connection.state": "idle"}
        yield found.connections.used, {"db.client.connection.pool.name": _NAME, "db.client.connection.state": "used"}


def _most_connections(found: StorageStatistics) -> Found:
    if found.connections is not None:
        yield found.connections.limit, {"db.client.connection.pool.name": _NAME}


_Instruments: TypeAlias = tuple[tuple[str, str, Callable[["StorageStatistics"], Found]], ...]
_COUNTERS: Final[_Instruments] = (
    ("agentstate.operations", "{operation}", _operations),
    ("agentstate.groups", "{group}", _groups),
    ("agentstate.attempts.repeated", "{attempt}", _repeated),
    ("agentstate.calls.degraded", "{call}", _degraded),
    ("agentstate.io", "By", _bytes),
    ("agentstate.cache.lookups", "{lookup}", _lookups),
    ("agentstate.cache.evictions", "{context}", _evictions),
)
_GAUGES: Final[_Instruments] = (
    ("agentstate.cache.size", "By", _cache_size),
    ("agentstate.files.open", "{file}", _open_files),
    ("db.client.connection.count", "{connection}", _connections),
    ("db.client.connection.max", "{connection}", _most_connections),
)
