"""Contexts in Valkey: `ValkeyStorage` (`storage`), its layouts, and the servers and connections that they stand on."""

from .storage import ValkeyStorage as ValkeyStorage
