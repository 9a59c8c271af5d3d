"""Context ids, and their names in a directory and in Valkey."""

from __future__ import annotations

import string
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentstate.errors import InvalidContextIdError, StateConfigError
from agentstate.keys import KeySpace, check_context_id, check_user_id, document_stem, file_stem
from agentstate.testing.identifiers import HOSTILE

IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)
TRICKY = st.text("aA{}%~7BD25:./\\ *é", min_size=1, max_size=12)


@given(IDS)
def test_an_id_is_taken_as_it_is(context_id: str) -> None:
    if len(context_id.encode()) <= 1024:
        assert check_context_id(context_id) is context_id


@pytest.mark.parametrize("bad", ["", "\0", "a\0", "x" * 1025, "é" * 513, "\ud800", None, 1, b"a", ["a"]])
def test_what_can_be_no_id_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidContextIdError) as caught:
        check_context_id(bad)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


@pytest.mark.parametrize("bad", ["", "\0", "\ud800", None, 1, b"alice"])
def test_what_can_be_no_user_is_refused(bad: Any) -> None:
    with pytest.raises(StateConfigError) as caught:
        check_user_id(bad)
    str(caught.value).encode()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", ["a", "0", "alice", "a-b_c.d", "conversation.42", "x" * 100, "console", "com10"])
def test_a_plain_id_is_its_own_file_name(plain: str) -> None:
    assert file_stem(plain) == plain


@pytest.mark.parametrize(
    "other",
    ["A", "alicE", ".a", "-a", "_a", "a/b", "..", "é", "a b", "a:b", "con", "nul.txt", "com1", "lpt9.x", "x" * 101],
)
def test_any_other_id_gets_a_slug_and_a_hash(other: str) -> None:
    slug, tilde, digest = file_stem(other).rpartition("~")
    assert tilde
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")
    assert slug


def test_a_hashed_file_name_is_contract() -> None:
    assert file_stem("Alice Smith/2026") == "alice-smith-2026~ecc97d5fba75b1a361b829b43427954b"
    assert file_stem("🙂") == "id~d06f1525f791397809f9bc98682b5c13"


@given(IDS | TRICKY)
def test_a_file_name_is_safe_everywhere(context_id: str) -> None:
    stem = file_stem(context_id)
    assert set(stem) <= set(string.ascii_lowercase + string.digits + "._-~")
    assert len(stem) <= 100
    assert stem[0] not in ".-~"
    assert stem == stem.casefold()  # so two names that differ, differ on every file system


@given(TRICKY, TRICKY)
@example("a", "A")
def test_two_ids_have_two_names(one: str, other: str) -> None:
    if one != other:
        assert file_stem(one) != file_stem(other)
        for windows in (False, True):
            assert document_stem(one, windows=windows) != document_stem(other, windows=windows)


def test_the_name_that_another_id_hashes_to_is_hashed_itself() -> None:
    for name in (file_stem("A"), document_stem("a/b")):
        assert file_stem(name) != name
        assert document_stem(name) != name


@pytest.mark.parametrize(
    "context_id",
    ["alice", "Alice", "user:alice", "a b", ".hidden", "..", "é", "x*?", "CON", "a\\b", "a\nb", "x.", "x" * 246],
)
def test_a_document_has_the_name_that_agentup_gave_it(context_id: str) -> None:
    assert document_stem(context_id, windows=False) == context_id


@pytest.mark.parametrize("context_id", ["a/b", "../x", "/etc/x", "x" * 247, "é" * 124])
def test_a_document_that_agentup_could_not_write_has_a_hashed_name(context_id: str) -> None:
    stem = document_stem(context_id, windows=False)
    assert stem != context_id
    assert "/" not in stem
    assert len(stem) < 100


@pytest.mark.parametrize("context_id", ["user:alice", "x*?", "CON", "nul.x", "a\\b", "a\nb", '"', "a|b"])
def test_windows_refuses_more_names(context_id: str) -> None:
    assert document_stem(context_id, windows=True) == file_stem(context_id) != context_id


# --- Valkey ---------------------------------------------------------------------------------------------------------


def slot_tag(key: str) -> str:
    """The part of a key that decides on its cluster slot: what the first pair of braces holds, if anything."""
    start = key.find("{")
    end = key.find("}", start + 1)
    return key[start + 1 : end] if start >= 0 and end > start + 1 else key


@pytest.mark.parametrize("prefix", ["agentup:state:", "s", "{agents}:state:", "a{tag}b", "*[?", "é:"])
@given(context_id=IDS | TRICKY)
def test_the_keys_of_a_context_are_its_own_and_in_one_slot(prefix: str, context_id: str) -> None:
    space = KeySpace(prefix)
    keys = space.keys(context_id)
    assert len(set(keys)) == len(keys)
    assert len(set(map(slot_tag, keys))) == 1
    assert space.context_id(keys.state) == context_id
    assert all(key.startswith(prefix) for key in keys)
    for key in keys[1:]:  # a list or a lease can be taken for no context's state
        assert space.keys(space.context_id(key)).state != key


@given(one=TRICKY, other=TRICKY)
def test_two_contexts_share_no_key(one: str, other: str) -> None:
    for prefix in ("s:", "{s}:"):
        space = KeySpace(prefix)
        if one != other:
            assert not set(space.keys(one)) & set(space.keys(other))


@pytest.mark.parametrize(
    "context_id", [name for name in HOSTILE if "{" not in name and "}" not in name and "%" not in name]
)
def test_a_key_without_braces_is_prefix_and_id(context_id: str) -> None:
    assert KeySpace("agentup:state:").keys(context_id).state == "agentup:state:" + context_id


def test_the_names_of_keys_are_contract() -> None:
    assert KeySpace("s:").keys("{x}%7B%") == (
        "s:%7Bx%7D%257B%",
        "s:{s:%7Bx%7D%257B%}:history",
        "s:{s:%7Bx%7D%257B%}:commits",
        "s:{s:%7Bx%7D%257B%}:lease",
    )
    assert KeySpace("{t}:").keys("x") == ("{t}:x", "{t}:{{t}:x}:history", "{t}:{{t}:x}:commits", "{t}:{{t}:x}:lease")


@pytest.mark.parametrize(
    "prefix", ["", None, 5, b"s:", "\ud800", "\0", "a\0", "{", "}", "{}", "{a", "a}", "{a}{b}", "{a}:{", "}{", "{{a}}"]
)
def test_a_prefix_that_makes_no_keys_or_would_tear_them_apart_is_refused(prefix: Any) -> None:
    with pytest.raises(StateConfigError, match="key_prefix") as caught:
        KeySpace(prefix)
    str(caught.value).encode()


@pytest.mark.parametrize("prefix", ["s:", "s", "{agents}:state:", "a{tag}b", r"a*b?c[d]e\f:", "é:"])
@given(context_id=IDS | TRICKY, other=TRICKY)
def test_the_pattern_finds_state_keys_and_no_others(prefix: str, context_id: str, other: str) -> None:
    space = KeySpace(prefix)
    pattern = space.pattern().replace("[^", "[!").replace("\\[", "[[]").replace("\\]", "]")
    pattern = pattern.replace("\\*", "[*]").replace("\\?", "[?]").replace("\\\\", "\\")
    keys = space.keys(context_id)
    assert fnmatchcase(keys.state, pattern)
    assert not any(fnmatchcase(key, pattern) for key in keys[1:])
    assert fnmatchcase(other, pattern) == (other.startswith(prefix) and other[len(prefix) :][:1] not in ("", "{"))
