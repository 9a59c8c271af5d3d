"""`load_config`: what a configuration file means, and what is said about a wrong one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentstate.config import StateConfig, load_config
from agentstate.errors import StateConfigError

Load = Callable[..., StateConfig]
Problems = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)


@pytest.fixture
def load() -> Load:
    def load(text: str, **options: Any) -> StateConfig:
        Path("agent_config.yaml").write_text(text, encoding="utf-8")
        return load_config(**options)

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    """All problems of a text, without the file's name: ``"3: ..."``."""

    def problems(text: str, **options: Any) -> list[str]:
        with pytest.raises(StateConfigError) as caught:
            load(text, **options)
        assert all(problem in str(caught.value) for problem in caught.value.problems)
        assert caught.value.problems
        assert not any("\n" in problem for problem in caught.value.problems)
        assert all(problem.startswith("agent_config.yaml:") for problem in caught.value.problems)
        return [problem.removeprefix("agent_config.yaml:") for problem in caught.value.problems]

    return problems


# --- the documents that users arrive with ----------------------------------------------------------------------------

CACHE = """
services:
  valkey:
    type: cache
    config:
      url: "valkey://localhost:6379"
"""

VALKEY = (
    CACHE
    + """
state:
  backend: valkey
  ttl: 3600  # 1 hour expiration
  url: "valkey://localhost:6379"          # REQUIRED: Explicit Valkey URL
  key_prefix: "agentup:state:"           # REQUIRED: Key prefix for namespacing
"""
)

PRODUCTION_WITH_CACHE = """
services:
  valkey:
    type: cache
    config:
      url: "${VALKEY_CACHE_URL:valkey://valkey-cache:6379}"
      db: 1                    # Use different DB for cache
      max_connections: 20
      retry_on_timeout: true
      socket_keepalive: true

state:
  backend: valkey
  url: "${VALKEY_STATE_URL:valkey://valkey-state:6379}"
  key_prefix: "${STATE_KEY_PREFIX:agentup:state:}"
  ttl: 7200  # 2 hours
"""

MULTI_VALKEY = """
services:
  valkey:
    type: cache
    config:
      url: "valkey://fast-valkey:6379"
      db: 0
      max_connections: 30
  valkey_state:
    type: database
    config:
      url: "valkey://persistent-valkey:6379"
      db: 0

state:
  backend: valkey
  url: "valkey://persistent-valkey:6379"
  key_prefix: "agentup:state:"
  ttl: 86400                  # 24 hours
"""

PRODUCTION = """
services:
  valkey:
    type: cache
    config:
      url: "${VALKEY_URL:valkey://valkey-server:6379}"

state:
  backend: valkey
  url: "${VALKEY_URL:valkey://valkey-server:6379}"
  key_prefix: "${VALKEY_KEY_PREFIX:agentup:state:}"
  ttl: 7200  # 2 hours
"""

INSUFFICIENT = "state:\n  backend: valkey\n  ttl: 3600\n"
CORRECT = (
    INSUFFICIENT + '  url: "valkey://localhost:6379"          # This line is critical\n  key_prefix: "agentup:state:"\n'
)

LOCAL = {"ttl": 3600, "url": "valkey://localhost:6379", "key_prefix": "agentup:state:"}


@pytest.mark.parametrize(
    ("text", "backend", "options"),
    [
        pytest.param(VALKEY, "valkey", LOCAL, id="valkey"),
        pytest.param(
            PRODUCTION_WITH_CACHE,
            "valkey",
            {"url": "valkey://valkey-state:6379", "key_prefix": "agentup:state:", "ttl": 7200},
            id="production-with-cache",
        ),
        pytest.param(
            MULTI_VALKEY,
            "valkey",
            {"url": "valkey://persistent-valkey:6379", "key_prefix": "agentup:state:", "ttl": 86400},
            id="multi-valkey",
        ),
        pytest.param(
            'state:\n  backend: file\n  storage_dir: "./agent_state"  # Optional\n',
            "file",
            {"storage_dir": "./agent_state"},
            id="file",
        ),
        pytest.param("state:\n  backend: memory\n  # No additional configuration needed\n", "memory", {}, id="memory"),
        pytest.param(
            'state:\n  backend: file\n  storage_dir: "./dev_conversations"\n',
            "file",
            {"storage_dir": "./dev_conversations"},
            id="development",
        ),
        pytest.param("state:\n  backend: memory\n  # Fast, isolated\n", "memory", {}, id="testing"),
        pytest.param(
            PRODUCTION,
            "valkey",
            {"url": "valkey://valkey-server:6379", "key_prefix": "agentup:state:", "ttl": 7200},
            id="production",
        ),
        pytest.param(CORRECT, "valkey", LOCAL, id="correct"),
        pytest.param(
            'state:\n  backend: file  # Changed from memory\n  storage_dir: "./conversation_states"\n',
            "file",
            {"storage_dir": "./conversation_states"},
            id="memory-to-file",
        ),
        pytest.param(
            CACHE + "state:\n  backend: valkey  # Changed from file\n" + CORRECT.split("\n", 2)[2],
            "valkey",
            LOCAL,
            id="file-to-valkey",
        ),
    ],
)
def test_a_documented_block_means_what_it_says(load: Load, text: str, backend: str, options: dict[str, Any]) -> None:
    config = load(text)
    assert (config.backend, config.enabled, config.options()) == (backend, True, options)
    assert (config.source, config.section) == ("agent_config.yaml", "state")


