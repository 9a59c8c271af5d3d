"""export, import and migrate: from end to end, interrupted, and killed."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import valkey
from commands import COMMAND, assert_one_line, environment, run, started, until
from servers import ValkeyServer
from stores import fill, many, whole
from test_transfer import comparable

from agentstate.cli import exits
from agentstate.context import SyncConversationContext
from agentstate.storage.base import StateStorage
from agentstate.storage.file import FileStorage
from agentstate.storage.valkey import ValkeyStorage
from agentstate.transfer import count_contexts, migrate


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a store of conversations of many shapes in the default place."""
    with closing(FileStorage(tmp_path / "conversation_states", fsync="no")) as storage:
        fill(storage)
    return tmp_path


def opened(folder: Path) -> FileStorage:
    return FileStorage(folder)


def same(one: Any, other: Any) -> bool:
    """Whether two storages hold the same."""
    report = migrate(one, other, dry_run=True)
    return report.unchanged == report.contexts == count_contexts(other)


# --- archives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backup.jsonl", "backup.jsonl.gz"])
def test_an_export_can_be_imported(here: Path, name: str) -> None:
    ran = run("export", name, "--json", cwd=here)
    assert (ran.code, ran.json["copied"], ran.json["failed"]) == (0, 24, 0)
    data = (here / name).read_bytes()
    assert data.startswith(b"\x1f\x8b") == name.endswith(".gz")
    assert (here / name).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in here.iterdir() if "part" in path.name] == []
    dry = run("import", name, "--storage-dir", "new", "--dry-run", "--json", cwd=here)
    assert dry.json["copied"] == 24
    assert not (here / "new").exists()
    assert run("import", name, "--storage-dir", "new", "--json", cwd=here).json["copied"] == 24
    assert same(opened(here / "conversation_states"), opened(here / "new"))
    assert run("import", name, "--storage-dir", "new", "--json", cwd=here).json["unchanged"] == 24


