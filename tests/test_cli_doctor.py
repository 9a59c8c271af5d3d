"""doctor: what it finds, on folders and on servers of every condition."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import valkey
from commands import run
from servers import HOST, ValkeyServer, wait_until
from stores import many

from agentstate.cli import exits
from agentstate.cli.doctor import _examine, _look_for_damage
from agentstate.cli.doctor_file import look_at_folder
from agentstate.cli.doctor_valkey import _transport
from agentstate.context import SyncConversationContext
from agentstate.storage.file import FileStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.storage.valkey import ValkeyStorage

LOCAL = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's own files")
NOT_ROOT = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may do everything")


def examine(folder: Path, *arguments: str, code: int = exits.OK) -> dict[str, Any]:
    """The findings, the levels of each subject."""
    ran = run("doctor", "--json", *arguments, cwd=folder)
    assert ran.code == code, ran
    assert ran.err == ""
    levels: dict[str, Any] = {}
    for finding in ran.json["findings"]:
        levels.setdefault(finding["subject"], []).append((finding["level"], finding["text"], finding["advice"]))
    return levels


def level(findings: dict[str, Any], subject: str) -> set[str]:
    return {finding[0] for finding in findings[subject]}


def test_a_healthy_folder_is_fine(disk_path: Path) -> None:
    with SyncConversationContext(FileStorage(disk_path / "conversation_states")) as context:
        many(context.storage, 10)
    findings = examine(disk_path)
    assert {name for each in findings.values() for name, _, _ in each} <= {"ok", "note"}
    for subject in ("folder", "operations", "append", "read", "variable", "turn", "durability", "conversations"):
        assert level(findings, subject) == {"ok"}
    assert "10 read" in findings["conversations"][0][1]
    assert run("list", cwd=disk_path).out.count("\n") == 10  # its own conversation is gone


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    findings = examine(tmp_path, "--read-only")
    assert "append" not in findings
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_examined_first(tmp_path: Path) -> None:
    assert level(examine(tmp_path, "--read-only"), "configuration") == {"note"}
    (tmp_path / "agent_config.yaml").write_text("state:\n  backend: valkey\n  tll: 1\n")
    findings = examine(tmp_path, code=exits.PROBLEM)
    assert len(findings["configuration"]) == 2
    assert any("url" in text for _, text, _ in findings["configuration"])
    (tmp_path / "agent_config.yaml").write_text("state:\n  enabled: false\n")
    assert "warning" in level(examine(tmp_path, "--read-only"), "configuration")
    examine(tmp_path, "--read-only", "--strict", code=exits.PROBLEM)


@pytest.mark.parametrize("layout", ["log", "document"])
def test_doctor_leaves_no_file_behind(tmp_path: Path, layout: str) -> None:
    with SyncConversationContext(FileStorage(tmp_path / "store", layout=layout)) as context:
        context.set_variable("alice", "x", 1)
    before = sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_file())
    examine(tmp_path, "--storage-dir", "store", "--layout", layout)
    assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_file()) == before
    assert len(before) == 1


@pytest.mark.parametrize("after", ["operations", "append", "turn", "conversations"])
def test_an_interrupted_doctor_leaves_no_file_behind(tmp_path: Path, after: str) -> None:
    folder = tmp_path / "store"
    names = ("config_file", "storage", "url", "key_prefix", "layout", "settings")
    findings = _examine({**dict.fromkeys(names), "storage_dir": str(folder)}, read_only=False)
    assert any(finding.subject == after for finding in findings)
    assert [path for path in folder.iterdir() if path.is_file()] != [] or after == "conversations"
    with pytest.raises(KeyboardInterrupt):
        findings.throw(KeyboardInterrupt)
    assert [path for path in folder.iterdir() if path.is_file()] == []


def test_a_server_that_refuses_connections_is_a_problem_at_once(tmp_path: Path) -> None:
    findings = examine(tmp_path, "--url", "valkey://127.0.0.1:1", "-o", "deadline=3600", code=exits.PROBLEM)
    found, text, advice = findings["connection"][0]
    assert (found, text) == ("problem", "cannot connect to 127.0.0.1:1: Connection refused")
    assert "is the server running" in advice


@pytest.mark.parametrize(
    "options", [["--storage", "nothing"], ["--storage", "valkey"], ["-o", "ttl=-1"], ["--url", "http://x"]]
)
def test_bad_options_are_a_problem(tmp_path: Path, options: list[str]) -> None:
    assert level(examine(tmp_path, *options, code=exits.PROBLEM), "storage") == {"problem"}


def test_memory_storage_is_reported_as_volatile(tmp_path: Path) -> None:
    assert level(examine(tmp_path, "--storage", "memory"), "durability") == {"note"}


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    findings = examine(tmp_path, "--storage-dir", "x", code=exits.PROBLEM)
    assert level(findings, "folder") == {"problem"}
    assert level(examine(tmp_path, "--storage-dir", "x/y", code=exits.PROBLEM), "folder") == {"problem"}


@NOT_ROOT
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o500)
    assert "problem" in level(examine(tmp_path, "--storage-dir", "x", code=exits.PROBLEM), "folder")
    assert "problem" in level(examine(tmp_path, "--storage-dir", "x/y", code=exits.PROBLEM), "folder")


@pytest.mark.skipif(sys.platform == "win32", reason="no mode bits")
def test_a_folder_that_is_open_to_others_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "conversation_states").mkdir()
    (tmp_path / "conversation_states").chmod(0o755)
    findings = examine(tmp_path)
    assert findings["folder"][0][0] == "warning"
    assert "chmod 700" in findings["folder"][0][2]


def test_files_of_other_programs_are_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "conversation_states"
    with SyncConversationContext(FileStorage(folder)) as context:
        context.set_variable("converted", "x", 1)
    document = {"context_id": "old", "created_at": "2025-01-01T00:00:00", "updated_at": "2025-01-01T00:00:00"}
    (folder / "old.json").write_text(json.dumps(document))
    (folder / "done.json.adopted").write_text("")
    (folder / "holiday.jpg").write_text("")
    findings = examine(tmp_path)
    texts = [text for _, text, _ in findings["files"]]
    assert level(findings, "files") == {"note"}
    assert sorted(text.split()[0] for text in texts) == ["1", "1", "1"]
    (folder / "converted.json").write_text(json.dumps({**document, "context_id": "converted"}))
    findings = examine(tmp_path, code=exits.PROBLEM)
    assert any("wrote converted.json" in text for _, text, _ in findings["files"])
    assert "problem" in level(examine(tmp_path, "--layout", "document", code=exits.PROBLEM), "files")


def test_damaged_conversations_are_a_problem(tmp_path: Path) -> None:
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        many(context.storage, 10)
    for number in range(8):
        (tmp_path / "conversation_states" / f"c00000{number}.jsonl").write_bytes(b"nonsense\n" * 10)
    findings = examine(tmp_path, code=exits.PROBLEM)
    assert len(findings["conversations"]) == 6
    assert "verify" in findings["conversations"][0][2]


@LOCAL
@pytest.mark.parametrize(
    ("kind", "expected"), [("nfs4", "problem"), ("fuse.sshfs", "problem"), ("tmpfs", "warning"), ("ext4", "ok")]
)
def test_network_file_systems_are_a_problem_and_volatile_ones_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    monkeypatch.setattr("agentstate.cli.doctor_file._file_system_of", lambda path: kind)
    found = {finding.subject: finding.level for finding in look_at_folder(str(tmp_path), {})}
    assert found["file system"] == expected


@LOCAL
def test_the_file_system_is_recognised(tmp_path: Path) -> None:
    from agentstate.cli.doctor_file import _file_system_of

    assert _file_system_of("/proc/self") == "proc"
    assert _file_system_of(str(tmp_path))


def test_the_file_system_of_a_folder_is_found_by_its_mount_point_whatever_bytes_its_name_has() -> None:
    from agentstate.cli.doctor_file import _type_at

    mounts = (
        b"25 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        b"40 25 0:33 / /mnt/\xc3\xa4\xc3\xb6 rw - tmpfs tmpfs rw,size=1024k\n"
        b"41 25 0:34 / /mnt/two\\040words\\134 rw shared:7 - xfs /dev/vdb rw\n"
        b"42 25 0:35 / /mnt/\xff rw - btrfs /dev/vdc rw\n"
        b"a line of another kind\n"
    )
    assert _type_at(mounts, "/mnt/äö/states".encode()) == "tmpfs"
    assert _type_at(mounts, "/mnt/äö".encode()) == "tmpfs"
    assert _type_at(mounts, "/mnt/äöü".encode()) == "ext4"
    assert _type_at(mounts, b"/mnt/two words\\/states") == "xfs"
    assert _type_at(mounts, b"/mnt/\xff/states") == "btrfs"
    assert _type_at(b"", b"/mnt") == ""


@LOCAL
def test_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    for field, value in (("f_bavail", 10), ("f_favail", 10)):
        values = {name: getattr(real, name) for name in ("f_bavail", "f_frsize", "f_files", "f_favail")}
        values |= {"f_bavail": 10**12, "f_favail": 10**9, "f_files": 10**10} | {field: value}
        monkeypatch.setattr(os, "statvfs", lambda path, values=values: type("Disk", (), values))
        found = {each.subject: each.level for each in look_at_folder(str(tmp_path), {})}
        assert found["space"] == "problem"


# --- servers --------------------------------------------------------------------------------------------------------


def test_a_healthy_server_is_fine(tmp_path: Path, valkey_server: ValkeyServer, key_prefix: str) -> None:
    with SyncConversationContext(ValkeyStorage(valkey_server.url, key_prefix=key_prefix, ttl=60)) as context:
        many(context.storage, 10)
    options = ["--url", valkey_server.url, "--key-prefix", key_prefix]
    findings = examine(tmp_path, *options, "-o", "ttl=3600")
    for subject in ("server", "connection", "durability", "ttl", "operations", "append", "turn", "memory"):
        assert level(findings, subject) == {"ok"}, findings[subject]
    assert level(examine(tmp_path, *options), "ttl") == {"warning"}
    assert "keys" not in findings


def test_keys_of_other_programs_are_recognised(tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str) -> None:
    document = {"context_id": "b", "created_at": "2025-01-01T00:00:00", "updated_at": "2025-01-01T00:00:00"}
    with valkey.Valkey.from_url(valkey_9.url) as client:
        client.set(f"{key_prefix}b", json.dumps(document))
        client.hset(f"{key_prefix}other:x", "id", "x")
        client.lpush(f"{key_prefix}list", "x")
        with SyncConversationContext(ValkeyStorage(valkey_9.url, key_prefix=key_prefix)) as context:
            context.add_to_history("ours", "user", "x")
        findings = examine(tmp_path, "--url", valkey_9.url, "--key-prefix", key_prefix, "-o", "ttl=60")
    assert sorted(each[0] for each in findings["keys"]) == ["note", "warning"]
    assert "2 keys" in next(text for name, text, _ in findings["keys"] if name == "warning")


@pytest.mark.parametrize(
    ("config", "word"), [("maxmemory-policy allkeys-lru", "allkeys-lru"), ("appendonly no", "appendonly")]
)
def test_a_server_that_may_lose_conversations_is_a_problem(
    tmp_path: Path, start_valkey: Callable[..., ValkeyServer], config: str, word: str
) -> None:
    server = start_valkey(config)
    findings = examine(tmp_path, "--url", server.url, "-o", "ttl=60", code=exits.PROBLEM)
    assert level(findings, "durability") == {"problem"}
    assert word in findings["durability"][0][1]
    assert level(findings, "operations") == {"ok"}


def test_a_server_that_is_down_is_explained(tmp_path: Path) -> None:
    findings = examine(tmp_path, "--url", "valkey://127.0.0.1:1", "-o", "deadline=1", code=exits.PROBLEM)
    assert level(findings, "connection") == {"problem"}
    assert "operations" not in findings


def test_a_wrong_password_is_explained_and_not_shown(tmp_path: Path, valkey_password: ValkeyServer) -> None:
    host = valkey_password.url.rpartition("@")[2]
    for url in (f"valkey://:wr0ng@{host}", f"valkey://{host}"):
        findings = examine(tmp_path, "--url", url, code=exits.PROBLEM)
        assert "password" in findings["connection"][0][1] + findings["connection"][0][2]
        assert "wr0ng" not in json.dumps(findings)
    assert level(examine(tmp_path, "--url", valkey_password.url, "-o", "ttl=60"), "connection") == {"ok"}


def test_a_name_that_does_not_resolve_is_explained(tmp_path: Path) -> None:
    findings = examine(tmp_path, "--url", "valkey://no-such-host.invalid", "-o", "deadline=2", code=exits.PROBLEM)
    assert level(findings, "connection") == {"problem"}


def test_missing_replicas_are_a_problem(tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str) -> None:
    options = ["--url", valkey_9.url, "--key-prefix", key_prefix, "-o", "min_replicas=1", "-o", "deadline=1"]
    findings = examine(tmp_path, *options, "--read-only", code=exits.PROBLEM)
    assert level(findings, "replicas") == {"problem"}


def test_durability_that_cannot_be_seen_is_unknown(tmp_path: Path, start_valkey: Callable[..., ValkeyServer]) -> None:
    server = start_valkey("appendonly no")
    with valkey.Valkey.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", "+@all", "-info", "-config|get")
    url = f"valkey://limited:pw@{HOST}:{server.port}"
    findings = examine(tmp_path, "--url", url, "--read-only")
    assert level(findings, "durability") == {"warning"}
    assert "unknown" in str(findings["durability"])
    assert "+info" in str(findings["durability"])


def test_a_replica_is_a_problem(tmp_path: Path, start_valkey: Callable[..., ValkeyServer]) -> None:
    primary = start_valkey()
    replica = start_valkey(f"replicaof {HOST} {primary.port}")
    findings = examine(tmp_path, "--url", replica.url, "--read-only", "-o", "deadline=2", code=exits.PROBLEM)
    assert "problem" in level(findings, "connection")
    assert "is a replica" in str(findings["connection"])
    with primary.client() as client:
        wait_until(lambda: client.info("replication")["connected_slaves"] == 1, "the replica is connected")
    findings = examine(tmp_path, "--url", primary.url, "--read-only", "-o", "ttl=60")
    assert findings["replicas"] == [("ok", "1 connected", "")]


def test_missing_permissions_are_reported(tmp_path: Path, start_valkey: Callable[..., ValkeyServer]) -> None:
    server = start_valkey()
    with valkey.Valkey.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", "+@all", "-scan")
    findings = examine(
        tmp_path, "--url", f"valkey://limited:pw@{HOST}:{server.port}", "-o", "ttl=60", code=exits.PROBLEM
    )
    assert level(findings, "keys") == {"warning"}
    assert level(findings, "conversations") == {"problem"}


def test_memory_that_is_nearly_full_is_a_problem(tmp_path: Path, start_valkey: Callable[..., ValkeyServer]) -> None:
    server = start_valkey("maxmemory 4mb", "maxmemory-policy noeviction")
    with valkey.Valkey.from_url(server.url) as client:
        number = 0
        while client.info("memory")["used_memory"] < 0.92 * 4 * 2**20:
            client.set(f"filler {number}", b"x" * 30_000)
            number += 1
    findings = examine(tmp_path, "--url", server.url, "--read-only", "-o", "ttl=60", code=exits.PROBLEM)
    assert level(findings, "memory") == {"problem"}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("valkey://:secret@example.com", "password and conversations"),
        ("valkey://example.com:6379/1", "conversations are sent"),
        ("valkeys://:secret@example.com", ""),
        ("rediss://example.com", ""),
        ("valkey://localhost", ""),
        ("valkey://127.0.0.1:6379", ""),
        ("unix:///run/valkey.sock", ""),
        ("valkey://[broken", ""),
    ],
)
def test_unencrypted_connections_to_other_machines_are_a_warning(url: str, words: str) -> None:
    texts = [finding.text for finding in _transport(url)]
    assert len(texts) == bool(words)
    assert all(words in text and "secret" not in text for text in texts)


def test_weaker_durability_is_reported(tmp_path: Path) -> None:
    for fsync in ("everysec", "no"):
        (tmp_path / "x").mkdir(exist_ok=True, mode=0o700)
        assert level(examine(tmp_path, "--storage-dir", "x", "-o", f"fsync={fsync}"), "durability") == {"note"}


def test_without_colours_it_is_lines_of_fields(disk_path: Path) -> None:
    ran = run("doctor", cwd=disk_path)
    assert all(len(row) == 4 for row in ran.rows[:-2])
    assert ran.out.endswith("No problems found.\n")
    shutil.rmtree(disk_path / "conversation_states")


def test_a_folder_whose_parents_do_not_exist_is_created_later(tmp_path: Path) -> None:
    ran = run("doctor", "--read-only", "--storage-dir", "a/b/c", cwd=tmp_path)
    assert ran.code == exits.OK
    assert "does not exist yet" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_files_of_killed_processes_are_reported(tmp_path: Path) -> None:
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.set_variable("alice", "x", 1)
    (tmp_path / "conversation_states" / "bob.jsonl.new").write_bytes(b"")
    assert "1 unfinished file of killed processes" in run("doctor", "--read-only", cwd=tmp_path).out


def test_reading_conversations_ends_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.cli.doctor._READ_FOR", 0.0)
    storage = InMemoryStorage()
    many(storage, 250)
    assert [finding.text for finding in _look_for_damage(storage)] == ["100 read in 0 s (of more), none damaged"]


def test_more_keys_are_checked_than_one_page_has(tmp_path: Path, valkey_9: ValkeyServer, key_prefix: str) -> None:
    prefix = f"{{{key_prefix}}}:"  # with a hash tag: then the keys beside a context's state begin with it too
    with valkey_9.client() as client, closing(ValkeyStorage(valkey_9.url, key_prefix=prefix)) as storage:
        many(storage, 10)
        client.mset({f"{prefix}{number}": "{}" for number in range(1500)})
    findings = examine(
        tmp_path, "--url", valkey_9.url, "--key-prefix", prefix, "-o", "ttl=60", "--read-only", code=exits.PROBLEM
    )
    assert [each[:2] for each in findings["keys"]] == [("note", "1,500 documents of AgentUp")]
    assert level(findings, "conversations") == {"problem"}
