"""Commands about the configuration file: init, validate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from ..config import CONFIG_NAMES, StateConfig, json_schema
from ..config.model import EVERY, KEYS
from ..errors import ContextNotFoundError, StateConfigError, StateConflictError
from ..registry import read_config, storage_class
from ..urls import redact_url
from . import console, exits
from .completion import paths
from .newfiles import NewFile, write_all
from .store import config_option, json_option, use_config

DEFAULT_URL: Final = "valkey://localhost:6379"
_DEFAULTS: Final = {"file": {"storage_dir": "./conversation_states"}, "valkey": {"url": DEFAULT_URL}}
_URL_VARIABLE: Final = "VALKEY_URL"

backend_choice: Final = click.Choice(["file", "valkey", "memory"])


# --- init -----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", default=CONFIG_NAMES[0], type=click.Path(dir_okay=False))
@click.option("--storage", type=backend_choice, help="The storage.")
@click.option("--url", metavar="URL", help="The Valkey server.")
@click.option("--storage-dir", metavar="DIR", shell_complete=paths("dir"), help="The folder of the file storage.")
@click.option("--key-prefix", metavar="TEXT", help="The prefix of all keys in Valkey.")
@click.option("--ttl", metavar="SECONDS", help="Delete a conversation this many seconds after its last write.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; use defaults for everything else.")
def init(
    file: str,
    storage: str | None,
    url: str | None,
    storage_dir: str | None,
    key_prefix: str | None,
    ttl: str | None,
    yes: bool,
) -> int:
    """Write a configuration file.

    On a terminal it asks for everything that its options do not give. It never replaces a file. Passwords are not
    written: the environment variable VALKEY_URL overrides the URL in the file, and must be set if it has a password.

    \b
    Examples:
      agentstate init
      agentstate init --storage file --storage-dir ./conversations
      agentstate init --storage valkey --url valkey://localhost:6379 --ttl 7200
    """
    if url and storage_dir:
        raise click.UsageError("--url is for Valkey and --storage-dir for files: use only one of them")
    check_is_new(Path(file), hint=f"`agentstate validate {file}` checks it")
    given = {"url": url, "storage_dir": storage_dir, "key_prefix": key_prefix, "ttl": ttl}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    ask = console.can_ask() and not yes
    if storage is None:
        storage = "valkey" if url else "file"
        if ask and not url and not storage_dir:
            storage = str(click.prompt("Storage backend", type=backend_choice, default="file", err=True))
    section_text(storage, options)  # what was given is checked before anything is asked
    if ask:
        _ask(storage, options)
    text = section_text(storage, options)
    write_all([NewFile(Path(file), text)])
    console.line(f"Wrote {file}")
    if "${" + _URL_VARIABLE + "}" in text:
        console.note(f"The URL has a password, which was not written: set {_URL_VARIABLE} in the environment.")
    console.note("Next: agentstate doctor")
    return exits.OK


def check_is_new(path: Path, hint: str) -> None:
    """Raise StateConflictError where the file exists, OSError where none can be written there."""
    if os.path.lexists(path):
        raise StateConflictError(f"{path} exists already and was not changed: {hint}")
    parent = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(None, "no permission to write files here", str(parent))


def _ask(storage: str, options: dict[str, Any]) -> None:
    """Ask for the options that were not given."""
    questions = {
        "file": [("storage_dir", "Folder", _DEFAULTS["file"]["storage_dir"])],
        "valkey": [
            ("url", "Valkey URL", DEFAULT_URL),
            ("key_prefix", "Key prefix", "agentup:state:"),
            ("ttl", "Seconds until a conversation expires (0: never)", "0"),
        ],
    }
    for name, text, default in questions.get(storage, ()):
        if name not in options:
            check = answer_check(storage, options, name)
            answer = click.prompt(text, default=default, value_proc=check, err=True)
            if not _is_never(name, answer):
                options[name] = answer


def _is_never(name: str, answer: str) -> bool:
    return name == "ttl" and answer.strip() == "0"


def answer_check(storage: str, options: dict[str, Any], name: str) -> Callable[[str], str]:
    """Checks the answer to a question for an option, so that click asks again after a wrong one."""

    def check(answer: str) -> str:
        try:
            if not _is_never(name, answer):
                section_text(storage, options | {name: answer})
        except StateConfigError as error:
            raise click.UsageError(str(error)) from None
        return answer

    return check


def section_text(storage: str, options: dict[str, Any]) -> str:
    """The text of a configuration file for a storage with these options. Raises StateConfigError."""
    checked = StateConfig(backend=storage, **_DEFAULTS.get(storage, {}) | options)
    lines = ["# Conversation state. All keys: agentstate validate --keys", "state:", f"  backend: {storage}"]
    for name, value in checked.options().items():
        shown = _without_secret(value) if name == "url" else value
        lines.append(f"  {name}: {json.dumps(shown, ensure_ascii=False)}")  # JSON is YAML
    if storage == "valkey" and checked.ttl is None:
        lines.append("  # ttl: 7200  # seconds; without it conversations are kept forever")
    return "\n".join(lines) + "\n"


def _without_secret(url: str) -> str:
    """How a URL is written into a file: as a variable, whose default is the URL unless that holds a secret."""
    return "${" + (_URL_VARIABLE if redact_url(url) != url else f"{_URL_VARIABLE}:{url}") + "}"


# --- validate -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", required=False, type=click.Path())
@config_option
@click.option("--keys", is_flag=True, help="Only print all keys and what they mean.")
@click.option("--schema", is_flag=True, help="Only print the JSON Schema, for editors.")
@json_option
def validate(file: str | None, config_file: str | None, keys: bool, schema: bool, as_json: bool) -> int:
    """Check the configuration file and print the settings in it.

    All problems are reported, each with its line. The exit code is 1 if there are any, and 4 if there is no file.

    \b
    Examples:
      agentstate validate
      agentstate validate deploy/agent_config.yaml
      agentstate validate --schema > agent_config.schema.json
    """
    if file is not None and config_file is not None:
        raise click.UsageError("the argument FILE and --config mean the same: use only one of them")
    if schema:
        console.json_document(json_schema())
        return exits.OK
    if keys:
        _print_keys()
        return exits.OK
    try:
        use_config(file if file is not None else config_file)
        config = read_config()
    except StateConfigError as error:
        _print_problems(list(error.problems) or [str(error)], as_json)
        return exits.NOT_FOUND if isinstance(error.__cause__, FileNotFoundError) else exits.PROBLEM
    if problems := [f"{config.source}: {problem}" for problem in _not_installed(config)]:
        _print_problems(problems, as_json)
        return exits.PROBLEM
    if as_json:
        answer = {"valid": True, "problems": [], "file": config.source, "section": config.section}
        console.json_document(answer | {"settings": config.to_dict()})
    elif config.source is not None:
        _print_settings(config)
    if config.source is None:
        raise ContextNotFoundError(
            f"there is no {' or '.join(CONFIG_NAMES)} here, so the defaults apply: files in ./conversation_states "
            "(`agentstate init` writes a configuration file)"
        )
    return exits.OK


def _not_installed(config: StateConfig) -> Iterator[str]:
    """What the settings need and this installation does not have."""
    for backend in dict.fromkeys(
        [config.backend, *(config.for_handler(name).backend for name in config.skill_overrides)]
    ):
        try:
            storage_class(backend)
        except StateConfigError as error:
            yield str(error)
    if config.telemetry:
        try:
            from .. import telemetry  # noqa: F401
        except StateConfigError as error:
            yield str(error)


def _print_problems(problems: list[str], as_json: bool) -> None:
    if as_json:
        console.json_document({"valid": False, "problems": problems})
        return
    for problem in problems:
        console.line(console.one_line(problem), "red")
    console.note(f"{console.counted(len(problems), 'problem')} found.")


def _print_settings(config: StateConfig) -> None:
    pairs = [("file", str(config.source)), ("section", str(config.section or "none, so the defaults apply"))]
    for name, value in config.to_dict().items():
        pairs.append((name, value if isinstance(value, str) else console.json_text(value)))
    console.facts(pairs)
    if not config.enabled:
        console.note("State management is disabled by `enabled: false`.")


def _print_keys() -> None:
    rows = (
        (
            name,
            ", ".join(key.backends) if key.backends and key.backends != EVERY else "",
            key.kind.expects,
            key.meaning,
        )
        for name, key in KEYS.items()
    )
    columns = (console.Column("key", style="bold"), *map(console.Column, ("storage", "value", "meaning")))
    console.table(columns, rows)


COMMANDS = (init, validate)
