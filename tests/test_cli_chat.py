"""chat: handlers of every kind, and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import assert_one_line, run, started

from agentstate.cli import exits
from agentstate.cli.chat import Task

HANDLERS = """
import asyncio
from agentstate import register_handler, stateful

@register_handler("registered name")
@stateful
def blocking(task, context, context_id):
    context.add_to_history(context_id, "user", task.message.parts[0].text)
    return f"{context.count_history(context_id)} in {context_id}"

@stateful
async def awaitable(task, context, context_id):
    await context.add_to_history(context_id, "user", task["text"])
    return {"messages": await context.count_history(context_id)}

@stateful
def pieces(task, context, context_id):
    for word in ("one ", "two ", 3):
        yield word

@stateful
async def async_pieces(task, context, context_id):
    for word in ("a", "b", {"c": 1}):
        await asyncio.sleep(0)
        yield word

@stateful(user_id=lambda task: task.metadata.get("user_id"))
async def private(task, context, context_id):
    return (await context.get_or_create(context_id)).user_id

def plain(task):
    return task.get("input").upper()

def silent(task):
    return None

def failing(task):
    raise ZeroDivisionError("by zero")

def offline(task):
    raise ConnectionResetError(104, "the model is away")

def offline_pieces(task):
    yield "one "
    raise BrokenPipeError(32, "the model is away")

def leaving(task):
    raise SystemExit(9)

class Assistant:
    @stateful
    def method(self, task, context, context_id):
        return "a method"

assistant = Assistant()
number = 5
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "__init__.py").write_text("")
    (tmp_path / "agent" / "handlers.py").write_text(HANDLERS)
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "exploding.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("handler", "answer"),
    [
        ("agent.handlers:blocking", "1 in terminal\n"),
        ("agent/handlers.py:blocking", "1 in terminal\n"),
        ("agent.handlers:registered name", "1 in terminal\n"),
        ("agent.handlers:awaitable", '{\n  "messages": 1\n}\n'),
        ("agent.handlers:pieces", "one two 3\n\n"),
        ("agent.handlers:async_pieces", 'ab{\n  "c": 1\n}\n\n'),
        ("agent.handlers:plain", "HELLO\n"),
        ("agent.handlers:silent", ""),
        ("agent.handlers:assistant.method", "a method\n"),
    ],
)
def test_handlers_of_every_kind_answer(here: Path, handler: str, answer: str) -> None:
    ran = run("chat", handler, "hello", cwd=here)
    assert (ran.code, ran.out, ran.err) == (0, answer, "")


def test_the_folder_of_a_file_may_be_on_the_path_already(here: Path) -> None:
    ran = run("chat", "agent/handlers.py:plain", "hello", cwd=here, PYTHONPATH=str((here / "agent").resolve()))
    assert (ran.code, ran.out, ran.err) == (0, "HELLO\n", "")


def test_a_conversation_goes_on_at_the_next_run(here: Path) -> None:
    for number in (1, 2, 3):
        assert run("chat", "agent.handlers:blocking", "hi", "--context-id", "a", cwd=here).out == f"{number} in a\n"
    assert run("chat", "agent.handlers:blocking", "hi", cwd=here).out == "1 in terminal\n"


def test_each_line_of_a_pipe_is_a_message(here: Path) -> None:
    ran = run("chat", "agent.handlers:blocking", cwd=here, stdin="one\n\n  two  \nthree")
    assert ran.out == "1 in terminal\n2 in terminal\n3 in terminal\n"
    history = run("show", "terminal", "--json", cwd=here).json["history"]
    assert [message["content"] for message in history] == ["one", "two", "three"]


def test_the_task_has_the_user(here: Path) -> None:
    assert run("chat", "agent.handlers:private", "hi", "--user", "alice", cwd=here).out == "alice\n"
    assert_one_line(run("chat", "agent.handlers:private", "hi", "--user", "bob", cwd=here), exits.REFUSED, "terminal")


def test_the_handler_uses_the_configuration_file(here: Path) -> None:
    (here / "x.yaml").write_text("state:\n  backend: file\n  storage_dir: elsewhere\n")
    assert run("chat", "agent.handlers:blocking", "hi", "--config", "x.yaml", cwd=here).code == 0
    assert (here / "elsewhere").is_dir()
    assert not (here / "conversation_states").exists()


