"""The state section of `agent_config.yaml`.

    from agentstate.config import load_config

    config = load_config()          # the checked configuration; defaults if there is no file
    config.backend                  # "valkey"
    config.options()                # {"url": "valkey://localhost:6379", "ttl": 3600}: only what the file sets

`model` describes every key once; checks, `config_table` and `json_schema` are derived from that description. `loader`
finds the file, `tree` parses its text into nodes with line numbers, `reader` turns these into a `StateConfig`.
Editors check and complete the file with the schema in `agentstate/agent_config.schema.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .loader import CONFIG_NAMES, CONFIG_VARIABLE, load_config
from .model import BACKENDS, StateConfig

if TYPE_CHECKING:
    from .reference import config_table as config_table
    from .reference import json_schema as json_schema

__all__ = ["BACKENDS", "CONFIG_NAMES", "CONFIG_VARIABLE", "StateConfig", "config_table", "json_schema", "load_config"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: only documentation needs them.
    if name not in ("config_table", "json_schema"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import reference

    return getattr(reference, name)
