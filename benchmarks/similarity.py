"""How close SLTT's gradient is to BPTT's, over tau and over T: `results/similarity.csv`, `docs/similarity.png`.

A small convolutional network with the paper's neuron (soft reset, triangle surrogate) is trained with SLTT on scikit-learn's
handwritten digits, for a few epochs for every tau and seed. Then it is measured on test images.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import write_results
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import gradient_similarity
from sltt_ext.data import Digits, load_digits
from sltt_ext.optional import require

TAUS = (1.1, 1.5, 2.0, 4.0, 8.0)
LENGTHS = (1, 2, 4, 6, 8, 16)
SEEDS = (0, 1, 2)
TIME_STEPS, EPOCHS, CHANNELS, BATCH = 6, 3, 16, 64
FIGURE = Path(__file__).parents[1] / "docs" / "similarity.png"
COLORS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00")
MARKERS = ("s", "o", "^", "v", "D")


def network(tau: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        lif = neuron.LIFNode(
            tau=tau,
            decay_input=False,
            v_reset=None,
            surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        )
        return [layer.Conv2d(inputs, outputs, 3, padding=1, bias=False), layer.BatchNorm2d(outputs), lif]

    return nn.Sequential(
        *block(1, CHANNELS),
        *block(CHANNELS, 2 * CHANNELS),
        layer.AvgPool2d(2),
        *block(2 * CHANNELS, 2 * CHANNELS),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(8 * CHANNELS, 10),
    )


def train(net: nn.Module, data: Digits, seed: int) -> float:
    """Train with SLTT; returns the test accuracy."""
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, TIME_STEPS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train_labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            online.forward_backward(data.train_images[batch], data.train_labels[batch])
            optimizer.step()
    net.eval()
    accuracy = (online.predict(data.test_images).argmax(1) == data.test_labels).float().mean().item()
    net.train()
    sltt_ext.revert(net)
    return accuracy


def similarity(net: nn.Module, data: Digits, time_steps: int, detach_reset: bool) -> tuple[float, float]:
    """Mean cosine similarity and norm ratio of the whole gradient over two test batches."""
    for module in net.modules():
        if isinstance(module, neuron.LIFNode):
            module.detach_reset = detach_reset
    first, second = ((data.test_images[i : i + BATCH], data.test_labels[i : i + BATCH]) for i in (0, BATCH))
    result = gradient_similarity(net, *first, F.cross_entropy, time_steps, more_batches=[second])
    return result.overall.cosine, result.overall.norm_ratio


def measure() -> list[dict[str, Any]]:
    data = load_digits()
    values: dict[tuple[float, int, bool], list[tuple[float, float]]] = {}
    accuracy: dict[float, list[float]] = {}
    for tau in TAUS:
        for seed in SEEDS:
            net = network(tau, seed)
            accuracy.setdefault(tau, []).append(train(net, data, seed))
            for time_steps in LENGTHS:
                for detach_reset in (False, True) if time_steps == TIME_STEPS else (False,):
                    own = similarity(net, data, time_steps, detach_reset)
                    values.setdefault((tau, time_steps, detach_reset), []).append(own)
    rows = []
    for (tau, time_steps, detach_reset), pairs in values.items():
        cosines, ratios = zip(*pairs)
        rows.append(
            {
                "tau": tau,
                "time_steps": time_steps,
                "detach_reset": detach_reset,
                "seeds": len(pairs),
                "cosine": round(statistics.mean(cosines), 4),
                "cosine_lowest": round(min(cosines), 4),
                "cosine_highest": round(max(cosines), 4),
                "norm_ratio": round(statistics.mean(ratios), 4),
                "test_accuracy": round(statistics.mean(accuracy[tau]), 4),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    figure = require("matplotlib.figure", extra="plots").Figure(
        figsize=(9, 3.6), layout="constrained", dpi=150
    )
    over_tau, over_time = figure.subplots(1, 2, sharey=True)
    for index, detach_reset in enumerate((False, True)):
        own = [r for r in rows if r["time_steps"] == TIME_STEPS and r["detach_reset"] == detach_reset]
        means = [r["cosine"] for r in own]
        spread = [
            [r["cosine"] - r["cosine_lowest"] for r in own],
            [r["cosine_highest"] - r["cosine"] for r in own],
        ]
        label = "BPTT, reset detached" if detach_reset else "BPTT through the reset"
        over_tau.errorbar([r["tau"] for r in own], means, spread, label=label, color=COLORS[1 + 3 * index],
                          marker=MARKERS[index], capsize=3)  # fmt: skip
    for index, tau in enumerate(TAUS):
        own = [r for r in rows if r["tau"] == tau and not r["detach_reset"]]
        over_time.plot([r["time_steps"] for r in own], [r["cosine"] for r in own], label=f"tau = {tau:g}",
                       color=COLORS[index], marker=MARKERS[index])  # fmt: skip
    over_tau.set(
        xlabel="membrane time constant tau (time steps)",
        ylabel="cosine similarity of SLTT and BPTT",
        xscale="log",
    )
    over_tau.set_xticks(TAUS, [f"{tau:g}" for tau in TAUS])
    over_tau.minorticks_off()
    over_tau.set_title(f"T = {TIME_STEPS}, lowest to highest of {len(SEEDS)} seeds")
    over_time.set(xlabel="time steps T", title="BPTT through the reset")
    over_time.set_xticks(LENGTHS)
    for axes in (over_tau, over_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(FIGURE)


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    write_results("similarity", rows)
    plot(rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
