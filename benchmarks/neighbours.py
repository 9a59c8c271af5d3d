"""Two processes that keep the processors busy, as other programs on the same machine would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

COUNT: Final = 2
LIFETIME: Final = 600.0
"""Seconds after which a neighbour ends by itself, whatever became of the benchmark."""

_BUSY_LOOP: Final = """
import os, sys, time
parent, end = os.getppid(), time.monotonic() + float(sys.argv[1])
print("started", flush=True)
while time.monotonic() < end and os.getppid() == parent:
    pass
"""


@contextmanager
def busy_neighbours() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the neighbours during the block. `RuntimeError` if one of them ended before the block did."""
    with ExitStack() as stack:
        neighbours = [stack.enter_context(_neighbour()) for _ in range(COUNT)]
        for neighbour in neighbours:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
        yield neighbours
        if any(neighbour.poll() is not None for neighbour in neighbours):
            raise RuntimeError(f"a busy neighbour ended during the measurement: it lives {LIFETIME:g} s at most")


@contextmanager
def _neighbour() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-S", "-c", _BUSY_LOOP, str(LIFETIME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
