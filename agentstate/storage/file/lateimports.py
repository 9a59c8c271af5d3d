"""Imports that are deferred until they are needed, and never go on in another thread while this process forks.

A child that is forked in the middle of an import waits for ever when it imports the same module: the import's lock
belongs to a thread that the child does not have.
"""

from __future__ import annotations

import os
import threading
from typing import Final

importing: Final = threading.RLock()
"""To be held during a deferred import. A fork waits for it."""

if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)
