"""Commands in odd surroundings: full disks, file names of any bytes, other encodings, an early Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from commands import COMMAND, Ran, assert_one_line, environment, run, unmeasured
from stores import many

from agentstate.cli import exits
from agentstate.cli.lookup import not_found
from agentstate.cli.rows import rows_of
from agentstate.cli.store import Place
from agentstate.cli.verify import _damaged, _Seen
from agentstate.context import SyncConversationContext
from agentstate.errors import StateUnavailableError
from agentstate.operations import Operation, Query
from agentstate.storage.base import Settle
from agentstate.storage.file import FileStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.transfer import pages_of_ids

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own limits, files and locales")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""The environment of a process that takes all names of files for ASCII."""


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder with a store of two conversations in the default place."""
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.add_to_history("alice", "user", "tea é 漢 😀")
        context.set_variable("世界", "x", 1)
    return tmp_path


def agentup_document(context_id: str) -> str:
    time = "2026-01-31T12:00:00.000000"
    times = {"created_at": time, "updated_at": time}
    return json.dumps({"context_id": context_id, "user_id": None, **times, "history": [], "variables": {"y": 2}})


# --- no space ---------------------------------------------------------------------------------------------------------


def run_without_space(*arguments: str, cwd: Path) -> Ran:
    """Run a command for which every file is full before its first byte."""
    command = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *COMMAND, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=unmeasured(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@LINUX
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["init", "new/agent_config.yaml"], "new/agent_config.yaml"),
        (["skill", "create", "tea", "--storage", "file", "--directory", "new"], "new/tea.py"),
        (["export", "new.jsonl"], "new.jsonl"),
        (["export", "new.jsonl.gz"], "new.jsonl.gz"),
    ],
)
def test_a_file_that_has_no_space_is_named_and_not_left_half_written(
    some: Path, arguments: list[str], named: str
) -> None:
    assert_one_line(run_without_space(*arguments, cwd=some), exits.PROBLEM, f"{named}: File too large")
    assert [path for path in some.rglob("*") if path.is_file() and path.parent.name != "conversation_states"] == [
        path for path in some.rglob("*") if ".locks" in path.parts and path.is_file()
    ]
    assert run(*arguments, cwd=some).code == 0


@LINUX
def test_an_exit_code_does_not_depend_on_whether_stderr_can_be_written(some: Path) -> None:
    buffered = {**unmeasured(), "PYTHONUNBUFFERED": ""}
    for arguments, code in ((["list", "--frob"], exits.USAGE), (["show", "nobody"], exits.NOT_FOUND), (["list"], 0)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], cwd=some, env=buffered, stderr=full, stdout=subprocess.DEVNULL, check=False
            )
        assert done.returncode == code, arguments


# --- odd names, other encodings -------------------------------------------------------------------------------------


@LINUX
@pytest.mark.parametrize("variables", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_file_names_of_any_bytes_are_accepted(some: Path, variables: dict[str, str]) -> None:
    store = os.fsencode(some / "conversation_states")
    for name in (b"\xff.json", b"\xff.jsonl", b"\xff.txt"):
        with open(store + b"/" + name, "xb"):
            pass
    for command in (["list"], ["stats"], ["verify"], ["export"], ["cleanup", "--yes"], ["doctor"]):
        ran = run(*command, cwd=some, **variables)
        assert ran.code == 0, ran
        assert "Traceback" not in ran.err
    assert "3 files of other programs" in run("doctor", cwd=some, **variables).out


@LINUX
def test_conversations_are_the_same_ones_in_a_locale_of_ascii(some: Path) -> None:
    left_behind = "conversation_states/été.json".encode()
    with open(os.fsencode(some) + b"/" + left_behind, "w") as file:
        file.write(agentup_document("été"))
    ids = {json.loads(line)["context_id"] for line in run("list", "--json", cwd=some, **ASCII).out.splitlines()}
    assert ids == {"alice", "世界", "été"}
    archive = run("export", cwd=some, **ASCII)
    assert archive.code == 0
    assert run("import", "--storage-dir", "new", cwd=some, stdin=archive.out).code == 0
    assert run("show", "été", "--json", "--storage-dir", "new", cwd=some).json["variables"] == {"y": 2}
    script = (
        "from agentstate import *; context = SyncConversationContext(FileStorage());"
        "context.set_variable('\\xe9t\\xe9', 'z', 3); print(context.get_variables('\\xe9t\\xe9'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=some, env=environment(**ASCII), capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'y': 2, 'z': 3}\n"
    assert run("show", "été", "--json", cwd=some).json["variables"] == {"y": 2, "z": 3}


@LINUX
def test_a_folder_that_this_locale_cannot_name_is_a_mistake_in_the_configuration(some: Path) -> None:
    (some / "agent_config.yaml").write_text('state: {storage_dir: "./\\u00e9t\\u00e9"}\n')
    assert_one_line(run("list", cwd=some, **ASCII), exits.USAGE, "storage_dir", "ascii")
    assert run("list", cwd=some).code == 0


# --- what cannot be read --------------------------------------------------------------------------------------------


def test_a_document_of_another_program_is_reported_and_not_repaired(some: Path) -> None:
    assert run("clear", "--yes", "世界", cwd=some).code == 0
    (some / "conversation_states" / "alice.json").write_text(agentup_document("alice"))
    log = some / "conversation_states" / "alice.jsonl"
    before = log.read_bytes()
    for command in (["list"], ["stats"], ["export"]):
        assert run(*command, cwd=some).code == exits.REFUSED
    for command in (["verify"], ["verify", "--repair"], ["verify", "--repair", "alice"]):
        ran = run(*command, cwd=some)
        assert ran.code == exits.CORRUPTED
        assert "repaired" not in ran.out
    assert log.read_bytes() == before
    assert not list(log.parent.glob("*.damaged*"))


def test_a_second_repair_keeps_the_first_original(tmp_path: Path) -> None:
    path = tmp_path / "conversation_states" / "alice.jsonl"
    damaged = []
    for number in range(3):
        with SyncConversationContext(FileStorage(path.parent)) as context:
            for text in ("one", "two"):
                context.add_to_history("alice", "user", f"{text} {number}")
        path.write_bytes(path.read_bytes().replace(b"one %d" % number, b"0ne %d" % number))
        damaged.append(path.read_bytes())
        assert run("verify", "--repair", cwd=tmp_path).code == 0
    kept = [path.with_name(f"alice.jsonl.damaged{end}") for end in ("", "2", "3")]
    assert [each.read_bytes() for each in kept] == damaged


@LINUX
@pytest.mark.parametrize("layout", ["log", "document"])
def test_folders_in_place_of_files_are_reported_and_do_not_hide_the_others(tmp_path: Path, layout: str) -> None:
    store = tmp_path / "store"
    with SyncConversationContext(FileStorage(store, layout=layout)) as context:
        for name in ("a", "z"):
            context.add_to_history(name, "user", "hello")
    suffix = "jsonl" if layout == "log" else "json"
    (store / f"folder.{suffix}").mkdir()
    os.mkfifo(store / f"fifo.{suffix}")
    (store / f"link.{suffix}").symlink_to(f"a.{suffix}")
    options = ["--storage-dir", "store", "--layout", layout]
    ran = run("list", *options, cwd=tmp_path)
    assert {row[0] for row in ran.rows} == {"a", "z", "folder", "fifo", "link"}
    assert ran.code in (exits.PROBLEM, exits.UNAVAILABLE)
    assert len(ran.err.splitlines()) == 3
    assert run("stats", *options, "--json", cwd=tmp_path).json["contexts"] == 2
    verified = run("verify", "--repair", *options, "--json", cwd=tmp_path)
    assert verified.code == exits.CORRUPTED
    assert (verified.json["conversations"], len(verified.json["damaged"])) == (2, 3)
    assert run("migrate", "store", "new", "--from-layout", layout, "--json", cwd=tmp_path).json["copied"] == 2
    assert run("cleanup", "--max-age-hours", "0", *options, "--json", cwd=tmp_path).json == {"deleted": 2}


def test_a_damaged_document_is_not_repaired(tmp_path: Path) -> None:
    (tmp_path / "conversation_states").mkdir()
    (tmp_path / "conversation_states" / "broken.json").write_text('{"context_id": "broken", "hist')
    ran = run("verify", "--repair", cwd=tmp_path)
    assert ran.code == exits.CORRUPTED
    assert "repair it by hand" in ran.err
    assert (tmp_path / "conversation_states" / "broken.json").read_text() == '{"context_id": "broken", "hist'


class Away(InMemoryStorage):
    """A store that is lost between the listing and the reading."""

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        for index, operation in enumerate(operations):
            if isinstance(operation, Query):
                settle(index, StateUnavailableError("the server went away"))
            else:
                super().execute([operation], lambda _, outcome, index=index: settle(index, outcome))  # type: ignore[misc]


def test_a_store_that_becomes_unreachable_is_reported_once() -> None:
    with closing(Away()) as storage:
        many(storage, 10)
        with pytest.raises(StateUnavailableError, match="went away"):
            list(rows_of(storage))
        with pytest.raises(StateUnavailableError, match="went away"):
            list(_damaged(storage, [], _Seen()))


class Unlistable(InMemoryStorage):
    """A store whose listing fails."""

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        for index in range(len(operations)):
            settle(index, StateUnavailableError("the server went away"))


def test_an_unknown_id_is_an_error_without_a_hint_where_ids_cannot_be_listed() -> None:
    with closing(Unlistable()) as storage:
        error = not_found(storage, Place("mine", {}), "alice")
    assert str(error) == "there is no conversation 'alice' in the storage 'mine'"


def test_an_unknown_id_is_compared_with_a_limited_number_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(InMemoryStorage()) as storage:
        many(storage, 2000)
        listed = list(pages_of_ids(storage))
        near = listed[0][0][:-1] + "x"
        assert "did you mean" in str(not_found(storage, Place("mine", {}), near))
        monkeypatch.setattr("agentstate.cli.lookup._MOST", 0)
        assert "did you mean" not in str(not_found(storage, Place("mine", {}), near))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("Alice", "alice"), ("alicee", "alice"), ("ALICIA", "alice"), ("bob", "user:bob"), ("x" * 40, None), ("", None)],
)
def test_the_id_that_was_meant_is_found(typed: str, meant: str | None) -> None:
    with closing(InMemoryStorage()) as storage:
        for name in ("alice", "user:bob", "conversation:4711"):
            SyncConversationContext(storage).get_or_create(name)
        error = str(not_found(storage, Place("mine", {}), typed))
    assert error.partition(" (did you mean ")[2] == (f"{meant!r}?)" if meant else "")


# --- Ctrl-C before the command has begun ----------------------------------------------------------------------------


def test_ctrl_c_while_the_command_is_loaded_prints_no_traceback(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'agentstate.cli.doctor':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from agentstate.cli import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (exits.INTERRUPTED, "", "")
