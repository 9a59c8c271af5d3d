"""The description of the keys: as a table, as a JSON Schema, and against what the backends really take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from agentstate.config import BACKENDS, StateConfig, config_table, json_schema, load_config
from agentstate.config.model import KEYS, keys_of
from agentstate.config.reference import schema_text
from agentstate.errors import StateConfigError
from agentstate.registry import get_context_manager, storage_class
from agentstate.storage.options import storage_options


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = resources.files("agentstate").joinpath("agent_config.schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "run: python -m agentstate.config > agentstate/agent_config.schema.json"


def test_the_module_prints_the_schema() -> None:
    printed = subprocess.run([sys.executable, "-m", "agentstate.config"], check=True, capture_output=True, text=True)
    assert printed.stdout == schema_text()


def test_the_table_has_a_row_for_every_key() -> None:
    head, _, *rows = config_table().splitlines()
    assert [row.split("|")[1].strip(" `") for row in rows] == list(KEYS)
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert "| `ttl` | every | a positive number of seconds, or `null` | never |" in config_table()
    assert "| `storage_dir` | `file` | the path of a directory | `./conversation_states` |" in config_table()


OPTIONS = [(backend, name) for backend in BACKENDS for name in keys_of(backend)]


def configuration(backend: str, directory: Path, **options: Any) -> StateConfig:
    needed = {"valkey": {"url": "valkeys://h"}, "file": {"storage_dir": str(directory / "states")}}.get(backend, {})
    return StateConfig(backend=backend, **needed | options)


def example(name: str) -> Any:
    text = KEYS[name].kind.example
    return text.strip('"') if text != "{}" else {}


@pytest.mark.parametrize(("backend", "name"), OPTIONS)
def test_a_backend_takes_its_keys(backend: str, name: str, tmp_path: Path) -> None:
    given = configuration(backend, tmp_path, **{name: example(name)}).options()
    assert name in given
    get_context_manager(backend, force_new=True, blocking=True, **given).close()


@pytest.mark.parametrize(("backend", "name"), OPTIONS)
def test_the_documented_default_of_an_option_is_the_backends(backend: str, name: str) -> None:
    parameter = (storage_options(storage_class(backend)) or {}).get(name)
    if parameter is not None and name != "url":
        assert parameter.default == KEYS[name].default


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.default is not None and name != "backend"])
def test_the_documented_default_of_a_key_is_a_value_that_it_takes(name: str, tmp_path: Path) -> None:
    backend = next((owner for owner in KEYS[name].backends if owner in BACKENDS), "memory")
    default = KEYS[name].default
    assert getattr(configuration(backend, tmp_path, **{name: default}), name) == default


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from objects(child)


def test_every_reference_in_the_schema_leads_somewhere_and_every_definition_is_used() -> None:
    schema = json_schema()
    used = {part["$ref"].removeprefix("#/definitions/") for part in objects(schema) if "$ref" in part}
    assert used == set(schema["definitions"])


def test_every_key_is_described_in_the_schema_without_markup() -> None:
    described = {}
    for part in objects(json_schema()):
        for name, value in part.get("properties", {}).items():
            if isinstance(value, dict) and "description" in value:
                described[name] = value["description"]
    assert set(described) == set(KEYS)
    assert not any("`" in text for text in described.values())


VALID = [
    "",
    "services: {a: b}",
    "state:",
    "state: {}",
    "state: {ttl: 5, max_history: null, fsync: 'no', config: {exclusive: true}}",
    "state: {backend: memory, ttl: 1.5, on_unavailable: ephemeral, enabled: false}",
    "state: {backend: memory, ttl: '${TTL:5}', config: null}",
    "state: {backend: valkey, url: 'valkey://h', db: 2, strict: '${STRICT:yes}'}",
    "state_management: {backend: valkey, config: {url: '${URL:redis://h}', key_prefix: 'x:'}, ttl: 5}",
    "state: {backend: '${BACKEND:file}', url: 'valkey://h', storage_dir: x}",
    "state: {backend: sqlite, file: x, ttl: 5, config: {url: 'postgres://h', deep: {a: [1]}}}",
    "state: {ttl: 5, skill_overrides: {a: {ttl: null}, b: {backend: memory}, c: null, d: {storage_dir: x}}}",
    "skills: [{skill_id: a, state_override: {backend: valkey, url: 'valkey://h'}}, {skill_id: b}]",
    "plugins: [{plugin_id: a, state_override: {ttl: 5}}]",
    "plugins: {a: b}",
]
INVALID = [
    "[]",
    "state: memory",
    "state: {tll: 5}",
    "state: {url: 'valkey://h'}",
    "state: {ttl: 0}",
    "state: {ttl: yes}",
    "state: {deadline: null}",
    "state: {max_history: 1.5}",
    "state: {fsync: sometimes}",
    "state: {config: {fsync: sometimes}}",
    "state: {config: {url: 'valkey://h'}}",
    "state: {config: {ttl: -1}}",
    "state: {config: {backend: file}}",
    "state: {config: []}",
    "state: {backend: ''}",
    "state: {backend: memory, storage_dir: x}",
    "state: {backend: valkey}",
    "state: {backend: valkey, config: {}}",
    "state: {backend: valkey, config: null}",
    "state: {backend: valkey, url: localhost}",
    "state: {backend: valkey, url: 'http://h'}",
    "state: {backend: sqlite, ttl: -1}",
    "state: {skill_overrides: {a: {ttl: 0}}}",
    "state: {skill_overrides: {a: {backend: memory, url: x}}}",
    "state: {skill_overrides: {a: 5}}",
    "state: {skill_overrides: []}",
    "state: {}\nstate_management: {}",
    "skills: [{skill_id: a, state_override: {ttl: 0}}]",
]


class TestTheSchemaAgreesWithTheLoader:
    @pytest.fixture
    def accepts(self) -> Any:
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.Draft7Validator.check_schema(json_schema())
        return jsonschema.Draft7Validator(json_schema()).is_valid

    @pytest.mark.parametrize("text", VALID)
    def test_on_what_is_right(self, accepts: Any, text: str, tmp_path: Path) -> None:
        import yaml

        (tmp_path / "x.yaml").write_text(text)
        load_config(tmp_path / "x.yaml")
        assert accepts(yaml.safe_load(text))

    @pytest.mark.parametrize("text", INVALID)
    def test_on_what_is_wrong(self, accepts: Any, text: str, tmp_path: Path) -> None:
        import yaml

        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(StateConfigError):
            load_config(tmp_path / "x.yaml")
        assert not accepts(yaml.safe_load(text))
