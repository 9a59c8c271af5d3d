"""The state section of `agent_config.yaml`.

    from agentstate.config import load_config

    config = load_config()          # what the file says, checked; the defaults where there is no file
    config.backend                  # "valkey"
    config.options()                # {"url": "valkey://localhost:6379", "ttl": 3600}: what the file sets, nothing else

`model` describes every key once; checking, `config_table` and `json_schema` are made from that description. `loader`
finds the file, `tree` turns its text into nodes that know their lines, `reader` turns those into a `StateConfig`.
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
    # What makes documents is not for those who only read their configuration.
    if name not in ("config_table", "json_schema"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import reference

    return getattr(reference, name)
