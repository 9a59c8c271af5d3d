"""What a run found: the data types, and the file that they are kept in."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Self

from .sampling import Figures

_PACKAGES: Final = (
    "valkey", "libvalkey", "valkey-glide", "filelock", "openai-agents", "langchain-community", "strands-agents",
    "agentup", "redis",
)  # fmt: skip

AT_REST: Final = "at rest"
BUSY: Final = "busy"
"""Beside other processes that keep the processors busy."""


@dataclass(frozen=True)
class Comparison:
    """Ours and theirs under one condition."""

    ours: Figures
    theirs: Figures
    ratio: float
    """Our cost of a call to theirs: below 1, ours is faster. The median over the rounds."""
    quartiles: tuple[float, float]
    """Of the ratio over the rounds."""


@dataclass(frozen=True)
class Row:
    """One operation, measured against somebody who does the same work."""

    where: str
    """The backend and how it is called."""
    operation: str
    against: str
    size: int | None
    """Bytes of a message's content, where several are measured."""
    concurrent: bool
    """Whether calls overlap, so that the throughput says more than the latency."""
    at_most: float | None
    """The target: the largest ratio."""
    why: str
    """Why the target is missed, where it is."""
    conditions: dict[str, Comparison]

    def missed(self) -> list[str]:
        """Where the target is missed: at rest, busy, or both. Other conditions have no target."""
        if self.at_most is None:
            return []
        return [name for name in (AT_REST, BUSY) if self.conditions[name].ratio > self.at_most]


@dataclass(frozen=True)
class Count:
    """Something that is counted, or measured once: bytes, round trips, memory."""

    what: str
    value: float
    unit: str
    at_most: float | None
    """The target: the largest value."""
    why: str
    """Why the target is missed, where it is."""
    note: str

    def missed(self) -> bool:
        """Whether there is a target that is missed."""
        return self.at_most is not None and self.value > self.at_most


@dataclass(frozen=True)
class Line:
    """A line of a plot."""

    plot: str
    name: str
    x: list[float]
    y: list[float]


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    about: str
    rows: list[Row] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The report that `asdict` made these data of."""
        rows = [
            Row(**{**row, "conditions": {name: _comparison(found) for name, found in row["conditions"].items()}})
            for row in data["rows"]
        ]
        counts = [Count(**count) for count in data["counts"]]
        return cls(**{**data, "rows": rows, "counts": counts, "lines": [Line(**line) for line in data["lines"]]})


def _comparison(data: Mapping[str, Any]) -> Comparison:
    low, high = data["quartiles"]
    return Comparison(Figures(**data["ours"]), Figures(**data["theirs"]), data["ratio"], (low, high))


@dataclass
class Results:
    """One run of the benchmarks."""

    machine: dict[str, Any]
    quick: bool
    reports: list[Report] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote."""
        data = json.loads(path.read_text())
        return cls(data["machine"], data["quick"], [Report.from_data(report) for report in data["reports"]])


def this_machine() -> dict[str, Any]:
    """The machine, the time, and the versions that are measured."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": f"{os.cpu_count()} × {found[1] if found else platform.machine()}",
        "packages": packages,
        "load": round(os.getloadavg()[0], 1),
    }
