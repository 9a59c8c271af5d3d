"""docs/command-line.md: it is generated from the commands, and every option in it works."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import Ran, environment, run

from agentstate.cli import exits
from agentstate.context import SyncConversationContext
from agentstate.storage.file import FileStorage

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "command-line.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no docs beside the tests")

CALLS = {
    "import": "import archive.jsonl",
    "chat": "chat bot.py:bot hello",
    "cleanup": "cleanup --max-age-hours 1000",
    "clear": "clear --yes alice",
    "export": "export new.jsonl",
    "init": "init new.yaml",
    "migrate": "migrate conversation_states copy",
    "show": "show alice",
    "skill create": "skill create tea",
}
"""How a command is called with an option, if not by its name alone."""

NOWHERE = "valkey://127.0.0.1:1"

CALLS_WITH = {
    ("init", "--key-prefix"): "init new.yaml --storage valkey",
    ("migrate", "--from-key-prefix"): f"migrate {NOWHERE} copy",
    ("migrate", "--to-key-prefix"): f"migrate conversation_states {NOWHERE}",
}
"""How it is called with one option."""

VALUES = {
    "FILE": "agent_config.yaml", "NAME": "file", "URL": NOWHERE, "DIR": "conversation_states", "TEXT": "x:",
    "NAME=VALUE": "max_history=5", "ID": "alice", "USER": "u1", "HOURS": "1000", "NUMBER": "3", "SECONDS": "60",
}  # fmt: skip
"""A value of each kind."""


def tables() -> dict[str, list[tuple[str, str]]]:
    """The options in each section of the page, each with the kind of its value."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        rows = re.findall(r"^\| ((?:`-[^`]+`(?:, )?)+)(.*?) \| ", section, re.MULTILINE)
        options = [(name, value.strip()) for names, value in rows for name in re.findall("`(.+?)`", names)]
        found[section.partition("\n")[0]] = options, "(#options-of-the-storage)" in section
    shared = found["Options of the storage"][0]
    return {title: options + (shared if has_shared else []) for title, (options, has_shared) in found.items()}


def calls() -> list[list[str]]:
    """The arguments of a call for every option of every command."""
    made = []
    for title, options in tables().items():
        if not title.startswith("agentstate "):
            continue
        command = title.removeprefix("agentstate ")
        for name, kind in options:
            if name in ("-f", "--follow"):  # does not end: tests/test_cli_contexts.py
                continue
            call = CALLS_WITH.get((command, name), CALLS.get(command, command)).split()
            if name == "--key-prefix" and command != "init":
                call += ["--url", NOWHERE]
            value = VALUES.get(kind, kind.partition(" or ")[0].strip("`"))
            made.append([*call, name, *([value] if kind else [])])
    return made


def test_the_page_is_what_the_commands_say() -> None:
    command = [sys.executable, ROOT / "docs" / "make" / "command_line.py"]
    made = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    assert PAGE.read_text() == made, "run: python docs/make/command_line.py > docs/command-line.md"


def test_every_option_in_the_page_works(tmp_path: Path) -> None:
    def tried(number: int, arguments: list[str]) -> Ran:
        folder = tmp_path / str(number)
        with SyncConversationContext(FileStorage(folder / "conversation_states", fsync="no")) as context:
            context.add_to_history("alice", "user", "hello")
        (folder / "agent_config.yaml").write_text("state:\n  backend: file\n")
        (folder / "bot.py").write_text("def bot(task):\n    return 'hello'\n")
        (folder / "archive.jsonl").write_text('{"context_id": "bob"}\n')
        return run(*arguments, cwd=folder)

    all_calls = calls()
    assert len(all_calls) > 120
    with ThreadPoolExecutor(4) as pool:
        for arguments, ran in zip(all_calls, pool.map(tried, range(len(all_calls)), all_calls), strict=True):
            connects = NOWHERE in arguments and arguments[0] not in ("init", "skill")
            allowed = [exits.UNAVAILABLE if connects else exits.OK]
            if arguments[0] == "doctor":  # it reports a server that is away, and the disk that this test runs on
                allowed = [exits.OK, exits.PROBLEM]
            assert ran.code in allowed, (arguments, ran)


def test_every_option_is_in_the_page(tmp_path: Path) -> None:
    documented = tables()
    for title, options in documented.items():
        if title.startswith("agentstate "):
            text = run(*title.split()[1:], "--help", cwd=tmp_path).out
            names = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text.partition("Options:")[2]))
            described = set(re.findall(r"^  (-.+?)(?:  |$)", text.partition("Options:")[2], re.MULTILINE))
            shown = {name for line in described for name in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)}
            assert shown <= names
            assert shown - {"-h", "--help"} == {name for name, _ in options}