def test_the_production_block_takes_its_url_and_prefix_from_the_environment(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALKEY_URL", "valkeys://:pw@prod:6380/2")
    monkeypatch.setenv("VALKEY_KEY_PREFIX", "tenant:a:")
    config = load(PRODUCTION)
    assert config.url == "valkeys://:pw@prod:6380/2"
    assert config.key_prefix == "tenant:a:"


def test_the_insufficient_block_fails_with_the_line_to_add(problems: Problems) -> None:
    assert problems(INSUFFICIENT) == [
        '2: `backend: valkey` needs a url: add the line `url: "valkey://localhost:6379"` under `state:`'
    ]


def test_the_line_to_add_makes_the_insufficient_block_load(load: Load) -> None:
    assert load(INSUFFICIENT + '  url: "valkey://localhost:6379"\n').options() == {
        "ttl": 3600,
        "url": "valkey://localhost:6379",
    }


def test_the_url_under_services_is_never_taken_and_the_error_says_so(problems: Problems) -> None:
    (problem,) = problems(CACHE + INSUFFICIENT)
    assert "needs a url: add the line" in problem
    assert "the url in line 6 is for the cache" in problem


def test_the_insufficient_and_the_correct_block_in_one_file_are_a_duplicate(problems: Problems) -> None:
    found = problems(INSUFFICIENT + CORRECT)
    assert "4: `state` is already set in line 1: keep one of them" in found


@pytest.mark.parametrize("text", ["state:\n  backend: file\n\n# Update handlers\n@stateful(storage='file')\n"])
def test_python_in_the_yaml_is_recognised(problems: Problems, text: str) -> None:
    (problem,) = problems(text)
    assert problem == ("5: a value must not begin with `@`: quote the text. A decorator belongs in the Python module")


AGENTUP = """
name: my-agent
plugins:
  - plugin_id: ai_assistant
    name: AI Assistant
    middleware_override:
      - name: rate_limited
        params: {requests_per_minute: 20}
state_management:
  enabled: true
  backend: valkey          # Distributed state backend for production
  ttl: 7200                # 2 hours expiration
  config:
    url: '${VALKEY_STATE_URL:valkey://localhost:6379}'
    db: 2
    key_prefix: "agentup:state:"
    max_connections: 5
  # Skill-specific state overrides
  skill_overrides:
    ai_assistant:
      enabled: true
      ttl: 86400           # 24 hours for AI conversations
"""


def test_a_generated_agentup_file_loads_with_its_nested_options_and_its_overrides(load: Load) -> None:
    config = load(AGENTUP)
    options = {
        "url": "valkey://localhost:6379",
        "db": 2,
        "key_prefix": "agentup:state:",
        "max_connections": 5,
        "ttl": 7200,
    }
    assert (config.section, config.enabled, config.backend) == ("state_management", True, "valkey")
    assert config.options() == options
    assert config.for_handler("ai_assistant").options() == options | {"ttl": 86400}
    assert config.for_handler("another").options() == options


@pytest.mark.parametrize("section", ["state", "state_management"])
@pytest.mark.parametrize("config", ["config: {}", "config:", "config: null"])
def test_both_sections_take_flat_and_nested_options(load: Load, section: str, config: str) -> None:
    flat = load(f"{section}:\n  backend: memory\n  ttl: 5\n  {config}\n")
    nested = load(f"{section}:\n  backend: memory\n  config:\n    ttl: 5\n")
    assert flat == nested
    assert nested.options() == {"ttl": 5}


def test_a_disabled_section_says_so(load: Load) -> None:
    assert load("state_management:\n  enabled: false\n").enabled is False


# --- which file ------------------------------------------------------------------------------------------------------


def test_without_a_file_the_default_configuration_is_the_answer() -> None:
    config = load_config()
    assert config == StateConfig()
    assert (config.backend, config.enabled, config.options(), config.source) == ("file", True, {}, None)


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "---\n", "null\n", "services: {}\n", "state:\n", "state: {}\n"]
)
def test_a_file_that_says_nothing_about_state_is_the_default_configuration_with_a_source(load: Load, text: str) -> None:
    config = load(text)
    assert (config.backend, config.options(), config.source) == ("file", {}, "agent_config.yaml")


def test_the_search_order_is_path_variable_agent_config_agentup(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["agentup.yml", "agent_config.yaml", "from_variable.yaml", "explicit.yaml"]
    for number, name in enumerate(names, 1):
        Path(name).write_text(f"state:\n  ttl: {number}\n")
        if name == "from_variable.yaml":
            monkeypatch.setenv("AGENTSTATE_CONFIG", name)
        config = load_config(name if name == "explicit.yaml" else None)
        assert (config.ttl, config.source) == (number, name)


def test_an_empty_variable_names_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_CONFIG", "")
    assert load_config().source is None


def test_a_path_object_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("state: {ttl: 3}")
    assert load_config(tmp_path / "x.yaml").ttl == 3


def test_a_file_that_was_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateConfigError, match=r"^missing\.yaml: there is no such file$") as caught:
        load_config("missing.yaml")
    assert caught.value.problems == ("missing.yaml: there is no such file",)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    monkeypatch.setenv("AGENTSTATE_CONFIG", "elsewhere.yaml")
    with pytest.raises(StateConfigError, match=r"elsewhere.yaml: .* \(\$AGENTSTATE_CONFIG names it\)"):
        load_config()


