"""The tests in parts, and everything that one Python is enough for, side by side.

    python tests/parts.py

Starts each command of `CHECKS`, and pytest for each part of the tests, in processes of their own, all at the same time:
tests wait for more time than they compute. Prints the output of each process when it has ended. The exit code is 0 if
all succeeded. `tox -e full` runs this in an environment that has everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final, NamedTuple

TESTS: Final = Path(__file__).parent

CHECKS: Final = {
    "rules": ("ruff", "check"),
    "format": ("ruff", "format", "--check"),
    "types": ("mypy",),
    "pages": ("mkdocs", "build", "--site-dir", "build/pages"),
}

PARTS: Final = {
    "contracts": (
        "test_contract.py::TestFileDocument",
        "test_contract.py::TestFileLogExclusive",
        "test_contract.py::TestFileLogUnflushed",
        "test_contract.py::TestValkeyDocument",
        "test_third_party.py",
    ),
    "faults": (
        "test_file_faults.py",
        "test_file_format.py",
        "test_file_interrupts.py",
        "test_file_model.py",
        "test_transfer",
        "test_valkey_faults.py",
        "test_valkey_model.py",
        "test_valkey_recovery.py",
        "test_valkey_topology.py",
    ),
    "commands": ("test_cli",),
    "programs": (
        "test_docs.py",
        "test_examples.py",
        "test_reference.py",
        "test_servers.py",
        "torture/test_harness.py",
        "torture/test_inputs.py",
        "torture/test_torture.py",
    ),
}
"""How the names of the tests in each part begin. The part `rest` has all others."""

UNMEASURED: Final = ("contracts", "programs")
"""Parts that run without coverage, which takes up to half of their time: the others cover nearly all that they do."""

ONE_PYTHON: Final = (
    *(beginning for beginnings in PARTS.values() for beginning in beginnings),
    "test_a2a.py",
    "test_benchmarks.py",
    "test_config",
    "test_distribution.py",
    "test_document",
    "test_file_processes.py",
    "test_layout.py",
    "test_telemetry.py",
    "torture/",
)
"""What is about something else than Python, and not in the part `python`, which is run on every other Python."""


def is_in(part: str, name: str) -> bool:
    """Whether a test belongs to a part, or a file may have tests that do (`test_x.py::test_y`, `test_x.py`)."""
    if part == "python":
        return not name.startswith(ONE_PYTHON)
    if part == "rest":
        return not any(name.startswith(beginnings) for beginnings in PARTS.values())
    return any(name.startswith(beginning) or beginning.startswith(name) for beginning in PARTS[part])


class Running(NamedTuple):
    """A process, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]


def start(name: str, *command: str, **variables: str) -> Running:
    output = tempfile.TemporaryFile()  # noqa: SIM115 (`finish` closes it)
    executable = str(Path(sys.executable).with_name(command[0]))
    process = subprocess.Popen(
        [executable, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **variables},
    )
    return Running(name, process, output)


def start_tests(part: str) -> Running:
    command: tuple[str, ...] = ("pytest", "--part", part)
    if part not in UNMEASURED:
        # `coverage run -m pytest` would put the source tree before the installed wheel.
        command = ("coverage", "run", str(Path(sys.executable).with_name("pytest")), *command[1:])
    # One part reads replies with libvalkey, and the others, which break connections too, with the parser in Python.
    variables = {} if part == "rest" else {"PYTHONPATH": str(TESTS / "without_libvalkey")}
    return start(part, *command, **variables)


def finish(running: Running) -> bool:
    """Wait for its end and print what it printed; whether it succeeded."""
    code = running.process.wait()
    with running.output:
        running.output.seek(0)
        text = running.output.read().decode(errors="replace")
    print(f"--- {running.name}: {'ok' if code == 0 else f'exit code {code}'}\n{text}", flush=True)
    return code == 0


def main() -> int:
    running = [start_tests(part) for part in ("rest", *PARTS)]
    running += [start(name, *command) for name, command in CHECKS.items()]
    succeeded = [finish(one) for one in running]  # all of them, whatever became of the first
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
