"""Fixtures of the tests of the Valkey backend: storages and a client, under a prefix of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import valkey
from servers import ValkeyServer
from valkey_support import Open

from agentstate.storage.valkey import ValkeyStorage


@pytest.fixture
def open_storage(valkey_server: ValkeyServer, key_prefix: str) -> Iterator[Open]:
    """Opens storages on each version of the server, under a prefix of this test."""
    with ExitStack() as stack:

        def open_one(url: str = valkey_server.url, **options: Any) -> ValkeyStorage:
            storage = ValkeyStorage(url, **{"key_prefix": key_prefix, **options})
            stack.callback(storage.close)
            return storage

        yield open_one


@pytest.fixture
def storage(open_storage: Open) -> ValkeyStorage:
    return open_storage()


@pytest.fixture
def client(valkey_server: ValkeyServer) -> Iterator[valkey.Valkey]:
    with valkey_server.client() as client:
        yield client
