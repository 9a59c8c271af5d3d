"""list, show, clear, cleanup and stats, on files and on a server."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_line, run, started, until
from servers import ValkeyServer
from stores import many, restore

from agentstate.cli import exits
from agentstate.context import SyncConversationContext
from agentstate.operations import Snapshot
from agentstate.state import ConversationState
from agentstate.storage.base import StateStorage
from agentstate.storage.file import FileStorage
from agentstate.storage.valkey import ValkeyStorage

HOUR = 3_600_000_000


class Store:
    """A store, and the options by which a command finds it."""

    def __init__(self, folder: Path, storage: StateStorage, *options: str) -> None:
        self.folder = folder
        self.storage = storage
        self.context = SyncConversationContext(storage)
        self.options = options

    def run(self, *arguments: str, **more: Any) -> Any:
        return run(*arguments, *self.options, cwd=self.folder, **more)


@pytest.fixture(params=["file", "file documents", "valkey", "valkey documents"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    layout = "document" if "documents" in request.param else "log"
    options = ["--layout", layout]
    storage: StateStorage
    if request.param.startswith("file"):
        storage = FileStorage(tmp_path / "store", layout=layout)
        options += ["--storage-dir", "store"]
    else:
        server: ValkeyServer = request.getfixturevalue("valkey_9")
        prefix = request.getfixturevalue("key_prefix")
        storage = ValkeyStorage(server.url, key_prefix=prefix, layout=layout)
        options += ["--url", server.url, "--key-prefix", prefix]
    yield Store(tmp_path, storage, *options)
    storage.close()


@pytest.fixture
def files(tmp_path: Path) -> Any:
    storage = FileStorage(tmp_path / "conversation_states", fsync="no")
    yield Store(tmp_path, storage)
    storage.close()


def put(store: Store, name: str, **fields: Any) -> None:
    """A context without messages, with these fields."""
    now = time.time_ns() // 1000
    restore(store.storage, name, Snapshot(None, now, now, 1, 0, 0, {}, {}, 0, ())._replace(**fields))


# --- on every kind of store -----------------------------------------------------------------------------------------


def test_what_handlers_store_is_listed_shown_counted_and_cleared(store: Store) -> None:
    assert store.run("list").rows == []
    store.context.get_or_create("alice", "u1")
    store.context.add_to_history("alice", "user", "I like tea é 漢")
    store.context.add_to_history("alice", "assistant", "Noted.", {"model": "m"})
    store.context.set_variable("alice", "drink", {"name": "tea", "cups": 2**70})
    store.context.set_metadata("alice", "channel", "web")
    store.context.set_variable("bob", "x", 1)

    rows = {row[0]: row for row in store.run("list").rows}
    assert sorted(rows) == ["alice", "bob"]
    assert rows["alice"][1:4] == ["u1", "2", "5"]
    datetime.fromisoformat(rows["alice"][4])
    listed = {line["context_id"]: line for line in store.run("list", "--json").json_lines}
    assert listed["alice"]["messages"] == 2
    assert listed["bob"]["user_id"] is None
    assert [row[0] for row in store.run("list", "--user", "u1").rows] == ["alice"]

    shown = store.run("show", "alice")
    assert shown.code == 0
    for words in ("u1", "I like tea é 漢", "Noted.", '"tea"', "channel", '{"model": "m"}'):
        assert words in shown.out
    document = store.run("show", "alice", "--json").json
    state = store.context.get_state("alice")
    assert state is not None
    assert ConversationState.from_dict(document) == state
    assert list(document) == list(state.to_dict())

    figures = store.run("stats", "--sizes", "--json").json
    assert (figures["contexts"], figures["messages"], figures["owners"]) == (2, 2, 1)
    assert figures["bytes"] > 100

    assert_one_line(store.run("show", "carol"), exits.NOT_FOUND, "carol")
    cleared = store.run("clear", "--yes", "alice", "carol")
    assert cleared.code == exits.NOT_FOUND
    assert [row[0] for row in store.run("list").rows] == ["bob"]


def test_cleanup_deletes_what_is_old_and_only_that(store: Store) -> None:
    now = time.time_ns() // 1000
    put(store, "old", updated=now - 30 * HOUR)
    put(store, "older", updated=now - 300 * HOUR, user_id="u1")
    put(store, "new")
    assert store.run("cleanup", "--dry-run", "--max-age-hours", "100").out == "older\n"
    assert store.run("cleanup", "--yes", "--user", "nobody", "--json").json == {"deleted": 0}
    assert store.run("cleanup", "--yes", "--user", "u1", "--json").json == {"deleted": 1}
    ran = store.run("cleanup", "--yes")
    assert (ran.code, ran.out) == (0, "")
    assert "Deleted 1 conversation from" in ran.err
    assert [row[0] for row in store.run("list").rows] == ["new"]


def test_the_last_messages_are_shown_alone(store: Store) -> None:
    store.context.extend_history("a", [{"role": "user", "content": f"message {n}."} for n in range(250)])
    out = store.run("show", "a", "--last", "2").out
    assert "message 248." in out
    assert "message 249." in out
    assert "message 247." not in out
    assert [each["content"] for each in store.run("show", "a", "-n", "3", "--json").json["history"]] == [
        "message 247.",
        "message 248.",
        "message 249.",
    ]
    assert store.run("show", "a", "--last", "0", "--json").json["history"] == []
    whole = store.run("show", "a").out
    assert [word in whole for word in ("message 0.", "message 99.", "message 100.", "message 249.")] == [True] * 4


def test_an_unknown_conversation_is_an_error(files: Store) -> None:
    for options in ([], ["--json"]):
        assert_one_line(files.run("show", "nobody", *options), exits.NOT_FOUND, "nobody")


def test_follow_prints_what_other_processes_add(store: Store) -> None:
    store.context.add_to_history("a", "user", "first")
    with started("show", "a", "--follow", "--json", "--interval", "0.05", *store.options, cwd=store.folder) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["content"] == "first"
        for number in range(5):
            store.context.add_to_history("a", "user", number)
            assert json.loads(process.stdout.readline())["content"] == number
        store.context.extend_history("a", [{"role": "user", "content": n} for n in range(250)])
        assert [json.loads(process.stdout.readline())["content"] for _ in range(250)] == list(range(250))
        store.context.pop_history("a", 2)
        store.context.trim_history("a", 10)
        assert process.stderr is not None
        assert "removed from the end" in process.stderr.readline()
        store.context.add_to_history("a", "user", "after")
        assert json.loads(process.stdout.readline())["content"] == "after"


def test_clear_says_what_it_cleared_before_it_failed(files: Store) -> None:
    for name in ("a", "b", "c"):
        files.context.set_variable(name, "x", 1)
    (files.folder / "conversation_states" / "b.jsonl").unlink()
    (files.folder / "conversation_states" / "b.jsonl").mkdir()
    ran = files.run("clear", "--yes", "a", "b", "c")
    assert ran.code == exits.CORRUPTED
    lines = ran.err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "Cleared 'a'."
    assert "b.jsonl" in lines[1]
    assert files.context.exists("c")


def test_the_last_messages_are_no_more_than_asked_for_while_more_are_written(store: Store) -> None:
    store.context.extend_history("a", [{"role": "user", "content": n} for n in range(5)])
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            store.context.add_to_history("a", "user", "more")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            counts = [store.run("show", "a", "--last", n).out.count("\n  more\n") for n in ("1", "3", "1", "3")]
        finally:
            done.set()
        writing.result()
    assert counts == [1, 3, 1, 3]


# --- follow ---------------------------------------------------------------------------------------------------------


def test_follow_waits_for_a_conversation_and_survives_its_end(files: Store) -> None:
    with started("show", "a", "-f", "--interval", "0.05", cwd=files.folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "Waiting" in process.stderr.readline()
        files.context.add_to_history("a", "user", "one")
        until(lambda: "one" in process.stdout.readline())  # type: ignore[union-attr]
        files.context.clear_context("a")
        assert "cleared" in process.stderr.readline()
        files.context.add_to_history("a", "user", "two")
        until(lambda: "two" in process.stdout.readline())  # type: ignore[union-attr]


def test_follow_begins_with_the_last_messages(files: Store) -> None:
    files.context.extend_history("a", [{"role": "user", "content": n} for n in range(20)])
    with started("show", "a", "-f", "--json", "--last", "2", cwd=files.folder) as process:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["content"] for _ in range(2)] == [18, 19]


# --- list -----------------------------------------------------------------------------------------------------------


def test_a_list_is_sorted(files: Store) -> None:
    for number, name in enumerate(["b", "c", "a"]):
        put(files, name, updated=1_700_000_000_000_000 + number * HOUR, created=1_600_000_000_000_000 - number * HOUR)
    files.context.extend_history("x", [{"role": "user", "content": 1}] * 3)
    orders = {"updated": "xacb", "created": "xbca", "id": "abcx", "messages": "x"}
    for order, expected in orders.items():
        rows = files.run("list", "--sort", order).rows
        assert "".join(row[0] for row in rows)[: len(expected)] == expected
        assert [row[0] for row in files.run("list", "--sort", order, "-n", "1").rows] == [expected[0]]
    assert sorted(row[0] for row in files.run("list", "--sort", "none").rows) == ["a", "b", "c", "x"]
    assert len(files.run("list", "--sort", "none", "-n", "3").rows) == 3


def test_a_pipe_gets_one_line_for_each_whatever_the_ids_hold(files: Store) -> None:
    names = ["a b", "tab\there", "line\nbreak", "é漢😀", "{x}*?[", "-dash", "x" * 300]
    for name in names:
        put(files, name)
    rows = files.run("list").rows
    assert len(rows) == len(names)
    assert {len(row) for row in rows} == {7}
    assert [line["context_id"] for line in files.run("list", "--json", "--sort", "id").json_lines] == sorted(names)
    shown = files.run("show", "--json", "--", "-dash")
    assert shown.json["context_id"] == "-dash"


def test_many_conversations_are_listed(files: Store) -> None:
    many(files.storage, 1500)
    rows = files.run("list", "--sort", "id").rows
    assert [row[0] for row in rows] == [f"c{number:06}" for number in range(1500)]


def test_damaged_conversations_are_listed_as_such(files: Store) -> None:
    many(files.storage, 3)
    path = files.folder / "conversation_states" / "c000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"message", b"massage"))
    ran = files.run("list")
    assert ran.code == exits.CORRUPTED
    assert len(ran.rows) == 3
    assert "cannot be read" in ran.out
    assert "c000001" in ran.err
    assert files.run("stats", "--json").json["unreadable"] == 1
    assert any("error" in line for line in files.run("list", "--json").json_lines)
    assert_one_line(files.run("show", "c000001"), exits.CORRUPTED, "c000001", "verify --repair")


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    ran = run("list", cwd=tmp_path)
    assert (ran.code, ran.out) == (0, "")
    assert "no conversations in ./conversation_states" in ran.err
    assert not (tmp_path / "conversation_states").exists()
    assert run("stats", "--json", cwd=tmp_path).json["contexts"] == 0


def test_an_expiry_is_shown(files: Store) -> None:
    put(files, "a", expires=time.time_ns() // 1000 + HOUR)
    assert files.run("list").rows[0][6]
    assert "expires" in files.run("show", "a").out
    assert files.run("stats", "--json").json["expiring"] == 1


# --- show -----------------------------------------------------------------------------------------------------------


def test_contents_other_than_text_are_readable(files: Store) -> None:
    parts = [
        {"kind": "text", "text": "from a part"},
        {"root": {"kind": "text", "text": "from a root"}},
        {"kind": "file", "uri": "file:///x"},
        "a bare text",
        ["nested"],
    ]
    files.context.extend_history(
        "a", [{"role": "user", "content": content} for content in (parts, None, 5, {"a": [1]}, "")]
    )
    out = files.run("show", "a").out
    for words in ("from a part", "from a root", "file:///x", "a bare text", "nested", "null", "  5\n"):
        assert words in out


def test_the_examples_for_jq_work(files: Store) -> None:
    files.context.extend_history("a", [{"role": "user", "content": n} for n in range(10)])
    document = files.run("show", "a", "--json").out
    try:
        done = subprocess.run(
            ["jq", "-c", "[.history[-3:][].content]"], input=document, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("no jq")
    assert done.stdout == "[7,8,9]\n"


def test_trimmed_conversations_say_so(files: Store) -> None:
    files.context.extend_history("a", [{"role": "user", "content": n} for n in range(10)])
    files.context.trim_history("a", 4)
    out = files.run("show", "a").out
    assert "4 (and 6 older ones that were trimmed)" in out
    assert "#6" in out
    assert files.run("show", "a", "--json").json["history_start"] == 6


# --- stats ----------------------------------------------------------------------------------------------------------


def test_stats_count_ages_and_lengths(files: Store) -> None:
    now = time.time_ns() // 1000
    for hours, name in ((0.5, "a"), (10, "b"), (100, "c"), (500, "d"), (5000, "e")):
        put(files, name, updated=now - int(hours * HOUR), user_id=name)
    files.context.extend_history("long", [{"role": "user", "content": n} for n in range(150)])
    figures = files.run("stats", "--json").json
    assert figures["by_age"] == {"last hour": 2, "last day": 1, "last week": 1, "last 30 days": 1, "older": 1}
    assert figures["by_messages"]["up to 1,000"] == 1
    assert figures["longest"][0] == {"context_id": "long", "messages": 150}
    assert (figures["owners"], figures["owned"]) == (5, 5)
    assert "bytes" not in figures
    text = files.run("stats", "--sizes").out
    assert "size\t" in text
    assert "last updated\tolder\t1" in text


def test_stats_include_sizes_on_request(store: Store) -> None:
    store.context.set_variable("small", "x", 1)
    store.context.set_variable("large", "x", "y" * 5_000_000)
    figures = store.run("stats", "--sizes", "--json").json
    assert figures["by_bytes"]["up to 1.0 kB"] == figures["by_bytes"]["up to 10.0 MB"] == 1
    assert figures["largest"][0] == {"context_id": "large", "bytes": 5_000_002}
    assert "largest" not in store.run("stats", "--json").json
    assert "size per conversation\tup to 10.0 MB\t1" in store.run("stats", "--sizes").out


def test_stats_include_the_operations_of_the_command_itself(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.context.set_variable(name, "x", 1)
    work = store.run("stats", "--json").json["this_command"]
    assert work["operations"]["query"] == 3
    assert work["operations"]["commit"] == 0
    assert work["errors"] == {}
    assert work["bytes_read"] > 0
    assert sum(work["latency_nanoseconds"]["query"]["counts"]) == 3
    text = store.run("stats").out
    assert "\nquery\t3\t" in text
    assert "\nretries\t0\n" in text
    assert "processes" in store.run("stats", "--help").out


def test_clear_and_cleanup_print_json(files: Store) -> None:
    files.context.set_variable("alice", "x", 1)
    files.context.set_variable("bob", "x", 1)
    idle = files.run("cleanup", "--dry-run", "--max-age-hours", "0", "--json")
    assert [row["context_id"] for row in idle.json_lines] == ["alice", "bob"]
    assert idle.err == ""
    cleared = files.run("clear", "--yes", "alice", "carol", "--json")
    assert cleared.code == exits.NOT_FOUND
    assert cleared.json_lines == [
        {"context_id": "alice", "cleared": True},
        {"context_id": "carol", "cleared": False},
    ]
    assert files.run("cleanup", "--max-age-hours", "0", "--json").json == {"deleted": 1}
