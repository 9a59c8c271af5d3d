"""The reference of the public names as Markdown, generated from their signatures and docstrings.

python docs/make/reference.py > docs/api.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from textwrap import fill, indent
from types import ModuleType
from typing import Any, ForwardRef

import agentstate
from agentstate import batches, compat, config, errors, operations, telemetry, transfer
from agentstate.storage import statistics
from agentstate.testing import StorageContract

_INTRODUCTION = """\
# API

All public names, grouped by purpose. The [guide](concepts.md) explains them with examples.

Names without a module are imported from `agentstate`. This page is generated from the docstrings
(`python docs/make/reference.py`).
"""


def _classes_of(module: ModuleType) -> tuple[type, ...]:
    """The documented classes of a module, in its own order."""
    own = (each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__)
    return tuple(each for each in own if each.__doc__)


_TWINS = (
    "`ConversationContext` has the operations of `SyncConversationContext` as coroutines, with the same names, "
    "parameters, defaults and meaning. Its `list_contexts` and `iter_history` are async iterators, its `batch` and "
    "`turn` async context managers."
)

SECTIONS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    (
        "Contexts",
        _TWINS,
        (agentstate.SyncConversationContext, agentstate.ConversationContext, batches.Batch, batches.Turn),
    ),
    ("Data", "", (agentstate.ConversationState, agentstate.Message)),
    (
        "Handlers",
        "",
        (
            agentstate.stateful,
            agentstate.register_handler,
            agentstate.get_handler,
            agentstate.list_handlers,
            agentstate.get_context_manager,
        ),
    ),
    (
        "Storages",
        "Their options are [in a table](backends.md#options-of-every-backend).",
        (agentstate.InMemoryStorage, agentstate.FileStorage, agentstate.ValkeyStorage, agentstate.register_storage),
    ),
    (
        "Statistics and telemetry",
        "In `agentstate.storage.statistics` and `agentstate.telemetry`: [with examples](observability.md).",
        (*_classes_of(statistics), telemetry.instrument),
    ),
    ("Configuration", "", (agentstate.load_config, config.StateConfig, config.config_table, config.json_schema)),
    (
        "Copying conversations",
        "In `agentstate.transfer`.",
        (transfer.migrate, transfer.export_contexts, transfer.import_contexts, transfer.Report, transfer.Result),
    ),
    (
        "Your own backends",
        "See [Writing a backend](writing-a-backend.md).",
        (agentstate.StateStorage, agentstate.DocumentStorage, StorageContract),
    ),
    (
        "Operations as data",
        "In `agentstate.operations`: the operations on a storage and their outcomes.",
        _classes_of(operations),
    ),
    (
        "Errors",
        "See [Errors](errors.md) for what each means for the caller.",
        _classes_of(errors),
    ),
    ("Compatibility with AgentUp", "In `agentstate.compat`.", (compat.install,)),
)

_METHODS = {
    agentstate.ConversationContext: ("aclose",),  # the others are those of SyncConversationContext
    StorageContract: ("make_storage",),  # the others are tests, and what they share
}
"""The methods that are described of a class, if not all of them."""

_NOT_CALLED = {agentstate.Message, batches.Batch, batches.Turn, StorageContract, *_classes_of(statistics)}
"""Classes that users do not instantiate."""


def markdown() -> str:
    """The page."""
    return "\n".join([_INTRODUCTION, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    for title, text, things in SECTIONS:
        yield f"## {title}\n"
        if text:
            yield fill(text, 120, break_long_words=False) + "\n"
        for thing in things:
            yield from _described(thing)


def _described(thing: Any) -> Iterator[str]:
    yield f"### {thing.__name__}\n"
    if call := _call_of(thing):
        yield indent(call, "    ") + "\n"
    yield from _paragraphs(thing)
    if inspect.isclass(thing):
        for name, method in inspect.getmembers(thing, inspect.isroutine):
            if _is_described_here(thing, name, method):
                yield f"#### {thing.__name__}.{name}\n"
                yield indent(_call(name, method), "    ") + "\n"
                yield from _paragraphs(method)


def _is_described_here(cls: type, name: str, method: Any) -> bool:
    """Whether it is a public method of ours that is not described with a base class on this page."""
    if name.startswith("_") or name not in _METHODS.get(cls, (name,)):
        return False
    bases = (base for base in cls.__mro__[1:] if any(base in things for _, _, things in SECTIONS))
    ours = (getattr(method, "__module__", None) or "").startswith("agentstate") and bool(method.__doc__)
    return ours and not any(getattr(base, name, None) is method for base in bases)


def _paragraphs(thing: Any) -> Iterator[str]:
    text = inspect.cleandoc(vars(thing).get("__doc__") or "") if inspect.isclass(thing) else inspect.getdoc(thing) or ""
    if not text.startswith(f"{thing.__name__}("):  # which dataclasses and named tuples write by themselves
        yield re.sub(r"``(.+?)``", r"`\1`", text) + "\n"


def _call_of(thing: Any) -> str:
    """How a function or a class is called, if its users do."""
    if not inspect.isclass(thing):
        return _call(thing.__name__, thing)
    if issubclass(thing, Enum):
        return "\n".join(f"{thing.__name__}.{member.name}" for member in thing)
    if issubclass(thing, BaseException) or inspect.isabstract(thing) or thing in _NOT_CALLED:
        return ""
    return _call(thing.__name__, thing)


def _call(name: str, thing: Any) -> str:
    """How it is called: on one line where that has room, otherwise with a line for each parameter."""
    signature = inspect.signature(thing)
    parts = list(_parts(parameter for parameter in signature.parameters.values() if parameter.name != "self"))
    returned = signature.return_annotation
    end = ")" if inspect.isclass(thing) or returned is signature.empty else f") -> {_type(returned)}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


def _parts(parameters: Iterator[inspect.Parameter]) -> Iterator[str]:
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    starred = False
    for parameter in parameters:
        if parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        typed = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        yield f"{stars.get(parameter.kind, '')}{parameter.name}{typed}{default}"


def _type(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _value(default: Any) -> str:
    text = repr(default)
    return "..." if text.startswith("<") else text  # made anew for each object


if __name__ == "__main__":
    print(markdown(), end="")
