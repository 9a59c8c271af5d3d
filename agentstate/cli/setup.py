"""Commands about the configuration file: init, validate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import click

from ..config import CONFIG_NAMES, StateConfig, json_schema
from ..config.model import KEYS
from ..errors import ContextNotFoundError, StateConfigError, StateConflictError
from ..registry import read_config
from ..urls import redact_url
from . import console, exits
from .completion import paths
from .newfiles import NewFile, write_all
from .store import use_config

_BACKENDS: Final = ("file", "valkey", "memory")
_DEFAULT_URL: Final = "valkey://localhost:6379"
_DEFAULT_DIR: Final = "./conversation_states"
_URL_VARIABLE: Final = "VALKEY_URL"


# --- init -----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", default=CONFIG_NAMES[0], type=click.Path(dir_okay=False))
@click.option("--storage", type=click.Choice(_BACKENDS), help="Where state is kept.")
@click.option("--url", metavar="URL", help="The Valkey server.")
@click.option("--storage-dir", metavar="DIR", shell_complete=paths("dir"), help="The folder of the file storage.")
@click.option("--key-prefix", metavar="TEXT", help="What all keys in Valkey begin with.")
@click.option("--ttl", metavar="SECONDS", help="Seconds after its last write until a conversation expires.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; what is not given gets its default.")
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

    Asks for what is not given, if there is somebody to answer. A file that exists is never touched. No secret is
    written: the URL is one that the environment variable VALKEY_URL overrides, and one with a password is left to it.

    \b
    Examples:
      agentstate init
      agentstate init --storage file --storage-dir ./conversations
      agentstate init --storage valkey --url valkey://localhost:6379 --ttl 7200
    """
    if url and storage_dir:
        raise click.UsageError("--url is for Valkey and --storage-dir for files: give one of them")
    if os.path.lexists(file):
        raise StateConflictError(
            f"{file} exists already, and was left as it is: `agentstate validate {file}` checks it"
        )
    ask = console.can_ask() and not yes
    if storage is None:
        storage = "valkey" if url else "file"
        if ask and not url and not storage_dir:
            storage = click.prompt("Storage backend", type=click.Choice(_BACKENDS), default="file", err=True)
    given: dict[str, Any] = {"url": url, "storage_dir": storage_dir, "key_prefix": key_prefix, "ttl": ttl}
    options = {name: value for name, value in given.items() if value is not None}
    if ask:
        _ask(str(storage), options)
    text = section_text(str(storage), options)
    write_all([NewFile(Path(file), text)])
    console.line(f"Wrote {file}")
    if "${" + _URL_VARIABLE + "}" in text:
        console.note(f"The URL has a password, which was not written: set {_URL_VARIABLE} in the environment.")
    console.note("Next: agentstate doctor")
    return exits.OK


def _ask(storage: str, options: dict[str, Any]) -> None:
    questions = {"file": ("storage_dir",), "valkey": ("url", "key_prefix", "ttl")}.get(storage, ())
    words = {
        "storage_dir": ("Folder", _DEFAULT_DIR),
        "url": ("Valkey URL", _DEFAULT_URL),
        "key_prefix": ("Key prefix", "agentup:state:"),
        "ttl": ("Seconds until a conversation expires (0: never)", "0"),
    }
    for name in questions:
        if name not in options:
            text, default = words[name]
            answer = click.prompt(text, default=default, err=True)
            if not (name == "ttl" and answer == "0"):
                options[name] = answer


def section_text(storage: str, options: dict[str, Any]) -> str:
    """The text of a configuration file for a storage with these options. Raises StateConfigError."""
    options = {"valkey": {"url": _DEFAULT_URL}, "file": {"storage_dir": _DEFAULT_DIR}}.get(storage, {}) | options
    checked = StateConfig(backend=storage, **options)
    lines = ["# Conversation state. All keys: agentstate validate --keys", "state:", f"  backend: {storage}"]
    for name, value in checked.options().items():
        shown = _without_secret(value) if name == "url" else value
        lines.append(f"  {name}: {json.dumps(shown, ensure_ascii=False)}")  # JSON is YAML
    if storage == "valkey" and checked.ttl is None:
        lines.append("  # ttl: 7200  # seconds; without it conversations are kept forever")
    return "\n".join(lines) + "\n"


def _without_secret(url: str) -> str:
    """The URL as it may be written into a file: behind a variable that overrides it, and never with a password."""
    return "${" + (_URL_VARIABLE if redact_url(url) != url else f"{_URL_VARIABLE}:{url}") + "}"


# --- validate -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", required=False, type=click.Path())
@click.option("--config", "config_file", metavar="FILE", type=click.Path(), help="The same as the argument.")
@click.option("--keys", is_flag=True, help="Print all keys and what they mean, and check nothing.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema for editors, and check nothing.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")
def validate(file: str | None, config_file: str | None, keys: bool, schema: bool, as_json: bool) -> int:
    """Check the configuration file, and show what it means.

    All problems are reported at once, each with its line. The exit code is 1 if there are any, 4 if there is no file.

    \b
    Examples:
      agentstate validate
      agentstate validate deploy/agent_config.yaml
      agentstate validate --schema > agent_config.schema.json
    """
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
        problems = list(error.problems) or [str(error)]
        if as_json:
            console.json_document({"valid": False, "problems": problems})
        else:
            for problem in problems:
                console.line(problem, "red")
            console.note(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found.")
        return exits.NOT_FOUND if isinstance(error.__cause__, FileNotFoundError) else exits.PROBLEM
    if as_json:
        answer = {"valid": True, "problems": [], "file": config.source, "section": config.section}
        console.json_document(answer | {"settings": config.to_dict()})
    elif config.source is not None:
        _print_settings(config)
    if config.source is None:
        raise ContextNotFoundError(
            f"there is no {' or '.join(CONFIG_NAMES)} here, so the defaults hold: files in ./conversation_states "
            "(agentstate init writes one)"
        )
    return exits.OK


def _print_settings(config: StateConfig) -> None:
    pairs = [("file", str(config.source)), ("section", str(config.section or "none, so the defaults hold"))]
    for name, value in config.to_dict().items():
        pairs.append((name, value if isinstance(value, str) else console.json_text(value)))
    console.facts(pairs)
    if not config.enabled:
        console.note("State management is switched off: `enabled: false`.")


def _print_keys() -> None:
    rows = (
        (
            name,
            ", ".join(key.backends) if key.backends and key.backends != ("*",) else "",
            key.kind.expects,
            key.meaning,
        )
        for name, key in KEYS.items()
    )
    console.table((console.Column("key", style="bold"), "storage", "value", "meaning"), rows)


COMMANDS = (init, validate)
