"""The examples, run as a reader runs them: as scripts, in processes of their own, in a directory of their own."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMEOUT = 60.0  # for one run; a loaded machine needs seconds to import a2a-sdk

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment() -> dict[str, str]:
    """Nothing of the caller's that examples look at, and output as it comes."""
    kept = {name: value for name, value in os.environ.items() if name != "AGENTSTATE_CONFIG"}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def command(example: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run an example to its end: `run("sync_script.py", "Buy tea")`. Its exit code must be `code`."""

    def run(example: str, *arguments: str, typed: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            command(example, *arguments),
            cwd=tmp_path,
            env=environment,
            input=typed,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        return result

    return run


@contextlib.contextmanager
def started(
    tmp_path: Path, environment: dict[str, str], example: str, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """An example that runs until the end of the block at most, and `TIMEOUT` seconds: so no reading waits forever."""
    with subprocess.Popen(
        command(example, *arguments),
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def interrupted(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C, and return the output that follows. Repeats it if necessary: a signal between a prompt and the
    reading of its answer takes effect only after the answer."""
    while True:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0]


def commands_of(example: Path) -> list[str]:
    """The commands in the docstring at the beginning of an example."""
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    return re.findall(r"(?:^    |: )(python examples/.+)$", docstring, re.MULTILINE)


SERVED = {"a2a_agent.py", "a2a_client.py"}  # which need each other, and so run in `TestA2A`
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name not in SERVED | {"storage_checks.py"}]


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_in_the_first_lines_run_in_this_order(
    example: Path, tmp_path: Path, environment: dict[str, str], request: pytest.FixtureRequest
) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    commands = commands_of(example)
    assert commands
    for line in commands:
        if "valkey://localhost:6379" in line:
            line = line.replace("valkey://localhost:6379", request.getfixturevalue("valkey_9").url)
        python, *arguments = shlex.split(line)
        assert python == "python"
        result = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        assert result.stdout


def test_every_example_is_run_here() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    here = Path(__file__).read_text(encoding="utf-8")
    not_run = {name for name in scripts if f'("{name}"' not in here and f', "{name}"' not in here}
    assert not_run == {"storage_checks.py"}  # which the three scripts for the storages run


