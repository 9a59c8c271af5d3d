"""Measure two source trees of agentstate against each other.

    python -m benchmarks.compare OLD_TREE NEW_TREE [--conversations 1,10,50,1000] [--backend valkey,file]

Appends by N conversations at a time, each of which waits for its last append. Every run is a fresh process that
imports one of the trees; the trees take turns, in changing order, at rest and beside busy neighbours. Only the public
API is used, so that any two versions can be compared. A lone awaited call to Valkey is also measured against an RPUSH
by `valkey.asyncio`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

from .neighbours import COUNT, busy_neighbours
from .servers import valkey_server

_HERE: Final = Path(__file__).resolve().parent.parent
_BACKENDS: Final = ("valkey", "file", "file-no-fsync", "memory")
_ADAPTERS: Final = ("async", "sync")
_PEER: Final = "valkey.asyncio"
_WARM_UP: Final = 0.2  # seconds


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    backend: str
    adapter: str
    conversations: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What one process found: appends a second, and the latencies of its appends in microseconds."""

    throughput: float
    median: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, latencies: list[float], elapsed: float) -> Self:
        """From latencies in seconds."""
        ordered = sorted(latency * 1e6 for latency in latencies)
        return cls(len(ordered) / elapsed, median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=_tree, metavar="OLD_TREE", help="a folder that contains the package agentstate")
    parser.add_argument("new", type=_tree, metavar="NEW_TREE", help="the same, of the version to judge")
    parser.add_argument("--conversations", type=_numbers, default=[1, 10, 50, 1000], metavar="N[,N]",
                        help="how many append at the same time (default: 1,10,50,1000)")  # fmt: skip
    parser.add_argument("--backend", type=_one_of(_BACKENDS), default=["valkey"], metavar="NAME[,NAME]",
                        help=f"of {', '.join(_BACKENDS)} (default: valkey)")  # fmt: skip
    parser.add_argument("--adapter", type=_one_of(_ADAPTERS), default=["async"], metavar="NAME[,NAME]",
                        help="async: tasks of one event loop; sync: threads (default: async)")  # fmt: skip
    parser.add_argument("--bytes", type=_numbers, default=[200], metavar="N[,N]",
                        help="size of a message's content (default: 200)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="processes for each figure (default: 9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of a run (default: 1)")
    parser.add_argument("--at-rest", action="store_true", help="leave out the runs beside busy neighbours")
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="where files are written (default: the system's)")
    options = parser.parse_args()
    conditions: dict[str, Callable[[], AbstractContextManager[None]]] = {"at rest": nullcontext}
    if not options.at_rest:
        conditions[f"beside {COUNT} busy processes"] = busy_neighbours
    print(_HEADER, flush=True)
    with valkey_server() as server:
        for backend, adapter, size, conversations in itertools.product(
            options.backend, options.adapter, options.bytes, options.conversations
        ):
            case = Case(backend, adapter, conversations, size, options.seconds)
            contenders = {"old": options.old, "new": options.new}
            if (backend, adapter, conversations) == ("valkey", "async", 1):
                contenders[_PEER] = options.new
            found: dict[str, dict[str, list[Sample]]] = {
                condition: {name: [] for name in contenders} for condition in conditions
            }
            for number in range(options.runs):
                names = list(contenders)[:: 1 if number % 2 else -1]
                for condition, neighbours in conditions.items():
                    for name in names:
                        server.client().flushall()
                        with neighbours(), TemporaryDirectory(prefix="agentstate-bench-", dir=options.disk) as folder:
                            target = server.url if backend == "valkey" else folder
                            found[condition][name].append(_measured(contenders[name], name == _PEER, case, target))
            for condition, samples in found.items():
                for line in _lines(case, condition, samples):
                    print(line, flush=True)


def _tree(argument: str) -> Path:
    tree = Path(argument).resolve()
    if not (tree / "agentstate" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{argument} does not contain the package agentstate")
    return tree


def _numbers(argument: str) -> list[int]:
    return [int(number) for number in argument.split(",")]


def _one_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def names(argument: str) -> list[str]:
        for name in argument.split(","):
            if name not in choices:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}: choose from {', '.join(choices)}")
        return argument.split(",")

    return names


_HEADER: Final = (
    "| backend | adapter | bytes | conversations | condition | compared | appends a second"
    " | ratio (quartiles): above 1 the first is faster | median µs | p99 µs | max µs |\n"
    "|---|---|--:|--:|---|---|--:|--:|--:|--:|--:|"
)


def _lines(case: Case, condition: str, samples: dict[str, list[Sample]]) -> Iterator[str]:
    pairs = [("new", "old")]
    if _PEER in samples:
        pairs += [("old", _PEER), ("new", _PEER)]
    for first, second in pairs:
        ratios = [a.throughput / b.throughput for a, b in zip(samples[first], samples[second], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        cells = [case.backend, case.adapter, case.bytes, case.conversations, condition, f"{first} / {second}"]
        for figure in ("throughput", "median", "p99", "maximum"):
            cells.append(
                " / ".join(f"{median(getattr(s, figure) for s in samples[name]):,.0f}" for name in (first, second))
            )
        cells.insert(7, f"{middle:.2f} ({low:.2f} to {high:.2f})")
        yield f"| {' | '.join(map(str, cells))} |"


def _measured(tree: Path, peer: bool, case: Case, target: str) -> Sample:
    """Measure one tree in a process of its own."""
    with TemporaryDirectory(prefix="agentstate-tree-") as path:
        # Only this package of the tree: its benchmarks must not take the place of these.
        (Path(path) / "agentstate").symlink_to(tree / "agentstate")
        asked = json.dumps({"case": asdict(case), "peer": peer, "target": target, "tree": str(tree)})
        answer = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__spec__.name} import _child; _child()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((path, str(_HERE)))},
            input=asked, stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    return Sample(**json.loads(answer))


def _child() -> None:
    """In the process of one run: what was asked for is on standard input, what was found goes to standard output."""
    import agentstate

    asked: dict[str, Any] = json.load(sys.stdin)
    package = Path(agentstate.__file__).resolve().parent
    if package.parent != Path(asked["tree"]):
        sys.exit(f"agentstate was imported from {package}, expected {asked['tree']}")
    case = Case(**asked["case"])
    if case.adapter == "sync":
        sample = _by_threads(case, asked["target"])
    else:
        sample = asyncio.run(_by_tasks(case, asked["target"], peer=asked["peer"]))
    json.dump(asdict(sample), sys.stdout)


def _storage(backend: str, target: str) -> Any:
    from agentstate import FileStorage, InMemoryStorage, ValkeyStorage

    match backend:
        case "valkey":
            return ValkeyStorage(target)
        case "file":
            return FileStorage(target)
        case "file-no-fsync":
            return FileStorage(target, fsync="no")
        case _:
            return InMemoryStorage()


async def _by_tasks(case: Case, target: str, *, peer: bool) -> Sample:
    content = "x" * case.bytes
    append: Callable[[str], Awaitable[Any]]
    if peer:
        import valkey.asyncio

        from .floors import message

        client = valkey.asyncio.Valkey.from_url(target)
        append, close = (lambda name: client.rpush(name, message(content))), client.aclose
    else:
        from agentstate import ConversationContext

        context = ConversationContext(_storage(case.backend, target))
        append, close = (lambda name: context.add_to_history(name, "user", content)), context.aclose
    latencies: list[float] = []

    async def converse(name: str, end: float) -> None:
        now = time.perf_counter()
        while now < end:
            began = now
            await append(name)
            now = time.perf_counter()
            latencies.append(now - began)

    async def all_of_them(seconds: float) -> float:
        began = time.perf_counter()
        names = [f"conversation-{number}" for number in range(case.conversations)]
        await asyncio.gather(*(converse(name, began + seconds) for name in names))
        return time.perf_counter() - began

    await all_of_them(_WARM_UP)
    latencies.clear()
    elapsed = await all_of_them(case.seconds)
    await close()
    return Sample.of(latencies, elapsed)


def _by_threads(case: Case, target: str) -> Sample:
    from agentstate import SyncConversationContext

    content = "x" * case.bytes
    context = SyncConversationContext(_storage(case.backend, target))
    latencies: list[float] = []

    def converse(name: str, end: float) -> None:
        now = time.perf_counter()
        while now < end:
            began = now
            context.add_to_history(name, "user", content)
            now = time.perf_counter()
            latencies.append(now - began)

    def all_of_them(seconds: float) -> float:
        began = time.perf_counter()
        threads = [
            threading.Thread(target=converse, args=(f"conversation-{number}", began + seconds))
            for number in range(case.conversations)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    all_of_them(_WARM_UP)
    latencies.clear()
    elapsed = all_of_them(case.seconds)
    context.close()
    return Sample.of(latencies, elapsed)


if __name__ == "__main__":
    main()
