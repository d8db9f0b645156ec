"""The networks of snnTorch's tutorials, one training iteration: T = 25 steps, a batch of 32 images of 28 x 28.

The contenders are snnTorch as in its tutorials (BPTT), snnTorch with the states detached by hand and one
backward per step (SLTT without sltt_ext), sltt_ext stepping, in one backward and in `OnlineTrainer`, and
`MultiStep`. The input is rate-coded random images. The loss is the cross-entropy of each step's membrane
potential. Time is the CPU time of one thread, so that other work on the machine does not count. More threads favour
the larger operators of `MultiStep`. Memory is the peak of activations.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import snntorch
import torch
from measure import write_results
from snntorch import spikegen, surrogate, utils
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.analysis.timing import interleaved_medians
from sltt_ext.snntorch import MultiStep

TIME_STEPS, BATCH, REPEATS = 25, 32, 11
BASELINE = "BPTT, snnTorch"


def fully_connected() -> nn.Module:
    """Tutorial 5."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1000),
        snntorch.Leaky(beta=0.95, init_hidden=True),
        nn.Linear(1000, 10),
        snntorch.Leaky(beta=0.95, init_hidden=True, output=True),
    )


def convolutional() -> nn.Module:
    """Tutorial 6."""
    options = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**options),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**options),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snntorch.Leaky(**options, output=True),
    )


def mean_loss(potentials: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over ``[T, N, classes]`` of each step's loss."""
    return F.cross_entropy(potentials.flatten(0, 1), target.repeat(len(potentials)))


def one_backward(net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor) -> None:
    utils.reset(net)
    mean_loss(torch.stack([net(x)[1] for x in x_seq]), target).backward()


def detached_by_hand(net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor) -> None:
    utils.reset(net)
    for x in x_seq:
        (F.cross_entropy(net(x)[1], target) / len(x_seq)).backward()
        for module in net:
            if isinstance(module, snntorch.Leaky):
                module.mem = module.mem.detach()


def online(net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor, chunk: int = 1) -> None:
    trainer = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, len(x_seq), chunk=min(chunk, len(x_seq)), time_dim=0, output="membrane"
    )
    trainer.forward_backward(x_seq, target)


def multi_step(net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor) -> None:
    utils.reset(net.net)
    mean_loss(net(x_seq)[1], target).backward()


def contenders(make: Callable[[], nn.Module]) -> dict[str, tuple[nn.Module, Callable[..., None]]]:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return make()

    converted = partial(sltt_ext.convert, network())
    return {
        BASELINE: (network(), one_backward),
        "SLTT, snnTorch, detached by hand": (network(), detached_by_hand),
        "SLTT, sltt_ext, steps": (converted(), one_backward),
        "SLTT, sltt_ext, OnlineTrainer": (sltt_ext.convert(network()), online),
        "SLTT, sltt_ext, MultiStep": (MultiStep(sltt_ext.convert(network())), multi_step),
        "SLTT, sltt_ext, OnlineTrainer, chunk=5": (
            MultiStep(sltt_ext.convert(network())),
            partial(online, chunk=5),
        ),
    }


def iteration(net: nn.Module, run: Callable[..., None], x_seq: torch.Tensor, target: torch.Tensor) -> None:
    net.zero_grad()
    run(net, x_seq, target)


def measure(name: str, make: Callable[[], nn.Module]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    images, target = torch.rand(BATCH, 1, 28, 28), torch.arange(BATCH) % 10
    x_seq = spikegen.rate(images, num_steps=TIME_STEPS)
    nets = contenders(make)
    seconds = interleaved_medians(
        {key: partial(iteration, net, run, x_seq, target) for key, (net, run) in nets.items()},
        REPEATS,
        clock=time.process_time,
    )
    peaks = {
        key: peak_activation_bytes(partial(iteration, net, run, x_seq, target), net)
        for key, (net, run) in nets.items()
    }
    return [
        {
            "network": name,
            "contender": key,
            "seconds": round(seconds[key], 4),
            "times_as_fast_as_bptt": round(seconds[BASELINE] / seconds[key], 2),
            "times_as_fast_as_own_steps": round(seconds["SLTT, sltt_ext, steps"] / seconds[key], 2),
            "peak_activation_mb": round(peaks[key] / 1e6, 1),
        }
        for key in nets
    ]


def main() -> None:
    rows = [*measure("fully connected", fully_connected), *measure("convolutional", convolutional)]
    write_results("tutorials", rows, framework="snntorch")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main()
