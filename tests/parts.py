"""The tests in parts, and everything that one Python is enough for, side by side.

    python tests/parts.py

runs each of `CHECKS`, and each part of the tests under coverage, in a process of its own, all at the same time: the
tests wait more than they compute. Prints the output of each when it has ended. The exit code is 0 if all succeeded.
`tox -e full` runs this in the environment that has everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Final, NamedTuple

TESTS: Final = Path(__file__).parent

CHECKS: Final = {
    "rules": ("ruff", "check"),
    "format": ("ruff", "format", "--check"),
    "types": ("mypy",),
    "pages": ("mkdocs", "build"),
}

PARTS: Final = {
    "contracts": ("test_contract.py", "test_third_party.py"),
    "faults": (
        "test_file_faults.py",
        "test_file_format.py",
        "test_file_model.py",
        "test_transfer",
        "test_valkey_faults.py",
        "test_valkey_model.py",
        "test_valkey_topology.py",
        "torture/",
    ),
    "programs": ("test_cli", "test_docs.py", "test_examples.py", "test_reference.py", "test_servers.py"),
}
"""How the names of the files in each part begin. The part `rest` has all other files."""

ONE_PYTHON: Final = (
    *PARTS["faults"],
    *PARTS["programs"],
    "test_a2a.py",
    "test_config",
    "test_contract.py::TestFileDocument",
    "test_contract.py::TestFileLogExclusive",
    "test_contract.py::TestFileLogUnflushed",
    "test_contract.py::TestValkeyDocument",
    "test_document.py",
    "test_layout.py",
    "test_telemetry.py",
    "test_third_party.py",
)
"""What tests something else than Python, and is left out of the part `python`, which runs on each Python."""


def is_in(part: str, name: str) -> bool:
    """Whether a file, or a test whose name follows its file's as in pytest's output, belongs to a part of the tests."""
    if part == "python":
        return not name.startswith(ONE_PYTHON)
    if part == "rest":
        return not any(name.startswith(beginnings) for beginnings in PARTS.values())
    return name.startswith(PARTS[part])


class Running(NamedTuple):
    """A process, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    begin: float


def start(name: str, *command: str, **variables: str) -> Running:
    output = tempfile.TemporaryFile()
    executable = str(Path(sys.executable).with_name(command[0]))
    process = subprocess.Popen(
        [executable, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **variables},
    )
    return Running(name, process, output, time.monotonic())


def start_tests(part: str) -> Running:
    # `coverage run -m pytest` would put the source tree before the installed wheel.
    pytest = str(Path(sys.executable).with_name("pytest"))
    return start(part, "coverage", "run", pytest, "--part", part)


def finish(running: Running) -> bool:
    """Wait for its end and print what it printed; whether it succeeded."""
    code = running.process.wait()
    with running.output:
        running.output.seek(0)
        text = running.output.read().decode(errors="replace")
    seconds = time.monotonic() - running.begin
    print(f"--- {running.name}: {'ok' if code == 0 else f'exit code {code}'} after {seconds:.0f} s\n{text}", flush=True)
    return code == 0


def main() -> int:
    running = [start_tests(part) for part in ("rest", *PARTS)]
    running += [start(name, *command) for name, command in CHECKS.items()]
    return 0 if all([finish(one) for one in running]) else 1


if __name__ == "__main__":
    sys.exit(main())
