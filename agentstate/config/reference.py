"""The description of the keys as a table for people and as a JSON Schema for editors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .model import AGENTUP_OVERRIDES, BACKENDS, EVERY, KEYS, SECTIONS, Key, keys_of

_EVERY_OPTION = {"$ref": "#/definitions/options of every backend"}
_VARIABLE = {"type": "string", "pattern": r"\$\{"}


def config_table() -> str:
    """All keys of the section as a table in Markdown."""
    rows = [("key", "backend", "value", "default", "meaning"), ("---",) * 5]
    for name, key in KEYS.items():
        value = key.kind.expects + (", or `null`" if key.nullable else "")
        rows.append((f"`{name}`", _backends(key), value, _without(key), key.meaning))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _backends(key: Key) -> str:
    if not key.backends:
        return ""
    return "every" if key.backends == EVERY else ", ".join(f"`{backend}`" for backend in key.backends)


def _without(key: Key) -> str:
    if key.default is None:
        return key.without
    return "`" + (key.default if isinstance(key.default, str) else json.dumps(key.default)) + "`"


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 7) of `agent_config.yaml`, as far as the file is about state.

    It describes the values of the parsed YAML: where `load_config` accepts a number or a word with or without quotes,
    an editor expects the usual form. It knows neither the values of variables nor which keys exclude each other.
    """
    sections = {name: {"$ref": "#/definitions/section"} for name in SECTIONS}
    override = {"items": {"properties": {"state_override": {"$ref": "#/definitions/override"}}}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "agent_config.yaml: conversation state",
        "type": ["object", "null"],
        "properties": sections | {name: override for name, _ in AGENTUP_OVERRIDES},
        "not": {"type": "object", "required": list(SECTIONS)},
        "definitions": {
            "section": _section(required=True),
            "override": _section(required=False),
            **{f"options of {backend}": _options(keys_of(backend), but=keys_of(None)) for backend in BACKENDS},
            "options of every backend": _options(keys_of(None)),
        },
    }


def _section(*, required: bool) -> dict[str, Any]:
    """The schema of a section; without `required`, of one that overrides another."""
    own = {name: _value(name, key) for name, key in KEYS.items() if not key.backends}
    if required:
        own["skill_overrides"]["additionalProperties"] = {"$ref": "#/definitions/override"}
        own["skill_overrides"]["type"] = ["object", "null"]
    else:
        del own["skill_overrides"]
    own["config"]["type"] = ["object", "null"]
    cases: list[dict[str, Any]] = []
    for backend in BACKENDS:
        this_one: dict[str, Any] = {"properties": {"backend": {"const": backend}}, "required": ["backend"]}
        if required and backend == KEYS["backend"].default:
            del this_one["required"]
        its_own = {"$ref": f"#/definitions/options of {backend}"}
        nested = {"allOf": [_EVERY_OPTION, its_own], "propertyNames": {"enum": list(keys_of(backend))}}
        then: dict[str, Any] = {
            "allOf": [its_own],
            "propertyNames": {"enum": [*own, *keys_of(backend)]},
            "properties": {"config": nested},
        }
        if required and backend == "valkey":
            then["anyOf"] = [
                {"required": ["url"]},
                {"required": ["config"], "properties": {"config": {"type": "object", "required": ["url"]}}},
            ]
        cases.append({"if": this_one, "then": then})
    return {"type": ["object", "null"], "properties": own, "allOf": [_EVERY_OPTION, *cases]}


def _options(keys: Mapping[str, Key], *, but: Collection[str] = ()) -> dict[str, Any]:
    return {"properties": {name: _value(name, key) for name, key in keys.items() if name not in but}}


def _value(name: str, key: Key) -> dict[str, Any]:
    """The schema of a value: its kind, or text that contains a variable."""
    about: dict[str, Any] = {"description": _plain_text(_about(name, key))}
    if key.default is not None:
        about["default"] = key.default
    if name == "backend":
        return about | {"anyOf": [{"enum": list(BACKENDS)}, {"type": "string", "minLength": 1}]}
    schema = key.kind.schema
    alternatives: list[Mapping[str, Any]] = [schema]
    if schema.get("type") not in ("string", "object") or "pattern" in schema:
        alternatives.append(_VARIABLE)
    if key.nullable:
        alternatives.append({"type": "null"})
    return about | (dict(alternatives[0]) if len(alternatives) == 1 else {"anyOf": alternatives})


def _about(name: str, key: Key) -> Iterable[str]:
    yield key.meaning
    yield f"Must be {key.kind.expects}."
    if without := key.without or (str(key.default) if key.default is not None else ""):
        yield f"Default: {without}."


def _plain_text(sentences: Iterable[str]) -> str:
    return " ".join(sentences).replace("`", "")


def schema_text() -> str:
    """The text of the shipped schema."""
    return json.dumps(json_schema(), indent=2) + "\n"
