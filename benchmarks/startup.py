"""What a process pays: the time until its first operation is done, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

import agentstate

from .measure import Round, Run
from .messages import TEXT
from .results import AT_REST
from .sampling import Limit, Sample

_ENVIRONMENT: Final = {
    **os.environ,
    "PYTHONPATH": str(Path(agentstate.__file__).parent.parent),
    "PYTHONDONTWRITEBYTECODE": "",
}
_BARE: Final = "bare interpreter"
_MEMORY: Final = """
from agentstate import SyncConversationContext
context = SyncConversationContext()
context.add_to_history("one", "user", "hi")
"""
_FILE: Final = """
from agentstate import FileStorage, SyncConversationContext
context = SyncConversationContext(FileStorage({folder!r}))
context.add_to_history("one", "user", "hi")
"""
_REPORT: Final = """
import sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
loaded = sorted(name for name in {unwanted!r} if name in sys.modules)
print(int(status["VmRSS"].split()[0]), ",".join(loaded))
"""
_UNWANTED: Final = ("asyncio", "valkey", "yaml", "filelock", "dataclasses_json")
_WHY: Final = "most of it is `json`, with the regular expressions that it imports"


def startup(run: Run) -> None:
    """`import agentstate` and one operation in a new process, against an interpreter that does nothing."""
    programs = {_BARE: "pass", "memory": _MEMORY, "files": _FILE.format(folder=str(run.folder()))}
    measured = run.compare({name: _started(program) for name, program in programs.items()}, rounds=21, calls=1)
    sizes, loaded = {}, {}
    for name, program in programs.items():
        size, _, modules = _run(program + _REPORT.format(unwanted=_UNWANTED)).strip().partition(" ")
        sizes[name], loaded[name] = int(size) / 1024, modules.split(",") if modules else []
    for name in ("memory", "files"):
        what = f"import and one operation, {name}"
        run.row("new process", what, measured, name, _BARE)
        rounds = zip(measured[AT_REST][name], measured[AT_REST][_BARE], strict=True)
        added = median(ours.elapsed - bare.elapsed for ours, bare in rounds) * 1e3
        targets = name == "memory"
        run.counted(f"{what}: added time", added, "ms", at_most=25 if targets else None, why=_WHY)
        run.counted(f"{what}: added memory", sizes[name] - sizes[_BARE], "MB", at_most=6 if targets else None, why=_WHY)
        run.counted(
            f"{what}: imports of {', '.join(_UNWANTED)}", len(loaded[name]), "modules",
            at_most=0 if targets else None, note=", ".join(loaded[name]),
        )  # fmt: skip


def _started(program: str) -> Round:
    def once(_: Limit) -> Sample:
        began = time.perf_counter()
        _run(program)
        elapsed = time.perf_counter() - began
        return Sample([elapsed], elapsed)

    return once


def _run(program: str) -> str:
    """What the program prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True).stdout


_TOUCH: Final = """
import json
from agentstate import FileStorage, SyncConversationContext
def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024
folder, cache, count = {folder!r}, {cache}, {count}
context = SyncConversationContext(FileStorage(folder, fsync="no", cache_bytes=cache))
context.add_to_history("first", "user", "hi")
before, points = resident(), {{}}
for number in range(1, count + 1):
    name = f"conversation-{{number}}"
    context.extend_history(name, [{{"role": "user", "content": {text!r}}}] * 20)
    context.get_history(name, limit=10)
    if number % (count // 10) == 0:
        points[number] = resident() - before
print(json.dumps(points))
"""


def cache(run: Run) -> None:
    """Memory that the file backend keeps for conversations it has read: no more than `cache_bytes`."""
    count = run.amount(10_000, 500)
    for megabytes in (32, 4):
        program = _TOUCH.format(folder=str(run.folder()), cache=megabytes << 20, count=count, text=TEXT)
        points = {float(number): added for number, added in json.loads(_run(program)).items()}
        run.line("cache", f"cache_bytes of {megabytes} MiB", points)
        run.counted(
            f"files, {count:,} conversations read, cache_bytes of {megabytes} MiB: memory", max(points.values()), "MiB",
            at_most=1.2 * megabytes,
        )  # fmt: skip
