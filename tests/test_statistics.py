"""What `statistics()` says beyond the contract: bytes, cache, connections and repeated attempts of each backend."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import valkey
from filetools import append, look
from servers import ValkeyServer

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateUnavailableError,
    SyncConversationContext,
    ValkeyStorage,
    stateful,
)
from agentstate.operations import Append, Commit, Page, Query
from agentstate.storage.document import DocumentStorage, DocumentUpdate
from agentstate.storage.statistics import Histogram, statistics_of
from agentstate.storage.tally import _BUFFERED, TIMED_ONE_IN, Tally


def size_of(folder: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"*{suffix}"))


class TestMemory:
    def test_one_call_in_some_is_timed(self) -> None:
        storage = InMemoryStorage()
        for _ in range(3 * TIMED_ONE_IN):
            storage.call(Query("alice"))
        found = storage.statistics()
        assert found.operations["query"] == 3 * TIMED_ONE_IN
        assert found.latency_nanoseconds["query"].count == 3
        assert (found.bytes_read, found.bytes_written, found.cache, found.connections) == (0, 0, None, None)

    def test_operations_in_order_are_one_group_in_both_contexts(self) -> None:
        blocking, awaitable = SyncConversationContext(), ConversationContext()
        blocking.get_or_create("alice")
        asyncio.run(awaitable.get_or_create("alice"))
        for context in (blocking, awaitable):
            sizes = context.storage.statistics().group_sizes
            assert (sizes.counts, sizes.below, sizes.total) == ([1], [4], 2)


class TestFiles:
    def test_bytes_written_are_those_in_the_files(self, tmp_path: Path) -> None:
        with closing(FileStorage(tmp_path)) as storage:
            for number in range(30):
                storage.carry_out([append(f"c{n}", number) for n in range(3)])
            assert storage.statistics().bytes_written == size_of(tmp_path, ".jsonl")
            assert storage.statistics().bytes_read == 0

    def test_a_cold_read_is_a_miss_and_reads_bytes_and_a_warm_one_is_neither(self, tmp_path: Path) -> None:
        with closing(FileStorage(tmp_path)) as storage:
            storage.call(append("alice", "hello"))
        with closing(FileStorage(tmp_path)) as storage:
            look(storage, "alice")
            first = storage.statistics()
            assert first.cache is not None
            assert (first.cache.hits, first.cache.misses, first.cache.open_files) == (0, 1, 1)
            assert first.bytes_read >= size_of(tmp_path, ".jsonl")
            for _ in range(5):
                look(storage, "alice")
            second = storage.statistics()
            assert second.cache is not None
            assert (second.cache.hits, second.cache.misses, second.cache.contexts) == (5, 1, 1)
            assert 0 < second.cache.size_bytes <= second.cache.limit_bytes
            assert second.bytes_read == first.bytes_read

    def test_what_has_no_room_is_evicted(self, tmp_path: Path) -> None:
        with closing(FileStorage(tmp_path, fsync="no", cache_bytes=1)) as storage:
            for number in range(20):
                storage.call(append(f"c{number}", "hello"))
            cache = storage.statistics().cache
            assert cache is not None
            assert cache.evictions >= 18
            assert cache.contexts <= 2

    def test_documents_have_bytes_and_no_cache(self, tmp_path: Path) -> None:
        with closing(FileStorage(tmp_path, layout="document")) as storage:
            storage.call(append("alice", "hello"))
            size = size_of(tmp_path, ".json")
            assert storage.statistics().bytes_written == size
            look(storage, "alice")
            found = storage.statistics()
            assert found.bytes_read == size
            assert found.cache is None
            assert found.operations == {"query": 1, "commit": 1, "lease": 0, "listing": 0}


class TestValkey:
    @pytest.fixture(params=["log", "document"])
    def storage(self, request: pytest.FixtureRequest, valkey_9: ValkeyServer, key_prefix: str) -> Any:
        with closing(ValkeyStorage(valkey_9.url, key_prefix=key_prefix, layout=request.param)) as storage:
            yield storage

    def test_bytes_and_connections_are_the_servers(self, storage: ValkeyStorage, valkey_9: ValkeyServer) -> None:
        storage.call(Query("alice"))  # connects
        before = storage.statistics()
        assert before.connections is not None
        assert (before.connections.opened, before.connections.idle, before.connections.used) == (1, 1, 0)
        with valkey.Valkey.from_url(valkey_9.url) as client:
            client.config_resetstat()
            storage.call(Commit("alice", (Append((b'"' + b"x" * 10_000 + b'"',)),), "id"))
            found = storage.statistics()
            seen = client.info("stats")
        sent = found.bytes_written - before.bytes_written
        assert 10_000 < sent < 21_000
        # What the server counted includes the two commands of this test's own client.
        assert 0 <= seen["total_net_input_bytes"] - sent < 200
        assert found.connections is not None
        assert found.connections.opened == 1
        assert found.attempts_repeated == 0

    def test_what_is_sent_again_is_counted(self, storage: ValkeyStorage, valkey_9: ValkeyServer) -> None:
        storage.call(Query("alice"))
        with valkey.Valkey.from_url(valkey_9.url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        storage.call(Query("alice"))
        found = storage.statistics()
        assert found.attempts_repeated == 1
        assert found.errors == {}
        assert found.connections is not None
        assert found.connections.opened == 2

    def test_an_outage_is_errors_and_degraded_calls(self, start_valkey: Callable[..., ValkeyServer]) -> None:
        server = start_valkey()
        with closing(ValkeyStorage(server.url, deadline=0.3)) as storage:

            @stateful(storage, on_unavailable="ephemeral")
            def handler(task: Any, context: Any, context_id: str) -> bool:
                return bool(context.degraded)

            assert handler({"id": "alice"}) is False
            server.kill()
            assert handler({"id": "alice"}) is True
            with pytest.raises(StateUnavailableError):
                storage.call(Query("alice"))
            found = storage.statistics()
            assert found.degraded_calls == 1
            assert found.errors == {"StateUnavailableError": 2}
            assert found.connections is not None
            assert (found.connections.idle, found.connections.used) == (0, 0)


class Contested(DocumentStorage):
    """Documents in a dictionary, where another writer comes between as often as one says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.documents: dict[str, bytes] = {}
        self.contests = 0

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        return self.documents.get(context_id)

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        while self.contests:
            self.contests -= 1
            update(self.documents.get(context_id))
        new = update(self.documents.get(context_id))
        assert new is not None
        self.documents[context_id] = new

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        return Page(tuple(self.documents), None)


