"""Configuration files that mean harm, or were never meant to be one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agentstate.config import load_config
from agentstate.errors import StateConfigError

Refusal = Callable[[str | bytes], tuple[str, ...]]


@pytest.fixture(autouse=True, params=["libyaml", "pure Python"])
def _parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure Python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without libyaml")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent_config.yaml"


@pytest.fixture
def refusal(path: Path) -> Refusal:
    """The problems of a file, without its name. (A limit that does not hold shows as a test that does not end.)"""

    def refusal(content: str | bytes) -> tuple[str, ...]:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(StateConfigError) as caught:
            load_config(path)
        assert len(str(caught.value)) < 30_000
        return tuple(problem.removeprefix(f"{path}:").strip() for problem in caught.value.problems)

    return refusal


def test_a_file_of_more_than_a_mebibyte_is_not_read(refusal: Refusal) -> None:
    assert refusal("#" * (2**20 + 1)) == ("larger than 1,048,576 bytes, the maximum for a configuration",)


def test_a_mebibyte_of_comments_is_fine(path: Path) -> None:
    path.write_text("state: {ttl: 5}\n".ljust(2**20, "#"))
    assert load_config(path).ttl == 5


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "? " * 100_000, "a:\n" + " - " * 100]
)
def test_deep_nesting_is_refused(refusal: Refusal, text: str) -> None:
    (problem,) = refusal(text)
    assert problem.endswith("nested more than 64 deep")


@pytest.mark.parametrize(
    "text", ["- a\n" * 200_000, "[" + "a, " * 300_000 + "]", "state: {" + "a: 1, " * 100_000 + "}"]
)
def test_too_many_values_are_refused(refusal: Refusal, text: str) -> None:
    (problem,) = refusal(text)
    assert "more than 50,000 values" in problem


def bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 lol"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines)


def test_a_billion_laughs_are_refused(refusal: Refusal) -> None:
    (problem,) = refusal(f"{bomb(10, 10)}\nstate: {{backend: x, y: *a9}}")
    assert "more than 50,000 values; those of aliases are counted at each use" in problem


def test_merge_keys_are_no_way_around_that(refusal: Refusal) -> None:
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, 10)]
    (problem,) = refusal("\n".join([*lines, "state: *a9"]))
    assert "more than 50,000 values" in problem


def test_a_chain_of_aliases_is_as_deep_as_it_would_be(refusal: Refusal) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{level}: &a{level} [*a{level - 1}]" for level in range(1, 100)]
    (problem,) = refusal("\n".join(lines))
    assert problem.endswith("nested more than 64 deep")


@pytest.mark.parametrize("text", ["state: &a {x: *a}", "state: &a [*a]", "state: &a\n  <<: *a", "state: *nothing"])
def test_a_circle_or_an_alias_of_nothing_is_refused(refusal: Refusal, text: str) -> None:
    (problem,) = refusal(text)
    assert problem.endswith("`*` begins an alias, and this one is not defined: quote the text")


def test_aliases_and_merges_within_reason_work(path: Path) -> None:
    path.write_text("""
defaults: &defaults {backend: file, ttl: 60, storage_dir: &dir ./x}
more: &more {max_history: 7, ttl: 1}
state:
  <<: [*defaults, *more]
  ttl: 5
  skill_overrides:
    a: {<<: *more, storage_dir: *dir}
