"""Measure, and write down what was found.

Writes `results.json` (all that was measured), `results.md` (the tables) and the plots to the output folder. A run of
only some benchmarks leaves what the folder has of the others. `--publish` measures nothing: it puts what is in the
output folder into docs/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from . import bytes_written, files, growth, listing, memory, peers, startup, valkey_async, valkey_sync
from .measure import ALL, Report, Run
from .report import Results, made_on, publish, table

_REGISTERED = (valkey_async, valkey_sync, files, memory, growth, bytes_written, startup, listing, peers)
_DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a little of everything: tries the benchmarks out")
    parser.add_argument("--only", action="append", choices=list(ALL), metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), metavar="FOLDER")
    parser.add_argument("--disk", type=Path, default=None, metavar="FOLDER", help="where the measured files are put")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/ and measure nothing")
    options = parser.parse_args()
    results = Results(options.output)
    if not options.publish:
        for name in options.only or ALL:
            results.add(_measured(name, options.quick, options.disk), quick=options.quick)
    reports = results.in_order(ALL)
    if not reports:
        parser.error(f"there is nothing in {options.output} yet")
    (options.output / "results.md").write_text(f"{made_on(reports)}\n\n{table(reports)}")
    try:
        from .plots import draw
    except ImportError:
        print("no plots: matplotlib is not installed")
    else:
        draw(reports, _DOCS if options.publish else options.output)
    if options.publish:
        publish(_DOCS / "performance.md", reports)
    print(table(reports))


def _measured(name: str, quick: bool, disk: Path | None) -> Report:
    function = ALL[name]
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
    return report


if __name__ == "__main__":
    main()
