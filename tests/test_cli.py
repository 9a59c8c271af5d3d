"""The command line as a whole: help, exit codes, pipes, signals, encodings; and its documentation."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import COMMAND, assert_one_line, environment, run, started, until
from stores import many

import agentstate.cli
from agentstate.cli import console, exits
from agentstate.cli.app import _Log, cli
from agentstate.context import SyncConversationContext
from agentstate.errors import StateError
from agentstate.storage.file import FileStorage

COMMANDS = [
    "chat", "cleanup", "clear", "completion", "doctor", "export", "import", "init", "list", "migrate", "show", "skill",
    "stats", "validate", "verify",
]  # fmt: skip


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder with a store of two conversations in the default place."""
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.get_or_create("alice", "u1")
        context.add_to_history("alice", "user", "tea é 漢 😀")
        context.set_variable("bob", "x", 1)
    return tmp_path


def test_all_commands_are_there() -> None:
    assert sorted(cli.commands) == COMMANDS


def test_help_is_given_without_arguments_and_for_every_command(tmp_path: Path) -> None:
    bare = run(cwd=tmp_path)
    assert bare.code == exits.USAGE
    asked = run("--help", cwd=tmp_path)
    assert asked.code == 0
    assert "Exit codes:" in asked.out
    assert "Exit codes:" in bare.err
    alone = run("skill", cwd=tmp_path)
    assert (alone.code, alone.out) == (exits.USAGE, "")
    assert "create" in alone.err
    for name in COMMANDS:
        text = run(name, "-h", cwd=tmp_path).out
        assert text.startswith(f"Usage: agentstate {name}")
        if name != "skill":
            assert "Examples:" in text


def test_the_version_is_printed(tmp_path: Path) -> None:
    ran = run("--version", cwd=tmp_path)
    assert re.fullmatch(r"agentstate \S.*\n", ran.out)
    assert ran.out == f"agentstate {agentstate.__version__}\n"