def test_the_variable_is_named_even_where_it_says_what_would_have_been_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_CONFIG", "agent_config.yaml")
    with pytest.raises(StateConfigError, match=r"\(\$AGENTSTATE_CONFIG names it\)"):
        load_config()


def test_a_broken_link_is_not_taken_for_no_file() -> None:
    Path("agent_config.yaml").symlink_to("gone.yaml")
    with pytest.raises(StateConfigError, match="there is no such file"):
        load_config()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("ttl: 1.5", 1.5),
        ("ttl: 1_000", 1000),
        ("ttl: 1e3", 1000.0),
        ('ttl: "3600"', 3600),
        ("ttl: !!str 3600", 3600),
        ("ttl: null", None),
        ("ttl: ~", None),
        ("ttl:", None),
        ('ttl: ""', None),
        ("max_history: 10", 10),
        ("cache_bytes: 0", 0),
        ("fsync: no", "no"),  # false to YAML
        ("exclusive: yes", True),
        ("exclusive: Off", False),
        ('exclusive: "1"', True),
        ("storage_dir: 007", "007"),  # 7 to YAML
        ("storage_dir: 2024-01-01", "2024-01-01"),
        ("storage_dir: on", "on"),
        ("layout: document", "document"),
    ],
)
def test_the_type_of_a_value_is_its_keys(load: Load, line: str, value: Any) -> None:
    key = line.partition(":")[0]
    config = load(f"state:\n  {line}\n")
    assert config.options() == {key: value}
    assert type(config.options()[key]) is type(value)


def test_an_unquoted_password_of_digits_stays_as_it_is_written(load: Load) -> None:
    assert load("state: {backend: valkey, url: 'valkey://h', password: 0123, username: yes}").options() == {
        "url": "valkey://h",
        "password": "0123",
        "username": "yes",
    }


