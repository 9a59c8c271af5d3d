"""What the tests of the file backend share: shorthands for operations, a file system in between, other processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentstate.errors import StateError
from agentstate.operations import (
    Append,
    Change,
    Commit,
    Delete,
    Operation,
    Outcome,
    Put,
    Query,
    Snapshot,
    Space,
    Window,
)
from agentstate.storage.base import StateStorage
from agentstate.storage.file.filesystem import FileSystem

_numbers = itertools.count(1)

EVERYTHING = Window()


def message(text: str | int) -> bytes:
    """A message as it is stored."""
    record = {"role": "user", "content": str(text), "timestamp": "2026-01-31T12:00:00.000000+00:00", "metadata": {}}
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


def commit(context_id: str, *changes: Change, commit_id: str | None = None, **options: Any) -> Commit:
    return Commit(context_id, changes, commit_id or f"test-{os.getpid():x}-{next(_numbers):x}", **options)


def append(context_id: str, *texts: str | int, **options: Any) -> Commit:
    return commit(context_id, Append(tuple(message(text) for text in texts)), **options)


def put(context_id: str, **options: bytes) -> Commit:
    return commit(context_id, Put(Space.VARIABLES, tuple(options.items())))


def clear(context_id: str, **options: Any) -> Commit:
    return commit(context_id, Delete(), **options)


def look(storage: StateStorage, context_id: str, window: Window | None = EVERYTHING) -> Snapshot | None:
    """Everything of a context."""
    outcome = storage.call(Query(context_id, None, None, window))
    assert outcome is None or isinstance(outcome, Snapshot)
    return outcome


def texts(storage: StateStorage, context_id: str, window: Window = EVERYTHING) -> list[str]:
    """The contents of a history."""
    snapshot = look(storage, context_id, window)
    return [] if snapshot is None else [json.loads(text)["content"] for text in snapshot.messages]


def together(storage: StateStorage, *operations: Operation) -> list[Outcome | StateError]:
    """Carry out a group; every operation is settled exactly once."""
    outcomes: list[Any] = [None] * len(operations)
    settled = [0] * len(operations)

    def settle(index: int, outcome: Outcome | StateError) -> None:
        outcomes[index] = outcome
        settled[index] += 1

    storage.execute(operations, settle)
    assert settled == [1] * len(operations)
    return outcomes


class Between(FileSystem):
    """The real file system, with `around(name, call, arguments)` in between; and what was called, and read."""

    NAMES = (
        "open", "close", "write", "truncate", "stat", "descriptor_stat", "follow", "replace", "unlink", "make_folder",
        "change_mode", "read_at", "sync", "sync_folder", "sync_all", "names",
    )  # fmt: skip

    def __init__(self, around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any] | None = None) -> None:
        self.around = around or (lambda name, call, arguments: call(*arguments))
        self.calls: list[str] = []
        self.read_bytes = 0
        self.written_bytes = 0
        real = FileSystem()
        for name in self.NAMES:
            setattr(self, name, self._between(name, getattr(real, name)))

    def _between(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def through(*arguments: Any) -> Any:
            self.calls.append(name)
            result = self.around(name, call, arguments)
            if name == "read_at":
                self.read_bytes += len(result)
            elif name == "write":
                self.written_bytes += result
            return result

        return through

    def forget(self) -> None:
        self.calls.clear()
        self.read_bytes = self.written_bytes = 0


def fail(error: int, *names: str, after: int = 0, times: int = 1) -> Callable[..., Any]:
    """An `around` that fails calls of these names: after so many that succeed, so many times."""
    seen = itertools.count()

    def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name in names and after <= next(seen) < after + times:
            raise OSError(error, os.strerror(error))
        return call(*arguments)

    return around


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, as any reader of JSON Lines sees them."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def logs(folder: Path) -> set[str]:
    """The files in a store, but for locks and leases."""
    return {entry.name for entry in folder.iterdir() if entry.is_file()}


class Interruption(BaseException):
    """What the handler of a signal raises: KeyboardInterrupt, SystemExit, the time limit of a task queue."""


def interrupted(step: int, function: Callable[[], object]) -> bool:
    """Call a function and interrupt it at this step; False if it came to its end before.

    Steps are the moments at which Python runs the handlers of signals (but for jumps back in a loop): when a function
    of ours begins, and when one that is written in C has returned.
    """
    steps = itertools.count()

    def at_event(frame: Any, event: str, _: object) -> None:
        if event in ("call", "c_return") and "/agentstate/" in frame.f_code.co_filename and next(steps) == step:
            sys.setprofile(None)
            raise Interruption

    try:
        sys.setprofile(at_event)
        function()
    except Interruption:
        return True
    finally:
        sys.setprofile(None)
    return False


_IMPORTS = "import os, sys, time; from agentstate import FileStorage; from filetools import *\n"


def start_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Another process that runs `code`, with the arguments in `sys.argv` and this module at hand."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            _IMPORTS + textwrap.dedent(code),
            *map(str, arguments),
        ],
        text=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
        **options,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What processes printed, once all of them ended well."""
    outputs = []
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        outputs.append(output)
    return outputs


def says(process: subprocess.Popen[str], word: str) -> None:
    """Wait until a process says this."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word
