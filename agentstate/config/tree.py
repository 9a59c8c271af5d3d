"""YAML text as nodes that know their lines, read within limits that no hostile file can stretch.

The text is taken from the parser event by event, and nothing is built from tags, so there is no depth to overflow, no
object to smuggle in, and no alias that costs more than the number which says how large it would be.
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
    """The text cannot be read any further. `line` counts from 1; 0 means the file as a whole."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True, eq=False)
class Node:
    """A scalar with its `text`, a list of `children`, or a map whose `children` are keys and values in turn.

    `tag` is the type that YAML sees in a scalar ("str", "int", "null", ...). `plain` scalars stand without quotes.
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
        raise UnreadableError(0, f"larger than {MAX_BYTES:,} bytes, which no configuration is")
    if data.startswith(_WIDE_MARKS):
        raise UnreadableError(1, "this is UTF-16 or UTF-32: save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(line, f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from None
    if culprit := _NOT_ALLOWED.search(text):
        line = text.count("\n", 0, culprit.start()) + 1
        raise UnreadableError(line, f"character U+{ord(culprit[0]):04X} has no place in YAML: is this a text file?")
    return text


def parse(text: str) -> tuple[Node | None, list[tuple[int, str]]]:
    """The root node of the only document, None for an empty one, and what is wrong with the text, each with its line.

    Raises UnreadableError where it cannot go on.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _compose(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        # The error shows a piece of the text, which may hold a password; so it is neither quoted nor chained.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "the text cannot be parsed"
        place = _place(text, mark)
    raise UnreadableError(mark.line + 1 if mark else 0, _explained(problem, place))


def scalar(text: str, tag: str = "", *, plain: bool = False) -> Any:
    """What `yaml.safe_load` makes of a scalar, where that is a plain value; a date stays text. With `plain`, the tag is
    the one that the text would have without quotes. Raises ValueError.
    """
    import yaml

    if plain:
        resolver: Any = yaml.resolver.Resolver()
        tag = resolver.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
    if tag in ("null", "bool", "int", "float"):
        try:
            return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(_TAG + tag, text))
        except (ValueError, LookupError):
            raise ValueError(f"this is not the text of a {tag}") from None
    if tag == "binary":
        raise ValueError("a configuration has no binary values")
    return text


def _compose(events: Any) -> tuple[Node | None, list[tuple[int, str]]]:
    import yaml

    resolver: Any = yaml.resolver.Resolver()
    problems: list[tuple[int, str]] = []
    finished: dict[str, Node] = {}
    opened: list[tuple[Node, str | None]] = [(Node("list", 0), None)]  # the first one's only child is the root
    documents = size = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                problems.append((line, "a second document begins here, but a configuration is one: remove the `---`"))
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
                raise UnreadableError(line, "`*` begins an alias, and this one stands for nothing: quote the text")
            node = finished[event.anchor]
            _close(opened[-1][0], node)
        else:
            finished.pop(event.anchor or "", None)  # while a node is open, an alias to it would be a circle
            if event.tag and event.tag != "!" and event.tag not in _SAFE_TAGS:
                problems.append((line, f"{_named(event.tag)} makes no plain value: remove the tag, or quote the text"))
            node = _opened(event, line, resolver)
            if node.kind != "scalar":
                opened.append((node, event.anchor))
            else:
                _close(opened[-1][0], node)
                if event.anchor:
                    finished[event.anchor] = node
        size += node.size
        if size > MAX_NODES:
            raise UnreadableError(line, f"more than {MAX_NODES:,} values, those behind aliases counted at each use")
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
    # A tag of another kind may be a password that begins with "!".
    return f"`!!{tag.removeprefix(_TAG)}`" if tag.startswith(_TAG) else "a `!tag`"


def _place(text: str, mark: Any) -> str:
    lines = text.split("\n")
    return lines[mark.line][mark.column : mark.column + 1] if mark and mark.line < len(lines) else ""


def _explained(problem: str, character: str) -> str:
    if character == "\t":
        return "this line begins with a tab: YAML is indented with spaces"
    if character == "@":
        return "`@` begins no value in YAML: quote the text. A decorator belongs into the Python module"
    if character in ("%", "`"):
        return f"`{character}` begins no value in YAML: quote the text"
    problem = _LONG_QUOTE.sub("'...'", problem)
    if "maximum nesting depth" in problem:  # libyaml has a limit of its own, from 0.2.6 on
        return _TOO_DEEP
    if "mapping values are not allowed" in problem:
        return "there is a `:` too many, or the indentation is wrong: quote text that holds `: `"
    return f"this is not YAML: {problem}; look at the indentation, brackets and quotes here and above"
