"""Commands on a real terminal: questions, colours, bars, and what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, environment, plain, run, until
from stores import fill, many

from agentstate.cli import exits
from agentstate.config import load_config
from agentstate.context import SyncConversationContext
from agentstate.storage.file import FileStorage

if sys.platform == "win32":
    pytest.skip("no pseudo-terminals", allow_module_level=True)

import pexpect


@contextmanager
def terminal(*arguments: str, cwd: Path, columns: int = 100, **variables: str) -> Iterator[Any]:
    """A command that runs on a terminal of its own; `ended` waits for it and gives all it showed and its code."""
    child = pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], *arguments], cwd=str(cwd), env=environment(**variables), encoding="utf-8",
        codec_errors="replace", dimensions=(40, columns), timeout=30, echo=True,
    )  # fmt: skip
    with closing(child):
        yield child


def ended(child: Any) -> tuple[str, int]:
    """All that was shown since the last expectation, and the exit code."""
    child.expect(pexpect.EOF)
    text = child.before
    child.wait()
    return text, child.exitstatus


def interrupt_at_prompt(child: Any) -> None:
    """Press Ctrl-C once the command waits for an answer: one that comes between the prompt and the reading of the
    answer is noticed only after the answer. (A process that does one thing sleeps only where it reads.)"""
    stat = Path(f"/proc/{child.pid}/stat")
    if stat.exists():
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
    child.sendintr()


def shown(*arguments: str, cwd: Path, **options: Any) -> tuple[str, int]:
    with terminal(*arguments, cwd=cwd, **options) as child:
        return ended(child)


@pytest.fixture
def some(tmp_path: Path) -> Path:
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.get_or_create("alice", "u1")
        context.add_to_history("alice", "user", "tea é 漢 😀")
        context.add_to_history("alice", "assistant", "\x1b[31mred\x1b[0m [bold]markup[/bold] :smile:")
        context.set_variable("alice", "[red]x[/red]", "[bold]y[/bold]")
        context.set_variable("x" * 120, "v", 1)
    return tmp_path


# --- how it looks ---------------------------------------------------------------------------------------------------


def test_a_list_is_a_table_that_shows_all_of_an_id(some: Path) -> None:
    text, code = shown("list", cwd=some)
    assert code == 0
    assert "\x1b[1m" in text
    assert "conversation" in plain(text)
    assert "ago" in plain(text)
    assert plain(text).replace("\n", "").replace(" ", "").count("x") >= 120


def test_the_pages_of_a_long_list_have_the_same_columns(tmp_path: Path) -> None:
    with closing(FileStorage(tmp_path / "conversation_states", fsync="no")) as storage:
        many(storage, 1200)
    text, code = shown("list", "--sort", "id", cwd=tmp_path)
    lines = [line for line in plain(text).splitlines() if " ago" in line]
    assert code == 0
    assert len(lines) == 1200
    assert plain(text).count("conversation ") == 1
    assert len({len(line.rstrip()) for line in lines}) == 1  # all columns stand where they stood


def test_stored_markup_and_escapes_are_printed_as_text(some: Path) -> None:
    text, code = shown("show", "alice", cwd=some)
    assert code == 0
    for words in ("tea é 漢 😀", r"\x1b[31mred", "[bold]markup[/bold] :smile:", "[red]x[/red]", '"[bold]y[/bold]"'):
        assert words in plain(text)
    assert "\x1b[31mred" not in text


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_left_out(some: Path, variables: dict[str, str]) -> None:
    for command in (["list"], ["show", "alice"], ["stats"], ["doctor", "--read-only"]):
        text, code = shown(*command, cwd=some, **variables)
        assert code == 0
        assert "\x1b[3" not in text
        assert "\x1b[1;3" not in text


def test_a_terminal_without_unicode_gets_ascii(some: Path) -> None:
    options = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for command in (
        ["list"],
        ["show", "alice"],
        ["stats"],
        ["doctor", "--read-only"],
        ["migrate", "conversation_states", "new"],
    ):
        text, code = shown(*command, cwd=some, **options)
        assert code == 0, text
        assert text.isascii()


@pytest.mark.parametrize("columns", [20, 40, 300])
def test_every_width_works(some: Path, columns: int) -> None:
    for command in (["list"], ["show", "alice"], ["stats"], ["validate", "--keys"], ["--help"]):
        text, code = shown(*command, cwd=some, columns=columns)
        assert code == 0, text
        assert "Traceback" not in text


def test_stats_and_doctor_are_drawn(some: Path, disk_path: Path) -> None:
    text, _ = shown("stats", cwd=some)
    assert "█" in text
    text, code = shown("doctor", cwd=disk_path)
    assert code == 0
    assert "✔" in text
    assert "No problems found." in plain(text)


def test_an_import_shows_a_bar_with_rate_and_remaining_time(tmp_path: Path) -> None:
    with closing(FileStorage(tmp_path / "conversation_states", fsync="no")) as storage:
        many(storage, 3000)
    text, code = shown("migrate", "conversation_states", "new", "--to-option", "fsync=no", cwd=tmp_path)
    assert code == 0
    assert "migrating" in plain(text)
    assert "/3000" in plain(text)
    assert "/s" in plain(text)
    assert "copied and verified" in plain(text)
    text, code = shown("export", "x.jsonl", cwd=tmp_path)
    assert "exporting" in plain(text)
    text, code = shown("import", "x.jsonl", cwd=tmp_path)
    assert "importing" in plain(text)
    assert "skipped (equal)" in plain(text)


def test_a_migration_can_be_started_again_after_ctrl_c(tmp_path: Path) -> None:
    with closing(FileStorage(tmp_path / "conversation_states", fsync="no")) as storage:
        many(storage, 1000)
        fill(storage, contexts=0, long=5000)
    with terminal("migrate", "conversation_states", "new", cwd=tmp_path) as child:
        child.expect("/s")
        child.sendintr()
        text, code = ended(child)
    assert code in (exits.INTERRUPTED, 0)
    assert "Traceback" not in text
    assert run("migrate", "conversation_states", "new", cwd=tmp_path).code == 0
    assert run("migrate", "conversation_states", "new", "--json", cwd=tmp_path).json["unchanged"] == 1004


@pytest.mark.parametrize(
    ("columns", "left_out"), [(120, ""), (100, "expires"), (60, "owner, revision, created, expires")]
)
def test_a_list_leaves_out_columns_that_do_not_fit(tmp_path: Path, columns: int, left_out: str) -> None:
    long = "user:bob-with-an-id-of-a-usual-length"
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        for name in ("alice", long):
            context.get_or_create(name, "some-owner")
    text, code = shown("list", cwd=tmp_path, columns=columns)
    assert code == 0
    _, heading, after = plain(text).partition("conversation ")
    lines = (heading + after).splitlines()
    assert max(map(len, lines[:4])) <= columns
    titles = ["conversation", "owner", "messages", "revision", "updated", "created", "expires"]
    assert lines[0].split() == [title for title in titles if title not in left_out]
    assert {line.split()[0] for line in lines[2:4]} == {"alice", long}
    assert (f"too narrow: {left_out}." in after) == bool(left_out)


def test_a_list_breaks_ids_where_a_terminal_is_very_narrow(some: Path) -> None:
    text, code = shown("list", cwd=some, columns=40)
    assert code == 0
    assert plain(text).count("x") >= 120


HOSTILE = "\x9b31m \u202e rtl \u200bzero \U000e0041tag \x7f \u2028 end"


@pytest.mark.parametrize("arguments", [("show", "x"), ("show", "x", "--json"), ("export",), ("list",)])
def test_control_and_invisible_characters_do_not_reach_the_terminal(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.add_to_history("x", "user", HOSTILE, {HOSTILE: HOSTILE})
        context.set_variable("x", HOSTILE, HOSTILE)
        context.get_or_create("id" + HOSTILE, HOSTILE)
    text, code = shown(*arguments, cwd=tmp_path)
    assert code == 0
    assert not re.search("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\U000e0000-\U000e0fff]", text)


def test_emoji_and_scripts_that_need_joiners_are_shown(tmp_path: Path) -> None:
    said = "👩\u200d💻 ❤\ufe0f\u200d🔥 می\u200cخواهم"
    with SyncConversationContext(FileStorage(tmp_path / "conversation_states")) as context:
        context.add_to_history("x", "user", said)
    for arguments in (("show", "x"), ("show", "x", "--json")):
        assert said in shown(*arguments, cwd=tmp_path)[0]


def test_compressed_output_is_not_written_to_a_terminal(some: Path) -> None:
    text, code = shown("export", "-z", cwd=some)
    assert code == exits.USAGE
    assert "\x1f" not in text


# --- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 1), ("n", exits.PROBLEM, 2), ("", exits.PROBLEM, 2)])
def test_clear_asks_first(some: Path, answer: str, code: int, left: int) -> None:
    with terminal("clear", "alice", cwd=some) as child:
        child.expect(r"Delete 'alice' \(2 messages\) from ./conversation_states\? \[y/N\]")
        child.sendline(answer)
        assert ended(child)[1] == code
    assert len(run("list", cwd=some).rows) == left


def test_clear_does_not_ask_about_what_does_not_exist(some: Path) -> None:
    text, code = shown("clear", "alicia", cwd=some)
    assert code == exits.NOT_FOUND
    assert "Delete" not in text
    assert "did you mean 'alice'?" in text


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", exits.PROBLEM, 2)])
def test_cleanup_asks_first(some: Path, answer: str, code: int, left: int) -> None:
    with terminal("cleanup", "--max-age-hours", "0", cwd=some) as child:
        child.expect(r"Delete 2 conversations not written to for 0 hours from ./conversation_states\? \[y/N\]")
        child.sendline(answer)
        text, ended_with = ended(child)
    assert ended_with == code
    assert ("Nothing was changed." in text) == bool(code)
    assert len(run("list", cwd=some).rows) == left


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--max-age-hours", "0", "--yes"]])
def test_cleanup_does_not_ask_where_it_need_not(some: Path, arguments: list[str]) -> None:
    text, code = shown("cleanup", *arguments, cwd=some)
    assert code == 0
    assert "[y/N]" not in text


def test_init_asks_again_for_an_answer_that_is_wrong(tmp_path: Path) -> None:
    with terminal("init", "--storage", "valkey", cwd=tmp_path) as child:
        for wrong in ("http://server", "valkey://server/x", "valkey://server:port"):
            child.expect("Valkey URL")
            child.sendline(wrong)
            child.expect("Error: ")
        child.expect("Valkey URL")
        child.sendline("valkey://server")
        child.expect("Key prefix")
        child.sendline("{x")
        child.expect("Error: `key_prefix` must be")
        child.expect("Key prefix")
        child.sendline("x:")
        child.expect("Seconds")
        child.sendline("soon")
        child.expect("Error: `ttl` must be")
        child.sendline("60")
        text, code = ended(child)
    assert code == 0, text
    config = load_config(tmp_path / "agent_config.yaml")
    assert (config.url, config.key_prefix, config.ttl) == ("valkey://server", "x:", 60)


@pytest.mark.parametrize(
    "arguments",
    [
        ("init", "--url", "http://server"),
        ("init", "--storage", "valkey", "--ttl", "soon"),
        ("skill", "create", "tea", "--url", "http://server"),
    ],
)
def test_wrong_options_are_reported_before_anything_is_asked(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    text, code = shown(*arguments, cwd=tmp_path)
    assert code == exits.USAGE
    assert text.startswith("agentstate: `")
    assert list(tmp_path.iterdir()) == []


def test_init_asks_for_what_is_not_given(tmp_path: Path) -> None:
    with terminal("init", cwd=tmp_path) as child:
        child.expect("Storage backend")
        child.sendline("valkei")
        child.expect("Storage backend")
        child.sendline("valkey")
        child.expect("Valkey URL")
        child.sendline("valkey://server:6380")
        child.expect("Key prefix")
        child.sendline("")
        child.expect("Seconds")
        child.sendline("7200")
        text, code = ended(child)
    assert code == 0, text
    config = load_config(tmp_path / "agent_config.yaml")
    assert (config.url, config.ttl, config.key_prefix) == ("valkey://server:6380", 7200, "agentup:state:")


def test_init_asks_for_nothing_that_was_given(tmp_path: Path) -> None:
    with terminal("init", "--url", "valkey://server:6380", cwd=tmp_path) as child:
        child.expect("Key prefix")
        child.sendline("mine:")
        child.expect("Seconds")
        child.sendline("")
        text, code = ended(child)
    assert code == 0, text
    assert "Valkey URL" not in text
    config = load_config(tmp_path / "agent_config.yaml")
    assert (config.url, config.ttl, config.key_prefix) == ("valkey://server:6380", None, "mine:")


@pytest.mark.parametrize("leave", [interrupt_at_prompt, pexpect.spawn.sendeof])
def test_init_can_be_left(tmp_path: Path, leave: Callable[[Any], None]) -> None:
    with terminal("init", cwd=tmp_path) as child:
        child.expect("Storage backend.*: ")
        leave(child)
        text, code = ended(child)
    assert code == exits.INTERRUPTED
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_skill_create_asks_as_agentup_does(tmp_path: Path) -> None:
    with terminal("skill", "create", cwd=tmp_path) as child:
        child.expect("Skill name")
        child.sendline("1 bad name")
        child.expect("Skill name")
        child.sendline("Conversation Memory Assistant")
        child.expect("Enable state management")
        child.sendline("y")
        child.expect("Storage backend")
        child.sendline("valkey")
        child.expect("Valkey URL")
        child.sendline("")
        text, code = ended(child)
    assert code == 0, text
    assert "url" in (tmp_path / "agent_config.yaml").read_text()
    assert "@stateful" in (tmp_path / "conversation_memory_assistant.py").read_text()


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_files_and_ids_with_colons(some: Path) -> None:
    with SyncConversationContext(FileStorage(some / "conversation_states")) as context:
        context.set_variable("user:alice", "x", 1)
    commands = some / "bin"
    commands.mkdir()
    (commands / "agentstate").write_text(f'#!/bin/sh\nexec {sys.executable} -m agentstate "$@"\n')
    (commands / "agentstate").chmod(0o755)
    variables = environment(PATH=f"{commands}{os.pathsep}{os.environ['PATH']}", PS1="$ ", TERM="dumb")
    shell = pexpect.spawn("bash", ["--norc", "--noprofile"], cwd=str(some), env=variables, encoding="utf-8", timeout=30)
    with closing(shell):
        shell.sendline('eval "$(agentstate completion bash)"; echo ready')
        shell.expect("\r\nready")
        for typed, completed in (
            ("agentstate mig", "migrate "),
            ("agentstate show al", "alice "),
            ("agentstate show us", "user:alice "),
            ("agentstate show user:", "user:alice "),
            ("agentstate show user:a", "user:alice "),
            ("agentstate list --sort m", "messages "),
            ("agentstate list --storage-dir conv", "conversation_states/"),
            ("agentstate migrate conv", "conversation_states/"),
        ):
            shell.send(f"{typed}\t")
            shell.expect_exact(typed.rpartition(" ")[0] + " " + completed)
            shell.sendcontrol("u")


# --- chat -----------------------------------------------------------------------------------------------------------

HANDLER = """
from agentstate import stateful

