"""Measure two source trees of agentstate against each other.

    python -m benchmarks.compare OLD_TREE NEW_TREE [--conversations 1,10,50,1000] [--backend valkey,file]

Appends by N conversations at a time, each of which waits for its last append. Every run is a new process that imports
one of the trees; the trees take turns, in changing order, at rest and beside busy processes. Only the public API is
used, so that any two versions can be compared. A lone awaited call to Valkey is also measured against an RPUSH by
`valkey.asyncio`.

Figures are medians over the runs. A ratio is the median of the ratios of runs that followed one another: above 1, the
first of the two has the higher throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final

from .measure import ALONE, BOTH, Conditions
from .sampling import Figures, Limit, in_tasks, in_threads
from .servers import valkey_server

_HERE: Final = Path(__file__).resolve().parent.parent
_BACKENDS: Final = ("valkey", "file", "file-no-fsync", "memory")
_ADAPTERS: Final = ("async", "sync")
_NATIVE: Final = "valkey.asyncio"
_WARM_UP: Final = Limit(0.2)


@dataclass(frozen=True)
class Case:
    """What is measured."""

    backend: str
    adapter: str
    conversations: int
    bytes: int
    seconds: float


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=_tree, metavar="OLD_TREE", help="a folder that contains the package agentstate")
    parser.add_argument("new", type=_tree, metavar="NEW_TREE", help="another one")
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
    parser.add_argument("--at-rest", action="store_true", help="leave out the runs beside busy processes")
    parser.add_argument("--disk", type=Path, metavar="FOLDER",
                        help="where files are written (default: the temporary folder)")  # fmt: skip
    options = parser.parse_args()
    print(_table_line(_HEADS), _table_line(["---"] * len(_HEADS)), sep="\n", flush=True)
    with valkey_server() as server:
        for backend, adapter, size, conversations in itertools.product(
            options.backend, options.adapter, options.bytes, options.conversations
        ):
            case = Case(backend, adapter, conversations, size, options.seconds)
            contenders = {"old": options.old, "new": options.new}
            if (backend, adapter, conversations) == ("valkey", "async", 1):
                contenders[_NATIVE] = options.new
            conditions = ALONE if options.at_rest else BOTH
            runs = _runs(contenders, conditions, case, options.runs, server, options.disk)
            for condition, figures in runs.items():
                for line in _lines(case, condition, figures):
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


def _runs(
    contenders: dict[str, Path], conditions: Conditions, case: Case, count: int, server: Any, disk: Path | None
) -> dict[str, dict[str, list[Figures]]]:
    """The figures of each run, by condition and contender."""
    found: dict[str, dict[str, list[Figures]]] = {
        condition: {name: [] for name in contenders} for condition in conditions
    }
    for number in range(count):
        names = list(contenders)[:: 1 if number % 2 else -1]
        for condition, enter in conditions.items():
            for name in names:
                server.client().flushall()
                with enter(), TemporaryDirectory(prefix="agentstate-bench-", dir=disk) as folder:
                    target = server.url if case.backend == "valkey" else folder
                    found[condition][name].append(_measured(contenders[name], case, target, native=name == _NATIVE))
    return found


_HEADS: Final = (
    "backend", "adapter", "bytes", "conversations", "condition", "compared", "appends/s", "ratio (quartiles)",
    "median µs", "p99 µs", "max µs",
)  # fmt: skip


def _lines(case: Case, condition: str, runs: dict[str, list[Figures]]) -> Iterator[str]:
    pairs = [("new", "old")]
    if _NATIVE in runs:
        pairs += [("old", _NATIVE), ("new", _NATIVE)]
    for first, second in pairs:
        ratios = [a.throughput / b.throughput for a, b in zip(runs[first], runs[second], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

        def both(figure: str, scale: float, names: tuple[str, str] = (first, second)) -> str:
            return " / ".join(f"{median(getattr(run, figure) for run in runs[name]) * scale:,.0f}" for name in names)

        yield _table_line([
            case.backend, case.adapter, case.bytes, case.conversations, condition, f"{first} / {second}",
            both("throughput", 1), f"{middle:.2f} ({low:.2f} to {high:.2f})",
            both("median", 1e6), both("p99", 1e6), both("maximum", 1e6),
        ])  # fmt: skip


def _table_line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _measured(tree: Path, case: Case, target: str, *, native: bool) -> Figures:
    """Measure one tree in a new process."""
    with TemporaryDirectory(prefix="agentstate-tree-") as path:
        # Only this package of the tree: its benchmarks must not take the place of these.
        (Path(path) / "agentstate").symlink_to(tree / "agentstate")
        asked = json.dumps({"case": asdict(case), "target": target, "native": native, "tree": str(tree)})
        answer = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__spec__.name} import _child; _child()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((path, str(_HERE)))},
            input=asked, stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    return Figures(**json.loads(answer))


def _child() -> None:
    """In the process of one run: what is asked for comes from standard input, the figures go to standard output."""
    import agentstate

    asked: dict[str, Any] = json.load(sys.stdin)
    package = Path(agentstate.__file__).resolve().parent
    if package.parent != Path(asked["tree"]):
        sys.exit(f"agentstate was imported from {package}, expected {asked['tree']}")
    case = Case(**asked["case"])
    if asked["native"]:
        figures = asyncio.run(_by_valkey_asyncio(case, asked["target"]))
    elif case.adapter == "sync":
        figures = _by_threads(case, asked["target"])
    else:
        figures = asyncio.run(_by_tasks(case, asked["target"]))
    json.dump(asdict(figures), sys.stdout)


def _names(case: Case) -> list[str]:
    return [f"conversation-{number}" for number in range(case.conversations)]


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


def _by_threads(case: Case, target: str) -> Figures:
    from agentstate import SyncConversationContext

    content = "x" * case.bytes
    with SyncConversationContext(_storage(case.backend, target)) as context:

        def append(name: str) -> None:
            context.add_to_history(name, "user", content)

        in_threads(append, _names(case), _WARM_UP)
        return Figures.of([in_threads(append, _names(case), Limit(case.seconds))])


async def _by_tasks(case: Case, target: str) -> Figures:
    from agentstate import ConversationContext

    content = "x" * case.bytes
    async with ConversationContext(_storage(case.backend, target)) as context:
        return await _tasks(case, lambda name: context.add_to_history(name, "user", content))


async def _by_valkey_asyncio(case: Case, target: str) -> Figures:
    import valkey.asyncio

    from .floors import message

    content = "x" * case.bytes
    client: Any = valkey.asyncio.Valkey.from_url(target)
    try:
        return await _tasks(case, lambda name: client.rpush(name, message(content)))
    finally:
        await client.aclose()


async def _tasks(case: Case, append: Callable[[str], Awaitable[Any]]) -> Figures:
    await in_tasks(append, _names(case), _WARM_UP)
    return Figures.of([await in_tasks(append, _names(case), Limit(case.seconds))])


if __name__ == "__main__":
    main()
