"""Parses YAML text into nodes with line numbers, within limits that hold for hostile files.

The text is read from the parser event by event, and no objects are built from tags. So neither deep nesting nor tags
nor aliases can do harm: an alias is not copied, only its size is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

MAX_BYTES: Final = 2**20
MAX_DEPTH: Final = 64
MAX_NODES: Final = 50_000  # with aliases written out

_TAG: Final = "tag:yaml.org,2002:"
_TOO_DEEP: Final = f"nested more than {MAX_DEPTH} deep"
_SAFE_TAGS: Final = frozenset(
    _TAG + name
    for name in ("null", "bool", "int", "float", "str", "binary", "timestamp", "seq", "map", "set", "omap", "pairs")
)
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LONG_QUOTE = re.compile(r"'(?!<)[^']{2,}'")
_WIDE_MARKS: Final = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


class UnreadableError(Exception):
    """The text cannot be parsed any further. `line` counts from 1; 0 means the whole file."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True, eq=False)
class Node:
    """A scalar with its `text`, a list with `children`, or a map whose `children` are its keys and values alternately.

    `tag` is the YAML type of a scalar ("str", "int", "null", ...). A `plain` scalar is not quoted.
    """

    kind: Literal["scalar", "list", "map"]
    line: int
    tag: str = ""
    text: str = ""
    plain: bool = False
    children: list[Node] = field(default_factory=list)
    size: int = 1
    depth: int = 1

    def pairs(self) -> Iterator[tuple[Node, Node]]:
        return zip(self.children[::2], self.children[1::2], strict=True)


def decode(data: bytes) -> str:
    """The text of a file: UTF-8, with or without a byte order mark. Raises UnreadableError."""
    if len(data) > MAX_BYTES:
        raise UnreadableError(0, f"larger than {MAX_BYTES:,} bytes, the maximum for a configuration")
    if data.startswith(_WIDE_MARKS):
        raise UnreadableError(1, "this is UTF-16 or UTF-32: save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(line, f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from None
    if culprit := _NOT_ALLOWED.search(text):
        line = text.count("\n", 0, culprit.start()) + 1
        raise UnreadableError(line, f"character U+{ord(culprit[0]):04X} is not allowed in YAML: is this a text file?")
    return text


def parse(text: str) -> tuple[Node | None, list[tuple[int, str]]]:
    """The root node of the document (None if it is empty), and the problems of the text, each with its line.

    Raises UnreadableError if the text cannot be parsed.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _compose(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        # The error quotes the text, which may contain a password: it is neither shown nor chained.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "the text cannot be parsed"
        place = _place(text, mark)
    raise UnreadableError(mark.line + 1 if mark else 0, _explained(problem, place))


def scalar(text: str, tag: str = "", *, plain: bool = False) -> Any:
    """The value of a scalar as `yaml.safe_load` reads it, if that is a plain value; a date stays text. With `plain`,
    the tag is that of the unquoted text. Raises ValueError.
    """
    import yaml

    if plain:
        resolver: Any = yaml.resolver.Resolver()
        tag = resolver.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
    if tag in ("null", "bool", "int", "float"):
        try:
            return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(_TAG + tag, text))
        except (ValueError, LookupError):
            raise ValueError(f"this is not a valid {tag}") from None
    if tag == "binary":
        raise ValueError("binary values are not supported")
    return text


def _compose(events: Any) -> tuple[Node | None, list[tuple[int, str]]]:
    import yaml

    resolver: Any = yaml.resolver.Resolver()
    problems: list[tuple[int, str]] = []
    finished: dict[str, Node] = {}
    opened: list[tuple[Node, str | None]] = [(Node("list", 0), None)]  # the root is the only child of the first
    documents = size = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                problems.append((line, "a second document begins here: remove the `---`"))
                break
        if isinstance(event, yaml.CollectionEndEvent):
            node, anchor = opened.pop()
            _close(opened[-1][0], node)
            if anchor:
                finished[anchor] = node
        if not isinstance(event, yaml.AliasEvent | yaml.ScalarEvent | yaml.CollectionStartEvent):
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in finished:
                raise UnreadableError(line, "`*` begins an alias, and this one is not defined: quote the text")
            node = finished[event.anchor]
            _close(opened[-1][0], node)
        else:
            finished.pop(event.anchor or "", None)  # an alias to a node that is still open would be a cycle
            if event.tag and event.tag != "!" and event.tag not in _SAFE_TAGS:
                problems.append((line, f"{_named(event.tag)} is not supported: remove the tag, or quote the text"))
            node = _opened(event, line, resolver)
            if node.kind != "scalar":
                opened.append((node, event.anchor))
            else:
                _close(opened[-1][0], node)
                if event.anchor:
                    finished[event.anchor] = node
        size += node.size
        if size > MAX_NODES:
            raise UnreadableError(line, f"more than {MAX_NODES:,} values; those of aliases are counted at each use")
        if len(opened) + node.depth - 1 > MAX_DEPTH:
            raise UnreadableError(line, _TOO_DEEP)
    return next(iter(opened[0][0].children), None), problems


def _opened(event: Any, line: int, resolver: Any) -> Node:
    import yaml

    if isinstance(event, yaml.ScalarEvent):
        tag = event.tag or resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
        return Node("scalar", line, tag.removeprefix(_TAG), event.value, plain=event.implicit[0])
    return Node("list" if isinstance(event, yaml.SequenceStartEvent) else "map", line)


def _close(parent: Node, child: Node) -> None:
    parent.children.append(child)
    parent.size += child.size
    parent.depth = max(parent.depth, child.depth + 1)


def _named(tag: str) -> str:
    # Any other tag may be a password that begins with "!".
    return f"`!!{tag.removeprefix(_TAG)}`" if tag.startswith(_TAG) else "a `!tag`"


def _place(text: str, mark: Any) -> str:
    lines = text.split("\n")
    return lines[mark.line][mark.column : mark.column + 1] if mark and mark.line < len(lines) else ""


def _explained(problem: str, character: str) -> str:
    if character == "\t":
        return "this line is indented with a tab: use spaces"
    if character == "@":
        return "a value must not begin with `@`: quote the text. A decorator belongs in the Python module"
    if character in ("%", "`"):
        return f"a value must not begin with `{character}`: quote the text"
    problem = _LONG_QUOTE.sub("'...'", problem)
    if "maximum nesting depth" in problem:  # libyaml has a limit of its own, from 0.2.6 on
        return _TOO_DEEP
    if "mapping values are not allowed" in problem:
        return "unexpected `:`, or wrong indentation: quote text that contains `: `"
    return f"this is not YAML: {problem}; look at the indentation, brackets and quotes here and above"
