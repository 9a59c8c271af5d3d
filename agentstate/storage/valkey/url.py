"""Where a Valkey is and how to get in: URLs and connection options, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ...errors import StateConfigError
from ...urls import redact_url

_SCHEMES: Final = {
    "valkey": ("server", False),
    "valkeys": ("server", True),
    "unix": ("unix", False),
    "valkey+unix": ("unix", False),
    "valkey+sentinel": ("sentinel", False),
    "valkeys+sentinel": ("sentinel", True),
    "valkey+cluster": ("cluster", False),
    "valkeys+cluster": ("cluster", True),
}
"""What each scheme means: the kind of service, and whether it speaks TLS. ``redis`` may stand for ``valkey``."""

_DEFAULT_PORT: Final = {"server": 6379, "sentinel": 26379, "cluster": 6379}

_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or int(value) < 0:
        raise ValueError("a whole number, 0 or more")
    return int(value)


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in _TRUE:
        return True
    if str(value).lower() in _FALSE:
        return False
    raise ValueError("true or false")


def _requirement(value: Any) -> str:
    if value not in ("required", "optional", "none"):
        raise ValueError("'required', 'optional' or 'none'")
    return str(value)


def _tls_version(value: Any) -> Any:
    from ssl import TLSVersion  # late: it takes its time to import

    if isinstance(value, TLSVersion):
        return value
    try:
        return TLSVersion[str(value).replace(".", "_")]
    except KeyError:
        raise ValueError("'TLSv1_2' or 'TLSv1_3'") from None


def _unchanged(value: Any) -> Any:
    return value


_OPTIONS: Final = {
    "username": _text,
    "password": _text,
    "db": _count,
    "client_name": _text,
    "socket_keepalive": _flag,
    "sentinel_username": _text,
    "sentinel_password": _text,
    "ssl_keyfile": _text,
    "ssl_certfile": _text,
    "ssl_password": _text,
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_ca_data": _unchanged,
    "ssl_cert_reqs": _requirement,
    "ssl_check_hostname": _flag,
    "ssl_min_version": _tls_version,
    "ssl_ciphers": _text,
}
"""The connection options, each with the reader of its value."""

_OURS: Final = {
    "socket_timeout": "deadline= bounds every call, its connection and its retries",
    "socket_connect_timeout": "deadline= bounds every call, its connection and its retries",
    "timeout": "deadline= bounds every call",
    "retry": "calls are retried until their deadline=",
    "retry_on_timeout": "calls are retried until their deadline=",
    "retry_on_error": "calls are retried until their deadline=",
    "health_check_interval": "broken connections are replaced as they are found",
    "decode_responses": "values are decoded from JSON anyway",
    "host": "it is part of the url",
    "port": "it is part of the url",
    "path": "it is part of the url",
}
"""Options of valkey-py that people bring along, and why they are not needed."""


class _UnreadableError(ValueError):
    """Why a URL cannot be read, in words that show nothing secret."""


class Address(NamedTuple):
    """Of one server: a host and port, or the path of a unix socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Target:
    """Where to connect: `kind` is ``server``, ``unix``, ``sentinel`` or ``cluster``.

    `options` are the connection options, secrets included: its `repr` shows none of them.
    """

    __slots__ = ("addresses", "kind", "options", "service", "shown", "tls")

    def __init__(
        self, kind: str, tls: bool, addresses: tuple[Address, ...], service: str, options: dict[str, Any], shown: str
    ) -> None:
        self.kind = kind
        self.tls = tls
        self.addresses = addresses
        self.service = service
        self.options = options
        self.shown = shown

    def __repr__(self) -> str:
        return f"Target({self.shown!r})"