FAILURES: list[tuple[list[str], int, list[str]]] = [
    (["lsit"], exits.USAGE, ["lsit"]),
    (["list", "--sort", "mood"], exits.USAGE, ["mood"]),
    (["list", "--limit", "0"], exits.USAGE, ["--limit"]),
    (["show"], exits.USAGE, ["ID"]),
    (["show", ""], exits.USAGE, ["empty"]),
    (["show", "nobody"], exits.NOT_FOUND, ["'nobody'", "conversation_states"]),
    (["show", "x" * 1025], exits.USAGE, ["1,024"]),
    (["show", "alice", "--follow", "--interval", "nan"], exits.USAGE, ["nan"]),
    (["show", "alice", "--follow", "--interval", "1e300"], exits.USAGE, ["--interval"]),
    (["cleanup", "--max-age-hours", "nan"], exits.USAGE, ["nan"]),
    (["cleanup", "--max-age-hours", "inf"], exits.USAGE, ["inf"]),
    (["verify", "nobody"], exits.NOT_FOUND, ["'nobody'"]),
    (["clear", "--yes", "nobody"], exits.NOT_FOUND, ["'nobody'"]),
    (["clear", "alice"], exits.USAGE, ["--yes"]),
    (["list", "--storage", "memory"], exits.USAGE, ["memory"]),
    (["list", "--storage", "valkye"], exits.USAGE, ["valkey"]),
    (["list", "--storage", "redis"], exits.USAGE, ["did you mean 'valkey'"]),
    (["list", "--storage", "valkey"], exits.USAGE, ["--url valkey://localhost:6379", "agent_config.yaml"]),
    (["--storage", "file", "list"], exits.USAGE, ["--storage belongs after the command"]),
    (["list", "--storage-dir", "typo"], exits.NOT_FOUND, ["the folder typo does not exist"]),
    (["stats", "-o", "storage_dir=typo"], exits.NOT_FOUND, ["the folder typo does not exist"]),
    (["export", "--storage-dir", "typo"], exits.NOT_FOUND, ["the folder typo does not exist"]),
    (["list", "--storage-dir", "valkey://x"], exits.USAGE, ["--url"]),
    (["show", "Alice"], exits.NOT_FOUND, ["did you mean 'alice'"]),
    (["show", "alcie"], exits.NOT_FOUND, ["did you mean 'alice'"]),
    (["verify", "alicee"], exits.NOT_FOUND, ["did you mean 'alice'"]),
    (["clear", "--yes", "bobb"], exits.NOT_FOUND, ["did you mean 'bob'"]),
    (["export", "--id", "alicia", "x.jsonl"], exits.NOT_FOUND, ["did you mean 'alice'"]),
    (["cleanup"], exits.USAGE, ["--max-age-hours", "--yes"]),
    (["validate", "x.yaml", "--config", "y.yaml"], exits.USAGE, ["only one"]),
    (["migrate", "valkey:/:s3cret@host", "x"], exits.USAGE, ["valkey://"]),
    (["migrate", "conversation_states", "redis:s3cret@host"], exits.USAGE, ["valkey://"]),
    (["list", "--url", "http://x"], exits.USAGE, ["valkey://"]),
    (["list", "--url", "valkey://x", "--storage-dir", "y"], exits.USAGE, ["--storage-dir"]),
    (["list", "-o", "ttl"], exits.USAGE, ["NAME=VALUE"]),
    (["list", "-o", "ttl=-1"], exits.USAGE, ["ttl"]),
    (["list", "-o", "tll=1"], exits.USAGE, ["ttl"]),
    (["list", "--config", "nothing.yaml"], exits.USAGE, ["nothing.yaml: there is no such file"]),
    (["list", "--storage-dir", "file"], exits.UNAVAILABLE, ["file"]),
    (["list", "--url", "valkey://127.0.0.1:1", "-o", "deadline=3600"], exits.UNAVAILABLE, ["127.0.0.1:1", "refused"]),
    (["list", "--url", "unix:///no/socket", "-o", "deadline=3600"], exits.UNAVAILABLE, ["/no/socket", "No such file"]),
    (
        ["list", "--url", "valkey+cluster://127.0.0.1:1,127.0.0.1:2", "-o", "deadline=3600"],
        exits.UNAVAILABLE,
        ["127.0.0.1:1, 127.0.0.1:2", "refused"],
    ),
    (["export", "file"], exits.REFUSED, ["exists already"]),
    (["export", "--force", os.devnull], exits.REFUSED, ["not a regular file"]),
    (["export", "no/folder/x"], exits.PROBLEM, ["no/folder/x: No such file"]),
    (["export", "--id", "a", "--user", "b"], exits.USAGE, ["--user"]),
    (["export", "--json"], exits.USAGE, ["--json"]),
    (["import", "nothing.jsonl"], exits.NOT_FOUND, ["nothing.jsonl"]),
    (["migrate", "nothing", "new"], exits.NOT_FOUND, ["nothing"]),
    (["migrate", "file", "new"], exits.USAGE, ["not a folder", "agentstate import"]),
    (["completion"], exits.USAGE, ["Choose from: bash, zsh, fish"]),
    (["migrate", "conversation_states", "./conversation_states/"], exits.USAGE, ["same storage"]),
    (["migrate", "conversation_states"], exits.USAGE, ["TO"]),
    (["migrate", "conversation_states", "file"], exits.UNAVAILABLE, ["file"]),
    (["chat", "nothing:handler"], exits.NOT_FOUND, ["nothing"]),
    (["chat", "nothing.py:handler"], exits.NOT_FOUND, ["nothing.py"]),
    (["chat", "json:handler"], exits.NOT_FOUND, ["handler"]),
    (["chat", "json"], exits.USAGE, ["MODULE:HANDLER"]),
    (["skill", "create"], exits.USAGE, ["NAME"]),
    (["skill", "create", "x", "--no-state", "--storage", "file"], exits.USAGE, ["--no-state"]),
    (["skill", "create", "x", "--storage", "file", "--url", "valkey://x"], exits.USAGE, ["--url"]),
    (["skill", "create", "../x"], exits.USAGE, ["../x"]),
]


def test_every_failure_is_one_line_and_a_code(some: Path) -> None:
    (some / "file").write_text("not a folder")
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda failure: run(*failure[0], cwd=some), FAILURES)
    for (_, code, words), ran in zip(FAILURES, done, strict=True):
        assert_one_line(ran, code, *words)
        assert ran.out == ""
        assert "s3cret" not in ran.err
    assert sorted(path.name for path in some.iterdir()) == ["conversation_states", "file"]


def test_every_error_has_an_exit_code() -> None:
    def kinds(kind: type[StateError]) -> list[type[StateError]]:
        return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]

    for kind in kinds(StateError):
        assert exits.code_of(kind("x")) in exits.MEANINGS


def test_a_broken_configuration_is_one_line_with_the_number_of_problems(some: Path) -> None:
    (some / "agent_config.yaml").write_text("state:\n  backend: fiel\n  tll: 5\n  ttl: -1\n")
    assert_one_line(run("list", cwd=some), exits.USAGE, "agent_config.yaml:2", "and 2 more", "agentstate validate")


def test_conversations_can_be_listed_while_state_management_is_switched_off(some: Path) -> None:
    (some / "agent_config.yaml").write_text("state:\n  enabled: false\n")
    assert len(run("list", cwd=some).rows) == 2


