"""The options that choose a storage, and opening it."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import isfinite
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from ..config import CONFIG_VARIABLE
from ..errors import ContextNotFoundError, StateConfigError, StateError, StateUnavailableError
from ..registry import overridden, read_config, shared_context
from ..storage.base import StateStorage
from ..urls import redact_url
from .completion import offered, paths

R = TypeVar("R")

_DEFAULT_DIR: Final = "./conversation_states"
_DEFAULT_PREFIX: Final = "agentup:state:"
_URL_LIKE = re.compile(r"(valkey|redis)s?(\+[a-z]+)?:|([a-z]+\+)?unix:", re.IGNORECASE)
_CONNECT_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Place:
    """A storage that is not opened yet: its name and its options.

    `named` is a folder that an option of the command names, so that one that does not exist is a mistake.
    """

    backend: str
    options: dict[str, Any]
    named: bool = False

    @property
    def name(self) -> str:
        """Where the storage is, without secrets."""
        if self.backend == "file":
            return os.path.expanduser(str(self.options.get("storage_dir", _DEFAULT_DIR)))
        if self.backend == "valkey":
            prefix = self.options.get("key_prefix", _DEFAULT_PREFIX)
            return f"{redact_url(str(self.options.get('url')))} under {prefix!r}"
        return f"the storage {self.backend!r}"

    @property
    def exists(self) -> bool:
        """Whether it is there, as far as that can be seen without opening it."""
        return self.backend != "file" or os.path.lexists(self.name)

    @contextmanager
    def open(self, *, shared: bool = True, may_be_new: bool = False) -> Iterator[StateStorage]:
        """The storage, opened for the block.

        With `shared` it must not be the memory of this process. Raises StateConfigError, ContextNotFoundError for a
        folder that an option names and that does not exist (unless it `may_be_new`), and StateUnavailableError for a
        server that refuses connections.
        """
        if shared and self.backend == "memory":
            raise StateConfigError(
                "the storage 'memory' exists only inside each process, so other processes cannot read it: "
                "choose another one with --storage, --url or --storage-dir"
            )
        if self.named and not may_be_new and not self.exists:
            raise ContextNotFoundError(f"the folder {self.name} does not exist")
        storage = shared_context(self.backend, self.options, blocking=True).storage
        try:
            if self.backend == "valkey":
                _check_that_it_listens(self.options)
            yield storage
        finally:
            storage.close()


def _check_that_it_listens(options: dict[str, Any]) -> None:
    """Raise StateUnavailableError where no server of the URL accepts connections, or there is no such host.

    Calls are retried until their deadline, since a server may be restarting. For a command a wrong address is more
    likely, which should not take seconds to be reported.
    """
    from ..storage.valkey.url import read_url

    problem: OSError | None = None
    addresses = read_url(options["url"], {}).addresses
    for address in addresses:
        try:
            _connect(address.path or (address.host, address.port)).close()
        except (ConnectionRefusedError, FileNotFoundError, socket.gaierror) as error:
            problem = error
        except (OSError, AttributeError):  # AttributeError: Windows has no unix sockets
            return  # the calls of the command report it
        else:
            return
    shown = ", ".join(map(str, addresses))
    raise StateUnavailableError(f"cannot connect to {shown}: {problem and problem.strerror}") from problem


def _connect(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=_CONNECT_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _parsed_settings(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, Any], ...]:
    """Each ``NAME=VALUE`` as a pair. A value that is JSON is decoded, anything else is text."""
    pairs = []
    for given in values:
        name, equals, text = given.partition("=")
        if not equals or not name:
            raise click.BadParameter("it must be NAME=VALUE, for example ttl=3600", context, parameter)
        try:
            pairs.append((name, json.loads(text)))
        except ValueError:
            pairs.append((name, text))
    return tuple(pairs)


def settings_option(*names: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # noqa: A002
    """An option that takes ``NAME=VALUE`` and can be repeated."""
    return click.option(*names, metavar="NAME=VALUE", multiple=True, callback=_parsed_settings, help=help)


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--config`."""
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        type=click.Path(),
        help=f"The configuration file (default: ${CONFIG_VARIABLE}, agent_config.yaml or agentup.yml).",
    )(command)


def use_config(config_file: str | None) -> None:
    """Make this process and the handlers it loads use a configuration file. Raises StateConfigError without it."""
    if config_file is not None:
        if not os.path.exists(config_file):
            raise StateConfigError(f"{config_file}: there is no such file") from FileNotFoundError(config_file)
        os.environ[CONFIG_VARIABLE] = config_file


class FiniteNumber(click.FloatRange):
    """A number in a range. (NaN is in every range of click.)"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
user_option: Final = click.option("--user", "user_id", metavar="USER", help="Only conversations of this owner.")
layout_choice: Final = click.Choice(["log", "document"])

_STORE_OPTIONS: Final = (
    click.option("--storage", metavar="NAME", help="memory, file, valkey, or the name of a third party's storage."),
    click.option("--url", metavar="URL", help="The Valkey server, for example valkey://localhost:6379."),
    click.option("--storage-dir", metavar="DIR", shell_complete=paths("dir"), help="The folder of the file storage."),
    click.option("--key-prefix", metavar="TEXT", help="The prefix of all keys in Valkey."),
    click.option("--layout", type=layout_choice, help="The format that conversations are stored in."),
    settings_option(
        "-o", "--option", "settings", help="Any other option of the storage, for example ttl=3600. Can be repeated."
    ),
)
_NAMES: Final = ("config_file", "storage", "url", "storage_dir", "key_prefix", "layout", "settings")


def store_options_unread(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options that choose a storage. The command gets them as `chosen`, for `chosen_place`."""

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
    """The storage that the options of a command choose, which override the configuration file."""
    use_config(chosen["config_file"])
    storage, url, storage_dir = chosen["storage"], chosen["url"], chosen["storage_dir"]
    if storage is None and url is not None and storage_dir is not None:
        raise click.UsageError("--url is for Valkey and --storage-dir for files: use only one of them")
    if storage_dir is not None and is_url_like(storage_dir):
        raise click.UsageError("--storage-dir must be a folder, got a URL: use --url")
    if storage is None and url is not None:
        storage = "valkey"
    if storage is None and storage_dir is not None:
        storage = "file"
    given = {name: chosen[name] for name in ("url", "storage_dir", "key_prefix", "layout")}
    options = {name: value for name, value in given.items() if value is not None} | dict(chosen["settings"] or ())
    config = read_config()
    if storage == "valkey" and "url" not in options and (config.backend, storage) != ("valkey", "valkey"):
        raise StateConfigError(
            f"the storage 'valkey' needs a URL: use --url valkey://localhost:6379, or set `backend: valkey` and `url:` "
            f"in {config.source or 'agent_config.yaml'}"
        )
    backend, merged = overridden(config, storage, options)
    return Place(backend, merged, named="storage_dir" in options)


def is_url_like(text: str) -> bool:
    """Whether a text that should be the name of a folder is, or was meant to be, the URL of a server."""
    return _URL_LIKE.match(text) is not None and not os.path.exists(text)


def complete_context_id(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Ids of conversations for the completion of a shell, from the first page of the listing."""
    from ..operations import Listing

    try:
        place = chosen_place({name: context.params.get(name) for name in _NAMES})
        with place.open() as storage:
            page: Any = storage.call(Listing(size=1000))
    except (StateError, click.ClickException, OSError):
        return []  # a completion cannot report what is wrong; the command itself will
    return offered(list(page.context_ids), incomplete)