@pytest.mark.parametrize(
    ("line", "write"),
    [
        ("ttl: yes", "ttl: 3600"),
        ("ttl: 0", "ttl: 3600"),
        ("ttl: -1", "ttl: 3600"),
        ("ttl: .inf", "ttl: 3600"),
        ("ttl: .nan", "ttl: 3600"),
        ("ttl: 1e999", "ttl: 3600"),
        ("ttl: 1:30", "ttl: 3600"),
        ("ttl: 010", "ttl: 3600"),
        ("ttl: " + "9" * 400, "ttl: 3600"),
        ("ttl: " + "9" * 5000, "ttl: 3600"),
        ("ttl: 1h", "ttl: 3600"),
        ("ttl: 90 min", "ttl: 5400"),
        ("ttl: 30 days", "ttl: 2592000"),
        ("ttl: 2.5s", "ttl: 2.5"),
        ("ttl: [1]", "ttl: 3600"),
        ("ttl: {a: 1}", "ttl: 3600"),
        ("deadline:", "deadline: 3600"),
        ("max_history: 1.5", "max_history: 2"),
        ("max_history: 10.0", "max_history: 10"),
        ("max_history: 0", "max_history: 1000"),
        ("max_history: true", "max_history: 1000"),
        ("max_value_bytes: 16 MiB", "max_value_bytes: 16777216"),
        ("max_value_bytes: 64k", "max_value_bytes: 65536"),
        ("cache_bytes: -1", "cache_bytes: 16777216"),
        ("exclusive: 2", "exclusive: true"),
        ("fsync: false", "fsync: always"),
        ("fsync: Always", "fsync: always"),
        ("layout: json", "layout: log"),
        ("storage_dir:", 'storage_dir: "./conversation_states"'),
        ('storage_dir: "a\\0b"', 'storage_dir: "./conversation_states"'),
        ("on_unavailable: ignore", "on_unavailable: raise"),
        ("enabled: maybe", "enabled: true"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(problems: Problems, line: str, write: str) -> None:
    (problem,) = problems(f"state:\n  {line}\n")
    key = line.partition(":")[0]
    assert problem.startswith(f"2: `{key}` must be ")
    assert problem.endswith(f"; write `{write}`")
    assert len(problem) < 250


@pytest.mark.parametrize(
    ("url", "write"),
    [
        ("localhost:6379", 'url: "valkey://localhost:6379"'),
        ("cache.internal", 'url: "valkey://cache.internal"'),
        ("http://localhost", 'url: "valkey://localhost:6379"'),
        ("valkey://", 'url: "valkey://localhost:6379"'),
        ("valkey:/localhost", 'url: "valkey://localhost:6379"'),
        ("user:secret@host:6379", 'url: "valkey://localhost:6379"'),
        ('""', 'url: "valkey://localhost:6379"'),
    ],
)
def test_a_wrong_url_is_answered_with_a_right_one_and_its_password_is_not_shown(
    problems: Problems, url: str, write: str
) -> None:
    (problem,) = problems(f"state:\n  backend: valkey\n  url: {url}\n")
    assert problem.startswith("3: `url` must be a URL that begins with `valkey://`")
    assert problem.endswith(f"; write `{write}`")
    assert "secret" not in problem


@pytest.mark.parametrize("name", ["valkey", "redis"])
@pytest.mark.parametrize("kind", ["", "s", "+sentinel", "s+sentinel", "+cluster", "s+cluster"])
def test_all_schemes_are_urls(load: Load, name: str, kind: str) -> None:
    url = f"{name}{kind}://h:1" + (",i:2/service" if "sentinel" in kind else "")
    assert load(f"state: {{backend: valkey, url: '{url}'}}").url == url


def test_a_socket_is_a_url(load: Load) -> None:
    assert load("state: {backend: valkey, url: 'unix:///run/valkey.sock'}").url == "unix:///run/valkey.sock"


@pytest.mark.parametrize("prefix", ['""', '"{"', '"a}{b"', '"a\\0"'])
def test_a_key_prefix_that_no_context_could_have_is_refused(problems: Problems, prefix: str) -> None:
    (problem,) = problems(f"state: {{backend: valkey, url: 'valkey://h', key_prefix: {prefix}}}")
    assert "`key_prefix` must be text, with braces only around one hash tag" in problem


def test_options_are_the_callers_own_copy(load: Load) -> None:
    config = load("state: {backend: sqlite, tables: [a, {b: c}]}")
    config.options()["tables"][1]["b"] = "changed"
    assert config.options() == {"tables": ["a", {"b": "c"}]}


# --- variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${UNSET:default}", "default"),
        ("${UNSET:}x", "x"),
        ("${UNSET:valkey://h:1/0}", "valkey://h:1/0"),
        ("${SET}", "here"),
        ("${SET:default}", "here"),
        ("a${SET}b${UNSET:c:d}e", "aherebc:de"),
        ("${UNSET:${SET}}", "here"),
        ("${UNSET:{tag}:state:}", "{tag}:state:"),
        ("${EMPTY:default}x", "x"),
        ("$${SET}", "${SET}"),
        ("$SET $$ 5$", "$SET $$ 5$"),
        ("${RECURSIVE}", "${SET}"),
    ],
)
@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_variables_are_replaced(load: Load, monkeypatch: pytest.MonkeyPatch, text: str, value: str, quote: str) -> None:
    for name, content in {"SET": "here", "EMPTY": "", "RECURSIVE": "${SET}"}.items():
        monkeypatch.setenv(name, content)
    assert load(f"state:\n  storage_dir: {quote}{text}{quote}\n").storage_dir == value


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('ttl: "${TTL:3600}"', 3600),
        ("ttl: ${TTL:1.5}", 1.5),
        ('ttl: "${TTL:}"', None),
        ('ttl: "${TTL:null}"', None),
        ("max_history: ${N:5}", 5),
        ('exclusive: "${EXCLUSIVE:true}"', True),
        ("exclusive: ${EXCLUSIVE:0}", False),
        ("fsync: ${FSYNC:no}", "no"),
        ("layout: ${LAYOUT:document}", "document"),
    ],
)
def test_types_come_after_expansion(load: Load, line: str, value: Any) -> None:
    assert list(load(f"state:\n  {line}\n").options().values()) == [value]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("${UNSET}", "the variable UNSET is not set: set it, or give it a default: `${UNSET:default}`"),
        ("x${UNSET:${ALSO_UNSET}}", "the variable ALSO_UNSET is not set"),
        ("${UNSET:-default}", "the default of UNSET must follow the colon without a `-`: `${UNSET:default}`"),
        ("${UNSET", "`${` begins a variable"),
        ("${}", "`${` begins a variable"),
        ("${1A}", "`${` begins a variable"),
        ("${A B}", "`${` begins a variable"),
        ("${UNSET:{{x}}}", "`${` begins a variable"),
    ],
)
def test_a_wrong_variable_is_named_once(problems: Problems, text: str, sentence: str) -> None:
    (problem,) = problems(f"state:\n  storage_dir: '{text}'\n")
    assert problem.startswith(f"2: {sentence}")


