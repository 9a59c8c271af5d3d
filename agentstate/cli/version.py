"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As it is installed."""
    try:
        return version("agentstate")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"
