"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import agentstate


def own_version() -> str:
    """The version that is installed; ``(not installed)`` in a source tree without metadata."""
    try:
        return str(agentstate.__version__)
    except PackageNotFoundError:
        return "(not installed)"