def test_what_a_variable_holds_is_not_shown(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTL", "hunter2")
    (problem,) = problems("state:\n  ttl: ${TTL}\n")
    assert problem == "2: `ttl` must be a positive number of seconds, got the value of ${TTL}; write `ttl: 3600`"


@pytest.mark.parametrize(
    ("key", "value"),
    [("url", "hunter2"), ("ttl", "4711d"), ("max_value_bytes", "4711k"), ("max_history", "4711.5")],
)
def test_the_advice_does_not_show_what_a_variable_holds(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv("SECRET", value)
    backend = "valkey" if key == "url" else "file"
    for problem in problems(f"state:\n  backend: {backend}\n  {key}: ${{SECRET}}\n"):
        assert "${SECRET}" in problem
        assert not any(part in problem for part in ("hunter2", "4711", "4712", "407030400", "4824064"))


def test_a_variable_that_is_not_utf8_is_refused(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRECTORY", "a\udcff")
    assert problems("state: {storage_dir: '${DIRECTORY}'}") == ["1: `storage_dir` is not valid Unicode"]


def test_variables_outside_the_section_are_nobodys_business(load: Load) -> None:
    assert load("ai_provider:\n  api_key: ${UNSET_KEY}\nstate:\n  backend: memory\n").backend == "memory"


BY_VARIABLE = """
state:
  backend: "${STATE_BACKEND:file}"
  storage_dir: ./states
  url: ${STATE_URL}
  ttl: 60
"""


def test_a_backend_from_a_variable_lets_the_keys_of_the_others_wait(
    load: Load, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(BY_VARIABLE).options() == {"storage_dir": "./states", "ttl": 60}
    monkeypatch.setenv("STATE_BACKEND", "memory")
    assert load(BY_VARIABLE).options() == {"ttl": 60}
    monkeypatch.setenv("STATE_BACKEND", "valkey")
    assert problems(BY_VARIABLE) == [
        "5: the variable STATE_URL is not set: set it, or give it a default: `${STATE_URL:default}`"
    ]
    monkeypatch.setenv("STATE_URL", "valkey://h")
    assert load(BY_VARIABLE).options() == {"url": "valkey://h", "ttl": 60}


# --- unknown, misplaced and contradicting keys -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tll", "ttl"),
        ("TTL", "ttl"),
        ("time-to-live", "ttl"),
        ("storagedir", "storage_dir"),
        ("directory", "storage_dir"),
        ("storage", "backend"),
        ("type", "backend"),
        ("enable", "enabled"),
        ("options", "config"),
        ("timeout", "deadline"),
        ("appendfsync", "fsync"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(problems: Problems, key: str, nearest: str) -> None:
    assert problems(f"state:\n  {key}: 1\n") == [f"2: `{key}` is not a key of `state:`; did you mean `{nearest}`?"]


def test_an_unknown_key_near_another_backends_names_that_backend(problems: Problems) -> None:
    assert problems("state:\n  key_prefx: x\n") == [
        "2: `key_prefx` is not a key of `state:`; did you mean `key_prefix`, a key of `backend: valkey`?"
    ]


def test_a_key_much_nearer_another_backends_names_that_one_too(problems: Problems) -> None:
    (problem,) = problems("state:\n  backend: valkey\n  url: valkey://localhost\n  storage_dri: x\n")
    assert problem.endswith("did you mean `storage_dir`, a key of `backend: file`?")


def test_a_key_like_no_other_is_answered_with_all_there_are(problems: Problems) -> None:
    (problem,) = problems("state_management:\n  qqqqqq: 1\n")
    assert problem.startswith("2: `qqqqqq` is not a key of `state_management:`; its keys are `backend`, `cache_bytes`,")
    assert "`url`" not in problem


def test_a_key_of_another_backend_is_said_to_be_one(problems: Problems) -> None:
    assert problems("state:\n  backend: memory\n  storage_dir: x\n  layout: log\n") == [
        "3: `storage_dir` is a key of `backend: file`, and this is `backend: memory`: delete it, or change the backend",
        (
            "4: `layout` is a key of `backend: file` and `backend: valkey`, and this is `backend: memory`: "
            "delete it, or change the backend"
        ),
    ]


def test_a_forgotten_backend_is_asked_for(problems: Problems) -> None:
    assert problems("state:\n  url: valkey://h\n") == [
        "2: `url` is a key of `backend: valkey`, and the default backend is `file`: add the line `backend: valkey`"
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("vlakey", "valkey"), ("Valkey", "valkey"), ("redis", "valkey"), ("in-memory", "memory"), ("filesystem", "file")],
)
def test_a_misspelt_backend_is_answered_with_the_nearest_and_the_rest_is_checked_as_if_it_were_that(
    problems: Problems, name: str, meant: str
) -> None:
    assert problems(f"state:\n  backend: {name}\n  tll: 1\n") == [
        f"2: unknown backend `{name}`; did you mean `{meant}`?",
        "3: `tll` is not a key of `state:`; did you mean `ttl`?",
    ]


@pytest.mark.parametrize("value", ["", '""', "[file]"])
def test_a_backend_that_is_no_name_is_refused_and_the_rest_is_checked(problems: Problems, value: str) -> None:
    first, second = problems(f"state:\n  backend: {value}\n  ttl: 0\n  unknown: 1\n  url: 'valkey://h'\n")
    assert first.startswith("2: `backend` must be the name of a backend, got ")
    assert second.startswith("3: `ttl` must be")


@pytest.mark.parametrize("key", ["enabled: true", "backend: file", "config: {}", "on_unavailable: raise"])
def test_a_key_of_the_section_has_no_place_among_the_options(problems: Problems, key: str) -> None:
    (problem,) = problems(f"state:\n  config:\n    {key}\n")
    assert problem == f"3: `{key.partition(':')[0]}` belongs directly under `state:`, not under `config:`"


def test_a_key_written_twice_is_a_problem_flat_nested_or_both(problems: Problems) -> None:
    assert problems(
        "state:\n  ttl: 1\n  ttl: 1\n  config:\n    ttl: 1\n    exclusive: true\n    exclusive: true\n"
    ) == [
        "3: `ttl` is already set in line 2: keep one of them",
        "5: `ttl` is already set in line 2: keep one of them",
        "7: `exclusive` is already set in line 6: keep one of them",
    ]


def test_both_sections_in_one_file_are_a_problem(problems: Problems) -> None:
    assert problems("state_management:\n  backend: file\nstate:\n  tll: 1\n") == [
        "3: `state:` is the same section as `state_management:` in line 1: keep one of them",
        "4: `tll` is not a key of `state:`; did you mean `ttl`?",
    ]


@pytest.mark.parametrize("name", ["State", "state-management", "sate", "state_managment"])
def test_a_misspelt_section_is_not_passed_over(problems: Problems, name: str) -> None:
    meant = "state_management" if "man" in name else "state"
    assert problems(f"{name}:\n  backend: memory\n") == [f"1: `{name}:` is not read; did you mean `{meant}:`?"]


@pytest.mark.parametrize("text", ["states: {idle: {}, busy: {}}", "stats: {backend: prometheus}", "State: Bavaria"])
def test_a_section_that_only_sounds_alike_is_somebody_elses(load: Load, text: str) -> None:
    assert load(text).section is None


def test_a_section_without_indentation_is_noticed(problems: Problems) -> None:
    assert problems("state:\nbackend: file\nstorage_dir: x\n") == [
        "2: `backend` belongs under `state:`: indent it",
        "3: `storage_dir` belongs under `state:`: indent it",
    ]


@pytest.mark.parametrize("value", ["memory", "[backend, memory]", "3"])
def test_a_section_that_holds_no_keys_is_refused(problems: Problems, value: str) -> None:
    (problem,) = problems(f"state: {value}\n")
    assert problem == "1: `state:` must contain keys, each on its own line, such as `backend: file`"


@pytest.mark.parametrize("line", ["config: 5", "skill_overrides: [a]"])
def test_what_must_hold_keys_is_refused_when_it_holds_none(problems: Problems, line: str) -> None:
    (problem,) = problems(f"state:\n  {line}\n")
    assert problem.startswith(f"2: `{line.partition(':')[0]}` must contain ")


@pytest.mark.parametrize(
    "options",
    [
        "url: 'valkey://h'\n  ssl_ca_certs: ca.pem",
        "url: 'unix:///s'\n  ssl_cert_reqs: none",
        "url: 'redis://h'\n  ssl_check_hostname: false",
        "url: 'valkey+cluster://h'\n  db: 1",
        "url: 'valkey+sentinel://h'",
        "url: 'valkey://u:hunter2@h:port'",
        "url: 'valkey://u:hunter2@[::1'",
        "url: 'valkey://h/x'",
        "url: 'valkey://h?pasword=hunter2'",
    ],
)
def test_a_url_that_cannot_work_or_not_with_these_options_is_refused(problems: Problems, options: str) -> None:
    (problem,) = problems(f"state:\n  backend: valkey\n  {options}\n")
    assert problem.startswith("3: ")
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "options",
    [
        "url: 'valkeys://h', ssl_ca_certs: ca.pem, ssl_certfile: c.pem, ssl_keyfile: k.pem, ssl_cert_reqs: none",
        "url: 'rediss+cluster://h', ssl_check_hostname: false",
        "url: 'valkey://u:p@h/1', db: 2, username: v, password: q, client_name: n, socket_keepalive: true",
        "url: 'unix:///run/9', db: 3",
        "url: 'redis+unix:///run/9'",
        "url: 'valkey+sentinel://h/m', sentinel_username: u, sentinel_password: p, min_replicas: 1, strict: true",
    ],
)
def test_options_that_go_together_are_taken(load: Load, options: str) -> None:
    assert load(f"state: {{backend: valkey, {options}}}").url


EVERYTHING_WRONG = """
services:
  cache: {config: {url: valkey://h}}
state:
  backend: valkey
  tll: 3600
  ttl: yes
  storage_dir: ./x
  strict: maybe
  password: ${NOWHERE}
  config:
    db: -1
    key_prefix: ""
  skill_overrides:
    talker:
      backend: file
      url: valkey://h
      ttl: -5
"""


def test_every_problem_is_reported_at_once_in_order_with_file_and_line(problems: Problems) -> None:
    found = problems(EVERYTHING_WRONG)
    assert [problem.partition(":")[0] for problem in found] == ["5", "6", "7", "8", "9", "10", "12", "13", "17", "18"]
    with pytest.raises(StateConfigError) as caught:
        load_config()
    assert str(caught.value).startswith("10 problems in agent_config.yaml:\n  agent_config.yaml:5: ")


def test_the_error_and_its_problems_survive_pickling(load: Load) -> None:
    with pytest.raises(StateConfigError) as caught:
        load(EVERYTHING_WRONG)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.problems) == (str(caught.value), caught.value.problems)
    assert StateConfigError("no file").problems == ()


# --- overrides -------------------------------------------------------------------------------------------------------


OVERRIDES = """
skills:
  - skill_id: ai_assistant
    state_override:
      enabled: true
      backend: valkey
      ttl: 7200
      config: {url: "valkey://localhost:6379", db: 3, key_prefix: "agentup:ai:"}
  - skill_id: plain
plugins:
  - plugin_id: brief
    state_override: {ttl: 5}
  - not a mapping
state_management:
  backend: file
  ttl: 3600
  max_history: 50
  config: {storage_dir: ./states}
  skill_overrides:
    forgetful: {backend: memory}
    forever: {ttl: null}
    off: {enabled: false}
    own: {backend: sqlite, file: x.db}
    nothing:
"""


@pytest.mark.parametrize(
    ("handler", "backend", "options"),
    [
        ("plain", "file", {"ttl": 3600, "max_history": 50, "storage_dir": "./states"}),
        ("brief", "file", {"ttl": 5, "max_history": 50, "storage_dir": "./states"}),
        ("forgetful", "memory", {"ttl": 3600, "max_history": 50}),
        ("forever", "file", {"ttl": None, "max_history": 50, "storage_dir": "./states"}),
        ("nothing", "file", {"ttl": 3600, "max_history": 50, "storage_dir": "./states"}),
        ("own", "sqlite", {"ttl": 3600, "max_history": 50, "file": "x.db"}),
        (
            "ai_assistant",
            "valkey",
            {"ttl": 7200, "max_history": 50, "url": "valkey://localhost:6379", "db": 3, "key_prefix": "agentup:ai:"},
        ),
    ],
)
def test_a_handler_has_its_own_settings(load: Load, handler: str, backend: str, options: dict[str, Any]) -> None:
    config = load(OVERRIDES).for_handler(handler)
    assert (config.backend, config.options(), config.enabled) == (backend, options, True)
    assert (config.source, config.section) == ("agent_config.yaml", "state_management")


def test_a_handler_can_be_switched_off(load: Load) -> None:
    assert load(OVERRIDES).for_handler("off").enabled is False


def test_handlers_settings_need_no_section(load: Load) -> None:
    config = load("skills: [{skill_id: a, state_override: {backend: memory}}]")
    assert (config.backend, config.for_handler("a").backend) == ("file", "memory")


def test_problems_of_handlers_settings_are_reported_where_they_are(problems: Problems) -> None:
    text = """\
state:
  backend: file
  skill_overrides:
    a:
      backend: valkey
    b:
      storage_dri: x
    c: 5
    d:
      skill_overrides: {}
skills:
  - skill_id: b
    state_override: {ttl: 1}
  - state_override: {ttl: 1}
"""
    assert problems(text) == [
        '5: `backend: valkey` needs a url: add the line `url: "valkey://localhost:6379"` under `a:`',
        "7: `storage_dri` is not a key of `b:`; did you mean `storage_dir`?",
        "8: `c:` must contain keys, each on its own line, such as `backend: file`",
        "10: `skill_overrides` is not allowed under `d:`",
        "13: `b` already has settings in line 6: keep one of them",
        "14: `state_override` needs a `skill_id:` beside it",
    ]


def test_a_wrong_backend_of_a_handler_is_one_problem(problems: Problems) -> None:
    text = "state:\n  skill_overrides:\n    a:\n      backend: vlakey\n      url: valkey://h\n    b:\n"
    assert problems(text) == ["4: unknown backend `vlakey`; did you mean `valkey`?"]


@pytest.mark.parametrize("services", ["5", "[a]", "{a: b}", "{a: {config: 5}}", "{a: {url: http://h}}"])
def test_services_of_any_shape_are_only_looked_at(problems: Problems, services: str) -> None:
    (problem,) = problems(f"services: {services}\nstate:\n  backend: valkey\n  skill_overrides:\n")
    assert problem.endswith("under `state:`")


def test_what_is_missing_in_the_section_is_not_reported_again_for_each_handler(problems: Problems) -> None:
    (problem,) = problems("state:\n  backend: valkey\n  skill_overrides:\n    a: {ttl: 1}\n    b: {ttl: 2}\n")
    assert problem.startswith("2: `backend: valkey` needs a url")


def test_an_override_wins_key_by_key() -> None:
    config = StateConfig(backend="valkey", url="valkey://h", ttl=60, key_prefix="a:")
    assert config.override(ttl=5).options() == {"url": "valkey://h", "ttl": 5, "key_prefix": "a:"}
    assert config.override("valkey", key_prefix="b:").options() == {"url": "valkey://h", "ttl": 60, "key_prefix": "b:"}
    assert config.override(ttl=None).options() == {"url": "valkey://h", "ttl": None, "key_prefix": "a:"}
    assert config.override(ttl=None).override(ttl=7).ttl == 7
    assert config.override(on_unavailable="ephemeral").on_unavailable == "ephemeral"
    assert config.override() == config


def test_another_backend_drops_the_options_of_the_first_and_keeps_what_every_backend_has() -> None:
    config = StateConfig(backend="file", storage_dir="x", layout="document", ttl=60, on_unavailable="ephemeral")
    memory = config.override("memory", max_history=5)
    assert (memory.options(), memory.on_unavailable) == ({"ttl": 60, "max_history": 5}, "ephemeral")
    third = config.override("sqlite", file="x.db")
    assert third.options() == {"ttl": 60, "file": "x.db"}
    assert third.override(table="t").options() == {"ttl": 60, "file": "x.db", "table": "t"}
    assert third.override("memory").options() == {"ttl": 60}


@pytest.mark.parametrize(
    ("backend", "options", "sentence"),
    [
        (None, {"tll": 5}, "`tll` is not a key of `backend: file`; did you mean `ttl`?"),
        (None, {"ttl": 0}, "`ttl` must be a positive number of seconds, got 0; write `ttl: 3600`"),
        (None, {"ttl": True}, "`ttl` must be a positive number of seconds, got True; write `ttl: 3600`"),
        (None, {"url": "valkey://h"}, "`url` is a key of `backend: valkey`, and this is `backend: file`"),
        ("valkey", {}, '`backend: valkey` needs a url: add the line `url: "valkey://localhost:6379"`'),
        ("valkey", {"url": b"x"}, "`url` must be a URL"),
        (None, {"config": 5}, "`config` must be a mapping of keys to values, got 5"),
        (None, {"config": {1: 2}}, "`config` must be a mapping of keys to values, got a mapping"),
        ("", {}, "`backend` must be the name of a backend, got nothing"),
    ],
)
def test_a_wrong_override_is_a_configuration_error(backend: str | None, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StateConfigError) as caught:
        StateConfig().override(backend, **options)
    assert any(problem.startswith(sentence) for problem in caught.value.problems)


# --- the backends of third parties -----------------------------------------------------------------------------------


def test_a_third_partys_options_are_passed_on_as_yaml_reads_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "5432")
    config = load("""
state:
  backend: postgres
  ttl: "60"
  url: "postgres://u:p@${HOST:localhost}/db"
  port: ${PORT}
  quoted: "${PORT}"
  config:
    pool: {size: 5, names: [a, "${PORT}"], ratio: 0.5, eager: yes, nothing: null, day: 2024-01-01, octal: 010}
    storage_dir: /x
""")
    assert config.options() == {
        "ttl": 60,
        "url": "postgres://u:p@localhost/db",
        "port": 5432,
        "quoted": "5432",
        "pool": {
            "size": 5,
            "names": ["a", "5432"],
            "ratio": 0.5,
            "eager": True,
            "nothing": None,
            "day": "2024-01-01",
            "octal": 8,
        },
        "storage_dir": "/x",
    }


def test_known_backends_have_their_options_checked(load: Load, problems: Problems) -> None:
    known: dict[str, list[str] | None] = {"sqlite": ["file", "table"], "anything": None}
    text = "state:\n  backend: sqlite\n  file: x\n  tabel: y\n"
    assert problems(text, known_backends=known) == ["4: `tabel` is not a key of `state:`; did you mean `table`?"]
    assert load("state: {backend: anything, tabel: y}", known_backends=known).options() == {"tabel": "y"}
    assert load("state: {backend: sqlite, file: y, ttl: 1}", known_backends=known).options() == {"file": "y", "ttl": 1}


def test_with_known_backends_any_other_is_a_problem(load: Load, problems: Problems) -> None:
    text = "state:\n  backend: {}\n"
    assert problems(text.format("sqlit"), known_backends={"sqlite": None}) == [
        "2: unknown backend `sqlit`; did you mean `sqlite`?"
    ]
    assert problems(text.format("oracle"), known_backends={"sqlite": None}) == [
        "2: unknown backend `oracle`; use one of `memory`, `file`, `valkey`, `sqlite`"
    ]
    assert load(text.format("redis"), known_backends={"redis": None}).backend == "redis"


@pytest.mark.parametrize("value", ["!!binary aGVsbG8=", "!!int abc", "!!bool abc", '!!int ""', "9" * 5000])
def test_a_third_partys_option_that_is_no_plain_value_is_refused(problems: Problems, value: str) -> None:
    (problem,) = problems(f"state:\n  backend: sqlite\n  x: {value}\n")
    assert problem.startswith("3: ")


# --- the dataclass ---------------------------------------------------------------------------------------------------


def test_a_section_read_elsewhere_can_be_given_as_it_is() -> None:
    section = {"enabled": True, "backend": "valkey", "ttl": 60, "config": {"url": "valkey://h", "db": "2"}}
    assert StateConfig(**section).options() == {"url": "valkey://h", "db": 2, "ttl": 60}


def test_a_configuration_cannot_be_wrong() -> None:
    with pytest.raises(StateConfigError) as caught:
        StateConfig(backend="valkey", ttl=-1, config={"ttl": 1, "tabel": 2, "enabled": True}, enabled=None)  # type: ignore[arg-type]
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "`ttl`",
        "`tabel`",
        "`enabled`",
        "`enabled`",
        "`ttl`",
    ][: len(caught.value.problems)]
    with pytest.raises(StateConfigError, match="`config` must be a mapping"):
        StateConfig(config=5)  # type: ignore[arg-type]


