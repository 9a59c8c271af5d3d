"""The benchmarks say what they measured: in words that cannot be misread, and on pages that are made of one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import require_server

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # At the end: the package that is tested is the installed one.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        yield


def run_with(ratios: dict[str, float], at_most: float | None, *, quick: bool = False):
    from benchmarks.results import Comparison, Report, Results, Row
    from benchmarks.sampling import Figures

    figures = Figures(median=85e-6, p99=1.2e-3, maximum=2.5, throughput=9876.5)
    conditions = {name: Comparison(figures, figures, ratio, (ratio, ratio)) for name, ratio in ratios.items()}
    row = Row("files", "append", "a floor", 4000, True, at_most, "the reason", conditions)
    machine = {"date": "", "python": "", "system": "", "processor": "", "packages": {}, "load": 0.0}
    return Results(machine, quick, [Report("file-async", "About it.", rows=[row])])


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0.25, "4 × faster"), (0.42, "2.38 × faster"), (1.0, "as fast"), (2.38, "2.38 × slower"), (24.0, "24 × slower")],
)
def test_a_ratio_is_never_called_faster_where_ours_is_slower(ratio: float, words: str) -> None:
    from benchmarks.page import in_words

    assert in_words(ratio) == words


def test_figures_are_median_p99_and_maximum_of_the_calls() -> None:
    from benchmarks.sampling import Figures, Sample

    calls = [float(number) for number in range(1, 201)]
    figures = Figures.of([Sample(calls[:100], 50.0), Sample(calls[100:], 25.0)])
    assert figures == Figures(median=100.5, p99=199.0, maximum=200.0, throughput=3.0)


def test_a_target_that_is_met_at_rest_only_is_not_called_met() -> None:
    from benchmarks.page import BLOCKS

    results = run_with({"at rest": 1.2, "busy": 1.5}, at_most=1.3)
    assert "**not when busy**" in BLOCKS["targets"](results)
    assert "1.50 × slower busy | at most 1.30 × slower | the reason" in BLOCKS["missed"](results)
    assert BLOCKS["missed"](run_with({"at rest": 1.2, "busy": 1.3}, at_most=1.3)) == "No target is missed."


def test_a_run_that_is_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    from benchmarks.results import Results

    results = run_with({"at rest": 0.5, "busy": 2.0}, at_most=None)
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["quick"] is False


def test_every_block_of_the_page_is_filled_by_a_run_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    from benchmarks.page import BLOCKS, publish

    written = (ROOT / "docs" / "performance.md").read_text()
    page = tmp_path / "performance.md"
    page.write_text(written)
    publish(run_with({"at rest": 0.5, "busy": 2.0}, at_most=1.0), tmp_path)
    once = page.read_text()
    for name in BLOCKS:
        assert f"<!-- results: {name} -->\n" in once
    assert "85 µs / 1.20 ms / 2.50 s" in (tmp_path / "performance-figures.md").read_text()
    without = [part.partition("<!-- end -->")[2] for part in once.split("<!-- results: ")[1:]]
    assert without == [part.partition("<!-- end -->")[2] for part in written.split("<!-- results: ")[1:]]
    publish(run_with({"at rest": 0.5, "busy": 2.0}, at_most=1.0), tmp_path)
    assert page.read_text() == once


def test_a_busy_neighbour_that_ends_early_fails_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import neighbours

    def measure_until_they_end() -> None:
        with neighbours.busy_neighbours() as started:
            for neighbour in started:
                neighbour.wait(timeout=60)

    monkeypatch.setattr(neighbours, "LIFETIME", 0.0)
    with pytest.raises(RuntimeError, match="ended during the measurement"):
        measure_until_they_end()


def test_busy_neighbours_end_with_the_block() -> None:
    from benchmarks.neighbours import COUNT, busy_neighbours

    with busy_neighbours() as started:
        assert [neighbour.poll() for neighbour in started] == [None] * COUNT
    assert all(neighbour.returncode is not None for neighbour in started)


def test_two_trees_are_compared_by_the_public_api() -> None:
    require_server("9.1")
    found = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.compare", ".", "."),
            *("--runs", "1", "--seconds", "0.05", "--at-rest"),
            *("--backend", "valkey,memory", "--adapter", "async,sync", "--conversations", "1"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    compared = [line.split(" | ")[5] for line in found.stdout.splitlines()[2:]]
    assert compared == ["new / old", "old / valkey.asyncio", "new / valkey.asyncio", *["new / old"] * 3]


def test_quick_and_partial_runs_are_not_published(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--publish", "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert "run the benchmarks without --only and --quick first" in found.stderr
