"""Valkey data as earlier versions wrote it."""

from __future__ import annotations

from collections.abc import Callable

import valkey


def make_former(client: valkey.Valkey, key_prefix: str, chosen: Callable[[str], bool] = lambda kind: True) -> None:
    """Turn the contexts under a prefix into format 1. Renames the keys of the kinds for which `chosen` answers true."""
    for key in list(client.scan_iter(f"*{key_prefix}*")):
        name = key.decode()
        if client.type(key) == b"hash":
            client.hdel(name, "format")
        elif name.startswith(key_prefix + "{"):
            state, _, kind = name[len(key_prefix) + 1 :].rpartition("}:")
            if chosen(kind):
                client.rename(name, f"{state}{{{kind}}}" if "{" in key_prefix else f"{{{state}}}:{kind}")
