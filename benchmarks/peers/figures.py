"""The plots of docs/benchmarks.md, drawn from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.tables import FRONT, Rows, results
from sltt_ext.analysis.plots import BLUE, COLORS, GREEN, MARKERS, ORANGE, WIDTH
from sltt_ext.optional import require

LINES = ("-", "--", ":", "-.")


def draw(folder: Path) -> None:
    """Write every plot whose results are there."""
    for name, rows, plot in (
        ("peers", results("peers_nf_resnet_34"), relative),
        ("peers_over_time", results("peers_over_time"), over_time),
    ):
        if rows:
            plot(rows).savefig(folder / f"{name}.png")
    if results("peers_over_time") and results("peers_nf_resnet_34"):
        front().savefig(folder / "front.png")


def front() -> Any:
    """Memory over T, and the time of an iteration: the picture of the front page."""
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(8, 3), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    shown = {
        "BPTT, step by step": "BPTT, steps",
        "BPTT, all steps in one call": "BPTT, sequence",
        "SLTT": "SLTT, sltt_ext, cache_invariant, pack_spikes",
    }
    rows = results("peers_over_time")
    for index, (label, contender) in enumerate(shown.items()):
        own = [row for row in rows if row["contender"] == contender]
        left.plot([int(row["time_steps"]) for row in own], [float(row["peak_mb"]) / 1000 for row in own], label=label,
                  color=(ORANGE, GREEN, BLUE)[index], marker=MARKERS[index])  # fmt: skip
    left.set(xlabel="time steps T", ylabel="GB", ylim=(0, None), title="peak memory")
    left.legend(fontsize=8)
    times = {
        row["contender"]: float(row["to_bptt_steps"])
        for row in results("peers_nf_resnet_34")
        if row["dtype"] == "float32"
    }
    values = [times[fastest] for _, fastest in FRONT.values()]
    bars = right.barh(list(FRONT), values, color=(ORANGE, GREEN, BLUE, BLUE))
    right.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    right.set(title="time of an iteration, T = 6", xlabel="relative to BPTT, step by step", xlim=(0, 1.15))
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="both" if axes is left else "x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def relative(rows: Rows) -> Any:
    """Time and memory of the contenders on NF-ResNet-34 in float32, relative to BPTT stepping through time."""
    both = {row["contender"] for row in rows if row["dtype"] == "bfloat16"}
    shown = [row for row in rows if row["dtype"] == "float32" and row["contender"] in both]
    figure = _figure(1.2 + 0.24 * len(shown))
    axes = figure.subplots()
    for place, (column, label, color) in enumerate(
        (("to_bptt_steps", "time", BLUE), ("peak_to_bptt_steps", "peak memory", ORANGE))
    ):
        places = [row + 0.4 * place - 0.2 for row in range(len(shown))]
        axes.barh(places, [float(row[column]) for row in shown], 0.4, label=label, color=color,
                  hatch=("", "///")[place], edgecolor="white", linewidth=0)  # fmt: skip
    axes.set_yticks(range(len(shown)), [row["contender"] for row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("relative to BPTT, steps (float32)")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def over_time(rows: Rows) -> Any:
    """Seconds and peak memory against T, one line for each contender, both axes logarithmic."""
    figure = _figure(6.5)
    panels = figure.subplots(2, 1, sharex=True)
    lengths = sorted({int(row["time_steps"]) for row in rows})
    for axes, (column, size, label) in zip(
        panels, (("seconds", "timed", "seconds"), ("peak_mb", "counted", "peak memory (MB)"))
    ):
        for index, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            own = [row for row in rows if row["contender"] == name]
            axes.plot([int(row["time_steps"]) for row in own], [float(row[column]) for row in own], label=name,
                      color=COLORS[index % 5], marker=MARKERS[index % 5], linestyle=LINES[index % 4],
                      fillstyle="full" if index < 5 else "none")  # fmt: skip
        axes.set(xscale="log", yscale="log", ylabel=label, title=rows[0][size])
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("time steps T")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def _figure(height: float) -> Any:
    matplotlib_figure = require("matplotlib.figure", extra="plots")
    return matplotlib_figure.Figure(figsize=(WIDTH, height), layout="constrained", dpi=150)
