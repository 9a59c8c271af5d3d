"""Any JSON from a caller and any bytes in a file: what is read is what was stored, or a typed error is raised."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from servers import ValkeyServer

from agentstate import FileStorage, InMemoryStorage, SyncConversationContext, ValkeyStorage
from agentstate.errors import InvalidContextIdError, StateCorruptedError, StateError, StateSerializationError
from torture.model import Model, Step, observed, perform
from torture.places import scratch

SOME = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

numbers = st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
anything = st.recursive(
    st.none() | numbers | st.floats() | st.text(max_size=10) | st.binary(max_size=4) | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=8,
)
ids = st.text(min_size=1, max_size=60) | st.text(string.punctuation + "/\\.~\0 ", min_size=1, max_size=12)


def exactly(one: Any, other: Any) -> bool:
    """Equal in value and in type, in every place (1 is not 1.0, and 0.0 is not -0.0)."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(exactly, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(exactly(value, other[key]) for key, value in one.items())
    if isinstance(one, float):
        return bool(one == other) and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


BACKENDS = ("memory", "file", "file-document", "valkey", "valkey-document")


@contextmanager
def opened(backend: str, folder: Path, server: ValkeyServer, prefix: str) -> Iterator[list[SyncConversationContext]]:
    """A context that writes, and one that reads from the store (with memory, the same one)."""
    name, _, layout = backend.partition("-")
    options: dict[str, Any] = {"layout": layout or "log"}
    if name == "memory":
        contexts = [SyncConversationContext(InMemoryStorage())] * 2
    elif name == "file":
        contexts = [SyncConversationContext(FileStorage(folder, fsync="no", **options)) for _ in range(2)]
    else:
        contexts = [SyncConversationContext(ValkeyStorage(server.url, key_prefix=prefix, **options)) for _ in range(2)]
    try:
        yield contexts
    finally:
        for context in contexts:
            context.close()


@pytest.fixture(params=BACKENDS)
def contexts(
    request: pytest.FixtureRequest, tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str
) -> Iterator[list[SyncConversationContext]]:
    with opened(request.param, tmp_path / "states", valkey_9, key_prefix) as both:
        yield both


def test_every_json_value_comes_back_as_it_was(contexts: list[SyncConversationContext]) -> None:
    writer, reader = contexts

    @SOME
    @given(values, texts)
    def round_trip(value: Any, key: str) -> None:
        writer.clear_context("a")
        writer.set_variable("a", key, value)
        writer.add_to_history("a", "user", value, {"m": value})
        writer.set_metadata("a", key, value)
        state = reader.get_state("a")
        assert state is not None
        assert exactly(state.variables, {key: value})
        assert exactly(state.metadata, {key: value})
        assert exactly([state.history[0]["content"], state.history[0]["metadata"]], [value, {"m": value}])

    round_trip()


def test_every_other_value_is_refused_and_changes_nothing(contexts: list[SyncConversationContext]) -> None:
    writer, reader = contexts
    writer.set_variable("a", "before", 1)

    @SOME
    @given(anything)
    def refuse(value: Any) -> None:
        before = observed(reader.get_state("a"))
        try:
            writer.set_variable("a", "x", value)
        except StateSerializationError:
            assert observed(reader.get_state("a")) == before
        else:
            stored = reader.get_variable("a", "x")
            assert json.dumps(stored, sort_keys=True) == json.dumps(value, sort_keys=True)

    refuse()


def test_every_context_id_is_a_conversation_of_its_own_or_refused(contexts: list[SyncConversationContext]) -> None:
    writer, reader = contexts
    known: set[str] = set()

    @SOME
    @given(ids)
    def separate(context_id: str) -> None:
        try:
            writer.set_variable(context_id, "id", context_id)
        except InvalidContextIdError:
            return
        known.add(context_id)
        assert reader.get_variables(context_id) == {"id": context_id}

    separate()
    for context_id in known:
        assert reader.get_variable(context_id, "id") == context_id
    assert set(reader.list_contexts()) == known


hostile_bytes = (
    st.binary(max_size=200)
    | st.sampled_from([b"", b"null", b"[]", b'"x"', b"\xff\xfe{\0}\0", b"[" * 100_000, b"9" * 5_000, b'{"a":NaN}'])
    | values.map(lambda value: json.dumps(value).encode())
    | values.map(lambda value: json.dumps({"context_id": "a", "history": value, "variables": value}).encode("utf-16"))
)


def test_whatever_a_file_holds_is_understood_or_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()

    @SOME
    @given(
        st.sampled_from([".json", ".jsonl"]),
        hostile_bytes,
    )
    def hostile(suffix: str, data: bytes) -> None:
        for path in folder.glob("a.*"):
            path.unlink()
        path = folder / f"a{suffix}"
        path.write_bytes(data)
        with SyncConversationContext(FileStorage(folder, fsync="no")) as context:
            for call in (lambda: context.get_state("a"), lambda: context.get_history("a", 3)):
                with suppress(StateError):
                    call()
            assert path.read_bytes() == data
            try:
                context.add_to_history("a", "user", "over it")
            except StateCorruptedError:
                assert path.read_bytes() == data
            except StateError:
                pass
            else:
                assert context.get_history("a")[-1]["content"] == "over it"

    hostile()


