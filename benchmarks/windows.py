"""A whole network with a gradient through time: time and memory of windows, against the framework's own BPTT in one call.

It is SpikingJelly's spiking ResNet-18 in multi-step mode, with 16 images of 64 px, T = 4 and two threads. The loss of all
contenders is the mean over time of the steps' cross-entropy. They take turns. The ratio is the time divided by the framework's,
as the median over rounds.

python benchmarks/windows.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from measure import write_results
from rich.progress import track
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import Tensor, nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes

T, BATCH, SIZE = 4, 16, 64
ROUNDS, WARM_UP = 9, 3
WINDOWS = {"window 4 (BPTT)": 4, "window 2": 2, "window 1 (SLTT)": 1}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), num_classes=10
    )
    functional.set_step_mode(net, "m")
    return net


def framework(net: nn.Module, x: Tensor, target: Tensor) -> None:
    functional.reset_net(net)
    output_seq = net(x.unsqueeze(0).repeat(T, 1, 1, 1, 1))
    F.cross_entropy(output_seq.flatten(0, 1), target.repeat(T)).backward()


def contenders(x: Tensor, target: Tensor) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    """Each network, and one iteration of it."""
    net = network()
    found: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "the framework's BPTT": (net, partial(framework, net, x, target))
    }
    for name, window in WINDOWS.items():
        net = sltt_ext.convert(network(), temporal="step" if window == 1 else "call")
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=window)
        found[name] = net, partial(online.forward_backward, x, target)
    return found


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(1)
    x, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 10, (BATCH,))
    runs = contenders(x, target)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(WARM_UP + ROUNDS), description="windows"):
        for name, (net, iteration) in runs.items():
            net.zero_grad()
            start = time.perf_counter()
            iteration()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    first = next(iter(runs))
    rows = [
        {
            "network": f"spiking ResNet-18, {BATCH} images of {SIZE} px, T={T}",
            "contender": name,
            "seconds": round(statistics.median(own), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(own, times[first])), 3),
            "peak_mib": round(peak_activation_bytes(runs[name][1], runs[name][0]) / 2**20, 1),
            "rounds": ROUNDS,
        }
        for name, own in times.items()
    ]
    write_results("windows", rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
