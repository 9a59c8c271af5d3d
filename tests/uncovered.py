"""Lists functions with lines or branches that no test ran and that `uncovered.toml` does not explain.

    coverage combine ... && python tests/uncovered.py

Explanations name functions, since line numbers change. An explanation of a function that does not exist is an error
too; one of a function that was covered in this run is not, since some lines are run by chance.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
import tomllib
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[1]
EXPLANATIONS = Path(__file__).with_suffix(".toml")
MODULE = "<module>"

Functions = set[tuple[str, str]]
"""Files below `agentstate/`, and names of functions in them."""


def explained() -> Functions:
    """All functions that an explanation names."""
    reasons = tomllib.loads(EXPLANATIONS.read_text(encoding="utf-8"))
    return {(file, name) for files in reasons.values() for file, names in files.items() for name in names}


def existing() -> Functions:
    """All functions that there are."""
    found: Functions = set()
    for path in (ROOT / "agentstate").rglob("*.py"):
        file = path.relative_to(ROOT / "agentstate").as_posix()
        found.add((file, MODULE))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add((file, node.name))
    return found


def uncovered() -> dict[tuple[str, str], str]:
    """The functions that were not run in full, and which lines of them."""
    data = coverage.Coverage()
    data.load()
    with tempfile.NamedTemporaryFile() as report:
        data.json_report(outfile=report.name)
        files = json.load(report)["files"]
    found = {}
    for path, said in files.items():
        file = Path(path).as_posix().rpartition("agentstate/")[2]
        for name, function in said["functions"].items():
            lines = {*function["missing_lines"], *(begin for begin, _ in function["missing_branches"])}
            if lines:
                where = ", ".join(map(str, sorted(lines)))
                found[file, name.rpartition(".")[2] or MODULE] = f"agentstate/{file}: {name or MODULE}: {where}"
    return found


def main() -> int:
    """The exit code: 1 if something is not explained, or an explained function does not exist."""
    names = explained()
    unexplained = [text for key, text in sorted(uncovered().items()) if key not in names]
    gone = [f"agentstate/{file}: {name}: no such function" for file, name in sorted(names - existing())]
    print("\n".join([*unexplained, *gone]) or "Everything that was not run is explained in tests/uncovered.toml.")
    return 1 if unexplained or gone else 0


if __name__ == "__main__":
    sys.exit(main())
