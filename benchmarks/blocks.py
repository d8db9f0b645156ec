"""Peak memory of an iteration block by block, step by step, and by BPTT, at the paper's size, with fake tensors.

python benchmarks/blocks.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import until_decided, write_results
from peers.contenders import bptt_steps
from peers.networks import LARGE, Network, Task
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes

T = 6
SPIKING_RESNET34 = Network(
    "SpikingJelly's spiking_resnet34",
    lambda maker: spiking_resnet.spiking_resnet34(spiking_neuron=maker, surrogate_function=surrogate.ATan()),
    (3, 224, 224),
    256,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "spikes as bits": {"chunk": 1, "pack_spikes": True, "cache_invariant": False},
    'memory_budget="least"': {"memory_budget": "least"},
}


def bptt(task: Task) -> tuple[Callable[[], Any], nn.Module]:
    """An iteration of BPTT, step by step, and its network."""
    net = task.network.build()
    return partial(bptt_steps, net, task, ()), net


def sltt(task: Task, options: dict[str, Any]) -> tuple[Callable[[], Any], nn.Module]:
    """An iteration of SLTT after its plan is decided, and its network."""
    net = sltt_ext.convert(task.network.build(), backend="torch")
    online = sltt_ext.OnlineTrainer(net, lambda output, target: task.loss(output), task.time_steps, **options)

    def run() -> None:
        net.zero_grad()
        online.forward_backward(task.x, task.target)

    run()
    until_decided(lambda: online.plan.is_decided, run)
    print(online.plan, flush=True)
    return run, net


def rows(network: Network) -> list[dict[str, Any]]:
    """The peaks of one network."""
    contenders: dict[str, Callable[[Task], tuple[Callable[[], Any], nn.Module]]] = {"BPTT, steps": bptt}
    contenders |= {f"SLTT, {name}": partial(sltt, options=options) for name, options in SETTINGS.items()}
    peaks = {}
    for name, prepare in contenders.items():
        with FakeTensorMode():
            run, net = prepare(network.task(T))
            net.zero_grad()
            peaks[name] = peak_activation_bytes(run, net)
    return [
        {
            "network": network.name,
            "batch": network.batch,
            "pixels": network.frame[-1],
            "contender": name,
            "time_steps": T,
            "peak_gib": round(peak / 2**30, 3),
            "to_bptt_steps": round(peak / peaks["BPTT, steps"], 4),
        }
        for name, peak in peaks.items()
    ]


def main() -> None:
    """Count, and write the results."""
    torch.set_num_threads(1)
    write_results("blocks", [row for network in (LARGE[0], SPIKING_RESNET34) for row in rows(network)])


if __name__ == "__main__":
    main()