@pytest.mark.parametrize("layout", ["log", "document"])
def test_whatever_a_key_holds_is_understood_or_refused_and_left_alone(
    valkey_9: ValkeyServer, key_prefix: str, layout: str
) -> None:
    key = f"{key_prefix}a"
    fields = st.sampled_from(["id", "v:a", "m:a", "revision", "x"]) | texts

    with (
        valkey_9.client() as client,
        SyncConversationContext(ValkeyStorage(valkey_9.url, key_prefix=key_prefix, layout=layout)) as context,
    ):

        @SOME
        @given(st.sampled_from(["set", "hash", "list"]), hostile_bytes, fields)
        def hostile(kind: str, data: bytes, field: str) -> None:
            client.delete(*client.keys(f"*{key_prefix}*") or ["none"])
            if kind == "set":
                client.set(key, data)
            elif kind == "hash":
                client.hset(key, field, data)
            else:
                client.rpush(key, data)
            before = client.dump(key)
            for call in (lambda: context.get_state("a"), lambda: context.get_history("a", 3)):
                with suppress(StateError):
                    call()
            assert client.dump(key) == before
            try:
                context.add_to_history("a", "user", "over it")
            except StateError:
                assert client.dump(key) == before
            else:
                assert context.get_history("a")[-1]["content"] == "over it"

        hostile()


def test_memory_files_and_valkey_are_one_with_a_plain_model(valkey_9: ValkeyServer, key_prefix: str) -> None:
    keys = st.sampled_from("abn")
    counts = st.integers(0, 5)

    class Machine(RuleBasedStateMachine):
        """Makes the same calls on every backend, and compares after each."""

        @initialize()
        def begin(self) -> None:
            self.scratch = scratch()
            folder = self.scratch.__enter__()
            Machine.number += 1
            prefix = f"{key_prefix}{Machine.number}:"
            self.opened = [opened(backend, folder / backend, valkey_9, prefix + backend) for backend in BACKENDS]
            self.contexts = [backend.__enter__() for backend in self.opened]
            self.model = Model()

        number = 0

        def make(self, name: str, *arguments: Any) -> None:
            step = Step(name, arguments)
            self.model, answer = self.model.after(step)
            for backend, (context, _) in zip(BACKENDS, self.contexts, strict=True):
                assert exactly(perform(context, "a", step), answer), backend

        @rule(content=values)
        def add(self, content: Any) -> None:
            self.make("add_to_history", "user", content)

        @rule(contents=st.lists(values, max_size=3))
        def extend(self, contents: list[Any]) -> None:
            self.make("extend_history", [{"role": "user", "content": content} for content in contents])

        @rule(key=keys, value=values)
        def set(self, key: str, value: Any) -> None:
            self.make("set_variable", key, value)

        @rule(key=keys, value=values)
        def set_metadata(self, key: str, value: Any) -> None:
            self.make("set_metadata", key, value)

        @rule(key=keys)
        def delete(self, key: str) -> None:
            self.make("delete_variable", key)

        @precondition(lambda self: type(self.model.variables.get("n", 0)) in (int, float))
        @rule(by=st.integers(-(10**20), 10**20) | st.floats(-1e6, 1e6))
        def increment(self, by: float) -> None:
            self.make("increment_variable", "n", by)

        @rule(keep=counts)
        def trim(self, keep: int) -> None:
            self.make("trim_history", keep)

        @rule(n=st.integers(1, 4))
        def pop(self, n: int) -> None:
            self.make("pop_history", n)

        @rule(key=keys, value=values, contents=st.lists(values, min_size=1, max_size=3))
        def batch(self, key: str, value: Any, contents: list[Any]) -> None:
            appends = [Step("add_to_history", ("user", content)) for content in contents]
            self.make("batch", *appends, Step("set_variable", (key, value)))

        @rule()
        def clear(self) -> None:
            self.make("clear_context")

        @invariant()
        def all_the_same(self) -> None:
            for backend, (_, reader) in zip(BACKENDS, getattr(self, "contexts", ()), strict=False):
                seen = observed(reader.get_state("a"))
                assert seen == self.model, backend
                assert exactly(seen.history, self.model.history), backend
                assert exactly(seen.variables, self.model.variables), backend

        def teardown(self) -> None:
            for backend in getattr(self, "opened", ()):
                backend.__exit__(None, None, None)
            if hasattr(self, "scratch"):
                self.scratch.__exit__(None, None, None)

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None, database=None)
    )
