"""What was found, as JSON, as Markdown and as plots."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from .measure import Report

_PACKAGES: Final = (
    "valkey", "libvalkey", "valkey-glide", "filelock", "openai-agents", "langchain-community", "strands-agents",
    "agentup", "redis",
)  # fmt: skip
BEGIN, END = "<!-- begin: python -m benchmarks --publish -->", "<!-- end -->"


def machine() -> dict[str, Any]:
    """Where this runs, and with what."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    model = ""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else ""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": f"{os.cpu_count()} × {model or platform.machine()}",
        "packages": packages,
        "load": round(os.getloadavg()[0], 1),
    }


class Results:
    """All that was found so far: a run of some benchmarks replaces what their last run found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.json"
        self.data: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def add(self, report: Report, *, quick: bool) -> None:
        self.data[report.name] = {**report.as_data(), "quick": quick, "machine": machine()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")

    def in_order(self, names: Iterable[str]) -> list[dict[str, Any]]:
        return [self.data[name] for name in names if name in self.data]


def table(reports: list[dict[str, Any]]) -> str:
    """The rows with a target, and the others behind them."""
    lines: list[str] = []
    for title, wanted in (("Targets", True), ("Beside them, without a target", False)):
        rows = [
            row
            for report in reports
            for row in report["rows"]
            if (row["target"] not in (None, 0.0)) is wanted
            or (wanted and row["target"] == 0.0 and row["bound"] == "at most")
        ]
        rows = [row for row in rows if not (not wanted and row["target"] == 0.0 and row["bound"] == "at most")]
        if not rows:
            continue
        lines += [f"### {title}", "", *_header(wanted)]
        lines += [_line(row, wanted) for row in rows]
        lines.append("")
    facts = [(report["name"], report["facts"]) for report in reports if report["facts"]]
    if facts:
        lines += ["### Noted on the way", ""]
        lines += [
            f"- {name}: {key}: {_fact(value)}"
            for name, found in facts
            for key, value in found.items()
            if key != "durability"  # stands in the rows
        ]
        lines.append("")
    return "\n".join(lines)


def _header(wanted: bool) -> list[str]:
    if wanted:
        return ["| work | against | ours | theirs | ratio | target | met |", "|---|---|--:|--:|--:|---|---|"]
    return ["| work | against | ours | theirs | ratio |", "|---|---|--:|--:|--:|"]


def _line(row: dict[str, Any], wanted: bool) -> str:
    low, high = row["spread"]
    spread = f" ({_short(low)} to {_short(high)})" if _short(low) != _short(high) else ""
    better = " faster" if row["bound"] == "at least" else ""
    unit = row["unit"]
    theirs = f"{_short(row['theirs'])} {unit}" if row["theirs"] else ""
    ratio = f"{_short(row['ratio'])} ×{better}{spread}" if row["theirs"] else ""
    work = row["work"] + (f" ({row['note']})" if row["note"] else "")
    cells = [work, row["against"], f"{_short(row['ours'])} {unit}", theirs, ratio]
    if wanted:
        cells += [
            f"{row['bound']} {_short(row['target'])} ×" if row["theirs"] else "none",
            "yes" if row["met"] else "**no**",
        ]
    return "| " + " | ".join(cells) + " |"


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {shown}" for key, shown in value.items())
    return str(value)


def made_on(reports: list[dict[str, Any]]) -> str:
    """One sentence about where the figures come from."""
    shown = reports[-1]["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in shown["packages"].items())
    loads = [report["machine"]["load"] for report in reports if "load" in report["machine"]]
    busy = f" The machine's load average was {min(loads)} to {max(loads)}." if max(loads, default=0.0) > 2 else ""
    quick = " Some are of a quick run, and say nothing." if any(report["quick"] for report in reports) else ""
    return (
        f"Measured on {shown['date']} with Python {shown['python']} on {shown['system']}, {shown['processor']}; "
        f"{packages}.{busy}{quick}"
    )


def publish(document: Path, reports: list[dict[str, Any]]) -> None:
    """Put the tables between the marks in a document."""
    text = document.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n{made_on(reports)}\n\n{table(reports)}\n{END}{after}")
