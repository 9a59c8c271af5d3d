"""The plots of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from .results import Report


class Plot(NamedTuple):
    title: str
    x: str
    y: str
    logarithmic: str = "xy"


PLOTS: Final = {
    "throughput": Plot("Appends to Valkey over asyncio", "conversations at the same time", "appends per second", "x"),
    "length-files-append": Plot("Append a message: files", "messages in the conversation", "microseconds"),
    "length-files-read": Plot("Read the last 10 messages: files", "messages in the conversation", "microseconds"),
    "length-valkey-append": Plot("Append a message: Valkey", "messages in the conversation", "microseconds"),
    "length-valkey-read": Plot("Read the last 10 messages: Valkey", "messages in the conversation", "microseconds"),
    "bytes": Plot("Bytes written for each message of 200 bytes", "messages appended", "bytes per message"),
    "cache": Plot("Memory for conversations that were read", "conversations", "MiB", ""),
}
_COLOURS: Final = ("#777777", "#d98324", "#7a5195", "#4c9f70", "#ef5675", "#8d6e63", "#3b9fc4")


def draw(reports: list[Report], folder: Path) -> None:
    """Write one SVG for each plot that has data. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "agentstate", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    )
    from matplotlib import pyplot

    for name, plot in PLOTS.items():
        lines = [line for report in reports for line in report.lines if line.plot == name]
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        others = iter(_COLOURS)
        for line in lines:
            ours = line.name.startswith(("agentstate", "cache_bytes"))
            style = "--" if "fsync: no" in line.name or "4 MiB" in line.name else "-"
            axes.plot(
                line.x, line.y, label=line.name, marker="o", markersize=4, linestyle=style,
                linewidth=2.4 if ours else 1.4, color="#1f4e99" if ours else next(others), zorder=3 if ours else 2,
            )  # fmt: skip
        if "x" in plot.logarithmic:
            axes.set_xscale("log")
        if "y" in plot.logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
        path = folder / f"performance-{name}.svg"
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)
