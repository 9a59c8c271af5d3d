"""`python -m torture`, in the folder `tests`: the long run, with its seed and its figures."""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from .figures import Figures
from .mutations import MUTATIONS, plant


def main() -> int:
    """Run what is asked for; 0 if all four figures are zero and every seeded bug was caught."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="what is drawn depends on it alone")
    parser.add_argument("--scale", type=float, default=1.0, help="this part of the long run (0.01: a hundredth)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="only these scenarios")
    parser.add_argument("--without-mutations", action="store_true", help="do not prove the harness with seeded bugs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mutation", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mutation:
        plant(MUTATIONS[options.mutation])

    from .scenarios import SCENARIOS, run_here

    if options.one:
        print(run_here(options.one, options.seed, options.rounds).to_json())
        return 0
    names = options.only or list(SCENARIOS)
    print(
        f"seed {options.seed}, scale {options.scale:g}; again with: python -m torture --seed {options.seed}", flush=True
    )
    total = _run_all(names, options.seed, options.scale)
    caught = [] if options.without_mutations or options.only else _prove(options.seed)
    print(total)
    if caught:
        print(f"{sum(caught)} of {len(caught)} seeded bugs caught")
    return 0 if total.clean and all(caught) else 1


def _run_all(names: list[str], seed: int, scale: float) -> Figures:
    from .scenarios import SCENARIOS, run_apart

    total = Figures("all", seed)
    for name in names:
        begin = time.monotonic()
        figures = run_apart(name, seed, max(1, round(SCENARIOS[name].long * scale)))
        print(f"{figures}  ({time.monotonic() - begin:.0f} s)", flush=True)
        total += figures
    return total


def _prove(seed: int) -> list[bool]:
    from .mutations import is_caught

    caught = []
    for name, mutation in MUTATIONS.items():
        caught.append(is_caught(name, seed))
        print(f"seeded bug {name:<32} {'caught' if caught[-1] else 'NOT CAUGHT'} by {mutation.scenario}", flush=True)
    return caught


sys.exit(main())
