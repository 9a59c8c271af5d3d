"""Imports run one way, and in no circle.

`RANKS` is the table: a module may import those of its own row and of the rows below it. A new module gets a place
there first; an entry stands for the module and everything in it, unless a longer one says otherwise.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

RANKS: tuple[tuple[str, ...], ...] = (
    ("agentstate", "agentstate.__main__"),
    ("agentstate.cli", "agentstate.compat"),
    ("agentstate.handlers", "agentstate.testing"),
    ("agentstate.transfer",),
    ("agentstate.config", "agentstate.registry"),
    ("agentstate.aio",),
    ("agentstate.context",),
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

# These hand out names of modules that stand above them, loaded on first use: what they import for that,
# in `__getattr__` and for type checkers under `if TYPE_CHECKING:`, does not count.
LAZY = frozenset({"agentstate", "agentstate.context"})


def test_imports_run_one_way() -> None:
    faults = violations(imports_of(package_folder()))
    assert not faults, "\n".join(faults)


def test_imports_run_in_no_circle() -> None:
    modules = circle(imports_of(package_folder(), types=False))
    assert not modules, " imports ".join(reversed(modules))


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


def imports_of(folder: Path, *, types: bool = True) -> dict[str, set[str]]:
    """What each module imports of the package, wherever in its code; without `types`, only at run time."""
    modules = read_package(folder)
    return {module: set(imported_modules(module, modules, types=types)) for module in modules}


def imported_modules(module: str, modules: dict[str, Path], *, types: bool) -> Iterator[str]:
    path = modules[module]
    tree = ast.parse(path.read_bytes(), path)
    ignored: set[ast.AST] = set()
    if module in LAZY or not types:
        ignored.update(type_checking_only(tree))
    if module in LAZY:
        ignored.update(lazy_exports(tree))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if node in ignored:
            continue
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


def type_checking_only(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for statement in node.body:
                yield from ast.walk(statement)


def lazy_exports(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            yield from ast.walk(node)


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


def circle(imports: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        names: list[str] = error.args[1]
        return names
    return []


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

    @pytest.mark.parametrize(
        "lazy",
        [
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import handlers",
            "def __getattr__(name):\n    from . import handlers",
        ],
    )
    def test_lazy_exports_do_not_count_where_they_are_allowed(self, check: Checker, lazy: str) -> None:
        check.write("handlers", "")
        check.write("context", lazy)
        assert check.violations() == []
        check.write("aio", lazy)
        assert check.violations() == ["agentstate.aio imports agentstate.handlers, which stands above it in RANKS"]
        check.write("aio", "")
        check.write("context", "def f():\n    from . import handlers")
        assert check.violations() == ["agentstate.context imports agentstate.handlers, which stands above it in RANKS"]

    def test_a_module_without_a_row_is_reported(self, check: Checker) -> None:
        check.write("__init__", "")
        check.write("shortcuts", "")
        assert check.violations() == ["agentstate.shortcuts is not in RANKS: give it a row"]

    def test_an_import_of_nothing_is_reported(self, check: Checker) -> None:
        check.write("aio", "from agentstate.errrors import StateError")
        assert check.violations() == ["agentstate.aio imports agentstate.errrors, which does not exist"]

    def test_a_circle_within_a_row_is_reported(self, check: Checker) -> None:
        check.write("codec", "from . import keys")
        check.write("keys", "def f():\n    from . import codec")
        assert check.violations() == []
        assert set(circle(imports_of(check.folder, types=False))) == {"agentstate.codec", "agentstate.keys"}

    def test_types_make_no_circle(self, check: Checker) -> None:
        check.write("codec", "from . import keys")
        check.write("keys", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import codec")
        assert circle(imports_of(check.folder, types=False)) == []


class Checker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, module: str, source: str) -> None:
        path = self.folder / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def violations(self) -> list[str]:
        return violations(imports_of(self.folder))
