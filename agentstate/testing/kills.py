"""Kills writers, for tests of backends whose conversations outlive their process.

    from agentstate.testing.kills import KillTests


    class TestMyStorageSurvives(KillTests):
        @pytest.fixture(autouse=True)
        def empty_store(self, tmp_path):
            self.path = tmp_path / "conversations.db"

        def make_storage(self, **options):
            return MyStorage(self.path, **options)

Requires os.fork.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from typing import ClassVar, Final

import pytest

from ..blocking import SyncConversationContext
from .harness import Harness

_BEGUN: Final = b"b"
_DONE: Final = b"d"


@pytest.mark.skipif(sys.platform == "win32", reason="os.fork is not available")
class KillTests(Harness):
    """Tests that kill writers at any moment. Subclass it, implement `make_storage`, and run pytest."""

    kills: ClassVar[int] = 10
    """The number of writers that are killed."""

    def test_what_was_acknowledged_survives_the_kill_of_its_writer(self) -> None:
        dice = random.Random()
        stored = 0
        for number in range(self.kills):
            pid, pipe = self._start_writer(stored)
            progress = os.read(pipe, 1)
            time.sleep(dice.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            while data := os.read(pipe, 65536):
                progress += data
            os.close(pipe)
            assert progress, "the writer ended before it began"
            with SyncConversationContext(self.make_storage()) as context:
                contents = [message["content"] for message in context.get_history("killed")]
                count = context.get_variable("killed", "count", 0)
                context.set_variable("killed", "next", number)  # no lock of a killed writer is left
            assert contents == list(range(len(contents))), "lost, doubled or out of order"
            assert count == len(contents), "half a batch is stored"
            assert stored + progress.count(_DONE) <= len(contents), "an acknowledged write is lost"
            assert len(contents) <= stored + progress.count(_BEGUN), "a write is there that nobody made"
            stored = len(contents)

    def _start_writer(self, first: int) -> tuple[int, int]:
        pipe, telling = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # about forking with threads: the child does not use them
            pid = os.fork()
        if pid == 0:
            try:
                os.close(pipe)
                self._write(first, telling)
            finally:
                os._exit(1)
        os.close(telling)
        return pid, pipe

    def _write(self, first: int, telling: int) -> None:
        context = SyncConversationContext(self.make_storage())
        for number in range(first, sys.maxsize):
            os.write(telling, _BEGUN)
            with context.batch("killed") as batch:
                batch.add_to_history("user", number)
                batch.increment_variable("count")
            os.write(telling, _DONE)
