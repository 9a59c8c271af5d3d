"""What a short script pays: time until its first operation, and memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import agentstate

from .measure import TEXT, Round, Run, benchmark

_MEMORY = """
from agentstate import SyncConversationContext
context = SyncConversationContext()
context.add_to_history("one", "user", "hi")
"""
_FILE = """
from agentstate import FileStorage, SyncConversationContext
context = SyncConversationContext(FileStorage({folder!r}))
context.add_to_history("one", "user", "hi")
"""
_REPORT = """
import sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
loaded = sorted(name for name in {unwanted!r} if name in sys.modules)
print(int(status["VmRSS"].split()[0]), len(sys.modules), ",".join(loaded))
"""
_UNWANTED = ("asyncio", "valkey", "yaml", "filelock", "dataclasses_json")


@benchmark("startup")
def startup(run: Run) -> None:
    """`import agentstate` and one operation, against an interpreter that does nothing."""
    root = str(Path(agentstate.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": ""}
    programs = {"bare interpreter": "pass", "memory": _MEMORY, "file": _FILE.format(folder=str(run.folder()))}

    worked: dict[str, list[float]] = {name: [] for name in programs}

    def started(name: str) -> Round:
        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", programs[name]], check=True, env=environment)
            took = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            worked[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            return took * 1e3

        return once

    samples = run.compare({name: started(name) for name in programs}, 25, warm_up=2)
    bare = "bare interpreter"
    sizes, modules, loaded = {}, {}, {}
    for name, program in programs.items():
        shown = subprocess.run(
            [sys.executable, "-c", program + _REPORT.format(unwanted=_UNWANTED)],
            check=True, env=environment, capture_output=True, text=True,
        ).stdout.split(" ")  # fmt: skip
        sizes[name], modules[name], loaded[name] = int(shown[0]) / 1024, int(shown[1]), shown[2].strip()
    for name, what in (
        ("memory", "import and one operation in memory"),
        ("file", "import and one operation on a file"),
    ):
        extra = sorted(a - b for a, b in zip(samples.of[name], samples.of[bare], strict=True))
        middle = extra[len(extra) // 2]
        wanted = name == "memory"
        run.figure(
            f"{what}: added time", middle, f"{bare} + 25 ms", 25.0, "ms", at_most=1.0 if wanted else None,
            note=f"the {bare} itself takes {samples.median(bare):.1f} ms",
        )  # fmt: skip
        run.figure(
            f"{what}: added memory", sizes[name] - sizes[bare], f"{bare} + 6 MB", 6.0, "MB",
            at_most=1.0 if wanted else None, note=f"the {bare} itself has {sizes[bare]:.1f} MB",
        )  # fmt: skip
        run.figure(
            f"{what}: unwanted modules", len(loaded[name].split(",")) if loaded[name] else 0, "none", 0, "modules",
            at_most=0.0 if wanted else None, note=loaded[name],
        )  # fmt: skip
        run.report.facts[f"{name}: modules more than the {bare}"] = modules[name] - modules[bare]
        # What it costs also where others use the machine, and the time above is mostly waiting for them.
        added = (median(worked[name]) - median(worked[bare])) * 1e3
        run.report.facts[f"{name}: processor time more than the {bare}"] = f"{added:.1f} ms"


_TOUCH = """
import json, sys
from agentstate import FileStorage, SyncConversationContext
def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024
folder, cache, count = {folder!r}, {cache}, {count}
context = SyncConversationContext(FileStorage(folder, fsync="no", cache_bytes=cache))
context.add_to_history("first", "user", "hi")
before, line = resident(), []
for number in range(count):
    name = f"conversation-{{number}}"
    context.extend_history(name, [{{"role": "user", "content": {text!r}}}] * 20)
    context.get_history(name, limit=10)
    if (number + 1) % (count // 10) == 0:
        line.append((number + 1, resident() - before))
print(json.dumps(line))
"""


@benchmark("cache")
def cache(run: Run) -> None:
    """Memory that the file backend takes for conversations it has touched: no more than `cache_bytes` says."""
    count = run.size(10_000, 500)
    for megabytes in (32, 4):
        program = _TOUCH.format(folder=str(run.folder()), cache=megabytes << 20, count=count, text=TEXT)
        root = str(Path(agentstate.__file__).parent.parent)
        shown = subprocess.run(
            [sys.executable, "-c", program],
            check=True, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True,
        ).stdout  # fmt: skip
        line = json.loads(shown)
        run.line("cache", f"cache_bytes of {megabytes} MiB", [x for x, _ in line], [y for _, y in line])
        most = max(y for _, y in line)
        run.figure(
            f"file, {count:,} contexts touched: memory", most, f"cache_bytes of {megabytes} MiB", megabytes, "MiB",
            at_most=1.2,
        )  # fmt: skip
