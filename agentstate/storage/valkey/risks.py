"""Whether a server may lose what it acknowledged: by evicting keys, or because it does not persist them."""

from __future__ import annotations

from .wire import Connection, command


def risks(connection: Connection, *, expiring: bool) -> tuple[list[str], list[str]]:
    """What this server may lose because of its configuration, and what of this could not be found out, in words for its
    operator.

    `expiring`: whether our keys have a time to live.
    """
    memory, persistence, save = connection.ask(
        command("INFO", "memory"), command("INFO", "persistence"), command("CONFIG", "GET", "save")
    )
    found, unknown = [], []
    policy = info_field(memory, b"maxmemory_policy").decode()
    if policy.startswith("allkeys-") or (policy.startswith("volatile-") and expiring):
        found.append(f"maxmemory-policy {policy} deletes conversations when memory runs out; set it to noeviction")
    elif not policy:
        unknown.append("whether it evicts keys cannot be seen; grant +info with ACL SETUSER")
    snapshots = save[1] if isinstance(save, list) and len(save) == 2 else None
    appends = info_field(persistence, b"aof_enabled")
    if appends == b"0" and snapshots == b"":
        found.append("without append-only file and snapshots a restart loses everything; set appendonly to yes")
    elif appends != b"1" and not snapshots:
        unknown.append("whether it persists its data cannot be seen; grant +info and +config|get with ACL SETUSER")
    return found, unknown


def info_field(info: object, name: bytes) -> bytes:
    """A field of an answer to INFO; b"" where the answer is an error or lacks it."""
    if not isinstance(info, bytes):
        return b""
    _, _, rest = info.partition(b"\n" + name + b":")
    return rest.partition(b"\r")[0]