def test_a_third_party_that_does_nothing_for_it_has_statistics_too() -> None:
    with SyncConversationContext(Contested()) as context:
        context.set_variable("alice", "key", 1)
        storage = context.storage
        assert isinstance(storage, Contested)
        storage.contests = 2
        context.set_variable("alice", "key", 2)
        found = storage.statistics()
        assert found.attempts_repeated == 2
        size = len(storage.documents["alice"])
        assert size < found.bytes_written < 3 * size
        assert found.bytes_read > 2 * found.bytes_written // 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_what_many_threads_do_is_counted_to_the_last_byte() -> None:
    tally = Tally()
    size = 3 * _BUFFERED + 7

    def work() -> None:
        for number in range(size):
            tally.took(Query, number)
            tally.wrote(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    sums = [statistics_of(tally).bytes_written for _ in range(20)]  # while it is going on
    for thread in threads:
        thread.join()
    found = statistics_of(tally)
    assert sorted(sums) == sums
    assert found.bytes_written == found.latency_nanoseconds["query"].total == 4 * sum(range(size))
    assert found.latency_nanoseconds["query"].count == 4 * size
    assert found.latency_nanoseconds["query"].counts[:4] == [4, 4, 8, 16]


def test_the_child_of_a_fork_counts_from_zero(tmp_path: Path) -> None:
    with closing(FileStorage(tmp_path)) as storage:
        storage.call(append("alice", "hello"))
        storage.carry_out([append(f"c{n}", "hello") for n in range(4)])
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                look(storage, "alice")
                os.write(writing, json.dumps(storage.statistics().to_dict()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading) as answer:
            found = json.load(answer)
        os.waitpid(child, 0)
        assert found["operations"] == {"query": 1, "commit": 0, "lease": 0, "listing": 0}
        assert found["bytes_written"] == 0
        assert found["cache"]["misses"] == 1
        assert storage.statistics().operations == {"query": 0, "commit": 5, "lease": 0, "listing": 0}


def test_a_histogram_knows_its_mean_and_its_quantiles() -> None:
    taken = Histogram(below=[8, 16, 32], counts=[90, 0, 10], total=900)
    assert (taken.count, taken.mean) == (100, 9.0)
    assert [taken.quantile(share) for share in (0.5, 0.9, 0.91, 1.0)] == [8, 8, 32, 32]
    nothing = Histogram([], [], 0)
    assert (nothing.count, nothing.mean, nothing.quantile(0.99)) == (0, 0, 0)