""")
    config = load_config(path)
    assert config.options() == {"storage_dir": "./x", "ttl": 5, "max_history": 7}
    assert config.for_handler("a").options() == {"storage_dir": "./x", "ttl": 1, "max_history": 7}


def test_a_problem_behind_an_alias_is_told_once(refusal: Refusal) -> None:
    text = "x: &x {ttl: 0}\nstate:\n  skill_overrides:\n    a: *x\n    b: *x\n"
    (problem,) = refusal(text)
    assert problem.startswith("1: `ttl` must be")


@pytest.mark.parametrize("value", ["5", "[a]", "[{ttl: 1}, 5]"])
def test_a_merge_of_anything_else_is_refused(refusal: Refusal, value: str) -> None:
    (problem,) = refusal(f"state:\n  <<: {value}\n")
    assert problem == "2: `<<` must be followed by a mapping"


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("!!python/object/apply:os.system [echo]", "`!!python/object/apply:os.system`"),
        ("!!python/name:os.system ''", "`!!python/name:os.system`"),
        ("!!python/tuple [1]", "`!!python/tuple`"),
        ("!secret x", "a `!tag`"),
        ("!<tag:example.org,2024:x> {a: b}", "a `!tag`"),
    ],
)
@pytest.mark.parametrize("place", ["state: {{backend: x, y: {}}}", "elsewhere: {}\nstate: {{backend: memory}}", "{}"])
def test_tags_that_build_objects_are_refused_anywhere(refusal: Refusal, tag: str, name: str, place: str) -> None:
    assert f"1: {name} is not supported: remove the tag, or quote the text" in refusal(place.format(tag))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("state: {}".encode("utf-16"), "1: this is UTF-16 or UTF-32: save the file as UTF-8"),
        ("state: {}".encode("utf-32"), "1: this is UTF-16 or UTF-32: save the file as UTF-8"),
        ("state: {}".encode("utf-16-le"), "1: character U+0000 is not allowed in YAML: is this a text file?"),
        (b"a: b\nc: \xe9\n", "2: byte 0xe9 is not UTF-8: save the file as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0", "1: character U+007F is not allowed in YAML: is this a text file?"),
        (b"a: b\n\nc: \x1b[31m\n", "3: character U+001B is not allowed in YAML: is this a text file?"),
        (b"a: \xed\xa0\x80", "1: byte 0xed is not UTF-8: save the file as UTF-8"),
        (bytes(range(256)), "1: character U+0000 is not allowed in YAML: is this a text file?"),
    ],
)
def test_what_is_no_text_is_refused(refusal: Refusal, content: bytes, problem: str) -> None:
    if content == bytes(range(256)):
        problem = "2: byte 0x80 is not UTF-8: save the file as UTF-8"
    assert refusal(content) == (problem,)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(path: Path) -> None:
    path.write_bytes("state:\r\n  backend: file\r\n  storage_dir: ./Übung 🎉\r\n".encode("utf-8-sig"))
    assert load_config(path).storage_dir == "./Übung 🎉"


@pytest.mark.parametrize(("text", "kind"), [("- state", "a list"), ("state", "text"), ("[]", "a list"), ("42", "text")])
def test_a_root_that_is_no_mapping_is_refused(refusal: Refusal, text: str, kind: str) -> None:
    assert refusal(text) == (f"1: the file must contain keys such as `state:`, got {kind}",)


def test_a_second_document_is_refused_and_the_first_is_checked(refusal: Refusal) -> None:
    assert refusal("---\nstate:\n  tll: 1\n---\nstate:\n  backend: memory\n") == (
        "3: `tll` is not a key of `state:`; did you mean `ttl`?",
        "4: a second document begins here: remove the `---`",
    )


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("state:\n\tbackend: file\n", "2: this line is indented with a tab: use spaces"),
        ("state:\n  url: @x\n", "2: a value must not begin with `@`: quote the text."),
        ("state:\n  url: `x`\n", "2: a value must not begin with ```: quote the text"),
        ("state:\n  password: %x\n", "2: a value must not begin with `%`: quote the text"),
        (
            "state:\n  url: a: b\n",
            "2: unexpected `:`, or wrong indentation: quote text that contains `: `",
        ),
        ("state: {url: ${X:y}}\n", "1: this is not YAML: "),
        ("state:\n  backend: file\n ttl: 5\n", "3: "),
        ("state: [\n", "2: this is not YAML: "),
        ("state: 'x\n", "2: this is not YAML: "),
        ('state: "\\q"\n', "1: this is not YAML: "),
        ("%YAML 9.9.9\n---\n", "1: "),
        ("a: 1\n...\nb: 2\n", "3: this is not YAML: "),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(refusal: Refusal, text: str, start: str) -> None:
    (problem,) = refusal(text)
    assert problem.startswith(start)


@pytest.mark.parametrize(
    "line",
    [
        "password: *hunter2",
        "password: !hunter2",
        "password: !hunter2!x y",
        "password: &hunter2 [",
        "password: %hunter2",
        "password: @hunter2",
        'password: "hunter2',
        "password: hunter2: x",
        "password: [hunter2, {",
        "password: ! hunter2]: [",
        "url: valkey://u:hunter2@h: 5",
        "url: http://u:hunter2@h",
        "url: 'valkey://u:hunter2@[h'",
        "url: ['valkey://u:hunter2@h']",
        "url: {x: 'hunter2'}",
        "password: {x: hunter2}",
        'password: "\\0hunter2"',
        "password: ${X:-hunter2}",
        "password: ${hunter2",
        "password: ${X Y:hunter2}",
    ],
)
def test_a_password_in_a_broken_line_is_not_shown(path: Path, line: str) -> None:
    url = "" if line.startswith("url") else "\n  url: valkey://h"
    path.write_text(f"state:\n  backend: valkey{url}\n  {line}\n")
    with pytest.raises(StateConfigError) as caught:
        load_config(path)
    assert "hunter2" not in str(caught.value)
    assert not any("hunter2" in problem for problem in caught.value.problems)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or "hunter2" not in str(caught.value.__context__)


@pytest.mark.parametrize("key", ["? [a, b]\n  : 1", "? {a: b}\n  : 1"])
def test_keys_that_are_no_text_are_refused(refusal: Refusal, key: str) -> None:
    (problem,) = refusal(f"state:\n  {key}\n")
    assert problem.startswith("2: a key of `state:` must be text, got a ")


@pytest.mark.parametrize("key", ["5", "yes", "null", "1.5", '"a\\nb\\e[31m"', "🎉", "x" * 500, "'`'", "~"])
def test_strange_keys_are_unknown_keys_in_one_line(refusal: Refusal, key: str) -> None:
    (problem,) = refusal(f"state:\n  {key}: 1\n")
    assert problem.startswith("2: ")
    assert "is not a key of `state:`" in problem
    assert problem.isprintable()


def test_a_thousand_problems_are_cut_off(path: Path) -> None:
    path.write_text("state:\n" + "".join(f"  unknown_{number}: 1\n" for number in range(10_000)))
    with pytest.raises(StateConfigError, match=r"^the first 100 problems in ") as caught:
        load_config(path)
    assert len(caught.value.problems) == 100


@pytest.mark.parametrize(
    "value",
    [
        "${A}" * 16_000,
        "${" * 30_000,
        "${a" * 20_000,
        "${{a}" * 12_000,
        "${" + "{a}" * 20_000,
        "x" * 70_000,
        "$" * 60_000,
    ],
)
def test_variables_are_no_way_to_a_large_value(path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("A", "x" * 100_000)
    path.write_text(f"state:\n  storage_dir: '{value}'\n")
    if set(value) == {"$"}:
        assert load_config(path).storage_dir == value
    else:
        with pytest.raises(StateConfigError) as caught:
            load_config(path)
        assert len(str(caught.value)) < 1000


YAML_PIECES = st.sampled_from(
    [
        *("state", "backend", "file", "ttl", "config", "skill_overrides", "services", "skills", "state_override", "a"),
        *("1", "-1", "null", "~", "é", ": ", ":", "- ", "\n", "  ", "    ", "{", "}", "[", "]", ",", "?", "<<"),
        *("&a ", "*a", "!!str ", "!x ", "'", '"', "#", "|", ">", "---", "...", "%", "@", "`", "\t", "\r", "\x00"),
        *("${A", "${HOME}", "${X:y}", "\ufeff"),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(YAML_PIECES, max_size=40).map("".join) | st.text(max_size=200) | st.binary(max_size=200))
def test_anything_at_all_is_a_configuration_or_a_configuration_error(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
    try:
        load_config(path)
        problems = ("none",)
    except StateConfigError as error:
        problems = error.problems
    assert problems
    assert all(problem.isprintable() for problem in problems)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(options=st.dictionaries(st.text().map("x_{}".format), values), default_style=st.sampled_from([None, '"']))
def test_a_third_partys_options_are_what_safe_load_makes_of_them(
    path: Path, options: dict[str, Any], default_style: Any
) -> None:
    text = yaml.safe_dump({"state": {"backend": "sqlite", **options}}, allow_unicode=False, default_style=default_style)
    assume("${" not in text)
    path.write_text(text)
    expected = yaml.safe_load(text)["state"]
    del expected["backend"]
    assert load_config(path).options() == expected


def test_a_link_that_leads_to_itself_is_a_configuration_error(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(StateConfigError, match="the file cannot be read: "):
        load_config(path)


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(StateConfigError, match="this is not a regular file"):
        load_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateConfigError, match="this is not a regular file"):
        load_config(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_a_device_is_not_read() -> None:
    with pytest.raises(StateConfigError, match="this is not a regular file"):
        load_config("/dev/zero")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "no/such/directory", ""])
def test_a_path_that_cannot_be_is_a_configuration_error(name: str) -> None:
    with pytest.raises(StateConfigError):
        load_config(name)


def test_a_file_that_may_not_be_read_is_a_configuration_error(path: Path) -> None:
    path.write_text("state: {}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(StateConfigError, match="cannot be read: Permission denied"):
        load_config(path)


def test_a_path_with_control_characters_is_shown_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b.yaml"
    path.write_text("state: 5")
    with pytest.raises(StateConfigError) as caught:
        load_config(path)
    assert str(caught.value).isprintable()