class TestConversationMemory:
    """The main job: it remembers after it was stopped."""

    @pytest.fixture(params=["file", "valkey_9", "valkey_8"])
    def storage(self, request: pytest.FixtureRequest, key_prefix: str) -> list[str]:
        """The arguments that choose a storage."""
        if request.param == "file":
            return []
        url: str = request.getfixturevalue(request.param).url
        return ["--storage", "valkey", "--url", url, "--key-prefix", key_prefix]

    def test_remembers_from_one_run_to_the_next(self, run: Run, storage: list[str]) -> None:
        def say(text: str, context_id: str = "alice") -> str:
            return run("conversation_memory.py", *storage, "--context-id", context_id, text).stdout

        assert say("Remember that I like tea") == "I will remember: you like tea.\n"
        assert say("My name is Alice") == "I will remember: your name is Alice.\n"
        assert say("Remember the key is under the mat") == 'I will remember: "the key is under the mat".\n'
        recalled = say("What do you remember?")
        assert recalled.startswith("This is our interaction #4.")
        assert 'your name is Alice, you like tea, "the key is under the mat"' in recalled
        assert 'Last time you said: "Remember the key is under the mat".' in recalled
        assert say("Hi").startswith("Hello again, Alice! This is our interaction #5.")
        assert say("Hi", context_id="bob").startswith("Hello! This is our interaction #1.")
        assert say("Forget everything").startswith("I have forgotten")
        assert "You have not told me anything" in say("What do you remember?")

    def test_remembers_after_a_terminal_conversation(self, run: Run, storage: list[str]) -> None:
        first = run("conversation_memory.py", *storage, typed="Remember that I like tea\n\nMy name is Alice\n")
        assert "you> I will remember: you like tea.\n" in first.stdout
        assert first.stdout.endswith("Goodbye!\n")
        second = run("conversation_memory.py", *storage, typed="What do you know about me?\n")
        assert "This is our interaction #3. I remember: your name is Alice, you like tea." in second.stdout

    def test_what_was_answered_survives_a_kill(
        self, run: Run, storage: list[str], tmp_path: Path, environment: dict[str, str]
    ) -> None:
        with started(tmp_path, environment, "conversation_memory.py", *storage) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("Remember that I like tea\n")
            process.stdin.flush()
            assert "kept in" in process.stdout.readline()
            assert process.stdout.readline() == "you> I will remember: you like tea.\n"
            process.kill()
        assert "you like tea" in run("conversation_memory.py", *storage, "What do I like?").stdout

    def test_two_terminals_lose_nothing_of_each_other(
        self, storage: list[str], tmp_path: Path, environment: dict[str, str], run: Run
    ) -> None:
        things = ["tea", "rain", "trains", "maps"]
        processes = [
            subprocess.Popen(
                command("conversation_memory.py", *storage, f"Remember that I like {thing}"),
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
            )
            for thing in things
        ]
        for process in processes:
            process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0
        recalled = run("conversation_memory.py", *storage, "What do you remember?").stdout
        assert recalled.startswith("This is our interaction #5.")
        assert all(f"you like {thing}" in recalled for thing in things)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one child")
    def test_ctrl_c_ends_it_cleanly(self, tmp_path: Path, environment: dict[str, str]) -> None:
        with started(tmp_path, environment, "conversation_memory.py") as process:
            assert process.stdout is not None
            assert "Ctrl-D ends it." in process.stdout.readline()
            assert process.stdout.read(5) == "you> "
            assert interrupted(process) == "\nGoodbye!\n"
            assert process.returncode == 0

    def test_memory_says_that_it_forgets(self, run: Run) -> None:
        once = run("conversation_memory.py", "--storage", "memory", "Remember that I like tea")
        assert once.stdout == "I will remember: you like tea.\n"
        assert "deleted when the program ends" in once.stderr
        typed = "Remember that I like tea\nWhat do you remember?\n"
        talk = run("conversation_memory.py", "--storage", "memory", typed=typed).stdout
        assert "it is deleted when this program ends" in talk
        assert "I remember: you like tea." in talk
        again = run("conversation_memory.py", "--storage", "memory", "What do you remember?").stdout
        assert "You have not told me anything" in again

    def test_another_directory_is_another_memory(self, run: Run, tmp_path: Path) -> None:
        run("conversation_memory.py", "--storage-dir", "elsewhere", "Remember that I like tea")
        assert "interaction #1" in run("conversation_memory.py", "Hi").stdout
        assert "interaction #2" in run("conversation_memory.py", "--storage-dir", "elsewhere", "Hi").stdout
        assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "conversation_states"}

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--storage", "valkey", "Hi"], "needs the server: --url valkey://localhost:6379"),
            (["--url", "valkey://localhost:6379", "Hi"], "--url is for --storage valkey"),
            (["--storage", "valkey", "--url", "localhost:6379", "Hi"], "valkey://localhost:6379"),
            (["--context-id", "", "Hi"], "must not be empty"),
            (["--context-id", "x" * 1025, "Hi"], "has 1,025 bytes of UTF-8; 1,024 are allowed"),
            (["--storage", "carrier-pigeon", "Hi"], "invalid choice"),
        ],
    )
    def test_what_cannot_be_is_said_in_a_sentence(self, run: Run, arguments: list[str], said: str) -> None:
        code = 1 if "x" * 1025 in arguments else 2
        assert said in run("conversation_memory.py", *arguments, code=code).stderr

    def test_a_server_that_is_not_there_is_said_in_a_sentence(self, run: Run) -> None:
        # Port 1 is for nobody; a connection to it is refused at once.
        url = "valkey://user:secret@127.0.0.1:1"
        error = run("conversation_memory.py", "--storage", "valkey", "--url", url, "Hi", code=1).stderr
        assert error.startswith("error: ")
        assert "secret" not in error

    def test_a_failed_answer_does_not_end_the_conversation(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "conversation_states").write_text("a file where the directory should be")
        result = run("conversation_memory.py", typed="Hi\nHi again\n")
        assert result.stderr.count("error: ") == 2
        assert result.stdout.endswith("Goodbye!\n")


