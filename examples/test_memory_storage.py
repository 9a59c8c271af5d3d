"""Test memory storage: python examples/test_memory_storage.py"""

from __future__ import annotations

import sys

from storage_checks import run

from agentstate import InMemoryStorage

if __name__ == "__main__":
    sys.exit(run("Memory", InMemoryStorage, persistent=False))
