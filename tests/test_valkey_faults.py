"""The Valkey backend while connections are cut, servers stop, restart, fill up and lose their scripts."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import valkey
from servers import ValkeyServer, wait_until
from valkey_proxy import CuttingProxy

from agentstate.errors import (
    StateAccessError,
    StateConflictError,
    StateError,
    StateOutcomeUnknownError,
    StateTimeoutError,
    StateUnavailableError,
)
from agentstate.operations import (
    Append,
    Change,
    Commit,
    Create,
    Delete,
    Drop,
    Increment,
    Lease,
    Listing,
    Operation,
    Outcome,
    Own,
    Pop,
    Put,
    Query,
    Snapshot,
    Space,
    Trim,
    Window,
)
from agentstate.storage.valkey import ValkeyStorage

HI, HO = b'{"content":"hi"}', b'{"content":"ho"}'


@pytest.fixture
def proxy(valkey_server: ValkeyServer) -> Iterator[CuttingProxy]:
    with closing(CuttingProxy(valkey_server.port)) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: CuttingProxy, key_prefix: str) -> Iterator[ValkeyStorage]:
    """Through the proxy."""
    with closing(ValkeyStorage(f"valkey://127.0.0.1:{proxy.port}", key_prefix=key_prefix, deadline=5.0)) as storage:
        yield storage


@pytest.fixture
def direct(valkey_server: ValkeyServer, key_prefix: str) -> Iterator[ValkeyStorage]:
    """Past the proxy."""
    with closing(ValkeyStorage(valkey_server.url, key_prefix=key_prefix)) as storage:
        yield storage


_number = iter(range(1, 1 << 60))


def commit(storage: ValkeyStorage, context_id: str, *changes: Change, **options: Any) -> bytes:
    options.setdefault("commit_id", f"test-{next(_number)}")
    answer = storage.call(Commit(context_id, changes, **options))
    assert isinstance(answer, bytes)
    return answer


def existing(storage: ValkeyStorage, context_id: str) -> Snapshot:
    snapshot = storage.call(Query(context_id, None, None, Window()))
    assert isinstance(snapshot, Snapshot)
    return snapshot


def put(key: str, value: bytes) -> Put:
    return Put(Space.VARIABLES, ((key, value),))


def once(action: str | int, times: int = 1) -> Callable[[bytes], str | int]:
    """A plan: so many scripts are treated like this, and all others pass."""
    left = [times]

    def plan(request: bytes) -> str | int:
        if b"EVALSHA" in request and left[0]:
            left[0] -= 1
            return action
        return "pass"

    return plan


CHANGES: list[tuple[tuple[Change, ...], bytes, dict[str, Any]]] = [
    ((Append((HO,)),), b"", {"end": 3}),
    ((Increment("n", b"5"),), b"6", {"variables": {"n": b"6"}}),
    ((Increment("n", b"0.5"),), b"1.5", {"variables": {"n": b"1.5"}}),
    ((Pop(1),), b'[{"content":"hi"}]', {"end": 1}),
    ((Drop(Space.VARIABLES, "n"),), b"true", {"variables": {}}),
    ((Trim(1),), b"", {"start": 1}),
    ((put("x", b"1"), Append((HO, HO))), b"", {"end": 4}),
]


class TestCutConnections:
    @pytest.mark.parametrize("action", ["drop", "lose", 0, 1, 5, 12, 22])
    @pytest.mark.parametrize(("changes", "answer", "then"), CHANGES)
    def test_a_commit_that_is_retried_takes_effect_once(
        self,
        storage: ValkeyStorage,
        proxy: CuttingProxy,
        action: str | int,
        changes: tuple[Change, ...],
        answer: bytes,
        then: dict[str, Any],
    ) -> None:
        commit(storage, "a", Append((HI, HI)), put("n", b"1"))
        proxy.plan = once(action, times=2)
        assert commit(storage, "a", *changes) == answer
        snapshot = existing(storage, "a")
        assert snapshot.revision == 2
        assert {name: getattr(snapshot, name) for name in then} == then

    @pytest.mark.parametrize("action", ["drop", "lose", 0, 10, 24, 25, 60, 200])
    def test_a_read_behind_a_commit_sees_it_wherever_the_connection_is_cut(
        self, storage: ValkeyStorage, proxy: CuttingProxy, action: str | int
    ) -> None:
        commit(storage, "a", put("x", b"1"))
        for change, answer, end in ((Append((HI,)), b"", 1), (Pop(1), b"[%b]" % HI, 0), (Create("u"), b"", 0)):
            proxy.plan = once(action)
            outcomes: dict[int, Any] = {}
            deadline = time.monotonic() + 5
            storage.execute(
                [
                    Commit(
                        "a", (change,), f"id {end} {answer!r} {type(change).__name__}", deadline=deadline, fresh=True
                    ),
                    Query("a", None, None, Window(), deadline=deadline),
                ],
                outcomes.__setitem__,
            )
            assert outcomes[0] == answer
            assert (outcomes[1].end - outcomes[1].start, len(outcomes[1].messages)) == (end, end)
        assert (outcomes[1].revision, outcomes[1].user_id) == (4, "u")

    @pytest.mark.parametrize("action", ["drop", "lose", 5])
    def test_a_condition_is_not_held_against_a_commit_that_took_effect_before_it_is_retried(
        self, storage: ValkeyStorage, proxy: CuttingProxy, action: str | int
    ) -> None:
        commit(storage, "a", put("n", b"1"))
        proxy.plan = once(action)
        assert commit(storage, "a", put("n", b"2"), expect=("n", b"1"), answer=b"2", fresh=True) == b"2"
        proxy.plan = once(action)
        assert commit(storage, "a", put("m", b"3"), expect=("m", None), answer=b"3", fresh=True) == b"3"
        proxy.plan = once(action)
        assert commit(storage, "b", Append((HI,)), absent=True, fresh=True) == b""
        snapshot = existing(storage, "a")
        assert (snapshot.variables, snapshot.revision) == ({"n": b"2", "m": b"3"}, 3)
        assert existing(storage, "b").revision == 1

    @pytest.mark.parametrize("action", ["drop", "lose", 3])
    def test_clearing_takes_effect_once(self, storage: ValkeyStorage, proxy: CuttingProxy, action: str | int) -> None:
        commit(storage, "a", Append((HI,)))
        proxy.plan = once(action)
        assert commit(storage, "a", Delete()) == b"true"
        assert storage.call(Query("a")) is None

    @pytest.mark.parametrize("layout", ["log", "document"])
    def test_a_hundred_increments_through_a_bad_line_are_a_hundred(
        self, proxy: CuttingProxy, key_prefix: str, layout: str
    ) -> None:
        seed = random.randrange(1 << 30)
        chance = random.Random(seed)
        proxy.plan = lambda request: (
            chance.choice(["drop", "lose", chance.randrange(60)]) if chance.random() < 0.3 else "pass"
        )
        url = f"valkey://127.0.0.1:{proxy.port}"
        with closing(ValkeyStorage(url, key_prefix=key_prefix, layout=layout, deadline=20)) as storage:
            answers = [commit(storage, "a", Increment("n", b"1"), Append((HI,))) for _ in range(100)]
            proxy.plan = lambda request: "pass"
            snapshot = existing(storage, "a")
        assert answers == [b"%d" % number for number in range(1, 101)], f"seed {seed}"
        assert (snapshot.variables, snapshot.end) == ({"n": b"100"}, 100), f"seed {seed}"

    def test_groups_through_a_bad_line_take_effect_once_and_in_order(
        self, storage: ValkeyStorage, proxy: CuttingProxy
    ) -> None:
        for round_ in range(10):
            proxy.plan = once(["drop", "lose", 10][round_ % 3])
            operations: list[Operation] = [
                Commit(f"c{number % 70}", (Increment("n", b"1"),), f"r{round_}-{number}") for number in range(100)
            ]
            operations += [Query(f"c{number}", variables=("n",)) for number in range(70)]
            outcomes: dict[int, Outcome | StateError] = {}
            storage.execute(operations, outcomes.__setitem__)
            for number in range(70):
                snapshot = outcomes[100 + number]
                assert isinstance(snapshot, Snapshot)
                assert snapshot.variables["n"] == b"%d" % ((round_ + 1) * (2 if number < 30 else 1))

    def test_reads_and_leases_are_simply_made_again(self, storage: ValkeyStorage, proxy: CuttingProxy) -> None:
        commit(storage, "a", put("x", b"1"))
        for action in ("drop", "lose", 7):
            left = [1]

            def plan(request: bytes, action: str | int = action, left: list[int] = left) -> str | int:
                left[0] -= 1
                return action if left[0] == 0 else "pass"

            proxy.plan = plan
            assert existing(storage, "a").variables == {"x": b"1"}
            proxy.plan = once(action)
            assert storage.call(Lease("a", "take", "token", 5.0)) is True
            left[0] = 1
            proxy.plan = plan
            page: Any = storage.call(Listing(size=1_000_000))  # whatever other tests have left there
            assert page.context_ids == ("a",)

    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize(
        ("changes", "answer"), [((Append((HO,)),), b""), ((Increment("n", b"1"),), b"1"), ((Delete(),), b"true")]
    )
    def test_a_copy_that_arrives_late_does_nothing(
        self,
        storage: ValkeyStorage,
        proxy: CuttingProxy,
        direct: ValkeyStorage,
        changes: tuple[Change, ...],
        answer: bytes,
        fresh: bool,
    ) -> None:
        commit(storage, "a", Append((HI,)))
        proxy.plan = once("hold")
        assert storage.call(Commit("a", changes, "late", fresh=fresh)) == answer
        if answer == b"true":
            commit(direct, "a", Append((HI,)))
        before = existing(direct, "a")
        assert proxy.release() == 1
        assert existing(direct, "a") == before

    @pytest.mark.parametrize("clear", [(Delete(),), (Delete(), Append((HI,)))])
    def test_a_copy_that_arrives_after_its_context_was_cleared_and_made_anew_does_nothing(
        self, storage: ValkeyStorage, proxy: CuttingProxy, direct: ValkeyStorage, clear: tuple[Change, ...]
    ) -> None:
        commit(storage, "a", Append((HI,)))
        proxy.plan = once("hold")
        assert storage.call(Commit("a", (Append((HO,)),), "late", fresh=True)) == b""
        commit(direct, "a", *clear)
        commit(direct, "a", put("x", b"1"))
        before = existing(direct, "a")
        assert proxy.release() == 1
        assert existing(direct, "a") == before

    def test_a_late_copy_cannot_contradict_an_answer_that_changed_nothing(
        self, storage: ValkeyStorage, proxy: CuttingProxy, direct: ValkeyStorage
    ) -> None:
        storage.call(Query("a"))
        proxy.plan = once("hold")
        assert storage.call(Commit("a", (Delete(),), "late")) == b"false"
        commit(direct, "a", Append((HI,)))
        assert proxy.release() == 1
        assert existing(direct, "a").messages == [HI]
        # Nothing was applied, so the id is free: a caller's own retry is carried out.
        assert storage.call(Commit("a", (Delete(),), "late")) == b"true"

    def test_a_late_copy_cannot_contradict_a_refusal(
        self, storage: ValkeyStorage, proxy: CuttingProxy, direct: ValkeyStorage
    ) -> None:
        commit(storage, "a", put("x", b"1"))
        proxy.plan = once("hold")
        with pytest.raises(StateConflictError):
            storage.call(Commit("a", (Append((HI,)),), "late", absent=True))
        commit(direct, "a", Delete())
        assert proxy.release() == 1
        assert direct.call(Query("a")) is None

    def test_a_late_copy_cannot_carry_out_what_was_refused(
        self, storage: ValkeyStorage, proxy: CuttingProxy, direct: ValkeyStorage
    ) -> None:
        commit(storage, "a", Append((HI,)))
        proxy.plan = once("hold")
        with pytest.raises(StateAccessError):
            storage.call(Commit("a", (Append((HO,)),), "late", user="bob", fresh=True))
        commit(direct, "a", Own("bob"))
        before = existing(direct, "a")
        assert proxy.release() == 1
        assert existing(direct, "a") == before

    def test_what_was_never_answered_is_unknown_and_can_be_asked_again(
        self, storage: ValkeyStorage, proxy: CuttingProxy
    ) -> None:
        commit(storage, "a", Append((HI,)))
        for number, action in enumerate(("lose", "drop")):
            proxy.plan = once(action, times=10_000)
            started = time.monotonic()
            operation = Commit("a", (Increment("n", b"1"),), f"u{number}", deadline=started + 0.4)
            with pytest.raises(StateOutcomeUnknownError) as caught:
                storage.call(operation)
            assert (caught.value.commit_id, caught.value.context_id) == (f"u{number}", "a")
            proxy.plan = lambda request: "pass"
            assert storage.call(operation._replace(deadline=time.monotonic() + 5)) == b"%d" % (number + 1)
            assert existing(storage, "a").variables == {"n": b"%d" % (number + 1)}

    def test_what_was_never_sent_is_not_done(self, storage: ValkeyStorage, proxy: CuttingProxy) -> None:
        proxy.plan = lambda request: "drop"
        for operation in (
            Commit("a", (Append((HI,)),), "c", deadline=time.monotonic() + 0.3),
            Query("a", deadline=time.monotonic() + 0.6),
            Listing(deadline=time.monotonic() + 0.9),
        ):
            with pytest.raises(StateUnavailableError) as caught:
                storage.call(operation)
            assert type(caught.value) is StateUnavailableError

    def test_operations_with_different_deadlines_end_each_at_its_own(
        self, storage: ValkeyStorage, proxy: CuttingProxy
    ) -> None:
        storage.call(Query("a"))
        proxy.plan = once("lose", times=10_000)
        ended: dict[int, float] = {}
        outcomes: dict[int, Any] = {}
        started = time.monotonic()

        def settle(index: int, outcome: Any) -> None:
            ended[index], outcomes[index] = time.monotonic() - started, outcome

        storage.execute(
            [Commit(f"c{n}", (Append((HI,)),), f"d{n}", deadline=started + 0.3 * (n + 1)) for n in range(3)], settle
        )
        assert all(isinstance(outcome, StateOutcomeUnknownError) for outcome in outcomes.values())
        assert ended[0] < ended[1] < ended[2]
        for number in range(3):
            assert 0.3 * (number + 1) - 0.05 <= ended[number]

    def test_a_stale_pool_is_replaced(self, storage: ValkeyStorage, valkey_server: ValkeyServer) -> None:
        commit(storage, "a", Append((HI,)))
        with valkey_server.client() as client:
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        commit(storage, "a", Append((HI,)))
        assert existing(storage, "a").end == 2


class TestServers:
    def test_a_server_that_is_killed_and_comes_back_has_everything_once(
        self, start_valkey: Any, key_prefix: str
    ) -> None:
        server: ValkeyServer = start_valkey()
        acknowledged: list[int] = []
        stop = threading.Event()
        with closing(ValkeyStorage(server.url, key_prefix=key_prefix, deadline=20)) as storage:

            def write() -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    commit(storage, "a", Append((b"%d" % number,)))
                    acknowledged.append(number)

            writer = threading.Thread(target=write)
            writer.start()
            for _ in range(3):
                enough = len(acknowledged) + 50
                wait_until(lambda enough=enough: len(acknowledged) > enough, "some writes")  # type: ignore[misc]
                server.kill()
                time.sleep(0.1)
                server.start()
            stop.set()
            writer.join()
            assert existing(storage, "a").messages == [b"%d" % number for number in acknowledged]

    def test_a_server_that_stands_still_is_waited_for_until_the_deadline(
        self, start_valkey: Any, key_prefix: str
    ) -> None:
        server: ValkeyServer = start_valkey()
        with closing(ValkeyStorage(server.url, key_prefix=key_prefix)) as storage:
            commit(storage, "a", Append((HI,)))
            with server.paused():
                started = time.monotonic()
                with pytest.raises(StateOutcomeUnknownError) as caught:
                    commit(storage, "a", Append((HO,)), commit_id="unknown", deadline=started + 0.5)
                with pytest.raises(StateUnavailableError):
                    storage.call(Query("a", deadline=time.monotonic() + 0.3))
            # The request is still in the server's buffers, but its time has passed.
            assert existing(storage, "a").messages == [HI]
            assert caught.value.commit_id == "unknown"
            commit(storage, "a", Append((HO,)), commit_id="unknown")
            assert existing(storage, "a").messages == [HI, HO]
            threading.Timer(0.3, server.resume).start()
            server.pause()
            commit(storage, "a", Append((HI,)))
            assert existing(storage, "a").messages == [HI, HO, HI]

    def test_scripts_that_are_flushed_are_loaded_again(self, start_valkey: Any, key_prefix: str) -> None:
        server: ValkeyServer = start_valkey()
        for layout in ("log", "document"):
            with (
                closing(ValkeyStorage(server.url, key_prefix=key_prefix + layout, layout=layout)) as storage,
                server.client() as client,
            ):
                for number in range(5):
                    client.script_flush()
                    assert commit(storage, "a", Increment("n", b"1")) == b"%d" % (number + 1)
                outcomes: dict[int, Any] = {}
                client.script_flush()
                deadline = time.monotonic() + 5
                storage.execute(
                    [
                        Commit("new", (Append((HI,)),), "new", deadline=deadline),
                        Query("new", None, None, Window(), deadline=deadline),
                    ],
                    outcomes.__setitem__,
                )
                assert (outcomes[0], outcomes[1].messages) == (b"", [HI])
                outcomes.clear()
                client.script_flush()
                storage.execute(
                    [Commit(f"c{n}", (Increment("n", b"1"),), f"s{n}") for n in range(200)], outcomes.__setitem__
                )
                assert set(outcomes.values()) == {b"1"}

    def test_a_full_server_refuses_new_data_but_reads_deletes_and_remembers(
        self, start_valkey: Any, key_prefix: str
    ) -> None:
        server: ValkeyServer = start_valkey()
        with closing(ValkeyStorage(server.url, key_prefix=key_prefix)) as storage, server.client() as client:
            commit(storage, "a", put("n", b"1"), Append((HI,)), commit_id="one")
            commit(storage, "b", Increment("n", b"1"), commit_id="two")
            assert storage.call(Lease("b", "take", "held", 30.0)) is True
            client.config_set("maxmemory", "1mb")
            for changes in ((Append((HO,)),), (put("x", b"1"),), (Create("u"),)):
                with pytest.raises(StateUnavailableError, match="memory") as caught:
                    commit(storage, "a", *changes)
                assert type(caught.value) is StateUnavailableError
            with pytest.raises(StateUnavailableError, match="memory"):
                commit(storage, "new", Append((HO,)))
            with pytest.raises(StateUnavailableError, match="memory") as caught:
                storage.call(Lease("a", "take", "token", 30.0))
            assert type(caught.value) is StateUnavailableError
            assert storage.call(Lease("b", "release", "held", 30.0)) is True
            assert existing(storage, "a").messages == [HI]
            assert commit(storage, "b", Increment("n", b"1"), commit_id="two") == b"1"
            assert commit(storage, "a", Delete()) == b"true"
            client.config_set("maxmemory", "0")
            assert storage.call(Query("a")) is None
            assert storage.call(Query("new")) is None

    def test_a_replica_refuses_writes_until_it_is_a_primary(self, start_valkey: Any, key_prefix: str) -> None:
        server: ValkeyServer = start_valkey()
        with closing(ValkeyStorage(server.url, key_prefix=key_prefix)) as storage, server.client() as client:
            commit(storage, "a", Append((HI,)), commit_id="one")
            client.execute_command("REPLICAOF 127.0.0.1 1")
            with pytest.raises(StateUnavailableError, match="is a replica now") as caught:
                commit(storage, "a", Append((HO,)), deadline=time.monotonic() + 0.3)
            assert type(caught.value) is StateUnavailableError
            for write in (
                lambda: commit(storage, "a", Append((HO,))),
                lambda: storage.call(Lease("a", "take", "token", 30.0)),
                lambda: storage.call(Lease("a", "release", "token", 30.0)),
            ):
                client.execute_command("REPLICAOF 127.0.0.1 1")
                threading.Timer(0.3, lambda: server.client().execute_command("REPLICAOF NO ONE")).start()
                assert write() in (b"", True)
            assert existing(storage, "a").messages == [HI, HO]

    def test_a_server_that_is_loading_is_waited_for(self, start_valkey: Any, key_prefix: str) -> None:
        server: ValkeyServer = start_valkey("key-load-delay 2000", "loading-process-events-interval-bytes 1024")
        with closing(ValkeyStorage(server.url, key_prefix=key_prefix, deadline=15)) as storage:
            commit(storage, "a", Append((HI,)))
            with server.client() as client:
                pipeline = client.pipeline(transaction=False)
                for number in range(300):
                    pipeline.set(f"filler{number}", "x" * 1000)
                pipeline.execute()
                client.config_set("appendonly", "no")
                client.save()
            server.kill()
            thread = threading.Thread(target=server.start)
            thread.start()
            assert isinstance(storage.call(Query("a", deadline=time.monotonic() + 15)), Snapshot)
            thread.join()

    def test_min_replicas_are_waited_for(self, start_valkey: Any, key_prefix: str) -> None:
        primary: ValkeyServer = start_valkey("repl-diskless-sync-delay 0")
        replica: ValkeyServer = start_valkey(f"replicaof 127.0.0.1 {primary.port}")
        for layout in ("log", "document"):
            options: dict[str, Any] = {"key_prefix": key_prefix + layout, "layout": layout}
            with closing(ValkeyStorage(primary.url, min_replicas=1, **options)) as storage, replica.client() as there:
                wait_until(lambda: there.info("replication")["master_link_status"] == "up", "the replica")
                commit(storage, "a", Append((HI,)), commit_id="one")
                assert there.exists(f"{key_prefix}{layout}a") == 1
                with replica.paused():
                    with pytest.raises(StateOutcomeUnknownError) as caught:
                        commit(storage, "a", Increment("n", b"1"), commit_id="two", deadline=time.monotonic() + 1)
                    assert caught.value.commit_id == "two"
                    with pytest.raises(StateOutcomeUnknownError):  # applied, but still not confirmed
                        commit(storage, "a", Increment("n", b"1"), commit_id="two", deadline=time.monotonic() + 1)
                    assert existing(storage, "a").variables == {"n": b"1"}
                assert commit(storage, "a", Increment("n", b"1"), commit_id="two") == b"1"
        two = ValkeyStorage(primary.url, min_replicas=2, key_prefix=key_prefix)
        with closing(two), pytest.raises(StateOutcomeUnknownError, match="1 of 2"):
            commit(two, "b", Append((HI,)), deadline=time.monotonic() + 1)


class TestProcesses:
    def test_a_fork_opens_connections_of_its_own(self, direct: ValkeyStorage) -> None:
        commit(direct, "a", Append((HI,)))
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    for _ in range(50):
                        commit(direct, "a", Increment("n", b"1"), commit_id=f"child-{number}-{next(_number)}")
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        for _ in range(50):
            commit(direct, "a", Increment("n", b"1"))
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert existing(direct, "a").variables == {"n": b"250"}

    def test_an_interrupted_call_leaves_no_dirty_connection(self, start_valkey: Any, key_prefix: str) -> None:
        server: ValkeyServer = start_valkey()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with closing(ValkeyStorage(server.url, key_prefix=key_prefix)) as storage:
            commit(storage, "a", put("x", b"1"))
            before = signal.signal(signal.SIGALRM, interrupt)
            try:
                with server.paused():
                    for operation in (Query("a", ("x",)), Commit("a", (Append((HI,)),), "c"), Listing()):
                        signal.setitimer(signal.ITIMER_REAL, 0.1)
                        with pytest.raises(KeyboardInterrupt):
                            storage.call(operation)
            finally:
                signal.signal(signal.SIGALRM, before)
            assert existing(storage, "a").variables == {"x": b"1"}
            assert commit(storage, "a", Increment("n", b"1")) == b"1"

    def test_many_processes_and_threads_lose_nothing(self, valkey_server: ValkeyServer, key_prefix: str) -> None:
        def child(number: int) -> None:
            with closing(ValkeyStorage(valkey_server.url, key_prefix=key_prefix)) as storage:

                def work(thread: int) -> None:
                    for turn in range(25):
                        commit(storage, "a", Append((HI,)), Increment("n", b"1"), commit_id=f"{number}-{thread}-{turn}")

                threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

        children = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child(number)
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
        with closing(ValkeyStorage(valkey_server.url, key_prefix=key_prefix)) as storage:
            snapshot = existing(storage, "a")
        assert (snapshot.end, snapshot.revision, snapshot.variables) == (400, 400, {"n": b"400"})

    def test_waiting_for_a_connection_ends_at_the_deadline(self, start_valkey: Any) -> None:
        server: ValkeyServer = start_valkey()
        with closing(ValkeyStorage(server.url, max_connections=1)) as storage:
            commit(storage, "a", Append((HI,)))
            with server.paused():

                def hold() -> None:
                    with pytest.raises(StateUnavailableError):
                        storage.call(Query("a", deadline=time.monotonic() + 5))

                holder = threading.Thread(target=hold)
                holder.start()
                wait_until(
                    lambda: getattr(storage.statistics().connections, "used", 0) == 1, "the use of the only connection"
                )
                with pytest.raises(StateTimeoutError, match="max_connections"):
                    storage.call(Query("a", deadline=time.monotonic() + 0.2))
                holder.join()


def test_the_proxy_passes_what_it_is_to_pass(proxy: CuttingProxy) -> None:
    with valkey.Valkey(port=proxy.port) as client:
        assert client.ping() is True