@stateful
async def bot(task, context, context_id):
    if task.text == "fail":
        raise ValueError("it failed")
    if task.text == "wait":
        import asyncio
        print("waiting", flush=True)
        await asyncio.sleep(60)
    await context.add_to_history(context_id, "user", task.text)
    return f"answer {await context.count_history(context_id)}"
"""


def test_a_conversation_in_the_terminal_goes_on_after_errors_and_interrupts(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(HANDLER)
    with terminal("chat", "bot:bot", cwd=tmp_path) as child:
        child.expect("Ctrl-D to end it")
        child.expect("you> ")
        child.sendline("hello é")
        child.expect("answer 1")
        child.expect("you> ")
        child.sendline("")
        child.expect("you> ")
        child.sendline("fail")
        child.expect("agentstate: the handler failed: ValueError: it failed")
        child.expect("you> ")
        child.sendline("wait")
        child.expect("waiting\r\n")
        child.sendintr()
        child.expect("interrupted")
        child.expect("you> ")
        child.sendline("again")
        child.expect("answer 2")
        child.expect("you> ")
        child.sendeof()
        text, code = ended(child)
    assert code == 0
    assert "Goodbye!" in text
    history = run("show", "terminal", "--json", cwd=tmp_path).json["history"]
    assert [message["content"] for message in history] == ["hello é", "again"]


def test_ctrl_c_at_the_prompt_ends_the_conversation(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(HANDLER)
    with terminal("chat", "bot:bot", cwd=tmp_path) as child:
        child.expect("you> ")
        interrupt_at_prompt(child)
        text, code = ended(child)
    assert code == 0
    assert "Goodbye!" in text
    assert "Traceback" not in text


def test_follow_on_a_terminal(some: Path) -> None:
    with terminal("show", "alice", "--follow", "--interval", "0.05", cwd=some) as child:
        child.expect("tea")
        with SyncConversationContext(FileStorage(some / "conversation_states")) as context:
            context.add_to_history("alice", "user", "from elsewhere")
        child.expect("from elsewhere")
        child.sendintr()
        text, code = ended(child)
    assert code == exits.INTERRUPTED
    assert "Traceback" not in text


def test_a_hangup_ends_the_command(some: Path) -> None:
    with terminal("show", "alice", "--follow", cwd=some) as child:
        child.expect("tea")
        child.kill(signal.SIGHUP)
        text, code = ended(child)
    assert code == exits.TERMINATED
    assert "Traceback" not in text
