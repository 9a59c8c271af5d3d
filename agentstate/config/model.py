"""The keys of the state section: each is described once, as a field of `StateConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, cast

from agentstate.errors import StateConfigError
from agentstate.urls import HIDDEN, redact_url

from .kinds import (
    BACKEND,
    BOOLEAN,
    BYTES,
    COUNT,
    KEY_PREFIX,
    MAPPING,
    NATURAL,
    PATH,
    POSITIVE_BYTES,
    SECONDS,
    TEXT,
    URL,
    Kind,
    RefusedError,
    one_of,
)

BACKENDS: Final = ("memory", "file", "valkey")
"""The built-in backends. Any other name is a third party's."""

OTHER_BACKEND_NAMES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("redis", "keydb"), "valkey"),
    **dict.fromkeys(("files", "filesystem", "disk", "fs", "json"), "file"),
    **dict.fromkeys(("mem", "ram", "in_memory", "inmemory"), "memory"),
}
"""Names that people try, and the backend that each means."""

SECTIONS: Final = ("state", "state_management")
"""The names that the section may have."""

AGENTUP_OVERRIDES: Final = (("skills", "skill_id"), ("plugins", "plugin_id"))
"""AgentUp's lists whose entries may have a `state_override`, and the key of an entry's name."""

EVERY: Final = ("*",)
_FILE: Final = ("file",)
_VALKEY: Final = ("valkey",)

_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|(^|_)(pw|key|auth|dsn)$", re.IGNORECASE)


@dataclass(frozen=True)
class Key:
    """One key of the section.

    `backends` are those that have the option: `EVERY` is all of them, third parties' included; a key without any is for
    agentstate itself. `default` is its default, or `without` describes it. A `nullable` key may be `null`, which means
    "none". `connects` marks an option of the connection, like those in a URL. `mistaken` are other names, for hints.
    """

    kind: Kind
    meaning: str
    backends: tuple[str, ...] = ()
    default: Any = None
    without: str = ""
    nullable: bool = False
    secret: bool = False
    connects: bool = False
    mistaken: tuple[str, ...] = ()


def _option(kind: Kind, backends: tuple[str, ...], meaning: str, **more: Any) -> Any:
    return field(default=None, metadata={"key": Key(kind, meaning, backends, **more)})


def _connection(kind: Kind, meaning: str, **more: Any) -> Any:
    return _option(kind, _VALKEY, meaning, connects=True, **more)


def _own(kind: Kind, default: Any, meaning: str, **more: Any) -> Any:
    return field(default=default, metadata={"key": Key(kind, meaning, default=default, **more)})


