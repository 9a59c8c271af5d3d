"""Storages that nobody closes: what they hold is released with them, and a ResourceWarning says so."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from agentstate import (
    ConversationContext,
    FileStorage,
    InMemoryStorage,
    StateStorage,
    SyncConversationContext,
    ValkeyStorage,
)
from agentstate.engine import engine_of

pytestmark = [
    pytest.mark.filterwarnings("always:unclosed .*Storage:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning"),
]


@pytest.fixture(params=["file", "documents", "valkey", "valkey documents"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], StateStorage]:
    layout = "document" if "documents" in request.param else "log"
    if request.param.startswith("valkey"):
        url = request.getfixturevalue("valkey_9").url
        prefix = request.getfixturevalue("key_prefix")
        return lambda: ValkeyStorage(url, key_prefix=prefix, layout=layout)
    return lambda: FileStorage(tmp_path, layout=layout)


async def use(storage: StateStorage) -> None:
    context = ConversationContext(storage)
    await context.set_variable("a", "k", 1)
    assert await context.get_variable("a", "k") == 1


def collect(storage: weakref.ref[StateStorage]) -> None:
    end = time.monotonic() + 20
    while storage() is not None and time.monotonic() < end:  # a worker may still be on its way to its rest
        gc.collect()
        time.sleep(0.001)
    assert storage() is None


def workers_of(storage: StateStorage) -> set[threading.Thread]:
    return set(engine_of(storage)._threads)


def test_what_a_storage_holds_is_released_with_it(make: Callable[[], StateStorage]) -> None:
    asyncio.run(use(make()))  # what is opened once and for all
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        storage = make()
        asyncio.run(use(storage))
        workers = workers_of(storage)
        assert workers
        left = weakref.ref(storage)
        del storage
        with pytest.warns(ResourceWarning, match=r"unclosed .*Storage.*close\(\)"):
            collect(left)
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive()
    assert len(os.listdir("/dev/fd")) <= before


def test_a_closed_storage_and_one_that_has_opened_nothing_warn_of_nothing(
    make: Callable[[], StateStorage],
) -> None:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage, unused, memory = make(), make(), InMemoryStorage()
        asyncio.run(use(storage))
        storage.close()
        SyncConversationContext(memory).set_variable("a", "k", 1)
        left = [weakref.ref(each) for each in (storage, unused, memory)]
        del storage, unused, memory
        for each in left:
            collect(each)
