"""Runs the command `agentstate` in a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import agentstate

_PACKAGE = str(Path(agentstate.__file__).parents[1])
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\r")
COMMAND = (sys.executable, "-m", "agentstate")


class Ran(NamedTuple):
    """The exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that it printed."""
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        """What it printed as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def rows(self) -> list[list[str]]:
        """The fields of the lines it printed."""
        return [line.split("\t") for line in self.out.splitlines()]


def environment(**more: str) -> dict[str, str]:
    """The environment of this process, without variables that choose a configuration or colours."""
    names = ("AGENTSTATE_CONFIG", "VALKEY_URL", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join(filter(None, (_PACKAGE, os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "PYTHONUTF8": "1", "TERM": "xterm-256color", **more}


def unmeasured() -> dict[str, str]:
    """The same for a command that has no space to write its coverage to."""
    return {name: value for name, value in environment().items() if not name.startswith("COVERAGE_PROCESS")}


def run(*arguments: str | Path, cwd: Path, stdin: str | bytes = b"", timeout: float = 60, **variables: str) -> Ran:
    """Run a command to its end, with its output in pipes.

    It starts from nothing where `variables` of its environment decide how, or where there is no fork.
    """
    given = stdin.encode() if isinstance(stdin, str) else stdin
    if not variables and sys.platform == "linux":
        return _forked(list(map(str, arguments)), cwd, given, timeout)
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd, input=given, capture_output=True, env=environment(**variables), timeout=timeout, check=False,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


@cache
def _zygote() -> socket.socket:
    """The socket on which forked commands are requested."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = Path(__file__).with_name("zygote.py")
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(script), str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment()
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


_asking = threading.Lock()


def _forked(arguments: list[str], cwd: Path, stdin: bytes, timeout: float) -> Ran:
    """Run a command that the zygote forks."""
    request = {"arguments": arguments, "cwd": str(cwd), "environment": environment()}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        answer, answering = os.pipe()
        with open(answer, "rb") as code:
            with open(answering, "wb") as end, _asking:
                streams = [stream.fileno() for stream in (given, out, err, end)]
                socket.send_fds(_zygote(), [json.dumps(request).encode()], streams)
            poll = select.poll()  # not select(): the number of a descriptor may be large
            poll.register(code, select.POLLIN)
            if not poll.poll(timeout * 1000):
                raise TimeoutError(f"agentstate {' '.join(arguments)}: not within {timeout:g} s")
            number = int(code.read())
        out.seek(0)
        err.seek(0)
        return Ran(number, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


@contextmanager
def started(*arguments: str | Path, cwd: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that runs during the block, and is terminated at its end if it still runs."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), text=True, encoding="utf-8", **pipes | options
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def assert_one_line(ran: Ran, code: int, *words: str) -> None:
    """Assert that the command failed with this code and one line on stderr."""
    assert ran.code == code, ran
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("agentstate: ")
    for word in words:
        assert word in lines[0], ran.err


def plain(text: str) -> str:
    """The text without the escape sequences of a terminal."""
    return _ESCAPES.sub("", text)


def until(condition: Any, timeout: float = 20.0) -> None:
    """Return when the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