@dataclass(frozen=True, kw_only=True, repr=False)
class StateConfig:
    """The state section: a field for each of its keys.

    An option that is not set is None here and absent from `options()`, so that the backend's default applies. `config`
    contains the options of a third party's backend; those of the built-in ones are moved to their own fields. `source`
    is the file, and `section` the name of the section in it, or None.

    Raises StateConfigError, whose `problems` are all that is wrong.
    """

    enabled: bool = _own(BOOLEAN, True, "`false` switches state management off. The section is checked all the same.")
    backend: str = _own(
        BACKEND,
        "file",
        "Where state is kept: `memory`, `file`, `valkey`, or the name of a third party's backend.",
        mistaken=("type", "storage", "storage_type", "store"),
    )
    ttl: float | None = _option(
        SECONDS,
        EVERY,
        "Seconds after its last write until a context expires. `null`: never.",
        without="never",
        nullable=True,
        mistaken=("expire", "expires", "expiry", "expiration", "ttl_seconds", "time_to_live"),
    )
    max_history: int | None = _option(
        COUNT,
        EVERY,
        "A context keeps only its last so many messages. `null`: all of them.",
        without="all",
        nullable=True,
        mistaken=("history_limit", "limit", "max_messages", "history_size"),
    )
    max_value_bytes: int | None = _option(
        POSITIVE_BYTES,
        EVERY,
        "Bytes that a variable, a metadata value or a message may have as JSON.",
        default=16 * 2**20,
        mistaken=("max_value_size", "max_size"),
    )
    deadline: float | None = _option(
        SECONDS,
        EVERY,
        "Seconds that a call may take, lock waits and retries included.",
        default=5.0,
        mistaken=("timeout", "socket_timeout"),
    )
    telemetry: bool | None = _option(
        BOOLEAN,
        EVERY,
        "Emit spans and metrics with OpenTelemetry (`pip install opentelemetry-api`).",
        default=False,
        mistaken=("otel", "opentelemetry", "tracing", "metrics"),
    )
    on_unavailable: str = _own(
        one_of("raise", "ephemeral"),
        "raise",
        "What handlers get while the store cannot be reached: an error, or a context that forgets.",
    )
    storage_dir: str | None = _option(
        PATH,
        _FILE,
        "Directory of the files. A relative one begins at the working directory of the process.",
        default="./conversation_states",
        mistaken=("dir", "directory", "path", "storage_path", "state_dir", "folder"),
    )
    layout: str | None = _option(
        one_of("log", "document"),
        ("file", "valkey"),
        "`log` appends changes; `document` keeps one JSON document per context, as AgentUp does.",
        default="log",
        mistaken=("format",),
    )
    fsync: str | None = _option(
        one_of("always", "everysec", "no"),
        _FILE,
        "When writes are forced to the disk: before the call returns, every second, or when the system likes.",
        default="always",
        mistaken=("sync", "appendfsync", "durability"),
    )
    exclusive: bool | None = _option(
        BOOLEAN,
        _FILE,
        "This process has the directory for itself, and needs no lock for each operation.",
        default=False,
    )
    cache_bytes: int | None = _option(
        BYTES,
        _FILE,
        "Bytes of memory for what was read from files.",
        default=32 * 2**20,
        mistaken=("cache", "cache_size"),
    )
    url: str | None = _option(
        URL,
        _VALKEY,
        "The server. It is never taken from `services:`.",
        without="required",
        mistaken=("host", "port", "uri", "valkey_url", "redis_url", "address", "server"),
    )
    key_prefix: str | None = _option(
        KEY_PREFIX,
        _VALKEY,
        "What all keys begin with.",
        default="agentup:state:",
        mistaken=("prefix", "namespace", "keyprefix"),
    )
    db: int | None = _connection(
        NATURAL, "Number of the database.", without="the URL's", mistaken=("database", "db_number")
    )
    username: str | None = _connection(
        TEXT, "Name of the server's user.", without="the URL's", nullable=True, mistaken=("user",)
    )
    password: str | None = _connection(
        TEXT,
        "Password of the server's user.",
        without="the URL's",
        nullable=True,
        secret=True,
        mistaken=("pass", "passwd", "auth", "requirepass"),
    )
    sentinel_username: str | None = _connection(TEXT, "Name of the sentinels' user.", nullable=True)
    sentinel_password: str | None = _connection(TEXT, "Password of the sentinels' user.", nullable=True, secret=True)
    client_name: str | None = _connection(TEXT, "What `CLIENT LIST` shows for the connections.", nullable=True)
    socket_keepalive: bool | None = _connection(BOOLEAN, "Whether the system probes idle connections.")
    max_connections: int | None = _option(
        COUNT, _VALKEY, "Connections to each server at a time.", default=32, mistaken=("pool_size", "connections")
    )
    min_replicas: int | None = _option(
        NATURAL,
        _VALKEY,
        "A write is done when so many replicas have confirmed it.",
        default=0,
        mistaken=("replicas", "wait"),
    )
    strict: bool | None = _option(
        BOOLEAN,
        _VALKEY,
        "Refuse a server that may evict keys or keeps nothing on disk. Otherwise that is a warning in the log.",
        default=False,
    )
    ssl_ca_certs: str | None = _connection(
        TEXT,
        "PEM file with the certificates of the authorities that may vouch for the server.",
        without="the system's",
        nullable=True,
        mistaken=("ca", "cafile", "ssl_ca", "ca_certs", "tls_ca_cert"),
    )
    ssl_ca_path: str | None = _connection(TEXT, "Directory of such files, named as OpenSSL wants it.", nullable=True)
    ssl_ca_data: str | None = _connection(TEXT, "Such certificates themselves.", nullable=True)
    ssl_cert_reqs: str | None = _connection(
        one_of("required", "optional", "none"),
        "Whether the server must show a certificate that an authority vouches for.",
        default="required",
        mistaken=("ssl_verify", "verify"),
    )
    ssl_check_hostname: bool | None = _connection(
        BOOLEAN, "Whether that certificate must be for the host in the URL.", default=True
    )
    ssl_certfile: str | None = _connection(
        TEXT,
        "PEM file with the client's own certificate.",
        nullable=True,
        mistaken=("cert", "certfile", "ssl_cert", "tls_cert"),
    )
    ssl_keyfile: str | None = _connection(
        TEXT,
        "PEM file with the key of the client's certificate.",
        nullable=True,
        mistaken=("key", "keyfile", "ssl_key", "tls_key"),
    )
    ssl_password: str | None = _connection(TEXT, "Password of `ssl_keyfile`.", nullable=True, secret=True)
    ssl_ciphers: str | None = _connection(TEXT, "The ciphers that may be used, in OpenSSL's words.", nullable=True)
    skill_overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "key": Key(
                MAPPING,
                "Settings for single handlers: under the name of each, keys of this section that replace those here.",
                mistaken=("overrides", "handlers", "skills", "handler_overrides"),
            )
        },
    )
    config: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "key": Key(
                MAPPING,
                "Options of the backend; the same as writing them directly into the section.",
                mistaken=("options", "settings", "params"),
            )
        },
    )
    source: str | None = None
    section: str | None = None
    _nulls: frozenset[str] = frozenset()  # options that are set, namely to null

    def __post_init__(self) -> None:
        problems = list(self._flatten())
        for name in KEYS:
            if self._sets(name) or not KEYS[name].backends:
                try:
                    self._set(name, convert(name, getattr(self, name)))
                except ValueError as error:
                    problems.append(str(error))
        if not problems:
            problems = [sentence for _, sentence in conflicts(self._values())]
        if problems:
            raise StateConfigError("; ".join(problems), problems=problems)

    def __repr__(self) -> str:
        return f"StateConfig({', '.join(f'{name}={value!r}' for name, value in self._shown())})"

    def options(self) -> dict[str, Any]:
        """The keyword options for the backend, as far as they are set; the caller's own copy."""
        from copy import deepcopy

        named = {name: getattr(self, name) for name in keys_of(self.backend) if self._sets(name)}
        return named | deepcopy(self.config)

    def override(self, backend: str | None = None, /, **options: Any) -> StateConfig:
        """A copy of this configuration in which `options` replace single keys.

        With another `backend`, the options of this one are dropped and those of every backend (`ttl`, `max_history`,
        ...) are kept. None is a value: ``override(ttl=None)`` keeps contexts forever. Raises StateConfigError.
        """
        chosen = self.backend if backend is None else backend
        known = known_to(chosen)
        problems = []
        try:
            options = {**convert("config", options.pop("config", {})), **options}
        except ValueError as error:
            problems.append(str(error))
        if chosen in BACKENDS:
            problems += [unknown_key(name, chosen) for name in options if name not in known]
        if problems:
            raise StateConfigError("; ".join(problems), problems=problems)
        values = merged(self._values(), chosen, options)
        nulls = frozenset(name for name, value in values.items() if value is None)
        return StateConfig(**values, source=self.source, section=self.section, _nulls=nulls)

    def for_handler(self, name: str) -> StateConfig:
        """The configuration of the handler of that name: this one, with its `skill_overrides` applied."""
        options = dict(self.skill_overrides.get(name, {}))
        return self.override(options.pop("backend", None), **options, skill_overrides={})

    def to_dict(self) -> dict[str, Any]:
        """The keys that are set, as JSON values; secrets are replaced by a placeholder."""
        from dataclasses_json import DataClassJsonMixin

        values = DataClassJsonMixin.to_dict(cast(Any, self))
        return {name: _redacted(name, values[name]) for name, _ in self._shown()}

    def _flatten(self) -> Iterator[str]:
        """Move the options in `config` to their own fields."""
        given: Any = self.config
        if not isinstance(given, Mapping):
            return
        rest = dict(given)
        for name in given:
            if name in keys_of(self.backend):
                if self._sets(name):
                    yield f"`{name}` is set twice, here and in `config`: keep one of them"
                self._set(name, rest.pop(name))
            elif self.backend in BACKENDS:
                yield unknown_key(name, self.backend)
        self._set("config", rest)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is None:
            object.__setattr__(self, "_nulls", self._nulls | {name})

    def _sets(self, name: str) -> bool:
        return getattr(self, name) is not None or name in self._nulls

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEYS if self._sets(name)}

    def _shown(self) -> Iterator[tuple[str, Any]]:
        for name, value in self._values().items():
            if value != {}:
                yield name, _redacted(name, value)


KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {item.name: item.metadata["key"] for item in fields(StateConfig) if "key" in item.metadata}
)
"""Every key by its name."""


def keys_of(backend: str | None) -> dict[str, Key]:
    """The keys that are options of `backend`; with None, those of every backend."""
    return {name: key for name, key in KEYS.items() if key.backends == EVERY or backend in key.backends}


def known_to(backend: str | None) -> dict[str, Key]:
    """The keys that a section with that backend may have: its options, and the keys for agentstate itself."""
    return {name: key for name, key in KEYS.items() if not key.backends} | keys_of(backend)


def convert(name: str, value: object, *, given_by: str = "") -> Any:
    """`value` as the value of the key `name`: typed, or None if the key may be null and `value` is empty.

    Raises ValueError with a message that says what to write. `given_by` names the variables that the value came from;
    the message then shows these names, and nothing of the value.
    """
    key = KEYS[name]
    if key.nullable and (value is None or value == "" or (key.kind is not TEXT and value in ("null", "~"))):
        return None
    try:
        converted = key.kind.convert(value)
        if isinstance(converted, str):
            converted.encode()
    except RefusedError as refused:
        # The value of a variable may be a secret, and so may be what was probably meant by it.
        shown = f"the value of {given_by}" if given_by else _quoted(name, key, value)
        write = key.kind.example if given_by else str(refused) or key.kind.example
        raise ValueError(f"`{name}` must be {key.kind.expects}, got {shown}; write `{name}: {write}`") from None
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` is not valid Unicode") from None
    return converted


def merged(values: Mapping[str, Any], backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a section updated by `options`. For another backend, only the keys of every backend are kept."""
    same = backend == values["backend"]
    known = known_to(backend)
    kept = known if same else known_to(None)
    result = {name: value for name, value in values.items() if name in kept}
    rest = dict(values.get("config", {})) if same else {}
    for name, value in options.items():
        (result if name in known else rest)[name] = value
    return result | {"backend": backend, "config": rest}


def conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the combination of the values of a section: the key, and a message."""
    if values["backend"] != "valkey":
        return
    if values.get("url") is None:
        yield "backend", f"`backend: valkey` needs a url: add the line `url: {URL.example}`"
        return
    from agentstate.storage.valkey.url import read_url

    connection = {name: value for name, value in values.items() if name in KEYS and KEYS[name].connects}
    try:
        read_url(values["url"], connection)
    except StateConfigError as error:
        yield "url", str(error)


def unknown_key(name: str, backend: str, known: Iterable[str] = (), *, where: str = "", implied: bool = False) -> str:
    """The message for a key that a section with `backend` does not have, with a hint at the nearest one.

    `known` are the options of a third party's backend, `where` says where the key was found, and `implied` that the
    section does not set a backend.
    """
    if name in KEYS and backend in BACKENDS:
        if not KEYS[name].backends:
            return f"`{name}` belongs directly in the section, not in `config`"
        owners = " and ".join(f"`backend: {owner}`" for owner in KEYS[name].backends)
        if implied:
            line = f"add the line `backend: {KEYS[name].backends[0]}`"
            return f"`{name}` is a key of {owners}, and the default backend is `{backend}`: {line}"
        return f"`{name}` is a key of {owners}, and this is `backend: {backend}`: delete it, or change the backend"
    subject = f"`{name[:60]}` is not a key of {where or f'`backend: {backend}`'}"
    own = {*known_to(backend), *known}
    likeness, meant = _nearest(name, own)
    if backend in BACKENDS:
        other_likeness, other = _nearest(name, set(KEYS))
        if other_likeness > likeness + _CLEARLY:  # the backend itself may be the misspelt word
            meant = other
    if not meant:
        return f"{subject}; its keys are {', '.join(f'`{candidate}`' for candidate in sorted(own))}"
    owner = "" if meant in own else f", a key of `backend: {KEYS[meant].backends[0]}`"
    return f"{subject}; did you mean `{meant}`{owner}?"


_CLEARLY: Final = 0.1


def _nearest(name: str, candidates: set[str]) -> tuple[float, str]:
    """The key that is most similar to a name, and their similarity; "" and 0 if none is similar."""
    from difflib import SequenceMatcher, get_close_matches

    word = name[:60].lower().replace("-", "_")
    spellings = {candidate: candidate for candidate in candidates}
    for candidate in candidates.intersection(KEYS):
        spellings |= {other: candidate for other in KEYS[candidate].mistaken if other not in spellings}
    near = get_close_matches(word, spellings, 1)
    return (SequenceMatcher(None, near[0], word).ratio(), spellings[near[0]]) if near else (0.0, "")


def _quoted(name: str, key: Key, value: object) -> str:
    if value is None or value == "":
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if key.secret:
        return "this"
    if key.kind is URL and isinstance(value, str):
        value = redact_url(value)
    shown = f"`{value}`" if isinstance(value, str) and value.isprintable() else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _redacted(name: str, value: Any) -> Any:
    if name in ("config", "skill_overrides"):
        return {inner: _redacted(inner if name == "config" else "config", item) for inner, item in value.items()}
    if value is None or (KEYS[name].secret if name in KEYS else _SECRET_NAME.search(name)):
        return None if value is None else HIDDEN
    if isinstance(value, Mapping):
        return {inner: _redacted(inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, item) for item in value]
    return redact_url(value) if isinstance(value, str) and "://" in value else value
