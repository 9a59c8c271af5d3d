"""Connections to Valkey that break, before and within request and reply; and copies that come late."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any, Final

from servers import HOST, ValkeyServer

from agentstate import SyncConversationContext, ValkeyStorage
from agentstate.testing.faults import FaultProxy

from .figures import Figures
from .model import Steps
from .witness import Witness

_KINDS: Final = ("request", "request", "reply", "reply", "reply", "late")
_CALLS_PER_CONVERSATION: Final = 150


def cuts(
    random: Random, rounds: int, figures: Figures, *, server: ValkeyServer, prefix: str = "torture:", **options: Any
) -> None:
    """`rounds` faults between a client and `server`. Every call is insisted on: it takes effect exactly once."""
    with FaultProxy(HOST, server.port) as proxy:
        through = _context(proxy.port, server, prefix, deadline=3.0, **options)
        impatient = _context(proxy.port, server, prefix, deadline=0.05, **options)
        storage: Any = impatient.storage
        storage._servers._single._silence = 1.0  # it does not try again within its deadline: outcomes are unknown
        direct = _context(server.port, server, prefix, **options)
        cutter = _Cutter(proxy, random)
        for number in count():
            if figures.faults >= rounds:
                break
            witness = Witness(figures, f"cut-{number}-{random.getrandbits(32)}")
            steps = Steps(random, large=number % 5 == 0)
            for _ in range(_CALLS_PER_CONVERSATION):
                if figures.faults >= rounds:
                    break
                step = next(steps)
                waits = random.random() < 0.03
                if waits:
                    # (On a connection that stands, or only its greeting would be late.)
                    witness.look(impatient)
                    kind = _ask_for_silence(proxy, random)
                else:
                    kind = cutter.ask(step.name)
                before = proxy.fired
                error = witness.call(impatient if waits else through, step, insist=True)
                figures.faults += proxy.fired - before
                cutter.learn(step.name)
                proxy.calm()
                when = f"after {kind} in {step.name}"
                if error is not None and not waits:  # within so short a deadline there may be no connection
                    figures.lose(f"{when}: given up with {error}")
                error = witness.look(direct, when)
                if error is not None:
                    figures.fail_silently(f"{when}: {error}")
            time.sleep(0.06)  # longer than anything arrives late
            witness.look(direct, "after all late copies")
            direct.clear_context(witness.context_id)
        for context in (through, impatient, direct):
            context.close()


def _ask_for_silence(proxy: FaultProxy, random: Random) -> str:
    """The answer comes after a short deadline, or never."""
    after = random.choice((0, 0, 100, 300))  # for a call that makes several trips
    match random.randrange(3):
        case 0:
            proxy.drop_request(after)
            return "a dropped request"
        case 1:
            proxy.drop_reply(after)
            return "a dropped reply"
    proxy.delay_reply(0.06)
    return "a late reply"


def _context(port: int, server: ValkeyServer, prefix: str, **options: Any) -> SyncConversationContext:
    url = f"valkey://{server.credentials}{HOST}:{port}/0"
    return SyncConversationContext(ValkeyStorage(url, key_prefix=prefix, **options))


class _Cutter:
    """Asks for faults so that in the end every byte of every kind of call had its turn."""

    def __init__(self, proxy: FaultProxy, random: Random) -> None:
        self._proxy = proxy
        self._random = random
        self._sizes: dict[tuple[str, str], int] = {}
        self._next: dict[tuple[str, str], int] = {}

    def ask(self, name: str) -> str:
        kind = self._random.choice(_KINDS)
        if kind in ("request", "reply"):
            key = (kind, name)
            after = self._next.get(key, 0)
            self._next[key] = 0 if after > self._sizes.get(key, 40) else after + 1
            cut: Callable[[int], None] = self._proxy.cut_request if kind == "request" else self._proxy.cut_reply
            cut(after)
        else:
            self._proxy.deliver_late(self._random.choice((0.0, 0.003, 0.008, 0.05)))
        return kind

    def learn(self, name: str) -> None:
        """What passed without a cut is how long these are."""
        if self._proxy.sent:
            self._sizes["request", name] = min(self._proxy.sent, 600)
        if self._proxy.replied:
            self._sizes["reply", name] = min(self._proxy.replied, 300)
