"""Context ids: which are valid, and that each is a conversation of its own."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from ..errors import InvalidContextIdError
from .harness import Context, Harness, contents

HOSTILE = (
    "../x",
    "..",
    ".",
    "/etc/x",
    "x/y",
    "x\\y",
    "x",
    "X",
    unicodedata.normalize("NFC", "café"),
    unicodedata.normalize("NFD", "café"),
    "CON",
    "con",
    "con.txt",
    "nul",
    "com1",
    "{x}",
    "{",
    "}{",
    "{x}:history",
    "%7Bx%7D",
    "%",
    "*",
    "?",
    "[x]",
    "[",
    "a:b:c",
    "a:b",
    string.punctuation,
    string.whitespace,
    " ",
    "x ",
    "x.",
    " x",
    "-rf",
    "~",
    "x.json",
    "x.jsonl",
    "x.tmp",
    ".locks",
    "x~0123456789abcdef0123456789abcdef",
    "\n",
    "a\nb",
    "a\tb",
    "\x01\x7f",
    "a\u2028b",
    "\ufeff",
    "🙂",
    "\U0010ffff",
    "ß",
    "SS",
    "ı",
    "İ",
    "null",
    "true",
    "0",
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "a" * 255,
    "a" * 1024,
    "é" * 512,
    "'; DROP TABLE conversations; --",
    "${HOME}",
    "$(id)",
)

CALLS: tuple[Callable[[Context, Any], Any], ...] = (
    lambda context, name: context.get_or_create(name),
    lambda context, name: context.get_state(name),
    lambda context, name: context.exists(name),
    lambda context, name: context.update_state(name, variables={}),
    lambda context, name: context.clear_context(name),
    lambda context, name: context.fork_context(name, "fine"),
    lambda context, name: context.fork_context("fine", name),
    lambda context, name: context.add_to_history(name, "user", "x"),
    lambda context, name: context.extend_history(name, [{"role": "user", "content": "x"}]),
    lambda context, name: context.get_history(name),
    lambda context, name: list(context.iter_history(name)),
    lambda context, name: context.count_history(name),
    lambda context, name: context.trim_history(name, 1),
    lambda context, name: context.pop_history(name),
    lambda context, name: context.clear_history(name),
    lambda context, name: context.get_variable(name, "x"),
    lambda context, name: context.get_variables(name),
    lambda context, name: context.set_variable(name, "x", 1),
    lambda context, name: context.set_variables(name, {"x": 1}),
    lambda context, name: context.delete_variable(name, "x"),
    lambda context, name: context.increment_variable(name, "x"),
    lambda context, name: context.update_variable(name, "x", lambda _: 1),
    lambda context, name: context.get_metadata(name, "x"),
    lambda context, name: context.get_all_metadata(name),
    lambda context, name: context.set_metadata(name, "x", 1),
    lambda context, name: context.delete_metadata(name, "x"),
    lambda context, name: context.batch(name).__enter__(),
    lambda context, name: context.turn(name).__enter__(),
)


class IdentifierTests(Harness):
    def test_hostile_ids_are_conversations_of_their_own(self, context: Context) -> None:
        for name in HOSTILE:
            with context.batch(name) as batch:
                batch.set_variable("name", name)
                batch.add_to_history("user", name)
        for name in HOSTILE:
            state = context.get_state(name)
            assert state is not None
            assert state.context_id == name
            assert state.variables == {"name": name}
            assert contents(context, name) == [name]
        assert sorted(context.list_contexts()) == sorted(HOSTILE)
        for name in HOSTILE[::2]:
            assert context.clear_context(name) is True
        assert sorted(context.list_contexts()) == sorted(HOSTILE[1::2])
        for name in HOSTILE[::2]:
            assert context.get_state(name) is None
        for name in HOSTILE[1::2]:
            assert contents(context, name) == [name]

    @pytest.mark.parametrize("name", ["../x", "{x}", "*", "CON", "é" * 512, "a\nb"])
    def test_a_turn_can_be_held_on_a_hostile_id(self, context: Context, name: str) -> None:
        with context.turn(name) as turn:
            turn.set_variable("x", 1)
        assert context.get_variables(name) == {"x": 1}
        assert list(context.list_contexts()) == [name]

    @pytest.mark.parametrize(
        "name",
        ["", "\0", "a\0b", "x" * 1025, "x" * 10_000, "é" * 513, "\ud800", "ok\udfff", None, 5, b"bytes", ["a"]],
        ids=["empty", "NUL", "with NUL", "1025", "10000", "1026 bytes", "surrogate", "surrogates", "None", "int",
             "bytes", "list"],
    )  # fmt: skip
    def test_what_can_be_no_id_is_refused_by_every_call(self, context: Context, name: Any) -> None:
        for call in CALLS:
            with pytest.raises(InvalidContextIdError) as caught:
                call(context, name)
            assert isinstance(caught.value, ValueError)
        assert list(context.list_contexts()) == []

    def test_one_id_may_be_the_beginning_of_another(self, context: Context) -> None:
        for name in ("a", "a:", "a:b", "ab"):
            context.set_variable(name, "x", name)
        context.clear_context("a")
        assert sorted(context.list_contexts()) == ["a:", "a:b", "ab"]
        assert context.get_variables("a:b") == {"x": "a:b"}
