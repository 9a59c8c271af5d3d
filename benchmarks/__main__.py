"""Measure the cost of agentstate's operations and compare it with that of the same work done by others.

A complete run is kept in `results.json` in the output folder; `--publish` writes its figures and plots to docs/. A run
of only some benchmarks, or a quick one, is kept in `partial.json` and cannot be published. `figures.md` shows the
figures of the last run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Final

from . import bytes_written, files, growth, libraries, listing, memory, startup, valkey_async, valkey_sync
from .measure import Run
from .page import all_figures, publish
from .results import Report, Results, this_machine

BENCHMARKS: Final[dict[str, Callable[[Run], None]]] = {
    "memory": memory.memory,
    "file-sync": files.one_thread,
    "file-exclusive": files.exclusive,
    "file-threads": files.many_threads,
    "file-async": files.many_tasks,
    "file-turn": files.turn,
    "valkey-sync": valkey_sync.operations,
    "valkey-turn": valkey_sync.turn,
    "valkey-async": valkey_async.many_tasks,
    "growth": growth.growth,
    "bytes": bytes_written.bytes_written,
    "cache": startup.cache,
    "startup": startup.startup,
    "listing": listing.listing,
    "libraries": libraries.libraries,
}
"""By name, in the order of the pages. The first line of a docstring says what is measured."""
_DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few short rounds, to see that everything works")
    parser.add_argument("--only", type=_names, metavar="NAME[,NAME]", help=f"run only these: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), metavar="FOLDER",
                        help="where the results are kept (default: build/benchmarks)")  # fmt: skip
    parser.add_argument("--disk", type=Path, metavar="FOLDER",
                        help="where the measured files are written (default: the temporary folder)")  # fmt: skip
    parser.add_argument("--publish", action="store_true",
                        help="measure nothing: write the figures of the last complete run to docs/")  # fmt: skip
    options = parser.parse_args()
    complete = options.output / "results.json"
    if options.publish:
        if not complete.exists():
            parser.error(f"{complete} does not exist: run the benchmarks without --only and --quick first")
        results = Results.load(complete)
        publish(results, _DOCS)
        _draw(results, _DOCS)
        return
    results = Results(this_machine(), options.quick)
    partial = options.output / "partial.json"
    for name in options.only or BENCHMARKS:
        results.reports.append(_measured(name, options.quick, options.disk))
        results.save(partial)
    if not options.only and not options.quick:
        partial.replace(complete)
    (options.output / "figures.md").write_text(all_figures(results))
    _draw(results, options.output)
    print(f"took {sum(report.seconds for report in results.reports) / 60:.1f} minutes; see {options.output}/figures.md")


def _names(argument: str) -> list[str]:
    names = argument.split(",")
    for name in names:
        if name not in BENCHMARKS:
            raise argparse.ArgumentTypeError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    return names


def _draw(results: Results, folder: Path) -> None:
    try:
        from .plots import draw
    except ImportError:
        print("no plots were drawn: pip install matplotlib")
    else:
        draw(results.reports, folder)


def _measured(name: str, quick: bool, disk: Path | None) -> Report:
    function = BENCHMARKS[name]
    report = Report(name, (function.__doc__ or "").strip())
    print(f"{name}: {report.about}", flush=True)
    folder = Path(mkdtemp(prefix="agentstate-bench-", dir=disk))
    began = time.perf_counter()
    run = Run(report, folder, quick=quick, say=lambda text: print(f"  {text}", flush=True))
    try:
        with run.stack:
            function(run)
    finally:
        rmtree(folder, ignore_errors=True)
    report.seconds = time.perf_counter() - began
    print(f"  took {report.seconds:.0f} s", flush=True)
    return report


if __name__ == "__main__":
    main()
