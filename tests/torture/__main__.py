"""`python -m torture`, in the folder `tests`: the long run, with its seed and its figures."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from .mutations import MUTATIONS, plant


def main() -> int:
    """Run what is asked for; 0 if all four figures are zero and every seeded bug was caught."""
    options = _parser().parse_args()
    if options.mutation:
        plant(MUTATIONS[options.mutation])
    if options.one:
        from .scenarios import run_here

        print(run_here(options.one, options.seed, options.rounds, number=options.slice or 0).to_json())
        return 0

    from .longrun import LongRun, replay
    from .scenarios import SCENARIOS

    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    names = options.only or list(SCENARIOS)
    if options.slice is not None:
        seen = [replay(name, seed, options.scale, options.slice) for name in names]
        print(*seen, sep="\n")
        return 0 if all(figures.clean for figures in seen) else 1
    run = LongRun(seed, options.scale)
    if options.state is not None and options.state.exists():
        run = LongRun.load(options.state)
    print(f"seed {run.seed}, scale {run.scale:g}; again with: python -m torture --seed {run.seed}", flush=True)
    run.run(names, options.minutes, options.state)
    if not (options.without_mutations or options.only):
        run.prove()
    if options.state is not None:
        run.save(options.state)
    if options.report is not None:
        run.report(options.report)
    print(run.total)
    if run.caught:
        print(f"{sum(map(bool, run.caught.values()))} of {len(run.caught)} seeded bugs caught")
    return 0 if run.clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--seed", type=int, help="what is drawn depends on it alone")
    parser.add_argument("--scale", type=float, default=1.0, help="this part of the long run (0.01: a hundredth)")
    parser.add_argument("--minutes", type=float, help="end after so long (and the seeded bugs), complete or not")
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="resume the run in this file, if it exists; save the run there"
    )
    parser.add_argument(
        "--report", type=Path, metavar="PAGE", help="write the figures to this page (docs/reliability.md)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="only these scenarios")
    parser.add_argument("--slice", type=int, metavar="N", help="run only this slice of the scenarios again")
    parser.add_argument("--without-mutations", action="store_true", help="do not prove the harness with seeded bugs")
    for name, kind in (("--one", str), ("--rounds", int), ("--mutation", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser


sys.exit(main())