def test_an_archive_goes_through_pipes(here: Path) -> None:
    archive = run("export", "-z", cwd=here, PYTHONIOENCODING="utf-8")
    assert archive.code == 0
    one, other = (" ".join(COMMAND) + rest for rest in (" export -z", " import - --storage-dir new"))
    done = subprocess.run(
        ["sh", "-c", f"{one} | {other}"], cwd=here, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "24" in done.stdout
    assert same(opened(here / "conversation_states"), opened(here / "new"))


def test_an_export_replaces_a_file_only_with_force(here: Path) -> None:
    (here / "x.jsonl").write_text("precious")
    assert_one_line(run("export", "x.jsonl", cwd=here), exits.REFUSED, "exists already")
    assert (here / "x.jsonl").read_text() == "precious"
    assert run("export", "x.jsonl", "--force", cwd=here).code == 0
    assert (here / "x.jsonl").read_text().startswith('{"agentstate_archive"')


def test_an_export_from_a_server_that_is_down_leaves_no_file(tmp_path: Path) -> None:
    ran = run("export", "x.jsonl", "--url", "valkey://127.0.0.1:1", "-o", "deadline=1", cwd=tmp_path)
    assert_one_line(ran, exits.UNAVAILABLE, "127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_many_problems_are_printed_and_the_others_counted(tmp_path: Path) -> None:
    lines = [{"context_id": f"c{number}", "variables": {"n": 1}} for number in range(130)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("import", "x.jsonl", cwd=tmp_path).code == 0
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({**line, "variables": {"n": 2}}) + "\n" for line in lines))
    ran = run("import", "x.jsonl", cwd=tmp_path)
    assert ran.code == exits.REFUSED
    assert len(ran.err.splitlines()) >= 101
    assert "and 30 more of these" in ran.err


def test_some_conversations_can_be_exported(here: Path) -> None:
    lines = run("export", "--id", "owned", "--id", "empty", cwd=here).json_lines
    assert [line.get("context_id") for line in lines] == [None, "owned", "empty", None]
    assert len(run("export", "--user", "alice", cwd=here).json_lines) == 3
    assert_one_line(run("export", "--id", "owned", "--id", "nobody", "x", cwd=here), exits.NOT_FOUND, "'nobody'")
    assert not (here / "x").exists()


def test_a_damaged_conversation_is_reported_and_the_others_are_exported(here: Path) -> None:
    path = here / "conversation_states" / "owned.jsonl"
    path.write_bytes(path.read_bytes().replace(b"alice", b"malice"))
    ran = run("export", "x.jsonl", cwd=here)
    assert ran.code == exits.CORRUPTED
    assert "owned" in ran.err
    assert len(run("import", "x.jsonl", "--storage-dir", "new", "--json", cwd=here).json["problems"]) == 0


def test_a_cut_off_archive_is_reported(here: Path) -> None:
    assert run("export", "x.jsonl", cwd=here).code == 0
    data = (here / "x.jsonl").read_bytes()
    (here / "y.jsonl").write_bytes(data[: len(data) // 2])
    ran = run("import", "y.jsonl", "--storage-dir", "new", cwd=here)
    assert ran.code == exits.CORRUPTED
    assert "incomplete" in ran.err
    (here / "z.gz").write_bytes(gzip.compress(data)[:-100])
    assert run("import", "z.gz", "--storage-dir", "new2", cwd=here).code == exits.CORRUPTED


@pytest.mark.parametrize("data", [b"", b"\n\n", b"nonsense\n", b"\x00" * 100, b"\x1f\x8bnonsense", b"[]\n", b"{"])
def test_a_file_that_is_not_an_archive_is_reported(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    ran = run("import", "x", cwd=tmp_path)
    assert_one_line(ran, exits.CORRUPTED)


def test_differences_are_refused_or_replaced(here: Path) -> None:
    assert run("export", "x.jsonl", cwd=here).code == 0
    with SyncConversationContext(opened(here / "conversation_states")) as context:
        context.set_variable("owned", "new", 1)
    ran = run("import", "x.jsonl", cwd=here)
    assert ran.code == exits.REFUSED
    assert "'owned' exists and is different" in ran.err
    assert run("import", "x.jsonl", "--replace", cwd=here).code == 0
    with SyncConversationContext(opened(here / "conversation_states")) as context:
        assert context.get_variables("owned") == {}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that it takes a while to read."""
    folder = tmp_path_factory.mktemp("large") / "conversation_states"
    with closing(FileStorage(folder, fsync="no")) as storage:
        many(storage, 4000)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_export_leaves_no_file(tmp_path: Path, large: Path, number: signal.Signals) -> None:
    code = exits.OK
    while code == exits.OK:  # on a busy machine the signal may come after the end
        (tmp_path / "x.jsonl.gz").unlink(missing_ok=True)
        with started("export", "x.jsonl.gz", "--storage-dir", large, cwd=tmp_path) as process:
            until(lambda: process.poll() is not None or any(tmp_path.iterdir()))
            process.send_signal(number)
            code = process.wait(60)
            assert process.stderr is not None
            assert process.stderr.read() == ""
    assert code == (exits.INTERRUPTED if number == signal.SIGINT else exits.TERMINATED)
    assert list(tmp_path.iterdir()) == []


# --- migrate --------------------------------------------------------------------------------------------------------


def test_files_are_migrated_to_a_server_and_back(here: Path, valkey_9: ValkeyServer, key_prefix: str) -> None:
    there = run("migrate", "conversation_states", valkey_9.url, "--to-key-prefix", key_prefix, "--json", cwd=here)
    assert (there.code, there.json["copied"], there.json["messages"]) == (0, 24, 20 + 1080 + 1200)
    back = run("migrate", valkey_9.url, "back", "--from-key-prefix", key_prefix, cwd=here)
    assert back.code == 0
    assert ["copied and verified", "24"] in back.rows
    assert same(opened(here / "conversation_states"), opened(here / "back"))
    again = run("migrate", valkey_9.url, "back", "--from-key-prefix", key_prefix, "--json", cwd=here)
    assert (again.json["unchanged"], again.json["copied"]) == (24, 0)


def test_layouts_are_converted(here: Path) -> None:
    assert run("migrate", "conversation_states", "documents", "--to-layout", "document", cwd=here).code == 0
    assert json.loads((here / "documents" / "owned.json").read_text())["user_id"] == "alice"
    assert run("migrate", "documents", "logs", "--from-layout", "document", cwd=here).code == 0
    assert same(opened(here / "conversation_states"), opened(here / "logs"))


def test_configuration_files_say_from_where_and_to_where(here: Path) -> None:
    (here / "old.yaml").write_text("state:\n  backend: file\n  storage_dir: ./conversation_states\n")
    (here / "new.yml").write_text("state:\n  backend: file\n  storage_dir: ./new\n  ttl: 3600\n")
    assert run("migrate", "old.yaml", "new.yml", "--json", cwd=here).json["copied"] == 24
    rows = run("list", "--config", "new.yml", "--json", cwd=here).json_lines
    assert all(row["expires_at"] for row in rows)
    assert_one_line(run("migrate", "old.yaml", "old.yaml", cwd=here), exits.USAGE, "same storage")
    assert_one_line(run("migrate", "nothing.yaml", "new.yml", cwd=here), exits.USAGE, "nothing.yaml")


def test_data_of_agentup_is_migrated(tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str) -> None:
    (tmp_path / "agentup").mkdir()
    document = {
        "context_id": "alice", "user_id": "u", "created_at": "2025-06-01T10:00:00.123456",
        "updated_at": "2025-06-01T11:00:00", "metadata": {"a": 1}, "variables": {"v": {"x": [1.5, None]}},
        "history": [{"role": "user", "content": "hi é", "timestamp": "2025-06-01T10:30:00", "metadata": {}}],
    }  # fmt: skip
    (tmp_path / "agentup" / "alice.json").write_text(json.dumps(document))
    before = (tmp_path / "agentup" / "alice.json").read_bytes()
    with valkey.Valkey.from_url(valkey_9.url) as client:
        client.set(f"{key_prefix}old:bob", json.dumps({**document, "context_id": "bob"}), ex=5000)
        assert run("migrate", "agentup", valkey_9.url, "--to-key-prefix", f"{key_prefix}new:", cwd=tmp_path).code == 0
        ran = run(
            "migrate", valkey_9.url, valkey_9.url, "--from-key-prefix", f"{key_prefix}old:", "--to-key-prefix",
            f"{key_prefix}new:", "--json", cwd=tmp_path,
        )  # fmt: skip
        assert (ran.code, ran.json["copied"]) == (0, 1), ran
        assert client.type(f"{key_prefix}old:bob") == b"string"
        assert 4000 < client.ttl(f"{key_prefix}new:bob") <= 5000
        assert client.ttl(f"{key_prefix}new:alice") == -1
    assert (tmp_path / "agentup" / "alice.json").read_bytes() == before
    with SyncConversationContext(ValkeyStorage(valkey_9.url, key_prefix=f"{key_prefix}new:")) as context:
        for name in ("alice", "bob"):
            state = context.get_state(name)
            assert state is not None
            assert state.created_at.isoformat() == "2025-06-01T10:00:00.123456+00:00"
            assert state.updated_at.isoformat() == "2025-06-01T11:00:00+00:00"
            assert (state.user_id, state.variables, state.metadata) == ("u", document["variables"], {"a": 1})
            assert state.history == document["history"]


def test_a_dry_run_creates_nothing(here: Path) -> None:
    ran = run("migrate", "conversation_states", "new", "--dry-run", "--json", cwd=here)
    assert (ran.code, ran.json["copied"]) == (0, 24)
    assert not (here / "new").exists()


def test_a_server_that_is_down_ends_the_migration_at_once(here: Path) -> None:
    began = time.monotonic()
    ran = run("migrate", "conversation_states", "valkey://127.0.0.1:1", "--to-option", "deadline=0.5", cwd=here)
    assert_one_line(ran, exits.UNAVAILABLE)
    assert time.monotonic() - began < 60


def wait_for_more(process: subprocess.Popen[str], new: StateStorage) -> None:
    """Return when the process has written some contexts, or has ended."""
    seen = count_contexts(new)
    until(lambda: process.poll() is not None or count_contexts(new) > seen + 100)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("to", ["file", "valkey"])
def test_a_migration_that_is_killed_again_and_again_ends_complete(
    tmp_path: Path, to: str, valkey_9: ValkeyServer, key_prefix: str
) -> None:
    with closing(FileStorage(tmp_path / "old", fsync="no")) as storage:
        many(storage, 900)
        context = SyncConversationContext(storage)
        for _ in range(60):
            context.extend_history("long", [{"role": "user", "content": "x" * 50}] * 100)
    target = ["new"] if to == "file" else [valkey_9.url, "--to-key-prefix", key_prefix]
    new = FileStorage(tmp_path / "new") if to == "file" else ValkeyStorage(valkey_9.url, key_prefix=key_prefix)
    kills = 0
    for attempt in range(6):
        with started("migrate", "old", *target, cwd=tmp_path) as process:
            wait_for_more(process, new)
            time.sleep(0.05 * attempt)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            else:
                break
    assert kills
    ran = run("migrate", "old", *target, "--json", cwd=tmp_path)
    assert (ran.code, ran.json["copied"] + ran.json["unchanged"]) == (0, 901)
    with closing(FileStorage(tmp_path / "old")) as old:
        assert count_contexts(new) == 901
        for name in ("long", "c000000", "c000899"):
            assert comparable(whole(new, name)) == comparable(whole(old, name))
    new.close()


def test_a_migration_can_be_watched_in_the_log(here: Path) -> None:
    ran = run("-v", "migrate", "conversation_states", "new", cwd=here)
    assert ran.code == 0
    assert not re.search("message 1190", ran.err)
    assert os.listdir(here / "new")


@pytest.fixture
def third_party(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that finds a storage of a third party, `sqlite`, among the installed packages."""
    metadata = tmp_path / "site" / "sqlite_storage-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sqlite-storage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[agentstate.storages]\nsqlite = test_third_party:SqliteStorage\n")
    folders = (str(metadata.parent), str(Path(__file__).parent), environment()["PYTHONPATH"])
    return {"PYTHONPATH": os.pathsep.join(folders)}


def test_a_storage_of_a_third_party_is_one_like_any_other(here: Path, third_party: dict[str, str]) -> None:
    there = run(
        "migrate", "conversation_states", "sqlite", "--to-option", "path=x.db", "--json", cwd=here, **third_party
    )
    assert (there.code, there.json["copied"]) == (0, 24), there
    options = ["--storage", "sqlite", "-o", "path=x.db"]
    assert len(run("list", *options, cwd=here, **third_party).rows) == 24
    assert run("verify", *options, cwd=here, **third_party).code == 0
    assert run("doctor", *options, cwd=here, **third_party).code == 0
    back = run("migrate", "sqlite", "back", "--from-option", "path=x.db", cwd=here, **third_party)
    assert back.code == 0
    assert same(opened(here / "conversation_states"), opened(here / "back"))
    assert_one_line(run("list", "--storage", "sqlite", cwd=here, **third_party), exits.USAGE, "path")
    same_place = run(
        "migrate", "sqlite", "sqlite", "--from-option", "path=x", "--to-option", "path=x", cwd=here, **third_party
    )
    assert_one_line(same_place, exits.USAGE, "same storage")