def test_the_configuration_chooses_the_storage_and_options_override_it(some: Path) -> None:
    (some / "agent_config.yaml").write_text("state:\n  backend: file\n  storage_dir: ./elsewhere\n")
    (some / "other.yaml").write_text("state:\n  backend: file\n  storage_dir: ./conversation_states\n")
    assert run("list", cwd=some).rows == []
    assert len(run("list", "--config", "other.yaml", cwd=some).rows) == 2
    assert len(run("list", cwd=some, AGENTSTATE_CONFIG="other.yaml").rows) == 2
    assert len(run("list", "--storage-dir", "conversation_states", cwd=some).rows) == 2
    assert len(run("list", "-o", "storage_dir=conversation_states", cwd=some).rows) == 2


def test_a_folder_may_begin_with_a_tilde(some: Path) -> None:
    home = {"HOME": str(some), "USERPROFILE": str(some)}
    assert len(run("list", "--storage-dir", "~/conversation_states", cwd=some.parent, **home).rows) == 2
    (some / "agent_config.yaml").write_text("state:\n  backend: file\n  storage_dir: ~/conversation_states\n")
    ran = run("doctor", "--config", some / "agent_config.yaml", cwd=some.parent, **home)
    assert ["ok", "conversations", "2 read, none damaged", ""] in ran.rows
    assert any(row[1] == "folder" and str(some / "conversation_states") in row[2] for row in ran.rows[:-2])
    assert sorted(path.suffix for path in (some / "conversation_states").iterdir() if path.is_file()) == [".jsonl"] * 2


def test_no_password_is_printed(some: Path) -> None:
    url = "valkey://alice:s3cret!@127.0.0.1:1/0"
    for line in ("list", "show x", "stats", "doctor", "doctor --json", "export", "cleanup --yes", "clear -y x"):
        ran = run(*line.split(), "--url", url, "-o", "deadline=0.3", cwd=some)
        assert ran.code in (exits.UNAVAILABLE, exits.PROBLEM)
        assert "s3cret" not in ran.out + ran.err
    ran = run("migrate", "conversation_states", url, "--to-option", "deadline=0.3", cwd=some)
    assert ran.code == exits.UNAVAILABLE
    assert "s3cret" not in ran.out + ran.err
    ran = run("list", "--url", "valkey://alice:s3cret/!@127.0.0.1:1/0", cwd=some)
    assert ran.code != 0
    assert "s3cret" not in ran.out + ran.err
    (some / "agent_config.yaml").write_text(f"state:\n  backend: valkey\n  url: {url}\n")
    for command in (["validate"], ["validate", "--json"]):
        ran = run(*command, cwd=some)
        assert ran.code == 0
        assert "s3cret" not in ran.out + ran.err
    (some / "agent_config.yaml").write_text(
        "state:\n  backend: valkey\n  url: valkey://x\n  password: s3cret\n  tll: 5\n"
    )
    ran = run("validate", cwd=some)
    assert ran.code == exits.PROBLEM
    assert "s3cret" not in ran.out + ran.err


