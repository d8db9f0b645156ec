"""Compiled training of a spiking ResNet-18: BPTT over the whole sequence, SLTT, and SLTT-1 that stops after its step.

The network is multi-step, with T=4 and 16 images of 64 px. For BPTT, SpikingJelly's network is given to `torch.compile` as a
whole. SLTT compiles by blocks (`OnlineTrainer(compile=True)`). Contenders take turns. A ratio is the time divided by that of
compiled BPTT in the same round, as the median over rounds. ``compile_s`` is how much longer the first three iterations take
than three later ones, without a cache on disk.

On the CPU, the compiler turns convolutions to channels last by itself. The blocks of SLTT keep their layout instead. So compiled
BPTT is measured in both ways: as it is, and with ``layout_optimization`` off.

python benchmarks/compiled.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import write_results
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn
from torch.nn import functional as F

import sltt_ext

T, CLASSES = 4, 10
BPTT, COMPILED_BPTT, KEPT_LAYOUT = (
    "BPTT sequence",
    "BPTT sequence, compiled",
    "BPTT sequence, compiled, layout kept",
)
COMPILE: dict[str, dict[str, Any] | None] = {
    BPTT: None,
    COMPILED_BPTT: {},
    KEPT_LAYOUT: {"options": {"layout_optimization": False}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SLTT": {},
    "SLTT, compiled": {"compile": True},
    "SLTT, chunk=T, compiled": {"compile": True, "chunk": T},
    "SLTT-1, tail skipped": {"k": 1, "full_output": False},
    "SLTT-1, tail skipped, compiled": {"compile": True, "k": 1, "full_output": False},
}

Run = Callable[[], Any]


class SmallBlock(nn.Module):
    """A small residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4)
        self.neuron = neuron.LIFNode(surrogate_function=surrogate.ATan())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, N, 4, H, W]``."""
        return x + self.neuron(self.norm(self.conv(x)))


def network(smoke: bool) -> nn.Module:
    torch.manual_seed(0)
    if smoke:
        blocks = [layer.Conv2d(3, 4, 3, padding=1), SmallBlock(), SmallBlock()]
        net: nn.Module = nn.Sequential(
            *blocks, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(4, CLASSES)
        )
    else:
        net = spiking_resnet.spiking_resnet18(
            spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), num_classes=CLASSES
        )
    functional.set_step_mode(net, "m")
    return net


def bptt(net: nn.Module, x: torch.Tensor, target: torch.Tensor, how: dict[str, Any] | None) -> Run:
    call = net if how is None else torch.compile(net, **how)
    x_seq = x.expand(T, *x.shape)

    def iteration() -> None:
        net.zero_grad()
        functional.reset_net(net)
        output = call(x_seq)
        F.cross_entropy(output.flatten(0, 1), target.repeat(T)).backward()

    return iteration


def sltt(net: nn.Module, x: torch.Tensor, target: torch.Tensor, options: dict[str, Any]) -> Run:
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **options)

    def iteration() -> None:
        net.zero_grad()
        online.forward_backward(x, target)

    return iteration


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(smoke: bool, rounds: int, cache: str) -> None:
    warnings.simplefilter("ignore")
    n, size = (2, 8) if smoke else (16, 64)
    x, target = torch.rand(n, 3, size, size), torch.randint(0, CLASSES, (n,))
    runs = {name: bptt(network(smoke), x, target, how) for name, how in COMPILE.items()}
    runs |= {name: sltt(network(smoke), x, target, options) for name, options in OPTIONS.items()}
    first = {}
    for name, run in runs.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=cache)
        first[name] = [seconds(run) for _ in range(3)]
        print(name, "first iterations:", ", ".join(f"{value:.1f} s" for value in first[name]), flush=True)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    rows = []
    for name, values in taken.items():
        ratios = {
            reference: statistics.median(value / one for value, one in zip(values, taken[reference]))
            for reference in (COMPILED_BPTT, KEPT_LAYOUT)
        }
        median = statistics.median(values)
        rows.append(
            {
                "contender": name,
                "seconds": f"{median:.4f}",
                "of_compiled_bptt": f"{ratios[COMPILED_BPTT]:.3f}",
                "of_layout_kept": f"{ratios[KEPT_LAYOUT]:.3f}",
                "compile_s": f"{max(sum(first[name]) - 3 * median, 0):.1f}",
            }
        )
    if smoke:
        print(*rows, sep="\n")
    else:
        write_results("compiled", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny network, and no file")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # of each contender its own
        main(arguments.smoke, 1 if arguments.smoke else arguments.rounds, folder)
