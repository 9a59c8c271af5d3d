"""The long run: all scenarios in slices, until the time is over. It can be stopped and resumed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agentstate import __version__

from .figures import Figures
from .mutations import MUTATIONS, prove
from .scenarios import SCENARIOS, run_apart

_SLICES: Final = 20
_SLICE_TIMEOUT: Final = 1200.0  # seconds; a slice takes half a minute at most where nothing hangs
BEGIN: Final = "<!-- the latest run: written by `python -m torture --report` -->\n"
END: Final = "<!-- the end of the latest run -->"


@dataclass
class Progress:
    """How much of a scenario has run, and its figures."""

    figures: Figures
    rounds: int
    """How many rounds it has in all."""
    made: int = 0
    slices: int = 0
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return self.made >= self.rounds


@dataclass
class LongRun:
    """A run with one seed, and how much of it is done."""

    seed: int
    scale: float = 1.0
    begun: str = ""
    revisions: list[str] = field(default_factory=list)
    """The commits that were tested, one for each time that the run was resumed."""
    progress: dict[str, Progress] = field(default_factory=dict)
    caught: dict[str, str] = field(default_factory=dict)
    """How each seeded bug was caught; empty if it was not."""

    @classmethod
    def load(cls, path: Path) -> LongRun:
        """Resume a run."""
        loaded = json.loads(path.read_text())
        loaded["progress"] = {
            name: Progress(Figures(**entry.pop("figures")), **entry) for name, entry in loaded["progress"].items()
        }
        return cls(**loaded)

    def save(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        os.replace(temporary, path)

    @property
    def total(self) -> Figures:
        total = Figures("all", self.seed)
        for entry in self.progress.values():
            total += entry.figures
        return total

    def run(self, names: list[str], minutes: float | None, state: Path | None) -> None:
        """Run slices until all scenarios are complete or the time is over. Each scenario gets the same time."""
        self.begun = self.begun or _today()
        self.revisions = list(dict.fromkeys([*self.revisions, _revision()]))
        for name in names:
            rounds = max(1, round(SCENARIOS[name].long * self.scale))
            self.progress.setdefault(name, Progress(Figures(name, self.seed), rounds))
        end = None if minutes is None else time.monotonic() + minutes * 60
        while end is None or time.monotonic() < end:
            waiting = [name for name in names if not self.progress[name].complete]
            if not waiting:
                break
            name = min(waiting, key=lambda name: self.progress[name].seconds)
            self._run_slice(name, self.progress[name])
            if state is not None:
                self.save(state)

    def _run_slice(self, name: str, progress: Progress) -> None:
        rounds = min(_slice(name, progress.rounds), progress.rounds - progress.made)
        begin = time.monotonic()
        try:
            figures = run_apart(name, self.seed, rounds, number=progress.slices, timeout=_SLICE_TIMEOUT)
        except subprocess.TimeoutExpired:
            figures = Figures(name, self.seed)
            figures.hang(f"slice {progress.slices} did not end")
        except RuntimeError as error:
            figures = Figures(name, self.seed)
            figures.fail_silently(f"slice {progress.slices}: {error}")
        progress.figures += figures
        progress.seconds += time.monotonic() - begin
        progress.made += rounds
        progress.slices += 1
        details = str(figures) if not figures.clean else ""
        share = progress.made / progress.rounds
        print(f"{progress.figures}  ({share:.0%} in {progress.seconds:.0f} s)\n{details}".rstrip(), flush=True)

    def prove(self) -> None:
        """Run the seeded bugs."""
        self.caught = {}
        for name, how in prove(self.seed):
            self.caught[name] = how
            print(f"seeded bug {name:<50} {how or 'NOT CAUGHT'}  ({MUTATIONS[name].scenario})", flush=True)

    @property
    def clean(self) -> bool:
        return self.total.clean and all(self.caught.values())

    # --- the page of the documentation

    def report(self, page: Path) -> None:
        """Write the figures to the page, between the marks."""
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}{self._table()}{END}{after}")

    def _table(self) -> str:
        total = self.total
        where = (
            f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {os.cpu_count()} cores"
        )
        words = [
            f"Begun on {self.begun}, of {' and '.join(self.revisions)}, with {where}. The same again:",
            "",
            "<!-- not run: it takes hours -->",
            "```bash",
            f"cd tests && python -m torture --seed {self.seed}"
            + (f" --scale {self.scale:g}" if self.scale != 1 else ""),
            "```",
            "",
            "| scenario | of its length | faults | calls | outcomes unknown | L | D | S | H |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(
                self._row(f"`{name}`", entry.figures, entry.made / SCENARIOS[name].long)
                for name, entry in self._begun_scenarios()
            ),
            self._row("**all**", total, None),
            "",
        ]
        if self.caught:
            seen = sum(map(bool, self.caught.values()))
            words += [f"Of {len(self.caught)} seeded bugs, {seen} were caught.", ""]
        return "\n".join(words) + "\n"

    def _begun_scenarios(self) -> list[tuple[str, Progress]]:
        return [(name, self.progress[name]) for name in SCENARIOS if name in self.progress]

    @staticmethod
    def _row(name: str, figures: Figures, share: float | None) -> str:
        cells: list[Any] = [
            name, "" if share is None else f"{share:.0%}", f"{figures.faults:,}", f"{figures.calls:,}",
            f"{figures.unknown:,}", figures.lost, figures.doubled, figures.silent, figures.hanging,
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def _today() -> str:
    now = datetime.now(UTC)
    return f"{now.day} {now:%B %Y}"


def _revision() -> str:
    """The commit that is tested, or the version where there is no repository."""
    git = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h of %cs"]
    try:
        return "commit " + subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def replay(name: str, seed: int, scale: float, number: int) -> Figures:
    """Run one slice of a scenario again, in a process of its own."""
    rounds = max(1, round(SCENARIOS[name].long * scale))
    return run_apart(name, seed, _slice(name, rounds), number=number)


def _slice(name: str, rounds: int) -> int:
    """How many rounds one slice makes: enough for each kind of fault to occur."""
    return min(rounds, max(-(-rounds // _SLICES), SCENARIOS[name].short))
