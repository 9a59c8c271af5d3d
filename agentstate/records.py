"""`NamedTuple` as `typing` has it, made in a third of the time.

Importing this package makes two dozen of them. What `typing` adds is a look at the annotations, each of which it
compiles; here they are left to the type checker, which is told that these are typing's.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Fields(type):
    """Makes a class body with annotated fields, some with defaults, a class of named tuples."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if not bases:  # `NamedTuple` itself
            return super().__new__(cls, name, bases, body)
        fields: dict[str, Any] = body.get("__annotations__", {})
        defaults = [body[field] for field in fields if field in body]
        made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])  # type: ignore[misc]
        for member in body.keys() - fields.keys() - {"__module__"}:
            setattr(made, member, body[member])
        made.__annotations__ = fields
        return made


new_tuple = tuple.__new__
"""``new_tuple(Point, (1, 2))`` is ``Point(1, 2)`` in two thirds of the time, without the call of the constructor: for
what is made with every call of a context. All fields, in their order."""


class NamedTuple(metaclass=_Fields):
    """The base of a class of named tuples: ``class Point(NamedTuple): x: int; y: int = 0``."""