def read_url(url: Any, options: Mapping[str, Any]) -> Target:
    """The target of a URL and of connection options, which go before what the URL says.

    ``valkey://[[user]:password@]host[:port][/db][?option=value]``, ``valkeys://`` with TLS, ``unix:///path[?db=0]``,
    ``valkey+sentinel://host:port,host:port/service[/db]``, ``valkey+cluster://host:port,host:port``. Raises
    StateConfigError, which shows no secret.
    """
    if not isinstance(url, str) or not url.strip():
        raise StateConfigError("ValkeyStorage needs a url, for example url='valkey://localhost:6379'")
    url = url.strip()
    shown = redact_url(url)
    given = _checked(options, "")
    scheme, separator, rest = url.partition("://")
    spelled = scheme.lower().replace("redis", "valkey", 1).replace("valkeyss", "valkeys")
    if not separator or spelled not in _SCHEMES:
        nearest = get_close_matches(spelled, _SCHEMES, 1) if separator else []
        hint = f"; did you mean '{nearest[0]}://'?" if nearest else ", for example 'valkey://localhost:6379'"
        raise StateConfigError(f"the url {shown!r} must begin with one of {', '.join(_SCHEMES)}{hint}")
    kind, tls = _SCHEMES[spelled]
    try:
        parts = urlsplit(f"{'unix' if kind == 'unix' else 'valkey'}://{rest}")
        found = _checked(dict(parse_qsl(parts.query, keep_blank_values=True)), " in the url")
        found = {**_credentials(parts), **found}
        addresses = _addresses(parts, kind)
        service, db = _path(parts, kind)
    except _UnreadableError as error:
        raise StateConfigError(f"the url {shown!r} cannot be read: {error}") from None
    except StateConfigError:
        raise
    except ValueError:  # its text may quote a piece of a password
        hint = "in a user name or password, write '/' as %2F, '@' as %40, ':' as %3A, '#' as %23, '?' as %3F"
        raise StateConfigError(f"the url {shown!r} cannot be read; {hint}") from None
    if db is not None:
        found.setdefault("db", db)
    merged = {**found, **given}
    if kind == "cluster" and merged.get("db"):
        raise StateConfigError(f"a cluster has only database 0; leave out the db of {shown!r}")
    if not tls and any(name.startswith("ssl_") for name in merged):
        raise StateConfigError(f"the ssl options need TLS: write 'valkeys' for 'valkey' in {shown!r}")
    return Target(kind, tls, addresses, service, merged, shown)


def check_options(options: Mapping[str, Any], allowed: set[str], others: set[str]) -> None:
    """Raise StateConfigError for the first option that is neither a connection option nor in `allowed`.

    `others` may have been meant too.
    """
    for name in options:
        if name in _OPTIONS or name in allowed:
            continue
        if name in _OURS:
            raise StateConfigError(f"ValkeyStorage has no option {name!r}: {_OURS[name]}")
        nearest = get_close_matches(name, {*_OPTIONS, *allowed, *others}, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise StateConfigError(f"ValkeyStorage has no option {name!r}{hint}")


def _checked(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    checked = {}
    for name, value in options.items():
        if name not in _OPTIONS:
            if name in _OURS:
                raise StateConfigError(f"there is no option {name!r}{where}: {_OURS[name]}")
            nearest = get_close_matches(name, _OPTIONS, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise StateConfigError(f"there is no option {name!r}{where}{hint}")
        if value is None:
            continue
        try:
            checked[name] = _OPTIONS[name](value)
            if name.endswith(("username", "password")):
                _check_end(name, checked[name])
        except (TypeError, ValueError) as error:
            what = error.args[0] if "literal" not in str(error) else "a whole number, 0 or more"
            raise StateConfigError(f"{name}{where} must be {what}") from None  # its value may be a secret
    return checked


def _check_end(name: str, text: str) -> None:
    """Refuse white space at the end: that of a file with a secret in it, which no server would name as the reason."""
    if text != text.rstrip():
        raise StateConfigError(
            f"the {name} ends in white space, such as the line feed of the file it was read from: remove it (if it "
            "belongs to the secret, write it into the url as %0A or %20)"
        )


def _credentials(parts: SplitResult) -> dict[str, Any]:
    found = {}
    user, separator, _ = parts.netloc.rpartition("@")
    if separator:
        name, colon, password = user.partition(":")
        _check_end("user name", name)
        _check_end("password", password)
        if name:
            found["username"] = unquote(name)
        if colon and password:
            found["password"] = unquote(password)
    return found


def _addresses(parts: SplitResult, kind: str) -> tuple[Address, ...]:
    hosts = parts.netloc.rpartition("@")[2]
    if kind == "unix":
        path = unquote(parts.path)
        if hosts or not path.startswith("/"):
            raise _UnreadableError("a unix socket is written unix:///path/to/valkey.sock")
        return (Address("", 0, path),)
    addresses = []
    for host in hosts.split(","):
        one = urlsplit(f"valkey://{host}")
        # The default host is for 'valkey://'; an empty one among several is a slip of the pen.
        if not one.hostname and (host or kind != "server"):
            raise _UnreadableError("a host is missing")
        addresses.append(Address(unquote(one.hostname or "localhost"), one.port or _DEFAULT_PORT[kind]))
    if kind == "server" and len(addresses) > 1:
        raise _UnreadableError("several hosts are written valkey+cluster:// or valkey+sentinel://")
    return tuple(addresses)


def _path(parts: SplitResult, kind: str) -> tuple[str, int | None]:
    """The service and the database that the path names."""
    if kind == "unix":
        return "", None
    names = [unquote(name) for name in parts.path.strip("/").split("/") if name]
    service = ""
    if kind == "sentinel":
        if not names:
            raise _UnreadableError("the name of the service is missing: valkey+sentinel://host:26379/service")
        service = names.pop(0)
    if len(names) > 1 or (names and not names[0].isdecimal()):
        raise _UnreadableError("the path must be the number of a database")
    return service, int(names[0]) if names else None
