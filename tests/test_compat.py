"""AgentUp's import paths, each case in a process of its own; and the log of state operations."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentstate
from agentstate import ConversationContext, InMemoryStorage, StateConflictError, SyncConversationContext

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program in a directory of its own, which is on its path."""

    def run(program: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(textwrap.dedent(program))
        command = [sys.executable, "-W", "error", "program.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)

    return run


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


INSTALL = "import agentstate.compat\nagentstate.compat.install()\n"


def test_agentups_imports_work(run: Run) -> None:
    program = """
        from src.agent.context import (
            ConversationContext, ConversationState, FileStorage, InMemoryStorage, StateStorage, ValkeyStorage,
            get_context_manager, stateful,
        )
        from src.agent.handlers import get_handler, list_handlers, register_handler
        import src.agent.context
        import src.agent.handlers as handlers
        import agentstate

        assert src.agent.context.stateful is stateful is agentstate.stateful
        assert handlers.register_handler is register_handler is agentstate.register_handler
        assert get_context_manager is agentstate.get_context_manager
        assert ConversationContext is agentstate.ConversationContext
        print("fine")
    """
    assert succeed(run(INSTALL + textwrap.dedent(program))) == "fine\n"


def test_without_installing_there_is_no_such_module(run: Run) -> None:
    result = run("import agentstate.compat\nimport src.agent.context")
    assert "ModuleNotFoundError: No module named 'src'" in result.stderr


def test_installing_again_changes_nothing(run: Run) -> None:
    program = """
        import sys
        import src.agent.context
        before = src, src.agent, src.agent.context, list(agentstate.calllog.LOGGED_AS)
        agentstate.compat.install()
        assert before == (src, src.agent, src.agent.context, agentstate.calllog.LOGGED_AS)
        print(agentstate.calllog.LOGGED_AS)
    """
    assert succeed(run(INSTALL + textwrap.dedent(program))) == "['agentstate.context', 'src.agent.context']\n"


@pytest.mark.parametrize("packages", [["src"], ["src", "src/agent"]])
@pytest.mark.parametrize("regular", [True, False])
def test_the_applications_own_packages_stay(run: Run, tmp_path: Path, packages: list[str], regular: bool) -> None:
    for package in packages:
        (tmp_path / package).mkdir()
        (tmp_path / package / "own.py").write_text("NAME = __name__")
        if regular:
            (tmp_path / package / "__init__.py").write_text("")
    program = """
        import importlib
        from src.agent.context import stateful
        from src.agent.handlers import register_handler
        print(*[importlib.import_module(f"{package}.own").NAME for package in PACKAGES])
    """
    names = [package.replace("/", ".") for package in packages]
    output = succeed(run(INSTALL + f"PACKAGES = {names}\n" + textwrap.dedent(program)))
    assert output.split() == [f"{name}.own" for name in names]


def test_a_real_context_module_is_an_error_that_names_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "src" / "agent").mkdir(parents=True)
    (tmp_path / "src" / "agent" / "context.py").write_text("stateful = None")
    result = run(INSTALL)
    assert "StateConfigError: src.agent.context already exists in " in result.stderr
    assert "import from agentstate.context instead" in result.stderr
    assert succeed(run("import src.agent.context\nprint(src.agent.context.stateful)")) == "None\n"


def test_a_real_handlers_module_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "src" / "agent").mkdir(parents=True)
    (tmp_path / "src" / "agent" / "handlers.py").write_text("register_handler = 'own'")
    program = """
        from src.agent.context import stateful
        from src.agent.handlers import register_handler
        print(register_handler)
    """
    assert succeed(run(INSTALL + textwrap.dedent(program))) == "own\n"


def test_a_module_where_a_package_should_be_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "src.py").write_text("")
    result = run(INSTALL)
    assert "StateConfigError: 'src' must be a package, but there is a module of that name in " in result.stderr
    assert "must be a package" in result.stderr


def test_debug_logging_by_agentups_name(run: Run) -> None:
    program = """
        import logging
        logging.basicConfig(format="%(name)s %(levelname)s %(message)s", level=logging.INFO)
        logging.getLogger('src.agent.context').setLevel(logging.DEBUG)

        from src.agent.context import InMemoryStorage
        from agentstate import SyncConversationContext

        SyncConversationContext(InMemoryStorage()).set_variable("alice", "k", "a secret")
    """
    result = run(INSTALL + textwrap.dedent(program))
    succeed(result)
    assert result.stderr.startswith("src.agent.context DEBUG set_variable 'alice': 10 bytes written, 0 read, ")
    assert "secret" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- the log of state operations ------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged since the last call, without the times."""

    def log() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name == "agentstate.context"]
        caplog.clear()
        return [message.partition(" read, ")[0] + message.partition(" ms")[2] for message in messages]

    with caplog.at_level(logging.DEBUG, "agentstate.context"):
        yield log


def test_every_call_is_one_record_with_sizes_and_no_contents(log: Any) -> None:
    context = SyncConversationContext()
    context.set_variables("alice", {"a": "secret", "b": [1, 2]})
    assert log() == ["set_variables 'alice': 13 bytes written, 0"]
    assert context.get_variable("alice", "a") == "secret"
    assert log() == ["get_variable 'alice': 0 bytes written, 8"]
    context.get_or_create("alice")
    assert log() == ["get_or_create 'alice': 0 bytes written, 13"]
    with context.batch("alice") as batch:
        batch.set_variable("a", 1)
        batch.set_metadata("m", "secret")
    assert log() == ["batch 'alice': 9 bytes written, 0"]
    with context.turn("alice"):
        pass
    assert log() == ["turn 'alice': 0 bytes written, 0", "end of turn 'alice': 0 bytes written, 0"]
    assert list(context.list_contexts()) == ["alice"]
    assert log() == ["list_contexts None: 0 bytes written, 0"]
    context.cleanup_old_contexts()
    assert log() == ["cleanup_old_contexts None: 0 bytes written, 0"]


def test_a_failure_is_logged_by_its_name(log: Any) -> None:
    context = SyncConversationContext()
    context.set_variable("alice", "a", "secret")
    log()
    with pytest.raises(StateConflictError):
        context.increment_variable("alice", "a")
    assert log() == ["increment_variable 'alice': 1 bytes written, 0, StateConflictError"]
    for _ in context.iter_history("alice"):
        pass
    context.add_to_history("alice", "user", "hi")
    log()
    messages = context.iter_history("alice")
    next(messages)
    del messages
    assert log()[0].endswith(", not finished")


def test_the_awaitable_context_is_logged_alike(log: Any) -> None:
    async def main() -> None:
        context = ConversationContext(InMemoryStorage())
        await context.set_variable("alice", "a", "secret")
        assert [context_id async for context_id in context.list_contexts()] == ["alice"]

    asyncio.run(main())
    assert log() == ["set_variable 'alice': 8 bytes written, 0", "list_contexts None: 0 bytes written, 0"]


def test_a_context_id_cannot_forge_a_record(log: Any) -> None:
    SyncConversationContext().exists("alice\nINFO forged")
    assert log() == ["exists 'alice\\nINFO forged': 0 bytes written, 0"]


def test_nothing_is_logged_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "agentstate.context"):
        SyncConversationContext().set_variable("alice", "a", 1)
    assert not caplog.records


def test_the_package_names_all_that_it_hands_out() -> None:
    assert dir(agentstate) == agentstate.__all__
    assert all(hasattr(agentstate, name) for name in agentstate.__all__)