def test_nothing_secret_is_in_the_repr_or_the_dictionary() -> None:
    config = StateConfig(
        backend="valkey",
        url="valkeys://alice@h:6379",
        password="hunter2://x",
        sentinel_password="hunter2",
        ssl_password="hunter2",
        skill_overrides={
            "token": {"backend": "sqlite", "api_key": "hunter2", "dsn": "pg://u:hunter2@h", "size": 5},
            "other": {
                "backend": "sqlite",
                "links": ["pg://u:hunter2@h", {"pwd": "hunter2"}],
                "address": "x://:hunter2@h",
            },
        },
    )
    for shown in (repr(config), json.dumps(config.to_dict())):
        assert "hunter2" not in shown
        assert "valkeys://***@h:6379" in shown
    assert config.to_dict()["skill_overrides"]["token"] == {
        "backend": "sqlite",
        "api_key": "***",
        "dsn": "***",
        "size": 5,
    }
    assert config.to_dict()["password"] == "***"
    assert config.options()["password"] == "hunter2://x"


def test_the_dictionary_is_the_section() -> None:
    config = StateConfig(backend="memory", ttl=None, max_history=5, _nulls=frozenset({"ttl"}))
    assert config.to_dict() == {
        "enabled": True,
        "backend": "memory",
        "ttl": None,
        "max_history": 5,
        "on_unavailable": "raise",
    }
    assert StateConfig(**StateConfig(backend="sqlite", config={"file": "x"}).to_dict()).options() == {"file": "x"}


def test_importing_it_costs_nothing_that_is_not_needed() -> None:
    script = """
import sys
import agentstate.config
agentstate.config.load_config()
heavy = {"yaml", "dataclasses_json", "marshmallow", "asyncio", "valkey", "filelock", "difflib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)
