"""The plots of docs/benchmarks.md and docs/reproduce.md, drawn from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paired import Paired, paired

from peers import front_page
from peers.accuracy_tables import SETS, differences
from peers.markdown import Rows, results
from sltt_ext.analysis.plots import BLUE, COLORS, MARKERS, ORANGE, WIDTH
from sltt_ext.optional import require

LINES = ("-", "--", ":", "-.")
COMPARED = {
    "BPTT, steps": "BPTT, step by step",
    "BPTT, sequence": "BPTT, all steps in one call",
    "BPTT, memopt": "BPTT, SpikingJelly's memopt",
    "rate-based, steps": "rate-based, step by step",
    "rate-based, sequence": "rate-based, in one call",
    "SLTT, SpikingJelly": "SLTT, SpikingJelly's",
    "SLTT-1, tail skipped, SpikingJelly": "SLTT-1, SpikingJelly's, tail skipped",
    "SLTT, sltt_ext, cache_invariant, pack_spikes": "SLTT, spikes as bits",
    "SLTT, sltt_ext, cache_invariant, chunk=T": "SLTT, all steps in one call",
    "SLTT-1, tail skipped, sltt_ext, cache_invariant, pack_spikes": "SLTT-1, spikes as bits, tail skipped",
}
"""Those of the contenders that one picture has room for, and their names in it."""
NAMES = {
    **COMPARED,
    "SLTT-1, tail skipped, sltt_ext, cache_invariant, chunk=T": "SLTT-1, all steps in one call, tail skipped",
}


def draw(folder: Path) -> None:
    """Write every plot whose results are there."""
    for name, rows, plot in (
        ("peers", results("peers_nf_resnet_34"), relative),
        ("peers_over_time", results("peers_over_time"), over_time),
    ):
        if rows:
            plot(rows).savefig(folder / f"{name}.png")
    if results("peers_over_time") and results("peers_nf_resnet_34"):
        front_page.figure().savefig(folder / "front.png")
    if any(differences().values()):
        accuracy().savefig(folder / "accuracy.png")


def relative(rows: Rows) -> Any:
    """Time and memory of some contenders on NF-ResNet-34 in float32, relative to BPTT stepping through time."""
    own = {row["contender"]: row for row in rows if row["dtype"] == "float32"}
    shown = [own[contender] for contender in COMPARED]
    figure = _figure(1.2 + 0.3 * len(shown))
    axes = figure.subplots()
    for place, (column, label, color) in enumerate(
        (("to_bptt_steps", "time", BLUE), ("peak_to_bptt_steps", "peak memory", ORANGE))
    ):
        places = [row + 0.4 * place - 0.2 for row in range(len(shown))]
        axes.barh(places, [float(row[column]) for row in shown], 0.4, label=label, color=color,
                  hatch=("", "///")[place], edgecolor="white", linewidth=0)  # fmt: skip
    axes.set_yticks(range(len(shown)), list(COMPARED.values()), fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("relative to BPTT, step by step")
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
            axes.plot([int(row["time_steps"]) for row in own], [float(row[column]) for row in own],
                      label=NAMES[name],
                      color=COLORS[index % 5], marker=MARKERS[index % 5], linestyle=LINES[index % 4],
                      fillstyle="full" if index < 5 else "none")  # fmt: skip
        axes.set(xscale="log", yscale="log", ylabel=label, title=rows[0][size])
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("time steps T")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def accuracy() -> Any:
    """How far each method is from BPTT in accuracy, with intervals: where each step shows what is asked, and where not."""
    sets, tasks = differences(), _memory_tasks()
    methods = [method for method in METHODS if any(method in runs for runs in sets.values())]
    by_set = {label: [sets[name].get(method) for method in methods] for name, label in SETS.items()}
    by_window = {
        label: [runs[place] if place < len(runs) else None for runs in tasks.values()]
        for place, label in enumerate(("SLTT", "smaller window", "larger window"))
    }
    figure = _figure(7.5)
    panels = figure.subplots(2, 1, height_ratios=(len(methods), max(len(tasks), 1)))
    for axes, title, names, groups in zip(
        panels,
        ("Each step shows what is asked", "Tasks that need memory"),
        (methods, list(tasks)),
        (by_set, by_window),
    ):
        _intervals(axes, names, groups)
        axes.set_title(title, pad=22)
    panels[-1].set_xlabel("difference to BPTT in points, 95 % interval")
    return figure


METHODS = ("SLTT", "SLTT-2", "SLTT-1", "window 2", "window 4", "rate-based")


def _memory_tasks() -> dict[str, list[Paired]]:
    """Task -> SLTT, smaller and larger window beside BPTT."""
    tasks: dict[str, Rows] = {}
    for row in results("memory_tasks"):
        tasks.setdefault(f"{row['task']}\n({row['neuron']})", []).append(row)
    return {task: list(paired(rows).values())[1:] for task, rows in tasks.items()}


def _intervals(axes: Any, names: list[str], groups: dict[str, list[Paired | None]]) -> None:
    """A row for each name, and in it a point with its interval for each group that has some."""
    for group, (label, values) in enumerate(groups.items()):
        shown = [(row, value.interval) for row, value in enumerate(values) if value and value.interval]
        axes.errorbar(
            [each.mean for _, each in shown], [row + 0.22 * (group - 1) for row, _ in shown],
            xerr=[each.half for _, each in shown], label=label, color=COLORS[group], marker=MARKERS[group],
            linestyle="none", capsize=3, markersize=5,
        )  # fmt: skip
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=7, frameon=False)


def _figure(height: float) -> Any:
    matplotlib_figure = require("matplotlib.figure", extra="plots")
    return matplotlib_figure.Figure(figsize=(WIDTH, height), layout="constrained", dpi=150)
