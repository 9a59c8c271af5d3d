"""Listing the contexts on the servers, a page at a time, with SCAN.

A cursor of SCAN is valid for the server that gave it, and only as long as that server runs: another one, or the same
one after a restart, would skip keys. So a cursor of ours also has the server's run_id, and where that has changed the
server is scanned again. In a cluster, keys that move from a server that is still to be scanned to one that was scanned
would be missed. So a cursor also has a checksum of the map of the slots, and where that has changed the listing begins
again; while slots are moving, there is no page. An id may be listed twice, but none is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from ...errors import StateConfigError
from ...keys import KeySpace
from ...operations import Listing, Page
from .nodes import Servers
from .wire import Connection, ServerError, command

_MICROSECONDS: Final = 1_000_000


class Listed(NamedTuple):
    """What a listing filters contexts by."""

    user_id: str | None
    updated: int


ReadDocument = Callable[[bytes, str, int], Listed | None]
"""Reads the document that is stored for a context id, as of a time. None if it is not a document of this context."""

Choose = Callable[[Connection, dict[str, bytes], int], Iterable[str]]
"""Selects the ids to list, from ids with their keys, and the server's time."""


def scan_page(servers: Servers, keys: KeySpace, cursor: str, size: int, deadline: float, choose: Choose) -> Page:
    """A page of ids. Raises LostConnectionError, ServerError or a StateError where it could not be read."""
    slot, run_id, position, topology = _parsed(cursor)
    current, all_primaries = servers.primaries(deadline)
    if topology != current:
        slot, position = 0, 0
    primaries = [(first, pool) for first, pool in all_primaries if first >= slot]
    if not primaries:
        return Page((), None)
    first, pool = primaries[0]
    connection = pool.acquire(deadline)
    try:
        if first != slot or connection.run_id != run_id:
            position = 0
        elif position and not run_id:
            raise StateConfigError(
                "to list more contexts than fit into a page, the Valkey user needs a permission: "
                "grant +info with ACL SETUSER"
            )
        time, scanned = checked(
            connection.ask(command("TIME"), command("SCAN", position, "MATCH", keys.pattern(), "COUNT", max(1, size)))
        )
        servers.check_topology(connection, current)
        ids = tuple(choose(connection, _contexts(keys, scanned[1]), int(time[0]) * _MICROSECONDS + int(time[1])))
    except BaseException:
        pool.discard(connection)
        raise
    pool.release(connection)
    if scanned[0] != b"0":
        return Page(ids, f"{first}:{connection.run_id.decode()}:{int(scanned[0])}:{current}")
    return Page(ids, f"{primaries[1][0]}::0:{current}" if len(primaries) > 1 else None)


def _parsed(cursor: str) -> tuple[int, bytes, int, int]:
    if not cursor:
        return 0, b"", 0, 0
    slot, run_id, position, topology = cursor.split(":")
    return int(slot), run_id.encode(), int(position), int(topology)


def _contexts(keys: KeySpace, found: Iterable[bytes]) -> dict[str, bytes]:
    """The keys that are state keys of contexts, by context id."""
    contexts = {}
    for key in found:
        name = key.decode(errors="replace")
        context_id = keys.context_id(name)
        if context_id and keys.keys(context_id).state == name:  # neither a history nor anything else
            contexts[context_id] = key
    return contexts


def checked(replies: list[Any]) -> list[Any]:
    """The replies. Raises the first ServerError among them."""
    for reply in replies:
        if isinstance(reply, ServerError):
            raise reply
    return replies


def chosen(listing: Listing, read: ReadDocument) -> Choose:
    """Lists the contexts of the log layout, and the documents not yet converted, that a listing asks for."""

    def choose(connection: Connection, found: dict[str, bytes], now: int) -> Iterable[str]:
        if not found:
            return
        rows = connection.ask(*(command("HMGET", key, "id", "user", "updated") for key in found.values()))
        strange = [context_id for context_id, row in zip(found, rows, strict=True) if isinstance(row, ServerError)]
        texts = connection.ask(*(command("GET", found[context_id]) for context_id in strange)) if strange else []
        documents = dict(zip(strange, texts, strict=True))
        for context_id, row in zip(found, rows, strict=True):
            details: Listed | None = None
            if not isinstance(row, ServerError):
                if row[0] == context_id.encode():  # or else it is of a longer prefix
                    details = Listed(row[1].decode(errors="replace") or None, int(row[2]))
            elif row.code != "WRONGTYPE":
                raise row
            elif isinstance(documents[context_id], bytes):
                details = read(documents[context_id], context_id, now)
            if details is not None and _wanted(listing, details, now):
                yield context_id

    return choose


def _wanted(listing: Listing, details: Listed, now: int) -> bool:
    if listing.user is not None and details.user_id != listing.user:
        return False
    return listing.idle_for is None or min(details.updated, now) <= now - listing.idle_for * _MICROSECONDS
