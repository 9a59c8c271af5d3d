"""The command group skill: write a new handler, with its test and its configuration."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from typing import Any, Final

import click

from ..config import CONFIG_NAMES, CONFIG_VARIABLE
from ..errors import StateConfigError, StateConflictError
from . import console, exits
from .newfiles import NewFile, write_all
from .setup import section_text

_BACKENDS: Final = ("memory", "file", "valkey")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_MAX_NAME: Final = 60

_STATEFUL: Final = '''"""{title}: a handler that remembers its conversations.

Try it in the terminal:

    agentstate chat {module}.py:{module}
"""

from __future__ import annotations

from typing import Any

from agentstate import ConversationContext, register_handler, stateful


@register_handler("{module}")
@stateful()
async def {module}(task: Any, context: ConversationContext, context_id: str) -> str:
    """{title}: answers a message with what this conversation has held so far in mind."""
    message = text_of(task)
    earlier = await context.count_history(context_id)
    visits = await context.increment_variable(context_id, "visits")

    response = f"This is message #{{visits}} of our conversation. You said: {{message}}"
    if earlier:
        response += f" (I remember the {{earlier}} messages before.)"

    # Both sides of the exchange are stored, or neither.
    async with context.batch(context_id) as batch:
        batch.add_to_history("user", message)
        batch.add_to_history("assistant", response)
    return response


{text_of}'''

_STATELESS: Final = '''"""{title}: a handler.

Try it in the terminal:

    agentstate chat {module}.py:{module}
"""

from __future__ import annotations

from typing import Any

from agentstate import register_handler


@register_handler("{module}")
async def {module}(task: Any) -> str:
    """{title}: answers a message. It keeps no state."""
    return f"You said: {{text_of(task)}}"


{text_of}'''

_TEXT_OF: Final = '''def text_of(task: Any) -> str:
    """The text of the message that a task brings: an A2A task's is the last one of its history."""
    history = getattr(task, "history", None)
    message = getattr(task, "message", None) or (history[-1] if history else None)
    return " ".join(part.text for part in getattr(message, "parts", ()) if getattr(part, "text", ""))
'''

_STATEFUL_TEST: Final = '''"""Tests of {module}, on the memory storage: no server, no files."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from {module} import {module}

from agentstate import get_context_manager


@pytest.fixture(autouse=True)
def in_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler uses the storage of the configuration file; here that is this one."""
    config = tmp_path / "agent_config.yaml"
    config.write_text("state:\\n  backend: memory\\n")
    monkeypatch.setenv("AGENTSTATE_CONFIG", str(config))


def ask(context_id: str, text: str) -> str:
    task = SimpleNamespace(message=SimpleNamespace(parts=[SimpleNamespace(text=text)]))
    return asyncio.run({module}(task, context_id=context_id))


def test_it_answers() -> None:
    assert "hello" in ask("test-answers", "hello")


def test_it_remembers() -> None:
    ask("test-remembers", "first")
    assert "I remember" in ask("test-remembers", "second")
    assert "I remember" not in ask("test-somebody-else", "third")


def test_both_sides_are_stored() -> None:
    answer = ask("test-stored", "hello")
    context = get_context_manager(blocking=True)
    assert [message["content"] for message in context.get_history("test-stored")] == ["hello", answer]
