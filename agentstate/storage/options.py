"""The options that storage classes take, and what is said about others."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, signature
from typing import Any

from ..errors import StateConfigError


@cache
def storage_options(cls: type[Any]) -> dict[str, Parameter]:
    """The options that `cls` takes: its parameters and, as long as it hands on `**options`, those of its bases."""
    options: dict[str, Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
                options.setdefault(parameter.name, parameter)
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def unknown_option(cls: Any, name: str) -> StateConfigError:
    """The error for an option that `cls` does not take."""
    return StateConfigError(f"{cls.__name__} has no option {name!r}; {did_you_mean(name, storage_options(cls))}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint at the known name that is nearest to `name`; where none is near, at all of them."""
    known = sorted(known)
    near = get_close_matches(str(name).lower(), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, known))}"
