"""Imports run one way, and in no circle.

`RANKS` is the table: a module may import those of its own row and of the rows below it. A new module gets a place
there first; an entry stands for the module and everything in it, unless a longer one says otherwise.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

RANKS: tuple[tuple[str, ...], ...] = (
    ("agentstate.context",),
    ("agentstate", "agentstate.__main__"),
    ("agentstate.cli", "agentstate.compat"),
    ("agentstate.handlers", "agentstate.testing"),
    ("agentstate.transfer",),
    ("agentstate.config", "agentstate.registry"),
    ("agentstate.aio",),
    ("agentstate.blocking",),
    ("agentstate.telemetry",),
    ("agentstate.batches", "agentstate.calls", "agentstate.calllog"),
    ("agentstate.caller",),
    ("agentstate.engine",),
    ("agentstate.storage",),
    ("agentstate.storage.resolve",),
    ("agentstate.codec", "agentstate.decoding", "agentstate.keys", "agentstate.operations", "agentstate.urls"),
    ("agentstate.state",),
    ("agentstate.errors", "agentstate.records", "agentstate.version"),
)


def test_imports_run_one_way() -> None:
    faults = violations(imports_of(package_folder()))
    assert not faults, "\n".join(faults)


def test_imports_run_in_no_circle() -> None:
    found = circles(imports_of(package_folder()))
    assert not found, "\n".join(f"these import each other: {', '.join(modules)}" for modules in found)


def package_folder() -> Path:
    # Found without importing it, where the tests that do import it find it.
    spec = importlib.util.find_spec("agentstate")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def read_package(folder: Path) -> dict[str, Path]:
    """Every module of the package, with its file; a package goes by its own name, without `__init__`."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(folder: Path) -> dict[str, set[str]]:
    """What each module imports of the package: wherever in its code, and for type checkers too."""
    modules = read_package(folder)
    return {module: set(imported_modules(module, modules)) for module in modules}


def imported_modules(module: str, modules: dict[str, Path]) -> Iterator[str]:
    path = modules[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes(), path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # `from package import name`: the name may be a module, and then that is what is imported.
            names = [name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names]
        for name in names:
            if name.partition(".")[0] == package[0] and name != module:
                yield name


def rank(module: str) -> int | None:
    """The row of the longest entry that the module is, or is in; the package itself covers nothing but itself."""
    name = module
    while "." in name or name == module:
        for number, row in enumerate(RANKS):
            if name in row:
                return number
        name = name.rpartition(".")[0]
    return None


def violations(imports: dict[str, set[str]]) -> list[str]:
    faults = []
    for module, targets in imports.items():
        place = rank(module)
        if place is None:
            faults.append(f"{module} is not in RANKS: give it a row")
            continue
        for target in sorted(targets):
            if target not in imports:
                faults.append(f"{module} imports {target}, which does not exist")
            elif (above := rank(target)) is not None and above < place:
                faults.append(f"{module} imports {target}, which stands above it in RANKS")
    return faults


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The largest sets of modules that all import each other, directly or through others."""
    reached = {module: reachable(module, imports) for module in imports}
    found = {frozenset(other for other in reached[module] if module in reached[other]) for module in imports}
    return sorted(sorted(modules) for modules in found if modules)


def reachable(module: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for target in imports.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


class TestTheChecksThemselves:
    """On a small package made for it: each kind of fault is seen."""

    @pytest.fixture
    def check(self, tmp_path: Path) -> Checker:
        return Checker(tmp_path / "agentstate")

    def test_downward_imports_are_fine(self, check: Checker) -> None:
        check.write("context", "from agentstate.storage import base\nfrom .errors import StateError\nimport os, json")
        check.write("storage/__init__", "")
        check.write("storage/base", "from ..errors import StateError\nfrom . import resolve")
        check.write("storage/resolve", "from agentstate.codec import dump")
        check.write("codec", "")
        check.write("errors", "")
        assert check.violations() == []
        assert imports_of(check.folder)["agentstate.storage.base"] == {
            "agentstate.errors",
            "agentstate.storage.resolve",
        }

    @pytest.mark.parametrize(
        "statement",
        [
            "import agentstate.context",
            "from agentstate.context import stateful",
            "from agentstate import context",
            "from .context import stateful",
            "from . import context",
            "def f():\n    from agentstate import context",
            "class A:\n    async def f(self):\n        import agentstate.context as c",
            "try:\n    from . import context\nexcept ImportError:\n    pass",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import context",
        ],
    )
    def test_an_upward_import_is_seen_wherever_it_stands(self, check: Checker, statement: str) -> None:
        check.write("context", "")
        check.write("errors", statement)
        assert check.violations() == ["agentstate.errors imports agentstate.context, which stands above it in RANKS"]

    def test_an_import_of_the_package_itself_is_upward(self, check: Checker) -> None:
        check.write("__init__", "")
        check.write("cli/__init__", "from agentstate import stateful")
        assert check.violations() == ["agentstate.cli imports agentstate, which stands above it in RANKS"]

    def test_an_upward_import_out_of_a_subpackage_is_seen(self, check: Checker) -> None:
        check.write("aio", "")
        check.write("storage/dispatch", "from ..aio import queue")
        assert check.violations() == [
            "agentstate.storage.dispatch imports agentstate.aio, which stands above it in RANKS"
        ]

    def test_the_longest_entry_decides(self, check: Checker) -> None:
        check.write("storage/base", "")
        check.write("storage/resolve", "from .base import StateStorage")
        assert check.violations() == [
            "agentstate.storage.resolve imports agentstate.storage.base, which stands above it in RANKS"
        ]

    def test_names_that_are_loaded_on_first_use_are_imports_too(self, check: Checker) -> None:
        check.write("handlers", "")
        check.write("aio", "def __getattr__(name):\n    from . import handlers")
        assert check.violations() == ["agentstate.aio imports agentstate.handlers, which stands above it in RANKS"]

    def test_a_module_without_a_row_is_reported(self, check: Checker) -> None:
        check.write("__init__", "")
        check.write("shortcuts", "")
        assert check.violations() == ["agentstate.shortcuts is not in RANKS: give it a row"]

    def test_an_import_of_nothing_is_reported(self, check: Checker) -> None:
        check.write("aio", "from agentstate.errrors import StateError")
        assert check.violations() == ["agentstate.aio imports agentstate.errrors, which does not exist"]

    @pytest.mark.parametrize(
        "statement",
        [
            "from . import codec",
            "def f():\n    from . import codec",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import codec",
        ],
    )
    def test_a_circle_within_a_row_is_reported(self, check: Checker, statement: str) -> None:
        check.write("codec", "from . import keys")
        check.write("keys", "from . import urls")
        check.write("urls", statement)
        check.write("operations", "from . import codec")
        assert check.violations() == []
        assert circles(imports_of(check.folder)) == [["agentstate.codec", "agentstate.keys", "agentstate.urls"]]


class Checker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, module: str, source: str) -> None:
        path = self.folder / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def violations(self) -> list[str]:
        return violations(imports_of(self.folder))
