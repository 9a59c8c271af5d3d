"""Short runs of the scenarios: the four figures are zero. Those that fork run in processes of their own."""

from __future__ import annotations

import secrets
import sys

import pytest
from servers import require_server

from torture.scenarios import SCENARIOS, run_apart, run_here

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and signals")

NEED_A_SERVER = ("valkey", "cuts", "outages", "failovers", "linearizable")


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.short])
def test_nothing_is_lost_doubled_silent_or_hanging(name: str) -> None:
    if any(word in name for word in NEED_A_SERVER):
        require_server("8.1" if name.endswith("8.1") else "9.1")
    seed = secrets.randbelow(10**6)
    scenario = SCENARIOS[name]
    figures = run_apart(name, seed, scenario.short) if scenario.forks else run_here(name, seed, scenario.short)
    print(figures)
    assert figures.clean, str(figures)
    if not figures.faults:
        pytest.skip("this machine does not let us mount anything")
