"""The contract of a storage, over every built-in backend and layout, through both contexts.

A test's name says what it ran on: `TestFileLog::test_...[sync]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentstate.storage.base import StateStorage
from agentstate.storage.file import FileStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.storage.valkey import ValkeyStorage
from agentstate.testing import StorageContract


class TestMemory(StorageContract):
    shared = False

    def make_storage(self, **options: Any) -> StateStorage:
        return InMemoryStorage(**options)


class File(StorageContract):
    @pytest.fixture(autouse=True)
    def empty_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "conversations"


class TestFileLog(File):
    def make_storage(self, **options: Any) -> StateStorage:
        return FileStorage(self.folder, **options)


class TestFileLogUnflushed(File):
    """Without waiting for the disk, and with a cache of one byte, so that most reads are from the file."""

    def make_storage(self, **options: Any) -> StateStorage:
        return FileStorage(self.folder, fsync="no", cache_bytes=1, **options)


class TestFileLogExclusive(File):
    shared = False  # a folder of its own for every storage, since no other storage may use it

    def make_storage(self, **options: Any) -> StateStorage:
        self.made = getattr(self, "made", 0) + 1
        return FileStorage(self.folder / str(self.made), exclusive=True, fsync="everysec", **options)


class TestFileDocument(File):
    def make_storage(self, **options: Any) -> StateStorage:
        return FileStorage(self.folder, layout="document", **options)


class Valkey(StorageContract):
    """On a server of each version, or on the one that the environment names."""

    @pytest.fixture(autouse=True)
    def empty_keyspace(self, valkey_url: str, key_prefix: str) -> None:
        self.url = valkey_url
        self.key_prefix = key_prefix


class TestValkeyLog(Valkey):
    def make_storage(self, **options: Any) -> StateStorage:
        return ValkeyStorage(self.url, key_prefix=self.key_prefix, **options)


class TestValkeyDocument(StorageContract):
    """On one version: `test_valkey.py` shows that the commands of this layout do the same on each."""

    @pytest.fixture(autouse=True)
    def empty_keyspace(self, any_valkey_url: str, key_prefix: str) -> None:
        self.url = any_valkey_url
        self.key_prefix = key_prefix

    def make_storage(self, **options: Any) -> StateStorage:
        return ValkeyStorage(self.url, key_prefix=self.key_prefix, layout="document", **options)
