"""URLs of servers, fit to be shown."""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "***"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ENDS_AUTHORITY = re.compile(r"[/?#]")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:\[\]]*)(:[0-9]*)?")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_HARMLESS_PARAMETERS: Final = frozenset(
    (
        *("db", "protocol", "timeout", "socket_timeout", "socket_connect_timeout", "max_connections"),
        *("ssl_cert_reqs", "ssl_check_hostname", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"),
    )
)


def redact_url(url: str) -> str:
    """`url` without anything that may be secret, for messages and logs: ``valkey://alice:***@host:6379/0``.

    Made for URLs that people mistype as much as for good ones: what could be a piece of a password is hidden, be it in
    a place where no password belongs. Control characters are replaced, so that the result is one line.
    """
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    prefix, rest = url[:start], url[start:]
    user, at, address = rest.rpartition("@")
    if _ENDS_AUTHORITY.search(user):
        # A password with a raw "/", or an "@" behind the host: nobody can tell which, so nothing is shown.
        return _one_line(prefix + HIDDEN)
    if at:
        name, colon, _ = user.partition(":")
        # A lone name may be a password written into the wrong place.
        prefix += f"{name}:{HIDDEN}@" if colon else f"{HIDDEN}@"
    end = _ENDS_AUTHORITY.search(address)
    hosts, tail = (address[: end.start()], address[end.start() :]) if end else (address, "")
    for number, host in enumerate(hosts.split(",")):
        if not _HOST.fullmatch(host):
            # What stands for the port may be a password that lacks its host, and so may all that follows.
            shown = [*hosts.split(",")[:number], host.partition(":")[0] + f":{HIDDEN}"]
            return _one_line(prefix + ",".join(shown))
    tail, hash_, _ = tail.partition("#")
    path, question, query = tail.partition("?")
    if question:
        path += "?" + "&".join(map(_shown_parameter, query.split("&")))
    return _one_line(prefix + hosts + path + (hash_ and f"#{HIDDEN}"))


def _one_line(url: str) -> str:
    return _UNPRINTABLE.sub("?", url)


def _shown_parameter(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if name.lower() in _HARMLESS_PARAMETERS:
        return parameter
    return name + equals + HIDDEN if equals else HIDDEN