# --- pipes, signals, encodings --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of another kind")
class TestPipesSignalsAndEncodings:
    @pytest.mark.parametrize(
        "command", [["list"], ["list", "--json"], ["export"], ["validate", "--schema"], ["show", "long"]]
    )
    def test_a_closed_pipe_ends_the_command_quietly(self, tmp_path: Path, command: list[str]) -> None:
        with SyncConversationContext(FileStorage(tmp_path / "conversation_states", fsync="no")) as context:
            many(context.storage, 2000)
            context.extend_history("long", [{"role": "user", "content": "x" * 200}] * 2000)
        with started(*command, cwd=tmp_path) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(10)
            process.stdout.close()
            assert process.wait(30) in (exits.PIPE_CLOSED, 0)
            assert process.stderr.read() == ""

    def test_a_closed_output_is_one_line(self, some: Path) -> None:
        script = f"exec {' '.join(COMMAND)} list >&-"
        done = subprocess.run(
            ["sh", "-c", script], cwd=some, env=environment(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
    @pytest.mark.parametrize(
        "command", [["list"], ["export"], ["show", "alice"], ["show", "alice", "--json"], ["stats"]]
    )
    def test_a_full_disk_is_one_line(self, some: Path, command: list[str]) -> None:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, *command],
                cwd=some,
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == exits.PROBLEM
        assert done.stderr == "agentstate: cannot write the output: No space left on device\n"

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, exits.INTERRUPTED), (signal.SIGTERM, exits.TERMINATED)]
    )
    def test_a_signal_ends_a_follower_quietly(self, some: Path, number: signal.Signals, code: int) -> None:
        with started("show", "alice", "--follow", cwd=some) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            until(lambda: "tea" in process.stdout.readline())  # type: ignore[union-attr]
            process.send_signal(number)
            assert process.wait(10) == code
            assert process.stderr.read() == ""

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
    def test_every_encoding_works(self, some: Path, encoding: str) -> None:
        options = {"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        for command in (["show", "alice"], ["list"], ["stats"], ["doctor", "--read-only"], ["export"]):
            ran = run(*command, cwd=some, **options)
            assert ran.code == 0, ran
            assert "Traceback" not in ran.err
        shown = run("show", "alice", "--json", cwd=some, **options).json
        assert shown["history"][0]["content"] == "tea é 漢 😀"

    def test_what_was_stored_cannot_forge_output(self, some: Path) -> None:
        with SyncConversationContext(FileStorage(some / "conversation_states")) as context:
            evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \r over \u202e tfel"
            context.add_to_history("evil\n\x1b[31mid", evil, evil)
            context.set_variable("evil\n\x1b[31mid", evil, evil)
        for command in (["list"], ["show", "evil\n\x1b[31mid"], ["stats"], ["show", "\x1b[31mnobody"]):
            ran = run(*command, cwd=some)
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", ran.out + ran.err), ran
        assert len(run("list", cwd=some).rows) == 3


def test_without_click_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec;"
        "hide = lambda name, *a: None if name in ('click', 'rich') else real(name, *a);"
        "u.find_spec = hide; sys.modules['click'] = None; sys.modules['rich'] = None;"
        "from agentstate.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "agentstate: the command line needs click and rich: pip install click rich\n"


def test_importing_the_package_does_not_import_click() -> None:
    code = "import sys, agentstate.cli; print('click' in sys.modules or 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_log_records_are_one_harmless_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for everything in (False, True):
        handler = _Log(everything)
        text = "a name\n\x1b[31m of \u202e anybody"
        handler.emit(logging.LogRecord("agentstate", logging.WARNING, "", 1, text, (), None))
        printed = capsys.readouterr().err
        assert printed.endswith("a name\\n\\x1b[31m of \\u202e anybody\n")
        assert printed.count("\n") == 1


def test_verbose_logs_operations_without_contents(some: Path) -> None:
    ran = run("-vv", "show", "alice", "--json", cwd=some)
    assert ran.code == 0
    assert "get_state 'alice'" in ran.err
    assert "tea" not in ran.err


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(tmp_path: Path, shell: str) -> None:
    ran = run("completion", shell, cwd=tmp_path)
    assert ran.code == 0
    assert "_AGENTSTATE_COMPLETE" in ran.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("agentstate li", ["list"]),
        ("agentstate show al", ["alice"]),
        ("agentstate show --last 3 ", ["alice", "bob"]),
        ("agentstate clear alice b", ["bob"]),
        ("agentstate show --storage-dir nothing ", []),
        ("agentstate show --storage nothing ", []),
        ("agentstate list --layout ", ["log", "document"]),
    ],
)
def test_commands_options_and_ids_are_completed(some: Path, words: str, expected: list[str]) -> None:
    parts = words.split(" ")
    ran = run(cwd=some, _AGENTSTATE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(parts) - 1))
    assert ran.err == ""
    assert [line.partition(",")[2] for line in ran.out.split()] == expected


def test_ids_that_need_quotes_in_a_shell_are_not_completed(some: Path) -> None:
    with SyncConversationContext(FileStorage(some / "conversation_states")) as context:
        for name in (
            "user:x",
            "$(touch hacked)",
            "`touch hacked`",
            "a b",
            "*",
            "-n",
            "new\nplain,line",
            "a;b",
            "~",
            "世界",
        ):
            context.set_variable(name, "x", 1)
    ran = run(cwd=some, _AGENTSTATE_COMPLETE="bash_complete", COMP_WORDS="agentstate show ")
    assert ran.out.split("\n") == [f"plain,{name}" for name in ("alice", "bob", "user:x", "世界")] + [""]


def test_the_console_script_and_the_module_are_the_same(tmp_path: Path) -> None:
    assert callable(agentstate.cli.main)
    assert json.loads(run("validate", "--schema", cwd=tmp_path).out)["title"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (5e9, "5.0 GB"), (7e15, "7000.0 TB")],
)
def test_sizes_are_rounded_and_have_units(size: float, text: str) -> None:
    assert console.size_text(size) == text


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ("2026-01-31T13:00:00.5+01:00", "2026-01-31 12:00:00"),
        ("2026-01-31T12:00:00", "2026-01-31 12:00:00"),
        ("yester\x1b[31mday", "yester\\x1b[31mday"),
        ("", ""),
    ],
)
def test_times_are_printed_in_utc_and_other_text_with_escapes(stored: str, text: str) -> None:
    assert console.clock_text(stored) == text
