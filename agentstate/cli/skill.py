"""The command skill create: write a new handler with a test and a configuration file."""

from __future__ import annotations

import keyword
import os
import re
import shlex
from pathlib import Path
from typing import Any, Final

import click

from ..config import CONFIG_NAMES, CONFIG_VARIABLE
from ..errors import StateConfigError
from . import console, exits
from .newfiles import NewFile, write_all
from .setup import DEFAULT_URL, answer_check, backend_choice, check_is_new, section_text
from .store import json_option

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
    """{title}: answers a message, and counts the messages of the conversation."""
    message = text_of(task)
    earlier = await context.count_history(context_id)
    visits = await context.increment_variable(context_id, "visits")

    response = f"This is message #{{visits}} of our conversation. You said: {{message}}"
    if earlier:
        response += f" (I remember {{earlier}} earlier messages.)"

    # Stores both messages, or neither.
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
    """{title}: answers a message. It stores nothing."""
    return f"You said: {{text_of(task)}}"


{text_of}'''

_TEXT_OF: Final = '''def text_of(task: Any) -> str:
    """The text of a task: a dict such as {"text": "hello"}, an A2A task or message, or any object like these."""
    if text := _text_in(task):
        return text
    raise ValueError("the task has no text: adapt text_of() to the tasks of this agent")


def _text_in(thing: Any) -> str:
    if isinstance(thing, str):
        return thing
    get = thing.get if isinstance(thing, dict) else lambda name: getattr(thing, name, None)
    for name in ("text", "message", "content", "input", "root"):
        if text := _text_in(get(name)) if get(name) else "":
            return text
    # An A2A message has parts; the message of an A2A task is the last one of its history.
    parts = list(get("parts") or ()) or list(get("history") or ())[-1:]
    return " ".join(filter(None, map(_text_in, parts)))
'''

_STATEFUL_TEST: Final = '''"""Tests of {module} on the memory storage, which needs neither a server nor files."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from {module} import {module}

from agentstate import get_context_manager


@pytest.fixture(autouse=True)
def in_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the handler, which uses the storage of the configuration file, use one in memory."""
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


def test_it_reads_dicts() -> None:
    assert "hello" in asyncio.run({module}({{"text": "hello", "context_id": "test-dict"}}))


def test_both_messages_are_stored() -> None:
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
    assert "hello" in asyncio.run({module}({{"text": "hello"}}))
'''


@click.group(invoke_without_command=True)
@click.pass_context
def skill(context: click.Context) -> None:
    """Create new handlers."""
    console.help_if_alone(context)


@skill.command("create")
@click.argument("name", required=False)
@click.option("--state/--no-state", default=None, help="Whether the handler stores conversations.")
@click.option("--storage", type=backend_choice, help="The storage for the configuration file.")
@click.option("--url", metavar="URL", help="The Valkey server.")
@click.option(
    "--directory",
    metavar="DIR",
    default=".",
    show_default=True,
    type=click.Path(file_okay=False),
    help="The folder to write the files to.",
)
@json_option
def create(
    name: str | None, state: bool | None, storage: str | None, url: str | None, directory: str, as_json: bool
) -> int:
    """Write a handler, a test for it, and a configuration file if there is none.

    On a terminal it asks for everything that its options do not give. It never replaces a file.

    \b
    Examples:
      agentstate skill create
      agentstate skill create "Conversation Memory Assistant" --storage file
      agentstate skill create weather --no-state --directory skills
    """
    ask = console.can_ask()
    if name is None:
        if not ask:
            raise click.UsageError("missing argument NAME")
        name = click.prompt("Skill name", value_proc=_checked_name, err=True)
    module = _module_name(name)
    for file in _file_names(module):
        check_is_new(Path(directory, file), hint="choose another name or --directory")
    if state is False and (storage or url):
        raise click.UsageError("--no-state excludes --storage and --url")
    if storage not in (None, "valkey") and url:
        raise click.UsageError("--url needs --storage valkey")
    if url:
        storage = "valkey"
        section_text(storage, {"url": url})  # checked before anything is asked
    if state is None:
        state = storage is not None or not ask or click.confirm("Enable state management?", default=True, err=True)
    if state and storage is None:
        storage = click.prompt("Storage backend", type=backend_choice, default="file", err=True) if ask else "file"
    options = {}
    if storage == "valkey":
        if url is None and ask:
            check = answer_check(storage, {}, "url")
            url = click.prompt("Valkey URL", default=DEFAULT_URL, value_proc=check, err=True)
        options["url"] = url or DEFAULT_URL
    files = _files(name.strip(), module, storage, options, Path(directory))
    write_all(files)
    _show(files, module, storage, directory, as_json)
    return exits.OK


def _checked_name(text: str) -> str:
    try:
        _module_name(text)
    except StateConfigError as error:
        raise click.UsageError(str(error)) from None
    return text


def _module_name(name: str) -> str:
    """The name of the module and of the handler for the name of a skill. Raises StateConfigError."""
    text = name.strip()
    if not text or len(text) > _MAX_NAME or not text.isascii() or not text.isprintable():
        raise StateConfigError(
            f"the name of a skill must be 1 to {_MAX_NAME} printable ASCII characters, got {name[:80]!r}"
        )
    if re.search(r"[/\\\\\"'{}]", text):
        raise StateConfigError(f"the name of a skill must not contain slashes, quotes or braces, got {name!r}")
    module = _NOT_WORD.sub("_", text.lower()).strip("_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise StateConfigError(
            f"{name!r} is not a valid module name: begin with a letter, and do not use a keyword of Python"
        )
    if _shadows(module):
        raise StateConfigError(f"a module {module!r} would hide an installed module of that name: choose another name")
    return module


def _shadows(module: str) -> bool:
    import sys

    return module in sys.stdlib_module_names or module in ("agentstate", "pytest", "valkey", "yaml", "click", "rich")


def _files(name: str, module: str, storage: str | None, options: dict[str, Any], folder: Path) -> list[NewFile]:
    """The files to write. A configuration file only where there is none."""
    values = {"title": name[:1].upper() + name[1:], "module": module, "text_of": _TEXT_OF}
    source, test = (_STATELESS, _STATELESS_TEST) if storage is None else (_STATEFUL, _STATEFUL_TEST)
    files = [
        NewFile(folder / file, template.format(**values))
        for file, template in zip(_file_names(module), (source, test), strict=True)
    ]
    if storage is not None and not _configured(folder):
        files.append(NewFile(folder / CONFIG_NAMES[0], section_text(storage, options)))
    return files


def _configured(folder: Path) -> bool:
    return bool(os.environ.get(CONFIG_VARIABLE)) or any((folder / name).exists() for name in CONFIG_NAMES)


def _file_names(module: str) -> tuple[str, str]:
    return f"{module}.py", f"test_{module}.py"


def _show(files: list[NewFile], module: str, storage: str | None, directory: str, as_json: bool) -> None:
    if as_json:
        console.json_document({"skill": module, "storage": storage, "files": [str(file.path) for file in files]})
        return
    for path, _ in files:
        console.line(f"Wrote {path}")
    if storage is not None and not any(path.name == CONFIG_NAMES[0] for path, _ in files):
        console.note("The handler uses the storage in the configuration file, which exists already.")
    place = "" if directory == "." else f"cd {shlex.quote(directory)} && "
    console.note(f"Next: {place}python -m pytest test_{module}.py; agentstate chat {module}.py:{module}")


COMMANDS = (skill,)
