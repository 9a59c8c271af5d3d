"""Where a scenario keeps its files."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(*, disk: bool = False) -> Iterator[Path]:
    """An empty folder, in memory unless a real disk is asked for, without the warnings that are logged about faults."""
    logger = logging.getLogger("agentstate")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    memory = "/dev/shm"
    place = memory if not disk and os.access(memory, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix="agentstate-torture-", dir=place) as folder:
            yield Path(folder)
    finally:
        logger.setLevel(level)