def test_a_task_of_several_steps_outlives_the_process(run: Run) -> None:
    def say(text: str) -> str:
        return run("multi_session_task.py", *text.split()).stdout.strip()

    assert say("next step") == "There is no task. Say 'start task' to begin."
    assert say("start task") == "Step 1 of 3: collect the documents."
    assert say("next step") == "Step 2 of 3: check the figures."
    assert say("pause") == "Step 2 of 3, paused: check the figures."
    assert say("next step") == "Nothing to advance. Step 2 of 3, paused: check the figures."
    assert say("status") == "Step 2 of 3, paused: check the figures."
    assert say("resume") == "Step 2 of 3: check the figures."
    assert say("start task") == "There is a task already. Step 2 of 3: check the figures."
    assert say("next step") == "Step 3 of 3: write the report."
    assert say("next step") == "Task completed: 3 of 3 steps done."
    assert say("sing") == "Say 'start task', 'next step', 'pause', 'resume' or 'status'."
    assert run("multi_session_task.py", "status", "--context-id", "other").stdout.startswith("There is no task.")


def test_steps_taken_at_the_same_time_are_all_taken(run: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    run("multi_session_task.py", "start", "task")
    both = [
        subprocess.Popen(
            command("multi_session_task.py", "next", "step"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=TIMEOUT)[0] for process in both)
    assert said == [b"Step 2 of 3: check the figures.\n", b"Step 3 of 3: write the report.\n"]


def test_preferences_are_learned_for_each_user(run: Run) -> None:
    def say(user: str, text: str) -> str:
        return run("preference_learning.py", "--user", user, text).stdout.strip()

    assert say("alice", "Hello") == "How can I assist you today?"
    interested = "I see you're interested in programming!"
    assert say("alice", "How do I read a file in Python?") == f"{interested} Let me tell you more about that."
    assert say("alice", "Please keep it short") == interested
    assert say("bob", "Any recipe for bread?") == "I see you're interested in cooking! Let me tell you more about that."
    assert say("alice", "A hotel in Rome?") == "I see you're interested in programming and travel!"


def test_the_notebook_of_the_synchronous_script(run: Run) -> None:
    assert run("sync_script.py").stdout == "0 notes kept, 0 ever written.\n"
    lines = run("sync_script.py", "Buy tea", "Call Bob").stdout.splitlines()
    assert [line[18:] for line in lines[:2]] == ["Buy tea", "Call Bob"]
    assert lines[2] == "2 notes kept, 2 ever written."
    assert run("sync_script.py", "--undo").stdout.startswith("Removed: Call Bob\n")
    assert run("sync_script.py").stdout.endswith("1 notes kept, 2 ever written.\n")


class TestSensorLoop:
    def test_totals_go_on_over_restarts_and_only_the_newest_readings_are_kept(self, run: Run) -> None:
        arguments = ("--readings", "8", "--interval", "0", "--keep", "5")
        first = run("iot_sensor_loop.py", *arguments).stdout
        assert len(re.findall(r"°C \(simulated\)$", first, re.MULTILINE)) == 3
        assert re.search(r"^8 readings since \d{4}-\d\d-\d\d, 5 kept, 1 starts\.$", first, re.MULTILINE)
        second = run("iot_sensor_loop.py", *arguments, "--fsync", "always").stdout
        assert re.search(r"^16 readings since .*, 5 kept, 2 starts\.$", second, re.MULTILINE)

    def test_a_second_process_is_told_that_the_directory_is_taken(
        self, run: Run, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        arguments = ("--readings", "100000", "--interval", "0.01")
        with started(tmp_path, environment, "iot_sensor_loop.py", *arguments) as process:
            wait_for_readings(tmp_path)
            assert run("iot_sensor_loop.py", "--readings", "1", code=1).stderr.startswith("error: ")
            assert process.poll() is None

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
    def test_sigterm_ends_it_cleanly(self, run: Run, tmp_path: Path, environment: dict[str, str]) -> None:
        arguments = ("--readings", "100000", "--interval", "0.01")
        with started(tmp_path, environment, "iot_sensor_loop.py", *arguments) as process:
            wait_for_readings(tmp_path)
            process.terminate()
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, output
        total = re.search(r"^(\d+) readings", output, re.MULTILINE)
        assert output.startswith("Stopped.\n")
        assert total is not None
        more = run("iot_sensor_loop.py", "--readings", "1", "--interval", "0").stdout
        assert f"{int(total[1]) + 1} readings" in more


def wait_for_readings(directory: Path) -> None:
    log = directory / "sensor_states" / "sensor-greenhouse.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestA2A:
    """A real A2A client talks to a real A2A server."""

    @pytest.fixture(autouse=True)
    def _needs_a2a(self) -> None:
        if not os.environ.get("CI"):
            pytest.importorskip("a2a")
            pytest.importorskip("uvicorn")

    @contextlib.contextmanager
    def agent(self, tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
        with started(tmp_path, environment, "a2a_agent.py", "--port", "0") as process:
            assert process.stdout is not None
            greeting = process.stdout.readline()
            assert greeting.startswith("Serving on http://127.0.0.1:"), greeting + process.stdout.read()
            yield greeting.split()[-1]
            assert interrupted(process) == ""
            assert process.returncode == 0

    def test_the_second_message_of_a_context_is_answered_with_the_first_in_mind(
        self, run: Run, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        def say(url: str, *arguments: str) -> list[str]:
            return run("a2a_client.py", "--url", url, *arguments).stdout.splitlines()

        with self.agent(tmp_path, environment) as url:
            assert say(url, "--context-id", "alice", "I am Alice") == [
                "Message #1. We have just met.",
                "(context alice)",
            ]
            assert say(url, "--context-id", "alice", "Who am I?") == [
                "Message #2. Before this you said: I am Alice.",
                "(context alice)",
            ]
            answer, context = say(url, "Hello")  # no context: the agent begins a new one
            assert answer == "Message #1. We have just met."
            new_id = context.removeprefix("(context ").removesuffix(")")
            assert say(url, "--context-id", new_id, "Again")[0] == "Message #2. Before this you said: Hello."
        with self.agent(tmp_path, environment) as url:  # another process
            assert say(url, "--context-id", "alice", "And now?")[0] == (
                "Message #3. Before this you said: I am Alice; Who am I?."
            )


class TestScriptsForEachStorage:
    def test_memory(self, run: Run) -> None:
        assert run("test_memory_storage.py").stdout.endswith(" passed, 0 failed\n")

    def test_file(self, run: Run, tmp_path: Path) -> None:
        assert run("test_file_storage.py").stdout.endswith(" passed, 0 failed\n")
        assert not list(tmp_path.iterdir())

    def test_valkey(self, run: Run, valkey_url: str) -> None:
        assert run("test_valkey_storage.py", "--url", valkey_url).stdout.endswith(" passed, 0 failed\n")

    def test_valkey_without_a_server(self, run: Run) -> None:
        assert run("test_valkey_storage.py", "--url", "valkey://127.0.0.1:1", code=1).stderr.startswith("error: ")

    def test_a_failure_is_seen(self, tmp_path: Path, environment: dict[str, str]) -> None:
        script = (
            "import sys; from storage_checks import run; from agentstate import InMemoryStorage\n"
            "sys.exit(run('Memory', InMemoryStorage, persistent=True))"  # which it is not
        )
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), environment.get("PYTHONPATH", "")])},
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        assert result.returncode == 1
        assert "FAILED  persistence" in result.stdout
        assert result.stdout.endswith("10 passed, 1 failed\n")


def test_handlers_of_every_kind(run: Run) -> None:
    lines = run("handlers.py").stdout.splitlines()
    assert lines == [
        "registered: countdown, learning_assistant, my_stateful_skill, streaming_assistant, task_manager",
        "0 messages so far; you prefer dark_mode.",
        "2 messages so far; you prefer dark_mode.",
        "I see you're interested in programming!",
        "You are at step 1.",
        "You are at step 2.",
        "['You', 'said:', 'Hello!']",
        "3 [2, 1]",
        "Max was called 1 times in room:kitchen.",
        "Max was called 1 times in room:cellar.",
    ]


def test_the_files_of_a_conversation_are_json_lines(run: Run, tmp_path: Path) -> None:
    run("conversation_memory.py", "--context-id", "alice", "Remember that I like tea")
    lines = (tmp_path / "conversation_states" / "alice.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0])
    assert all(json.loads(line) for line in lines)
