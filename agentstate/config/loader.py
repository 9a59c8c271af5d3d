"""Finds `agent_config.yaml`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Final

from .model import StateConfig

CONFIG_VARIABLE: Final = "AGENTSTATE_CONFIG"
CONFIG_NAMES: Final = ("agent_config.yaml", "agentup.yml")


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    known_backends: Mapping[str, Collection[str] | None] | None = None,
) -> StateConfig:
    """The state section of the configuration file, checked.

    Reads `path`, or the file named by `$AGENTSTATE_CONFIG`, or `agent_config.yaml` or `agentup.yml` in the working
    directory. A named file must exist. Without a file, the result is the default configuration (the file backend with
    its defaults), whose `source` is None. The same holds for a file without a state section, with its path as `source`.

    `known_backends` are the backends of third parties by name, each with the names of its options, or None if they are
    not known. Without it, any name that is not similar to a built-in backend is taken for a third party's.

    Raises StateConfigError, whose `problems` are all problems found, each with file and line.
    """
    found = _find(path)
    if found is None:
        return StateConfig()
    from .reader import Reader

    named_by = f"${CONFIG_VARIABLE}" if path is None and os.environ.get(CONFIG_VARIABLE) else ""
    return Reader(found, known_backends, named_by=named_by).read()


def _find(path: str | os.PathLike[str] | None) -> str | None:
    if path is not None:
        return os.fspath(path)
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return named
    return next((name for name in CONFIG_NAMES if os.path.lexists(name)), None)
