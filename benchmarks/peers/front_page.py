"""What the front page shows: memory, time and accuracy of a few methods, as a table and as a picture."""

from __future__ import annotations

import statistics
from typing import Any

from peers.markdown import results, table
from sltt_ext.analysis.plots import BLUE, GREEN, MARKERS, ORANGE
from sltt_ext.optional import require

LEAST = 'SLTT, sltt_ext, memory_budget="least"'
FRONT = {
    "BPTT, step by step": ("BPTT, steps", "BPTT, steps"),
    "BPTT, all steps in one call": ("BPTT, sequence", "BPTT, sequence"),
    "SLTT": (LEAST, "SLTT, sltt_ext, cache_invariant, chunk=T"),
    "SLTT-1": (LEAST, "SLTT-1, tail skipped, sltt_ext, cache_invariant, chunk=T"),
}
"""Method on the front page -> the contenders whose memory and whose time it shows: the leanest, and the fastest."""


def table_of_methods() -> str:
    """What counts, in three numbers: memory, time and accuracy."""
    peaks = {
        row["contender"]: row
        for row in results("peers_memory")
        if row["tensors"] == "fake" and row["network"] == "NF-ResNet-34"
    }
    times = {row["contender"]: row for row in results("peers_nf_resnet_34") if row["dtype"] == "float32"}

    def accuracy(method: str) -> str:
        runs = [
            row for row in results("accuracy_digits") if (row["method"], row["scale"]) == (method, "mean")
        ]
        return f"{100 * statistics.mean(float(row['test_accuracy']) for row in runs):.1f} %" if runs else ""

    return table(
        [
            "",
            "peak memory: NF-ResNet-34, 256 images of 224 px, T = 6",
            "time of an iteration: NF-ResNet-34, T = 6",
            "test accuracy: digits",
        ],
        (
            [
                method,
                f"{float(peaks[leanest]['peak_gib']):.1f} GiB",
                f"{float(times[fastest]['to_bptt_steps']):.2f}",
                accuracy(method.partition(",")[0]),
            ]
            for method, (leanest, fastest) in FRONT.items()
        ),
    )


def figure() -> Any:
    """Memory over T, and the time of an iteration: the picture of the front page."""
    drawing = require("matplotlib.figure", extra="plots").Figure(
        figsize=(8, 3), layout="constrained", dpi=150
    )
    left, right = drawing.subplots(1, 2)
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
    return drawing
