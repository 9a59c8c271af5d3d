"""The checks of doctor on a Valkey server."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import StateError
from ..keys import KeySpace
from ..storage.base import StateStorage
from . import console
from .findings import Finding, note, ok, problem, warning

_KEYS: Final = 2000
"""How many keys are checked."""

_OLDEST: Final = (7, 2)
_LOCAL: Final = ("localhost", "127.0.0.1", "::1", "")


def look_at_servers(storage: StateStorage, options: dict[str, Any]) -> Iterator[Finding]:
    from ..storage.valkey import ValkeyStorage
    from ..storage.valkey.failures import failure
    from ..storage.valkey.wire import LostConnectionError, ServerError

    assert isinstance(storage, ValkeyStorage)
    deadline = time.monotonic() + storage.deadline
    try:
        for _, pool in storage._servers.primaries(deadline)[1]:
            yield from _look_at_server(pool, storage, options, deadline)
    except StateError as error:
        yield problem("connection", str(error), advice_on_connecting(error))
    except (LostConnectionError, ServerError) as lost:
        reason = failure(lost, None, reads=True)
        yield problem("connection", str(reason), advice_on_connecting(reason))


def advice_on_connecting(error: StateError) -> str:
    """What to do about a server that cannot be used."""
    text = f"{error} {error.__cause__ or ''}".lower()
    for words, advice in _ADVICE:
        if any(word in text for word in words):
            return advice
    return ""


_ADVICE: Final = (
    (("wrongpass", "refuses the user"), "check the user and the password: valkey://user:password@host"),
    (("noauth", "asks for a password"), "set it in the url, valkey://:password@host, or as `password:`"),
    (("refused",), "is the server running on this port? `valkey-server` starts one"),
    (("name or service", "resolve", "getaddrinfo", "nodename"), "check the name of the host in the url"),
    (
        ("certificate", "ssl", "tls"),
        "valkeys:// is for a server with TLS; ssl_ca_certs names its certificate authority",
    ),
    (
        ("timed out", "deadline", "unreachable", "no route"),
        "is the host reachable from here, firewalls included?",
    ),
    (("no such file",), "check the path of the socket in the url"),
    (("noperm", "permission"), "give the user these permissions with ACL SETUSER"),
)


def _look_at_server(pool: Any, storage: Any, options: dict[str, Any], deadline: float) -> Iterator[Finding]:
    from ..storage.valkey.risks import info_field, risks
    from ..storage.valkey.wire import command

    info = pool.ask(deadline, *(command("INFO", part) for part in ("server", "memory", "replication")))
    server, memory, replication = info
    version = (info_field(server, b"valkey_version") or info_field(server, b"redis_version")).decode()
    name = "Valkey" if info_field(server, b"valkey_version") else "Redis or a compatible server"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < _OLDEST:
        yield problem("server", f"{name} {version} is older than 7.2", "upgrade it")
    else:
        yield ok("server", f"{name} {version or '(unknown version)'}")
    yield _round_trips(pool, deadline)
    yield from _transport(str(options.get("url", "")))
    connection = pool.acquire(deadline)
    try:
        dangers, unknown = risks(connection, expiring=storage.ttl is not None)
    except BaseException:
        pool.discard(connection)
        raise
    pool.release(connection)
    for danger in dangers:
        yield problem("durability", danger, "`strict: true` refuses such a server")
    for what in unknown:
        yield warning("durability", f"unknown: {what.partition(';')[0]}", what.partition("; ")[2])
    if not dangers and not unknown:
        yield ok("durability", "the server does not evict conversations, and stores its data on disk")
    yield from _replicas(replication, storage, options)
    yield from _memory(memory)
    yield from _keys(pool, storage.key_prefix, deadline)


def _round_trips(pool: Any, deadline: float) -> Finding:
    from ..storage.valkey.wire import command

    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        pool.ask(deadline, command("PING"))
        seconds.append(time.perf_counter() - began)
    return ok("connection", f"round trip: median {sorted(seconds)[10] * 1000:.2f} ms of {len(seconds)}")


def _transport(url: str) -> Iterator[Finding]:
    try:
        parts = urlsplit(url)
        local = parts.scheme.endswith("unix") or (parts.hostname or "") in _LOCAL
        secret = parts.password is not None
    except ValueError:
        return
    if local or parts.scheme.startswith(("valkeys", "rediss")):
        return
    what = "password and conversations are" if secret else "conversations are"
    yield warning(
        "transport", f"{what} sent unencrypted to another machine", "use valkeys:// unless the network is trusted"
    )


def _replicas(replication: object, storage: Any, options: dict[str, Any]) -> Iterator[Finding]:
    from ..storage.valkey.risks import info_field

    connected = int(info_field(replication, b"connected_slaves") or 0)
    wanted = int(options.get("min_replicas") or 0)
    if wanted > connected:
        yield problem("replicas", f"{connected} connected, min_replicas needs {wanted}")
    elif connected:
        yield ok("replicas", f"{connected} connected")


def _memory(memory: object) -> Iterator[Finding]:
    from ..storage.valkey.risks import info_field

    used, limit = int(info_field(memory, b"used_memory") or 0), int(info_field(memory, b"maxmemory") or 0)
    if limit and used > 0.9 * limit:
        yield problem("memory", f"{console.size_text(used)} of {console.size_text(limit)} used", "raise maxmemory")
    elif used:
        of = f" of {console.size_text(limit)}" if limit else ", no limit (maxmemory)"
        yield ok("memory", f"{console.size_text(used)} used{of}")


# --- keys -----------------------------------------------------------------------------------------------------------


def _keys(pool: Any, prefix: str, deadline: float) -> Iterator[Finding]:
    """Check which programs the keys under the prefix belong to."""
    from ..storage.valkey.wire import ServerError, command

    space = KeySpace(prefix)
    found: list[bytes] = []
    cursor: Any = 0
    while len(found) < _KEYS and time.monotonic() < deadline - 1:
        reply = pool.ask(deadline, command("SCAN", cursor, "MATCH", space.pattern(), "COUNT", 1000))[0]
        if isinstance(reply, ServerError):
            yield warning("keys", f"cannot be listed: {reply}", "allow the command SCAN for this user")
            return
        cursor, keys = reply
        found += keys
        if int(cursor) == 0:
            break
    if not found:
        return
    kinds = pool.ask(deadline, *(command("TYPE", key) for key in found))
    asked = []
    for key, kind in zip(found, kinds, strict=True):
        asked.append(command("HGET", key, "id") if kind == b"hash" else command("PING"))
    owners = pool.ask(deadline, *asked)
    counts = Counter[str]()
    example = ""
    for key, kind, owner in zip(found, kinds, owners, strict=True):
        name = key.decode(errors="replace")
        context_id = space.context_id(name)
        if kind == b"hash" and owner == context_id.encode():
            counts["ours"] += 1
        elif kind == b"string":
            counts["documents"] += 1
        elif not _belongs_to_us(space, name):
            counts["foreign"] += 1
            example = example or name
    if counts["documents"]:
        yield note(
            "keys",
            f"{console.counted(counts['documents'], 'document')} of AgentUp",
            "the first write to each converts it",
        )
    if counts["foreign"]:
        yield warning(
            "keys",
            f"{console.counted(counts['foreign'], 'key')} under {prefix!r} of other programs, such as {example!r}",
            "they are not touched; a key_prefix of its own keeps them apart",
        )


def _belongs_to_us(space: KeySpace, name: str) -> bool:
    """Whether it is one of the keys beside a context's state (they begin with the prefix only if it has a hash tag)."""
    return name.endswith(("{history}", "{commits}", "{lease}"))
