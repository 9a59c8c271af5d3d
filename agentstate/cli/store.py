"""The options that choose a storage, and opening it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import isfinite
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from ..config import CONFIG_VARIABLE
from ..errors import StateConfigError, StateError
from ..registry import overridden, read_config, shared_context
from ..storage.base import StateStorage
from ..urls import redact_url
from .completion import offered, paths

R = TypeVar("R")

_DEFAULT_DIR: Final = "./conversation_states"
_DEFAULT_PREFIX: Final = "agentup:state:"


@dataclass
class Place:
    """A storage that is not opened yet: its name and its options."""

    backend: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Where it is, fit to be shown."""
        if self.backend == "file":
            return str(self.options.get("storage_dir", _DEFAULT_DIR))
        if self.backend == "valkey":
            prefix = self.options.get("key_prefix", _DEFAULT_PREFIX)
            return f"{redact_url(str(self.options.get('url')))} under {prefix}"
        return f"the storage {self.backend!r}"

    @contextmanager
    def open(self, *, shared: bool = True) -> Iterator[StateStorage]:
        """The storage, opened for the block. With `shared`, the memory of this process alone will not do."""
        if shared and self.backend == "memory":
            raise StateConfigError(
                "the storage is 'memory', which lives inside each process and cannot be looked at from another: "
                "choose one with --storage, --url or --storage-dir"
            )
        storage = shared_context(self.backend, self.options, blocking=True).storage
        try:
            yield storage
        finally:
            storage.close()


def _parsed_settings(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, Any], ...]:
    """Each ``NAME=VALUE`` in two; a value that is JSON is that, anything else is text."""
    pairs = []
    for given in values:
        name, equals, text = given.partition("=")
        if not equals or not name:
            raise click.BadParameter("write NAME=VALUE, for example ttl=3600", context, parameter)
        try:
            pairs.append((name, json.loads(text)))
        except ValueError:
            pairs.append((name, text))
    return tuple(pairs)


def settings_option(*names: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # noqa: A002
    """An option that takes ``NAME=VALUE``, repeatedly."""
    return click.option(*names, metavar="NAME=VALUE", multiple=True, callback=_parsed_settings, help=help)


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--config`."""
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        type=click.Path(),
        help=f"The configuration file (default: ${CONFIG_VARIABLE}, agent_config.yaml, agentup.yml).",
    )(command)


def use_config(config_file: str | None) -> None:
    """Make this process, handlers that it loads included, use a configuration file. StateConfigError: there is none."""
    if config_file is not None:
        if not os.path.exists(config_file):
            raise StateConfigError(f"{config_file}: there is no such file") from FileNotFoundError(config_file)
        os.environ[CONFIG_VARIABLE] = config_file


class FiniteNumber(click.FloatRange):
    """A number; what is none (nan) is in every range otherwise."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a number to count with", param, ctx)
        return number


json_option: Final = click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")

_STORE_OPTIONS: Final = (
    click.option("--storage", metavar="NAME", help="memory, file, valkey, or the name of a third party's storage."),
    click.option("--url", metavar="URL", help="The Valkey server, like valkey://localhost:6379."),
    click.option("--storage-dir", metavar="DIR", shell_complete=paths("dir"), help="The folder of the file storage."),
    click.option("--key-prefix", metavar="TEXT", help="What all keys in Valkey begin with."),
    click.option("--layout", type=click.Choice(["log", "document"]), help="How conversations are stored."),
    settings_option("-o", "--option", "settings", help="Any other option of the storage, like ttl=3600."),
)


_NAMES: Final = ("config_file", "storage", "url", "storage_dir", "key_prefix", "layout", "settings")


def store_options_unread(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options that choose a storage. The command gets them in `chosen`, for `chosen_place`."""

    @wraps(command)
    def with_choice(*args: Any, **kwargs: Any) -> R:
        return command(*args, chosen={name: kwargs.pop(name) for name in _NAMES}, **kwargs)

    decorated: Callable[..., R] = with_choice
    for option in reversed(_STORE_OPTIONS):
        decorated = option(decorated)
    return config_option(decorated)


def store_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options that choose a storage. The command gets the `place` that they mean."""

    @wraps(command)
    def with_place(*args: Any, chosen: dict[str, Any], **kwargs: Any) -> R:
        return command(*args, place=chosen_place(chosen), **kwargs)

    return store_options_unread(with_place)


def chosen_place(chosen: dict[str, Any]) -> Place:
    """The storage that the options of a command choose, over what the configuration file says."""
    use_config(chosen["config_file"])
    storage, url, storage_dir = chosen["storage"], chosen["url"], chosen["storage_dir"]
    if storage is None and url is not None and storage_dir is not None:
        raise click.UsageError("--url is for Valkey and --storage-dir for files: give one of them")
    if storage is None and url is not None:
        storage = "valkey"
    if storage is None and storage_dir is not None:
        storage = "file"
    named = {name: chosen[name] for name in ("url", "storage_dir", "key_prefix", "layout")}
    options = {name: value for name, value in named.items() if value is not None} | dict(chosen["settings"] or ())
    backend, merged = overridden(read_config(), storage, options)
    return Place(backend, merged)


def complete_context_id(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Ids of conversations for the shell's completion, as far as they can be had at once."""
    from ..operations import Listing

    try:
        place = chosen_place({name: context.params.get(name) for name in _NAMES})
        with place.open() as storage:
            page: Any = storage.call(Listing(size=1000))
    except (StateError, click.ClickException, OSError):
        return []  # completion has nowhere to say what is wrong; the command itself will
    return offered(list(page.context_ids), incomplete)
