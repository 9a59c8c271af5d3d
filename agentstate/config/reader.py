"""Reads `agent_config.yaml`, and reports everything that is wrong with its state section at once."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from agentstate.errors import StateConfigError

from .model import (
    AGENTUP_OVERRIDES,
    BACKENDS,
    KEYS,
    OTHER_BACKEND_NAMES,
    SECTIONS,
    StateConfig,
    conflicts,
    convert,
    known_to,
    merged,
    unknown_key,
)
from .tree import MAX_BYTES, Node, UnreadableError, decode, parse, scalar

_MAX_EXPANDED: Final = 2**16
_MAX_PROBLEMS: Final = 100
_VARIABLE = re.compile(r"\$\$\{|\$\{((?:[^{}]|\{[^{}]*\})*)\}|\$\{")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Entry(NamedTuple):
    """A key of a mapping with its value. `line` is the key's."""

    key: str
    line: int
    value: Node


class _Backend(NamedTuple):
    """The backend of a section (None if its name is wrong), and how it was chosen."""

    name: str | None
    implied: bool = False
    by_variable: bool = False


_DEFAULT_BACKEND: Final = _Backend("file", implied=True)


@dataclass
class _Section:
    """The contents of a section: the values by their keys, and the line of each."""

    line: int
    name: str
    backend: _Backend = _DEFAULT_BACKEND
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, _Section] = field(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """The keys that stand in the file, those of `config:` beside the others."""
        values = {name: value for name, value in self.values.items() if name in self.lines}
        return values | dict(self.values.get("config", {}))


class _TooManyError(Exception):
    """There are too many problems to report them all."""


class Reader:
    """Reads one file. `known_backends` is that of `load_config`; `named_by` says where the path is from."""

    def __init__(
        self, path: str, known_backends: Mapping[str, Collection[str] | None] | None, *, named_by: str = ""
    ) -> None:
        self.path = path
        self.known = known_backends
        self.named_by = named_by
        self.problems: list[tuple[int, str]] = []

    def read(self) -> StateConfig:
        config = StateConfig(source=self.path)
        try:
            root, self.problems = parse(decode(self._bytes()))
            if root:
                config = self._config(root)
        except UnreadableError as error:
            self.problems.append((error.line, str(error)))
        except _TooManyError:
            pass
        if self.problems:
            raise self._error()
        return config

    def _problem(self, line: int, sentence: str) -> None:
        self.problems.append((line, sentence))
        if len(self.problems) >= _MAX_PROBLEMS:
            raise _TooManyError

    def _error(self) -> StateConfigError:
        name = self.path if self.path.isprintable() else ascii(self.path)
        # A node that is used through aliases is read, and reported, more than once.
        ordered = sorted(dict.fromkeys(self.problems), key=lambda problem: problem[0])
        problems = [
            _one_line(f"{name}:{line}: {sentence}" if line else f"{name}: {sentence}") for line, sentence in ordered
        ]
        if len(problems) == 1:
            return StateConfigError(problems[0], problems=problems)
        first = "the first " if len(self.problems) >= _MAX_PROBLEMS else ""
        head = f"{first}{len(problems)} problems in {name}:"
        return StateConfigError("\n  ".join([head, *problems]), problems=problems)

    def _bytes(self) -> bytes:
        try:
            # Opening a pipe could block forever, and reading a device need not end.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise UnreadableError(0, "this is not a regular file")
            with open(self.path, "rb") as file:
                return file.read(MAX_BYTES + 1)
        except FileNotFoundError as error:
            by = f" ({self.named_by} names it)" if self.named_by else ""
            self._problem(0, f"there is no such file{by}")
            raise self._error() from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._problem(0, f"the file cannot be read: {getattr(error, 'strerror', None) or error}")
            raise self._error() from error

    # --- mappings -------------------------------------------------------------------------------------------------

    def _entries(self, node: Node, where: str) -> list[_Entry]:
        """The keys of a map with their values, merged ones (`<<`) included; duplicates are reported."""
        entries: dict[str, _Entry] = {}
        merged: list[Node] = []
        for key, value in node.pairs():
            if key.kind != "scalar":
                self._problem(key.line, f"a key of {where} must be text, got a {key.kind}")
            elif key.tag == "merge":
                merged += value.children if value.kind == "list" else [value]
            elif key.text in entries:
                first = entries[key.text].line
                self._problem(key.line, f"`{key.text[:60]}` is already set in line {first}: keep one of them")
            else:
                entries[key.text] = _Entry(key.text, key.line, value)
        for other in merged:
            if other.kind != "map":
                self._problem(other.line, "`<<` must be followed by a mapping")
                continue
            for entry in self._entries(other, where):
                entries.setdefault(entry.key, entry)
        return list(entries.values())

    # --- values ---------------------------------------------------------------------------------------------------

    def _take(self, section: _Section, entry: _Entry) -> Any:
        """Add the value of a known key to the section."""
        section.lines[entry.key] = entry.line
        value: Any = None
        variables = ""
        try:
            if entry.value.kind != "scalar":
                value = self._plain(entry.value, entry.key)
            elif entry.value.tag != "null":
                value, variables = _expanded(entry.value.text)
            section.values[entry.key] = convert(entry.key, value, given_by=variables)
        except ValueError as error:
            self._problem(entry.line, str(error))
        return section.values.get(entry.key)

    def _plain(self, node: Node, where: str) -> Any:
        """The value of a node of unknown type, as YAML reads it, with its variables expanded."""
        if node.kind == "list":
            return [self._plain(child, where) for child in node.children]
        if node.kind == "map":
            return {entry.key: self._plain(entry.value, where) for entry in self._entries(node, f"`{where}`")}
        try:
            text, variables = _expanded(node.text)
            return scalar(text, plain=True) if node.plain and variables else scalar(text, node.tag)
        except ValueError as error:
            self._problem(node.line, str(error))
            return None

    # --- sections -------------------------------------------------------------------------------------------------

    def _config(self, root: Node) -> StateConfig:
        if root.kind != "map":
            if root.tag != "null":
                kind = "a list" if root.kind == "list" else "text"
                self._problem(root.line, f"the file must contain keys such as `state:`, got {kind}")
            return StateConfig(source=self.path)
        entries = {entry.key: entry for entry in self._entries(root, "the file")}
        found = [entries[name] for name in SECTIONS if name in entries]
        sections = [self._section(entry.value, f"{entry.key}:", entry.line) for entry in found]
        if len(found) > 1:
            first, second = sorted(found, key=lambda entry: entry.line)
            also = f"`{second.key}:` is the same section as `{first.key}:` in line {first.line}: keep one of them"
            self._problem(second.line, also)
        elif not found:
            self._look_for_misspelt(entries.values())
        elif found[0].value.tag == "null":
            for name in ("backend", "storage_dir", "key_prefix"):
                if name in entries:
                    self._problem(entries[name].line, f"`{name}` belongs under `{found[0].key}:`: indent it")
        section = sections[0] if sections else _Section(0, "state:", values={"backend": "file"})
        self._agentup_overrides(entries, section)
        self._check(section, root)
        if self.problems:
            return StateConfig(source=self.path)
        values = section.values | {
            "skill_overrides": {name: override.written() for name, override in section.overrides.items()}
        }
        nulls = frozenset(name for name, value in values.items() if value is None)
        return StateConfig(**values, source=self.path, section=found[0].key if found else None, _nulls=nulls)

    def _look_for_misspelt(self, entries: Iterable[_Entry]) -> None:
        from difflib import get_close_matches

        for entry in entries:
            near = get_close_matches(entry.key[:60].lower().replace("-", "_"), SECTIONS, 1, 0.85)
            if near and entry.value.kind == "map" and any(key.text in KEYS for key, _ in entry.value.pairs()):
                self._problem(entry.line, f"`{entry.key[:60]}:` is not read; did you mean `{near[0]}:`?")

    def _section(self, node: Node, name: str, line: int, base: _Backend | None = None) -> _Section:
        """The contents of a section. `base` is the backend of the section that this one overrides."""
        section = _Section(line, name, base or _DEFAULT_BACKEND)
        if node.kind != "map":
            if node.tag != "null":
                self._problem(node.line, f"`{name}` must contain keys, each on its own line, such as `backend: file`")
            section.values["backend"] = section.backend.name
            return section
        own = {entry.key: entry for entry in self._entries(node, f"`{name}`")}
        nested: list[_Entry] = []
        if (config := own.pop("config", None)) and config.value.tag != "null":
            if config.value.kind == "map":
                nested = self._entries(config.value, "`config:`")
            else:
                self._problem(config.line, "`config` must contain keys, the options of the backend")
        handlers = own.pop("skill_overrides", None)
        section.values["backend"] = section.backend.name
        if backend := own.pop("backend", None):
            section.backend = self._backend(section, backend)
        for entry in own.values():
            self._option(section, entry)
        for entry in nested:
            if entry.key in section.lines:
                first = section.lines[entry.key]
                self._problem(entry.line, f"`{entry.key}` is already set in line {first}: keep one of them")
            elif entry.key in KEYS and not KEYS[entry.key].backends:
                self._problem(entry.line, f"`{entry.key}` belongs directly under `{name}`, not under `config:`")
            else:
                self._option(section, entry)
        if handlers and base is not None:
            self._problem(handlers.line, f"`skill_overrides` is not allowed under `{name}`")
        elif handlers:
            self._handlers(section, handlers)
        return section

    def _backend(self, section: _Section, entry: _Entry) -> _Backend:
        section.values["backend"] = None
        name = self._take(section, entry)
        if name is None:
            return _Backend(None)
        by_variable = "${" in entry.value.text
        if name in BACKENDS or name in (self.known or ()):
            return _Backend(name, by_variable=by_variable)
        from difflib import get_close_matches

        names = [*BACKENDS, *(self.known or ())]
        spellings = {**{known: known for known in names}, **OTHER_BACKEND_NAMES}
        near = get_close_matches(name[:60].lower().replace("-", "_"), spellings, 1, 0.75)
        if self.known is None and not near:
            return _Backend(name, by_variable=by_variable)
        meant = spellings[near[0]] if near else None
        hint = f"did you mean `{meant}`?" if meant else f"use one of {', '.join(f'`{known}`' for known in names)}"
        shown = f"`{name[:60]}`" if name.isprintable() else ascii(name[:60])
        self._problem(entry.line, f"unknown backend {shown}; {hint}")
        section.values["backend"] = None
        return _Backend(meant, by_variable=by_variable)

    def _option(self, section: _Section, entry: _Entry) -> None:
        """Read one key. While the backend is not known, only keys of all backends are checked."""
        name = section.backend.name
        if entry.key in (KEYS if name is None else known_to(name)):
            self._take(section, entry)
            return
        section.lines[entry.key] = entry.line
        if name is None or (section.backend.by_variable and name in BACKENDS and entry.key in KEYS):
            return  # with another value of the variable, the key may be one of the backend's
        options = None if self.known is None else self.known.get(name)
        if name in BACKENDS or (options is not None and entry.key not in options):
            where = f"`{section.name}`"
            sentence = unknown_key(entry.key, name, options or (), where=where, implied=section.backend.implied)
            self._problem(entry.line, sentence)
        else:
            section.values.setdefault("config", {})[entry.key] = self._plain(entry.value, entry.key)

    def _handlers(self, section: _Section, entry: _Entry) -> None:
        if entry.value.kind == "map":
            for handler in self._entries(entry.value, "`skill_overrides:`"):
                self._override(section, handler)
        elif entry.value.tag != "null":
            self._problem(entry.line, "`skill_overrides` must contain names of handlers, each with keys of its own")

    def _override(self, section: _Section, handler: _Entry) -> None:
        if handler.key in section.overrides:
            first = section.overrides[handler.key].line
            self._problem(handler.line, f"`{handler.key[:60]}` already has settings in line {first}: keep one of them")
            return
        name = f"{handler.key[:60]}:"
        section.overrides[handler.key] = self._section(handler.value, name, handler.line, section.backend)

    def _agentup_overrides(self, entries: Mapping[str, _Entry], section: _Section) -> None:
        """Read the `state_override` of each entry of AgentUp's `skills:` and `plugins:`."""
        for list_name, id_name in AGENTUP_OVERRIDES:
            if list_name not in entries or entries[list_name].value.kind != "list":
                continue
            for item in entries[list_name].value.children:
                override, name = _look(item, "state_override"), _look(item, id_name)
                if override and name and name.kind == "scalar":
                    self._override(section, _Entry(name.text, override.line, override))
                elif override:
                    self._problem(override.line, f"`state_override` needs a `{id_name}:` beside it")

    def _check(self, section: _Section, root: Node) -> None:
        """Report keys that contradict each other, in the section and with its overrides applied."""
        if section.values["backend"] is None:
            return
        common = list(conflicts(section.values))
        for key, sentence in common:
            if key == "backend" and "url" not in section.lines:
                line = _cache_line(root)
                note = f" (the url in line {line} is for the cache: state never uses it)" if line else ""
                self._problem(section.lines.get(key, section.line), f"{sentence} under `{section.name}`{note}")
            elif key != "backend":
                self._problem(section.lines[key], sentence)
        for override in section.overrides.values():
            if override.values["backend"] is None:
                continue
            values = merged(section.values, override.values["backend"], override.written())
            for key, sentence in conflicts(values):
                if (key, sentence) not in common and not (key == "backend" and "url" in override.lines):
                    self._problem(override.lines.get(key, override.line), f"{sentence} under `{override.name}`")


def _expanded(text: str) -> tuple[str, str]:
    """`text` with its variables expanded, and the variables as written. Raises ValueError."""
    pieces: list[str] = []
    variables: list[str] = []
    end = 0
    length = len(text)
    for match in _VARIABLE.finditer(text) if length <= _MAX_EXPANDED else ():
        value = _variable(match[1] or "", variables) if match[0] != "$${" else "${"
        pieces += (text[end : match.start()], value)
        end = match.end()
        length += len(value)
        if length > _MAX_EXPANDED:
            break
    if length > _MAX_EXPANDED:
        raise ValueError(f"the value has more than {_MAX_EXPANDED:,} characters after the expansion of its variables")
    return "".join([*pieces, text[end:]]), " ".join(variables)


def _variable(inside: str, variables: list[str]) -> str:
    """The value of ``${inside}``, which is added to `variables`."""
    name, colon, default = inside.partition(":")
    if not _VARIABLE_NAME.fullmatch(name):
        raise ValueError("`${` begins a variable, `${NAME}` or `${NAME:default}`; for the text itself write `$${`")
    variables.append("${" + name + "}")
    if name in os.environ:
        return os.environ[name]
    if not colon:
        raise ValueError(f"the variable {name} is not set: set it, or give it a default: `${{{name}:default}}`")
    if default.startswith("-"):
        raise ValueError(f"the default of {name} must follow the colon without a `-`: `${{{name}:default}}`")
    return _expanded(default)[0]


def _look(node: Node, name: str) -> Node | None:
    """The value of a key in a map that is not checked: nothing about it is reported."""
    if node.kind != "map":
        return None
    return next((value for key, value in node.pairs() if key.text == name), None)


def _cache_line(root: Node) -> int | None:
    """The line of a Valkey URL under `services:`, which is easily taken for the URL of the state."""
    services = _look(root, "services")
    for _, service in services.pairs() if services and services.kind == "map" else ():
        for place in (service, _look(service, "config")):
            url = _look(place, "url") if place else None
            if url and re.search(r"(valkey|redis)s?(\+\w+)?://", url.text):
                return url.line
    return None


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
