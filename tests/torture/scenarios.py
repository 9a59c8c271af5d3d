"""All scenarios by name, with how many rounds a short run and a long one make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

from servers import ValkeyServer, find_server

from agentstate import FileStorage, InMemoryStorage, StateStorage, ValkeyStorage

from .cancels import cancels, cancels_on_a_bad_line, exits, exits_on_valkey, handlers
from .crowd import crowd
from .cuts import cuts
from .damage import flipped_bits, moved_lines, torn_documents, torn_ends
from .failovers import failovers
from .figures import Figures
from .forks import forks
from .holders import holders
from .interrupts import interrupts
from .kills import kills, kills_of_clients
from .linearizable import linearizable
from .mounts import mounted_power, small_disk
from .outages import outages
from .places import scratch
from .power import grouped_power, power
from .repairs import repairs
from .stops import stopped_clients
from .troubles import kills_at_calls, system_errors
from .turns import clock_jumps, turns

Run = Callable[[Random, int, Figures], None]


class Scenario(NamedTuple):
    """What to run, and how many rounds of it in the tests (0: it is for the long run alone), and in the long run."""

    run: Run
    short: int
    long: int
    forks: bool = False


def _on_files(run: Any, **options: Any) -> Run:
    def on_files(random: Random, rounds: int, figures: Figures) -> None:
        with scratch() as folder:
            run(random, rounds, figures, make=partial(FileStorage, folder, **options))

    return on_files


def _on_valkey(run: Any, version: str = "9.1", **options: Any) -> Run:
    def on_valkey(random: Random, rounds: int, figures: Figures) -> None:
        with ValkeyServer(find_server(version)) as server:
            run(random, rounds, figures, make=partial(ValkeyStorage, server.url, **options))

    return on_valkey


def _beside_valkey(run: Any, version: str = "9.1", **options: Any) -> Run:
    def beside_valkey(random: Random, rounds: int, figures: Figures) -> None:
        with ValkeyServer(find_server(version)) as server:
            run(random, rounds, figures, server=server, **options)

    return beside_valkey


def _crowd_on_valkey(random: Random, rounds: int, figures: Figures, **options: Any) -> None:
    with ValkeyServer(find_server("9.1")) as server:
        crowd(random, rounds, figures, url=server.url, **options)


def _lines(count: int, make: Callable[[Path, str], StateStorage]) -> Run:
    def lines(random: Random, rounds: int, figures: Figures) -> None:
        with scratch() as folder, ValkeyServer(find_server("9.1")) as server:
            linearizable(random, rounds, figures, make=lambda: [make(folder, server.url) for _ in range(count)])

    return lines


SCENARIOS: Final[dict[str, Scenario]] = {
    "kills": Scenario(kills, 24, 10_000, forks=True),
    "kills-documents": Scenario(partial(kills, layout="document"), 10, 2_000, forks=True),
    "kills-valkey": Scenario(_beside_valkey(kills_of_clients, layout="log"), 10, 2_000, forks=True),
    "kills-valkey-documents": Scenario(_beside_valkey(kills_of_clients, layout="document"), 0, 1_000, forks=True),
    "kills-at-calls": Scenario(kills_at_calls, 60, 10_000, forks=True),
    "kills-at-calls-documents": Scenario(partial(kills_at_calls, layout="document"), 20, 2_000, forks=True),
    "repairs": Scenario(repairs, 10, 2_000, forks=True),
    "torn-ends": Scenario(torn_ends, 150, 20_000),
    "torn-documents": Scenario(torn_documents, 100, 5_000),
    "flipped-bits": Scenario(flipped_bits, 600, 200_000),
    "moved-lines": Scenario(moved_lines, 150, 20_000),
    "power": Scenario(power, 300, 60_000),
    "power-after-errors": Scenario(partial(power, failing=True), 300, 60_000),
    "power-lazily": Scenario(partial(power, lazily=True), 100, 20_000),
    "power-of-groups": Scenario(grouped_power, 100, 20_000),
    "power-documents": Scenario(partial(power, layout="document"), 100, 20_000),
    "power-documents-errors": Scenario(partial(power, failing=True, layout="document"), 100, 20_000),
    "power-of-ext4": Scenario(mounted_power, 5, 5_000, forks=True),
    "power-of-ext4-documents": Scenario(partial(mounted_power, layout="document"), 0, 500, forks=True),
    "system-errors": Scenario(system_errors, 40, 10_000),
    "system-errors-documents": Scenario(partial(system_errors, layout="document"), 20, 3_000),
    "full-disk": Scenario(small_disk, 3, 300, forks=True),
    "full-disk-documents": Scenario(partial(small_disk, layout="document"), 0, 100, forks=True),
    "locks": Scenario(holders, 4, 200, forks=True),
    "forks-files": Scenario(_on_files(forks), 4, 400, forks=True),
    "forks-documents": Scenario(_on_files(forks, layout="document"), 0, 100, forks=True),
    "forks-valkey": Scenario(_on_valkey(forks), 4, 400, forks=True),
    "crowd-files": Scenario(partial(crowd, processes=3, threads=4), 3, 3, forks=True),
    "crowd-files-64": Scenario(crowd, 0, 60, forks=True),
    "crowd-documents": Scenario(partial(crowd, layout="document", processes=3, threads=4), 0, 20, forks=True),
    "crowd-valkey": Scenario(partial(_crowd_on_valkey, processes=3, threads=4), 3, 3, forks=True),
    "crowd-valkey-64": Scenario(_crowd_on_valkey, 0, 60, forks=True),
    "crowd-valkey-documents": Scenario(
        partial(_crowd_on_valkey, layout="document", processes=3, threads=4), 0, 20, forks=True
    ),
    "linearizable-memory": Scenario(_lines(1, lambda *_: InMemoryStorage()), 10, 3_000),
    "linearizable-files": Scenario(_lines(2, lambda folder, _: FileStorage(folder)), 10, 3_000),
    "linearizable-documents": Scenario(_lines(2, lambda folder, _: FileStorage(folder, layout="document")), 5, 3_000),
    "linearizable-valkey": Scenario(_lines(2, lambda _, url: ValkeyStorage(url)), 10, 3_000),
    "linearizable-valkey-documents": Scenario(
        _lines(2, lambda _, url: ValkeyStorage(url, layout="document")), 5, 3_000
    ),
    "cuts": Scenario(_beside_valkey(cuts), 150, 100_000),
    "cuts-8.1": Scenario(_beside_valkey(cuts, "8.1"), 30, 10_000),
    "cuts-documents": Scenario(_beside_valkey(cuts, layout="document"), 30, 10_000),
    "outages": Scenario(_beside_valkey(outages), 8, 160),
    "outages-documents": Scenario(_beside_valkey(outages, layout="document"), 0, 80),
    "outages-8.1": Scenario(_beside_valkey(outages, "8.1"), 0, 40),
    "failovers": Scenario(failovers, 1, 60),
    "failovers-documents": Scenario(partial(failovers, layout="document"), 0, 20),
    "stops-files": Scenario(_on_files(stopped_clients), 0, 2_000, forks=True),
    "stops-valkey": Scenario(_on_valkey(stopped_clients), 6, 2_000, forks=True),
    "stops-valkey-documents": Scenario(_on_valkey(stopped_clients, layout="document"), 0, 1_000, forks=True),
    "cancels-files": Scenario(_on_files(cancels), 100, 10_000),
    "cancels-valkey": Scenario(_on_valkey(cancels), 100, 10_000),
    "cancels-documents": Scenario(_on_files(cancels, layout="document"), 100, 10_000),
    "cancels-cuts": Scenario(_beside_valkey(cancels_on_a_bad_line), 100, 10_000),
    "exits": Scenario(exits, 5, 200),
    "exits-valkey": Scenario(_beside_valkey(exits_on_valkey), 0, 100),
    "interrupts-files": Scenario(_on_files(interrupts), 20, 5_000, forks=True),
    "interrupts-valkey": Scenario(_on_valkey(interrupts), 20, 5_000, forks=True),
    "handlers": Scenario(handlers, 24, 2_000),
    "clock-jumps-files": Scenario(_on_files(clock_jumps), 6, 300),
    "clock-jumps-valkey": Scenario(_on_valkey(clock_jumps), 6, 300),
    "turns-files": Scenario(_on_files(turns), 2, 100, forks=True),
    "turns-valkey": Scenario(_on_valkey(turns), 2, 100, forks=True),
}


def run_here(name: str, seed: int, rounds: int, *, number: int = 0) -> Figures:
    """Run a scenario in this process. What it draws depends on seed, name and number alone."""
    figures = Figures(name, seed)
    SCENARIOS[name].run(Random(f"{seed} {name} {number}"), rounds, figures)
    return figures


def run_apart(
    name: str, seed: int, rounds: int, *, number: int = 0, mutation: str = "", timeout: float | None = None
) -> Figures:
    """Run a scenario in a process of its own: many of them fork, and some are run with a seeded bug.

    Raises RuntimeError where it fails, and subprocess.TimeoutExpired.
    """
    command = [sys.executable, "-m", "torture", "--one", name, "--seed", str(seed), "--rounds", str(rounds)]
    command += ["--slice", str(number)]
    environment = dict(os.environ)
    if mutation:
        command += ["--mutation", mutation]
        environment.pop("COVERAGE_PROCESS_CONFIG", None)  # what runs there is not the source that is measured
    # A process group of its own: when it hangs, what it started goes with it.
    child = subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, 9)
        child.communicate()
        raise
    if child.returncode != 0:
        raise RuntimeError(f"the scenario {name} (seed {seed}, {rounds} rounds) failed:\n{errors[-3000:]}")
    return Figures.from_json(output.splitlines()[-1])