@pytest.mark.parametrize(
    ("handler", "code", "words"),
    [
        ("agent.handlers:failing", exits.PROBLEM, ["ZeroDivisionError", "by zero"]),
        ("agent.handlers:offline", exits.PROBLEM, ["the handler failed: ConnectionResetError", "the model is away"]),
        ("agent.handlers:blockin", exits.NOT_FOUND, ["blocking"]),
        ("agent.handlers:number", exits.USAGE, ["number"]),
        ("agent.handlrs:blocking", exits.NOT_FOUND, ["agent.handlrs"]),
        ("broken:f", exits.PROBLEM, ["nothing_like_this"]),
        ("wrong:f", exits.PROBLEM, ["SyntaxError"]),
        ("wrong.py:f", exits.PROBLEM, ["SyntaxError"]),
        ("exploding:f", exits.PROBLEM, ["ZeroDivisionError"]),
        ("agent.handlers", exits.USAGE, ["MODULE:HANDLER"]),
        (":f", exits.USAGE, ["MODULE:HANDLER"]),
    ],
)
def test_a_bad_handler_is_one_line(here: Path, handler: str, code: int, words: list[str]) -> None:
    assert_one_line(run("chat", handler, "hello", cwd=here), code, *words)


def test_an_error_of_the_system_in_a_handler_is_no_error_of_the_output(here: Path) -> None:
    ran = run("chat", "agent.handlers:offline_pieces", "hello", cwd=here)
    assert (ran.code, ran.out) == (exits.PROBLEM, "one ")
    assert ran.err == "agentstate: the handler failed: BrokenPipeError: [Errno 32] the model is away\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("handler", ["plain", "pieces", "async_pieces"])
def test_an_answer_that_cannot_be_printed_is_an_error_of_the_output(here: Path, handler: str) -> None:
    with (
        open("/dev/full", "wb") as full,
        started("chat", f"agent.handlers:{handler}", "hello", cwd=here, stdout=full) as process,
    ):
        _, err = process.communicate(timeout=60)
    assert process.returncode == exits.PROBLEM
    assert err == "agentstate: cannot write the output: No space left on device\n"


def test_a_traceback_is_shown_when_asked_for(here: Path) -> None:
    ran = run("chat", "agent.handlers:failing", "hello", "--traceback", cwd=here)
    assert ran.code == exits.PROBLEM
    assert "Traceback" in ran.err
    assert "in failing" in ran.err


def test_bytes_that_are_not_text_do_not_end_the_conversation(here: Path) -> None:
    ran = run("chat", "agent.handlers:blocking", cwd=here, stdin=b"caf\xe9\nok\n")
    assert (ran.code, ran.out) == (0, "1 in terminal\n2 in terminal\n")


@pytest.mark.parametrize("context_id", ["", "x" * 1025])
def test_a_bad_context_id_is_refused(here: Path, context_id: str) -> None:
    ran = run("chat", "agent.handlers:blocking", "hi", "--context-id", context_id, cwd=here)
    assert_one_line(ran, exits.USAGE, "context id")


def test_a_task_is_an_object_and_a_mapping() -> None:
    task = Task(id="1", metadata={})
    assert (task["id"], task.id, task.get("id"), task.get("text", "none")) == ("1", "1", "1", "none")
    assert "metadata" in task
    assert "text" not in task
    assert 1 not in task
    with pytest.raises(KeyError):
        task["text"]


def test_an_error_of_agentstate_in_a_module_is_printed_unchanged(here: Path) -> None:
    (here / "wrong.py").write_text("from agentstate import FileStorage\nFileStorage(fsync='often')\n")
    assert_one_line(run("chat", "wrong.py:bot", "hello", cwd=here), exits.USAGE, "fsync must be one of")


def test_a_file_that_is_not_python_is_an_error(here: Path) -> None:
    (here / "bot.txt").write_text("bot = print")
    assert_one_line(run("chat", "./bot.txt:bot", "hello", cwd=here), exits.USAGE, "not a Python file")
