"""Writers that are killed, for the tests of backends whose conversations outlive their process.

    from agentstate.testing.kills import KillTests


    class TestMyStorageSurvives(KillTests):
        @pytest.fixture(autouse=True)
        def empty_store(self, tmp_path):
            self.path = tmp_path / "conversations.db"

        def make_storage(self, **options):
            return MyStorage(self.path, **options)

Needs a system that forks.
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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
class KillTests(Harness):
    """Tests that kill writers at any moment. Subclass it, give it `make_storage`, and run pytest."""

    kills: ClassVar[int] = 10
    """How many writers are killed."""

    def test_what_was_acknowledged_survives_the_kill_of_its_writer(self) -> None:
        dice = random.Random()
        stored = 0
        for number in range(self.kills):
            pid, pipe = self._start_writer(stored)
            told = os.read(pipe, 1)
            time.sleep(dice.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            while data := os.read(pipe, 65536):
                told += data
            os.close(pipe)
            assert told, "the writer ended before it began"
            with SyncConversationContext(self.make_storage()) as context:
                contents = [message["content"] for message in context.get_history("killed")]
                count = context.get_variable("killed", "count", 0)
                context.set_variable("killed", "next", number)  # nothing of the dead is in the way
            assert contents == list(range(len(contents))), "lost, doubled or out of order"
            assert count == len(contents), "half a batch is stored"
            assert stored + told.count(_DONE) <= len(contents), "an acknowledged write is lost"
            assert len(contents) <= stored + told.count(_BEGUN), "a write is there that nobody made"
            stored = len(contents)

    def _start_writer(self, first: int) -> tuple[int, int]:
        pipe, telling = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses none of them
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
