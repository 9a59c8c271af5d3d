"""The Valkey backend on a cluster and behind sentinels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import valkey
from servers import HOST, ValkeyCluster, ValkeySentinel, require_server, wait_until
from valkey.crc import key_slot

from agentstate.errors import StateConfigError, StateUnavailableError
from agentstate.keys import KeySpace
from agentstate.operations import Append, Commit, Increment, Listing, Query, Snapshot, Window
from agentstate.storage.valkey import ValkeyStorage

HI = b'{"content":"hi"}'


@pytest.fixture(params=["log", "document"])
def storage(request: pytest.FixtureRequest, valkey_cluster: ValkeyCluster, key_prefix: str) -> Iterator[ValkeyStorage]:
    with closing(ValkeyStorage(valkey_cluster.url, key_prefix=key_prefix, layout=request.param)) as storage:
        yield storage


def existing(storage: ValkeyStorage, context_id: str) -> Snapshot:
    snapshot = storage.call(Query(context_id, None, None, Window()))
    assert isinstance(snapshot, Snapshot)
    return snapshot


def ids(storage: ValkeyStorage, size: int = 500) -> list[str]:
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page: Any = storage.call(Listing(cursor, size=size))
        found += page.context_ids
        cursor = page.cursor
    return found


class TestCluster:
    def test_contexts_live_on_all_nodes_and_are_all_listed(
        self, storage: ValkeyStorage, valkey_cluster: ValkeyCluster, key_prefix: str
    ) -> None:
        outcomes: dict[int, Any] = {}
        names = [f"c{number}" for number in range(200)]
        storage.execute([Commit(name, (Append((HI,)),), f"i-{name}") for name in names], outcomes.__setitem__)
        assert set(outcomes.values()) == {b""}
        outcomes.clear()
        storage.execute([Query(name, history=Window()) for name in names], outcomes.__setitem__)
        assert all(outcome.messages == [HI] for outcome in outcomes.values())
        for node in valkey_cluster.nodes:
            with node.client() as client:
                assert next(client.scan_iter(f"*{key_prefix}*"), None) is not None
        assert sorted(ids(storage)) == sorted(names)
        assert set(ids(storage, size=7)) == set(names)

    def test_any_node_of_the_url_will_do(self, valkey_cluster: ValkeyCluster, key_prefix: str) -> None:
        url = f"valkey+cluster://{HOST}:1,{HOST}:{valkey_cluster.nodes[2].port}"
        with closing(ValkeyStorage(url, key_prefix=key_prefix)) as storage:
            storage.call(Commit("a", (Append((HI,)),), "one"))
            assert existing(storage, "a").messages == [HI]

    def test_a_server_that_is_no_cluster_says_so(self, valkey_9: Any) -> None:
        storage = ValkeyStorage(f"valkey+cluster://{HOST}:{valkey_9.port}", deadline=0.5)
        with closing(storage), pytest.raises(StateUnavailableError, match="cluster"):
            storage.call(Query("a"))

    def test_a_slot_that_moves_away_is_followed(
        self, storage: ValkeyStorage, valkey_cluster: ValkeyCluster, key_prefix: str
    ) -> None:
        """By MOVED once it has moved, and by ASK while it does; nothing is lost, and nothing done twice."""
        names = [f"m{number}" for number in range(30)]
        for name in names:
            storage.call(Commit(name, (Append((HI,)), Increment("n", b"1")), f"one-{name}"))
        slot = key_slot(KeySpace(key_prefix).keys("m0").state.encode())
        owner = next(node for node in valkey_cluster.nodes if self._owns(node, slot))
        other = next(node for node in valkey_cluster.nodes if node is not owner)
        with owner.client() as source, other.client() as target:
            source_id, target_id = (client.execute_command("CLUSTER MYID").decode() for client in (source, target))
            target.execute_command(f"CLUSTER SETSLOT {slot} IMPORTING", source_id)
            source.execute_command(f"CLUSTER SETSLOT {slot} MIGRATING", target_id)
            try:
                while keys := source.execute_command(f"CLUSTER GETKEYSINSLOT {slot} 100"):
                    source.execute_command("MIGRATE", HOST, other.port, "", 0, 5000, "KEYS", *keys)
                # All its keys have gone, but the slot is still the old owner's: it answers ASK. (The new one would
                # answer TRYAGAIN to a context of which one key does not exist: for all it knows it may still come.)
                assert storage.call(Commit("m0", (Increment("n", b"1"),), "two-m0")) == b"2"
                assert storage.call(Commit("m0", (Increment("n", b"1"),), "two-m0")) == b"2"
                assert existing(storage, "m0").variables == {"n": b"2"}
            finally:
                for client in (target, source):
                    client.execute_command(f"CLUSTER SETSLOT {slot} NODE", target_id)
        for name in names:
            assert storage.call(Commit(name, (Increment("n", b"1"),), f"three-{name}")) == (
                b"3" if name == "m0" else b"2"
            )
        assert set(ids(storage)) == set(names)

    def test_a_listing_misses_nothing_while_slots_move(
        self, storage: ValkeyStorage, valkey_cluster: ValkeyCluster, key_prefix: str
    ) -> None:
        """From a server that is still to be scanned to one that was scanned already."""
        names = {f"n{number}" for number in range(90)}
        for name in names:
            storage.call(Commit(name, (Append((HI,)),), f"one-{name}"))
        keys = KeySpace(key_prefix)
        first, last = valkey_cluster.nodes[0], valkey_cluster.nodes[-1]
        moving = {key_slot(keys.keys(name).state.encode()) for name in names}
        moving = {slot for slot in moving if self._owns(last, slot)}
        assert len(moving) > 5
        page: Any = storage.call(Listing(size=10_000))  # of the first server, which comes first in any case
        found = set(page.context_ids)
        assert found
        assert found != names
        with last.client() as source, first.client() as target:
            source_id, target_id = (client.execute_command("CLUSTER MYID").decode() for client in (source, target))
            for slot in moving:
                target.execute_command(f"CLUSTER SETSLOT {slot} IMPORTING", source_id)
                source.execute_command(f"CLUSTER SETSLOT {slot} MIGRATING", target_id)
            try:
                for slot in moving:
                    while there := source.execute_command(f"CLUSTER GETKEYSINSLOT {slot} 100"):
                        source.execute_command("MIGRATE", HOST, first.port, "", 0, 5000, "KEYS", *there)
                with pytest.raises(StateUnavailableError, match="slots of the cluster are being moved"):
                    self._rest(storage, page.cursor, 1)
            finally:
                for slot in moving:
                    for client in (target, source):
                        client.execute_command(f"CLUSTER SETSLOT {slot} NODE", target_id)
        wait_until(
            lambda: not any(self._owns(node, slot) for node in valkey_cluster.nodes[1:] for slot in moving),
            "all servers to know where the slots are",
        )
        assert found | self._rest(storage, page.cursor, 20) == names

    def _rest(self, storage: ValkeyStorage, cursor: str | None, seconds: float) -> set[str]:
        found: set[str] = set()
        while cursor is not None:
            page: Any = storage.call(Listing(cursor, deadline=time.monotonic() + seconds))
            found.update(page.context_ids)
            cursor = page.cursor
        return found

    def _owns(self, node: Any, slot: int) -> bool:
        with node.client() as client:
            rows = client.execute_command("CLUSTER SLOTS")
        return any(row[0] <= slot <= row[1] and row[2][1] == node.port for row in rows)

    def test_a_cluster_that_lost_a_node_serves_the_rest_until_it_is_down(self, key_prefix: str) -> None:
        with (
            ValkeyCluster(require_server("9.1")) as cluster,
            closing(ValkeyStorage(cluster.url, key_prefix=key_prefix, deadline=1)) as storage,
        ):
            outcomes: dict[int, Any] = {}
            storage.execute([Commit(f"c{n}", (Append((HI,)),), f"k{n}") for n in range(30)], outcomes.__setitem__)
            assert set(outcomes.values()) == {b""}
            cluster.nodes[1].kill()
            started = time.monotonic()
            storage.execute([Query(f"c{n}", deadline=started + 1) for n in range(30)], outcomes.__setitem__)
            lost = [n for n in range(30) if isinstance(outcomes[n], StateUnavailableError)]
            assert 0 < len(lost) <= 30
            assert {type(outcome) for outcome in outcomes.values()} <= {Snapshot, StateUnavailableError}, outcomes
            cluster.nodes[1].start()
            storage.execute([Query(f"c{n}", deadline=time.monotonic() + 20) for n in range(30)], outcomes.__setitem__)
            assert all(isinstance(outcome, Snapshot) for outcome in outcomes.values())

    def test_a_node_that_stands_still_is_a_lane_of_its_own_and_the_others_are_not_slower(self) -> None:
        with (
            ValkeyCluster(require_server("9.1")) as cluster,
            closing(ValkeyStorage(cluster.url, deadline=5)) as storage,
        ):
            for node in cluster.nodes:
                with node.client() as client:
                    client.config_set("cluster-require-full-coverage", "no")
            names = [f"c{number}" for number in range(40)]
            commits = [Commit(name, (Append((HI,)),), f"first-{name}", fresh=True) for name in names]
            assert {storage.lane(commit) for commit in commits} == {None}  # nothing is known yet
            outcomes: dict[int, Any] = {}
            storage.execute(commits, outcomes.__setitem__)
            assert set(outcomes.values()) == {b""}
            lanes: dict[Any, list[str]] = {}
            for name, commit in zip(names, commits, strict=True):
                lanes.setdefault(storage.lane(commit), []).append(name)
            assert {lane.port for lane in lanes} == {node.port for node in cluster.nodes}
            assert storage.lane(Listing()) not in lanes

            def append(lane: Any, turn: int) -> list[Any]:
                found: dict[int, Any] = {}
                deadline = time.monotonic() + 1.5
                storage.execute(
                    [Commit(name, (Append((HI,)),), f"{turn}-{name}", deadline=deadline) for name in lanes[lane]],
                    found.__setitem__,
                )
                return [*found.values()]

            stopped = next(lane for lane in lanes if lane.port == cluster.nodes[1].port)
            with cluster.nodes[1].paused():
                blocked = [threading.Thread(target=append, args=(stopped, turn)) for turn in range(4)]
                for thread in blocked:
                    thread.start()
                for turn in range(4, 8):
                    for lane in lanes:
                        if lane != stopped:
                            assert set(append(lane, turn)) == {b""}
                assert all(thread.is_alive() for thread in blocked)
                for thread in blocked:
                    thread.join()
            for lane, members in lanes.items():
                for name in members:
                    end = existing(storage, name).end
                    assert (1 <= end <= 5) if lane == stopped else end == 5


class TestSentinel:
    def test_writes_go_on_after_a_failover(self, key_prefix: str) -> None:
        with (
            ValkeySentinel(require_server("9.1")) as group,
            closing(ValkeyStorage(group.url, key_prefix=key_prefix, deadline=30, min_replicas=0)) as storage,
        ):
            acknowledged = []
            stop = threading.Event()

            def write() -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    storage.call(Commit("a", (Append((b"%d" % number,)),), f"w{number}"))
                    acknowledged.append(number)

            writer = threading.Thread(target=write)
            writer.start()
            wait_until(lambda: len(acknowledged) > 20, "some writes")
            with valkey.Valkey(port=group.primary.port) as client:  # nothing that was acknowledged is lost by this
                client.execute_command("CLIENT PAUSE 60000 WRITE")
                time.sleep(0.1)
                client.execute_command("WAIT 1 5000")
            group.primary.kill()
            count = len(acknowledged)
            wait_until(lambda: len(acknowledged) > count + 20, "writes to the new primary", timeout=30)
            stop.set()
            writer.join()
            assert existing(storage, "a").messages == [b"%d" % number for number in acknowledged]
            assert group.primary_port() == group.replica.port

    def test_an_unknown_service_is_explained(self, valkey_sentinel: ValkeySentinel) -> None:
        url = f"valkey+sentinel://{HOST}:1,{HOST}:{valkey_sentinel.sentinel.port}/other"
        with closing(ValkeyStorage(url)) as storage, pytest.raises(StateConfigError, match="no service 'other'"):
            storage.call(Query("a"))

    def test_without_any_sentinel_it_is_unavailable(self) -> None:
        storage = ValkeyStorage(f"valkey+sentinel://{HOST}:1/main", deadline=0.3)
        with closing(storage), pytest.raises(StateUnavailableError):
            storage.call(Query("a"))