'''

_STATELESS_TEST: Final = '''"""Tests of {module}."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from {module} import {module}


def test_it_answers() -> None:
    task = SimpleNamespace(message=SimpleNamespace(parts=[SimpleNamespace(text="hello")]))
    assert "hello" in asyncio.run({module}(task))
'''


@click.group(invoke_without_command=True)
@click.pass_context
def skill(context: click.Context) -> None:
    """Write new handlers."""
    console.help_if_alone(context)


@skill.command("create")
@click.argument("name", required=False)
@click.option("--state/--no-state", default=None, help="Whether the handler keeps state.")
@click.option("--storage", type=click.Choice(_BACKENDS), help="Where its state is kept.")
@click.option("--url", metavar="URL", help="The Valkey server.")
@click.option(
    "--directory",
    metavar="DIR",
    default=".",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Where to write the files.",
)
@click.option("--json", "as_json", is_flag=True, help="The names of the files as JSON, for machines.")
def create(
    name: str | None, state: bool | None, storage: str | None, url: str | None, directory: str, as_json: bool
) -> int:
    """Write a handler, a test of it that passes, and the configuration it needs.

    Asks for what is not given, if there is somebody to answer. Files that exist are never touched.

    \b
    Examples:
      agentstate skill create
      agentstate skill create "Conversation Memory Assistant" --storage file
      agentstate skill create weather --no-state --directory skills
    """
    ask = console.can_ask()
    if name is None:
        if not ask:
            raise click.UsageError("say the NAME of the skill")
        name = click.prompt("Skill name", value_proc=_checked_name, err=True)
    module = _module_name(name)
    if state is None:
        state = (
            storage is not None
            or url is not None
            or not ask
            or click.confirm("Enable state management?", default=True, err=True)
        )
    if not state and (storage or url):
        raise click.UsageError("--no-state excludes --storage and --url")
    if storage is None and state:
        default = "valkey" if url else "file"
        choice = click.Choice(_BACKENDS)
        storage = (
            click.prompt("Storage backend", type=choice, default=default, err=True) if ask and not url else default
        )
    if storage != "valkey" and url:
        raise click.UsageError("--url is for --storage valkey")
    if storage == "valkey" and url is None and ask and state:
        url = click.prompt("Valkey URL", default="valkey://localhost:6379", err=True)
    options = {"url": url or "valkey://localhost:6379"} if storage == "valkey" else {}
    files = _files(name.strip(), module, storage if state else None, options, Path(directory))
    _refuse_taken(files)
    write_all(files)
    _show(files, module, state, storage, directory, as_json)
    return exits.OK


def _checked_name(text: str) -> str:
    try:
        _module_name(text)
    except StateConfigError as error:
        raise click.UsageError(str(error)) from None
    return text


def _module_name(name: str) -> str:
    """The name of the module and of the function. Raises StateConfigError."""
    text = name.strip()
    if not text or len(text) > _MAX_NAME or not text.isascii() or not text.isprintable():
        raise StateConfigError(f"the name of a skill is 1 to {_MAX_NAME} printable ASCII characters, not {name[:80]!r}")
    if re.search(r"[/\\\\\"'{}]", text):
        raise StateConfigError(f"the name of a skill is words, without slashes, quotes and braces, not {name!r}")
    module = _NOT_WORD.sub("_", text.lower()).strip("_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise StateConfigError(f"{name!r} makes no name of a Python module: begin with a letter, and use no keyword")
    if _shadows(module):
        raise StateConfigError(
            f"a module {module!r} would hide one that Python or agentstate brings: choose another name"
        )
    return module


def _shadows(module: str) -> bool:
    import sys

    return module in sys.stdlib_module_names or module in ("agentstate", "pytest", "valkey", "yaml", "click", "rich")


def _files(name: str, module: str, storage: str | None, options: dict[str, Any], folder: Path) -> list[NewFile]:
    """What is to be written. The configuration only where there is none yet."""
    values = {"title": name[:1].upper() + name[1:], "module": module, "text_of": _TEXT_OF}
    source, test = (_STATELESS, _STATELESS_TEST) if storage is None else (_STATEFUL, _STATEFUL_TEST)
    files = [
        NewFile(folder / f"{module}.py", source.format(**values)),
        NewFile(folder / f"test_{module}.py", test.format(**values)),
    ]
    if storage is not None and not _configured(folder):
        files.append(NewFile(folder / CONFIG_NAMES[0], section_text(storage, options)))
    return files


def _configured(folder: Path) -> bool:
    return bool(os.environ.get(CONFIG_VARIABLE)) or any((folder / name).exists() for name in CONFIG_NAMES)


def _refuse_taken(files: list[NewFile]) -> None:
    for path, _ in files:
        if os.path.lexists(path):
            raise StateConflictError(
                f"{path} exists already, and was left as it is: choose another name or --directory"
            )


def _show(files: list[NewFile], module: str, state: bool, storage: str | None, directory: str, as_json: bool) -> None:
    if as_json:
        console.json_document(
            {"skill": module, "storage": storage if state else None, "files": [str(f.path) for f in files]}
        )
        return
    for path, _ in files:
        console.line(f"Wrote {path}")
    if state and not any(path.name == CONFIG_NAMES[0] for path, _ in files):
        console.note("There is a configuration file already; the handler uses the storage that it names.")
    place = "" if directory == "." else f"cd {directory} && "
    console.note(f"Next: {place}python -m pytest test_{module}.py; agentstate chat {module}.py:{module}")


COMMANDS = (skill,)
