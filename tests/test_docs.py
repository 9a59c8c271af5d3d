"""Every code block of README.md and of docs/ is run, and every link leads somewhere.

A page's blocks are run in order, in one fresh process and directory (`run_page`, at the end of this file):

- `python`: run, with the names of the page's earlier blocks; `await` works at the top level.
- `bash`: run by bash; `examples/` is there, and `python` and `.venv/bin/python` are this Python. Where a page runs
  pytest, only `SOME_TESTS` are run, for time: test_third_party.py has the whole contract of such a backend.
  `valkey-cli` is that of Valkey 8.1, if it is installed, and talks to the server of the page.
- `yaml`: read by `load_config`.

Lines that begin with ``#> `` are what a block prints, and must be exactly that, but for times and the ids of commits.

``valkey://localhost:6379`` becomes a real server's URL. An HTML comment in the line before a block changes this:

- ``<!-- not run: REASON -->``
- ``<!-- error: TEXT -->``: the block must fail with a StateError whose message holds TEXT
- ``<!-- needs: PROGRAM -->``: the block is run where that program is installed

A paragraph that is a file's name in backticks and a colon (`` `remember.py`: ``) names the block after it: the block is
also kept as that file for the blocks that follow, and python is then not run.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import pytest
from servers import ServerMissingError, find_server, wait_until

if TYPE_CHECKING:
    import httpx

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "yaml"}
SHOWN_ONLY = {"", "text", "json"}
SOME_TESTS = "metadata or conversation"
NEW_EACH_TIME = re.compile(
    r"\b(?P<microseconds>\d{16})\b|\b(?P<time>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?)"
    r"|\b(?P<commit>[0-9a-f]{12}-\d+)\b|\b(?P<milliseconds>\d+\.\d{3} ms)"
)
LOCAL_URL = re.compile(r"valkey://localhost:6379(/0)?\b")

_FENCE = re.compile(r"^```(\S*)\s*$")
_MARK = re.compile(r"^<!-- (not run|error|needs): (.+) -->$")
_FILE = re.compile(r"^`([^`]+\.\w+)`:$")


class Block(NamedTuple):
    """A fenced block. `line` is that of its first line of code; `marks` are the comments and the file name above it."""

    language: str
    line: int
    text: str
    marks: dict[str, str]


def blocks_of(text: str) -> list[Block]:
    blocks: list[Block] = []
    lines = text.split("\n")
    marks: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if mark := _MARK.match(line):
            marks[mark[1]] = mark[2]
        elif name := _FILE.match(line):
            marks["file"] = name[1]
        elif fence := _FENCE.match(line):
            end = lines.index("```", number)
            blocks.append(Block(fence[1], number + 1, "\n".join(lines[number:end]) + "\n", marks))
            marks, number = {}, end + 1
        elif line.strip():
            marks = {}
    return blocks


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_the_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = ""
    if uses_a_server(page):
        # Each page has its own database on a server of the tests, so that pages do not see each other's keys.
        database = list(filter(uses_a_server, PAGES)).index(page)
        url = f"{request.getfixturevalue('valkey_9').url.removesuffix('/0')}/{database}"
    lay_out(tmp_path, url)
    environment = {name: value for name, value in os.environ.items() if name != "AGENTSTATE_CONFIG"}
    environment["PATH"] = os.pathsep.join(
        [str(tmp_path / ".venv" / "bin"), str(Path(sys.executable).parent), environment["PATH"]]
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(page), url],
        cwd=tmp_path,
        env={**environment, "PYTHONIOENCODING": "utf-8", "PYTEST_ADDOPTS": f'-k "{SOME_TESTS}"'},
        capture_output=True,
        encoding="utf-8",
        timeout=150,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def uses_a_server(page: Path) -> bool:
    text = page.read_text(encoding="utf-8")
    return any(LOCAL_URL.search(block.text) or "valkey-cli" in block.text for block in blocks_of(text))


def lay_out(folder: Path, url: str = "") -> None:
    """What the commands of a page need in their directory: the examples, and an environment with this Python."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / ".venv" / "bin").mkdir(parents=True)
    # (A link to a Python would be a Python without what is installed beside it.)
    script(folder / ".venv" / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    script(folder / ".venv" / "bin" / "agentstate", f'exec {shlex.quote(sys.executable)} -m agentstate "$@"')
    if client := valkey_cli():
        script(folder / ".venv" / "bin" / "valkey-cli", f'exec {shlex.quote(str(client))} -u {url} "$@"')


def valkey_cli() -> Path | None:
    try:
        return find_server("8.1").with_name("valkey-cli")
    except ServerMissingError:
        return None


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        assert block.language in LANGUAGES | SHOWN_ONLY, f"{name_of(page)}:{block.line}: which language is this?"
        assert block.language in LANGUAGES or not block.marks, f"{name_of(page)}:{block.line}: a mark without effect"


def imports_of(block: Block) -> set[str]:
    """The top-level packages that a block imports; in bash, those that it runs with `python -m`."""
    if block.language == "bash":
        return set(re.findall(r"\bpython -m (\w+)", block.text))
    names: set[str] = set()
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


OUR_DEPENDENCIES = {"agentstate", "valkey"}
INSTALLED_AS = {"a2a": "a2a-sdk", "opentelemetry": "opentelemetry-sdk"}
COME_WITH = {"anyio": "fastapi"}  # which depends on it
MADE_AVAILABLE = {"src"}  # by agentstate.compat


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_needs_another_package_comes_after_how_to_install_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = [block for block in blocks_of(text) if block.language in ("bash", "python")]
    made = {name.removesuffix(".py") for block in blocks if (name := block.marks.get("file"))}
    known = set(sys.stdlib_module_names) | OUR_DEPENDENCIES | MADE_AVAILABLE | made
    for block in blocks:
        if "not run" in block.marks:
            continue
        before = "\n".join(text.split("\n")[: block.line])
        for name in imports_of(block) - known:
            package = INSTALLED_AS.get(name, COME_WITH.get(name, name))
            assert re.search(rf"pip install [^`]*\b{package}\b", before), (
                f"{name_of(page)}:{block.line}: say `pip install {package}` before it"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_installs_the_other_package_that_is_named_agentstate(page: Path) -> None:
    told = re.findall(r"pip3? install[^`\n]*[\s'\"]agentstate(?![-_\w/.])[^`\n]*", page.read_text(encoding="utf-8"))
    assert not told, f"the distribution is agentstate-store: {told}"


def test_the_first_block_of_the_readme_is_on_the_first_screen_and_shows_what_it_prints() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = blocks_of(text)[0]
    assert first.language == "python"
    assert "#> " in first.text
    assert first.line + first.text.count("\n") < 30
    assert text.count("\n") < 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links_of(page):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors_of(file), f"{name_of(page)} links to {target}#{anchor}, which does not exist"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.svg")), ids=name_of)
def test_a_picture_fetches_nothing_and_contains_nothing_of_a_machine(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    fetched = re.findall(r"""(?:href|src)=["'](?!#)|@import|url\((?!#)""", text)
    assert not fetched
    assert not re.search(r"127\.0\.0\.1|/tmp/|/home/|/root/", text)


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            linked = ((page.parent / target).resolve() for target, _ in links_of(page) if target.endswith(".md"))
            waiting += [file for file in linked if file in PAGES]
    assert reached == set(PAGES)


def links_of(page: Path) -> Iterator[tuple[str, str]]:
    """The relative links of a page: file and anchor."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            yield target, anchor


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- the README's two commands --------------------------------------------------------------------------------------


def commands_of_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.text for block in blocks_of(text) if block.language == "bash"]
    return [line for block in blocks for line in block.splitlines() if "-m venv" in line]


def test_the_first_command_of_the_readme_installs_and_starts_a_conversation(tmp_path: Path) -> None:
    """Exactly this command, except that `-m venv` and `pip` only record their arguments.

    (Every tox environment is such an installation, so it is tested that it works.)
    """
    lay_out(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "python3", 'test "$*" = "-m venv .venv"')
    script(tmp_path / ".venv" / "bin" / "pip", 'echo "$@" > asked')
    outputs = []
    for typed in ("Remember that I like tea\n", "What do you remember?\n"):
        result = subprocess.run(
            ["bash", "-c", commands_of_the_readme()[0]],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            input=typed,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert (tmp_path / "asked").read_text() == "install .[cli]\n"
    assert "I will remember: you like tea." in outputs[0]
    assert "I remember: you like tea." in outputs[1]


def test_the_second_command_of_the_readme_is_what_ci_runs() -> None:
    assert commands_of_the_readme()[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(commands_of_the_readme()) == 2


# --- the page about FastAPI, with a server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    import httpx

    with httpx.Client(timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the modules of the page, served by uvicorn."""
    tmp_path = tmp_path_factory.mktemp("served")
    for block in blocks_of(text_of("fastapi.md")):
        if "file" in block.marks:
            (tmp_path / block.marks["file"]).write_text(block.text, encoding="utf-8")
    (tmp_path / "all.py").write_text("from app import app\nimport kept, users\n")
    command = [sys.executable, "-W", "error", "-m", "uvicorn", "all:app", "--port", "0", "--no-access-log"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, encoding="utf-8") as server:
        watchdog = threading.Timer(60, server.kill)  # no reading waits for ever
        watchdog.start()
        try:
            assert server.stderr is not None
            said = ""
            while not (running := re.search(r"running on (http://\S+)", said)):
                line = server.stderr.readline()
                assert line, said
                said += line
            yield running[1]
            server.terminate()
            said += server.stderr.read()
            assert "Application shutdown complete." in said
            assert "ERROR" not in said
            assert "Exception" not in said
        finally:
            watchdog.cancel()
            server.kill()


def test_an_answer_is_streamed_and_stored(client: httpx.Client, served: str) -> None:
    messages = f"{served}/conversations/streamed/messages"
    with client.stream("POST", messages, json={"text": "I like tea"}) as response:
        pieces = [*response.iter_text()]
    assert len(pieces) > 1
    assert "".join(pieces) == "You have told me 1 things. "
    assert [message["role"] for message in client.get(messages).json()] == ["user", "assistant"]


def test_after_a_disconnect_nothing_is_stored_and_the_next_request_starts(client: httpx.Client, served: str) -> None:
    messages = f"{served}/conversations/left/messages"
    for number in range(1, 4):
        with client.stream("POST", messages, json={"text": "gone"}) as response:
            assert next(response.iter_text()) == "You "
        # Less than the 30 s after which a lease expires that was not released.
        answer = client.post(messages, json={"text": "here"}).text
        assert answer == f"You have told me {number} things. "
    contents = [message["content"] for message in client.get(messages).json()]
    assert contents[::2] == ["here"] * 3


def test_a_handler_can_store_what_a_client_received_before_it_disconnected(client: httpx.Client, served: str) -> None:
    with client.stream("POST", f"{served}/kept/received/messages", json={"text": "gone"}) as response:
        assert next(response.iter_text()) == "You "
    kept = f"{served}/conversations/received/messages"
    wait_until(lambda: len(client.get(kept).json()) == 2, "the messages are stored")
    question, answer = client.get(kept).json()
    assert question["content"] == "gone"
    assert answer["content"].startswith("You ")
    assert answer["content"] != "You have told me 1 things. "


def test_a_user_cannot_reach_the_context_of_another_user(client: httpx.Client, served: str) -> None:
    def visit(token: str) -> httpx.Response:
        return client.post(f"{served}/notes/diary", headers={"Authorization": f"Bearer {token}"})

    assert [visit("secret-of-alice").json() for _ in range(2)] == [1, 2]
    assert visit("secret-of-bob").status_code == 404
    assert visit("a guess").status_code == 401
    assert visit("secret-of-alice").json() == 3


# --- what pages say without a block that shows it -------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no cp")
@pytest.mark.parametrize("layout", ["log", "document"])
def test_a_copy_of_a_folder_in_use_holds_intact_conversations(tmp_path: Path, layout: str) -> None:
    """cookbook.md, "Backups"."""
    from agentstate import FileStorage, SyncConversationContext

    names = [f"c{number}" for number in range(12)]
    options: dict[str, Any] = {"layout": layout, "fsync": "no"}
    context = SyncConversationContext(FileStorage(tmp_path / "live", **options))
    copied = threading.Event()

    def write(mine: list[str]) -> None:
        number = 0
        while not copied.is_set():
            number += 1
            for name in mine:
                with context.batch(name) as batch:
                    batch.add_to_history("user", number)
                    batch.set_variable("number", number)
                    batch.set_variable("filling", "x" * 500)  # so that the files are written anew, too
                    batch.trim_history(keep=20)

    for name in names:  # what exists all along is in the copy
        with context.batch(name) as batch:
            batch.add_to_history("user", 0)
            batch.set_variable("number", 0)
    writers = [threading.Thread(target=write, args=(names[first::3],)) for first in range(3)]
    for writer in writers:
        writer.start()
    copies = [tmp_path / f"copy{number}" for number in range(3)]
    try:
        for number, copy in enumerate(copies):
            wait_until(lambda: context.get_variable("c0", "number") > number, "another write")  # noqa: B023
            # `cp` may fail: it says so if a temporary file is gone before it is copied.
            subprocess.run(["cp", "-a", str(tmp_path / "live"), str(copy)], stderr=subprocess.DEVNULL, check=False)
    finally:
        copied.set()
        for writer in writers:
            writer.join()
    for copy in copies:
        verify = [sys.executable, "-m", "agentstate", "verify", "--storage-dir", str(copy), "--layout", layout]
        subprocess.run(verify, check=True, stdout=subprocess.DEVNULL)
        backup = SyncConversationContext(FileStorage(copy, **options))
        found = {name: backup.get_state(name) for name in backup.list_contexts()}
        if names_keep_their_places(copy):
            assert found.keys() == set(names)
        for state in found.values():
            assert state is not None
            assert state.history[-1]["content"] == state.variables["number"]


def names_keep_their_places(path: Path) -> bool:
    """Whether a replaced file keeps its place in the folder. On btrfs and tmpfs it moves, and `cp` may miss it."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, encoding="utf-8", check=False)
    return kind.stdout.strip() in ("ext2/ext3", "xfs")


def test_a_turn_of_a_bound_context_reserves_no_id() -> None:
    """batches-and-turns.md, "Expired leases"."""
    from agentstate import InMemoryStorage, StateAccessError, StateTimeoutError, SyncConversationContext

    storage = InMemoryStorage()
    alice, bob = (SyncConversationContext(storage, user_id=user) for user in ("alice", "bob"))
    held = alice.turn("new")
    turn = held.__enter__()
    turn.set_variable("mine", True)
    with ThreadPoolExecutor(1) as other_thread, pytest.raises(StateTimeoutError):
        other_thread.submit(bob.turn("new", timeout=0.01).__enter__).result()
    bob.set_variable("new", "mine", False)
    with pytest.raises(StateAccessError):
        held.__exit__(None, None, None)
    assert bob.get_variable("new", "mine") is False


# --- nothing is left out --------------------------------------------------------------------------------------------


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_every_operation_is_run_on_the_page_of_operations() -> None:
    from agentstate import ConversationContext, SyncConversationContext

    code = "".join(block.text for block in blocks_of(text_of("operations.md")) if block.language == "python")
    for context in (ConversationContext, SyncConversationContext):
        for name in public_methods(context):
            assert re.search(rf"\.{name}\(", code) or name == "holding", f"operations.md never calls {name}"


def public_methods(cls: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")]


def test_every_error_is_on_the_page_of_errors() -> None:
    from agentstate import errors

    names = [name for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)]
    assert len(names) == 12
    for name in names:
        assert f"`{name}`" in text_of("errors.md")


def test_every_logger_is_on_the_page_of_debugging() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "agentstate").rglob("*.py"))
    names = set(re.findall(r'(?:getLogger\(|LOGGED_AS = \[)"(agentstate\.[^"]+)"', code))
    assert {"agentstate.context", "agentstate.storage.file", "agentstate.storage.valkey"} <= names
    for name in names:
        assert f"| `{name}` |" in text_of("debugging.md"), f"debugging.md does not describe {name}"


def test_every_key_of_the_configuration_is_on_its_page() -> None:
    from agentstate.config import config_table

    assert config_table().strip() in text_of("configuration.md"), "paste the output of agentstate.config.config_table()"


def test_the_reference_of_the_api_is_what_the_docstrings_say() -> None:
    import agentstate

    command = [sys.executable, ROOT / "docs" / "make" / "reference.py"]
    made = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", timeout=60).stdout
    assert made == text_of("api.md"), "python docs/make/reference.py > docs/api.md"
    for name in agentstate.__all__:
        assert f"\n### {name}\n" in made, f"docs/make/reference.py leaves {name} out"


def test_every_heading_of_the_reference_is_answered() -> None:
    headings = """
        Storage Backends, Memory Storage, File Storage, Valkey Storage, Configuration, Valkey Backend
        Configuration, Production Valkey Configuration, Multi-Valkey Setup, File Storage Configuration, Memory
        Storage Configuration, The @stateful Decorator, Decorator Parameters, Injected Parameters, Working with
        Variables, Conversation History, Metadata Management, Context Management, Using AgentUp CLI, Manual
        Implementation, User Preference Learning, Long-Running Task Management, Performance, Data Management,
        Security, Unit Testing, Integration Testing, Development Environment, Testing Environment, Production
        Environment, Issue 1: State Not Persisting, Issue 2: Valkey Connection Failed, Issue 3: Import Error,
        Common Issues, Configuration Validation, Test State Operations, Debugging, From Memory to File, From
        File to Valkey, Upgrading from Previous Versions, Examples, Configuration Management, Handler Design,
        Testing, Next Steps
    """
    text = text_of("coming-from-agentup.md")
    for heading in (" ".join(part.split()) for part in headings.split(",")):
        assert heading in text, f"coming-from-agentup.md has no answer to {heading!r}"


# --- the runner, in a process of its own ----------------------------------------------------------------------------


def run_page(page: Path, url: str) -> None:
    """Run all blocks of a page in this process and directory. Raises on the first that does not do what it shows."""
    module = types.ModuleType("__main__")
    sys.path.insert(0, os.getcwd())  # a page may make modules for its later blocks
    sys.modules["__main__"] = module  # dataclasses and pickles of the page look for their names there
    with asyncio.Runner() as runner:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            missing = "needs" in block.marks and not shutil.which(block.marks["needs"])
            if missing or "not run" in block.marks or block.language not in LANGUAGES:
                continue
            text = LOCAL_URL.sub(url, block.text) if url else block.text
            place = f"{name_of(page)}:{block.line}"
            try:
                with expected_error(block.marks.get("error")):
                    run_block(block, text, place, module, runner)
            except BaseException as error:
                error.add_note(f"In the block at {place}")
                raise


@contextlib.contextmanager
def expected_error(text: str | None) -> Iterator[None]:
    from agentstate import StateError

    if text is None:
        yield
    else:
        with pytest.raises(StateError, match=re.escape(text)):
            yield


def run_block(block: Block, text: str, place: str, module: types.ModuleType, runner: asyncio.Runner) -> None:
    if "file" in block.marks:
        Path(block.marks["file"]).write_text(text, encoding="utf-8")
    if block.language == "yaml":
        from agentstate import load_config

        path = Path(block.marks.get("file", "block.yaml"))
        path.write_text(text, encoding="utf-8")
        load_config(path)
    elif block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8")
        compare(text, done.stdout, place)
    elif "file" not in block.marks:
        compare(text, run_python(text, block.line, place, module, runner), place)


def run_python(text: str, line: int, place: str, module: types.ModuleType, runner: asyncio.Runner) -> str:
    padded = "\n" * (line - 1) + text  # so that a traceback names the line of the page
    code: Any = compile(padded, place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(code, module.__dict__))
        else:
            exec(code, module.__dict__)
    return printed.getvalue()


def compare(text: str, printed: str, place: str) -> None:
    """Fail unless a block of code printed what it shows."""
    shown = [comparable(line) for line in re.findall(r"^\s*#> ?(.*)$", text, re.MULTILINE)]
    said = [comparable(line) for line in printed.splitlines()]
    if shown and said != shown:
        raise AssertionError(f"{place} shows {json.dumps(shown, indent=1)}\nbut prints {json.dumps(said, indent=1)}")


def comparable(line: str) -> str:
    return NEW_EACH_TIME.sub(lambda match: f"<{match.lastgroup}>", line).rstrip()


if __name__ == "__main__":
    run_page(Path(sys.argv[1]), sys.argv[2])
