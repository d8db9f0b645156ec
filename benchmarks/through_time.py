"""The neuron alone under BPTT on the CPU: the frameworks' own, and ours with ``through_time``.

It measures training forward and backward over [T=8, N=16, C=64, 16, 16], with one backward for all steps: SpikingJelly's
multi-step neurons in PyTorch, snnTorch's Leaky in its loop, and the fused neurons as PyTorch operators and compiled. Contenders
take turns. The ratio is the time divided by the framework's in the same round, as the median over rounds. Saved bytes are what
autograd keeps between forward and backward, per byte of the input.

python benchmarks/through_time.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import snntorch
import torch
from measure import version_of, write_results
from rich.progress import track
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from sltt_ext import functional
from sltt_ext.surrogate import Surrogate

SHAPE = (8, 16, 64, 16, 16)
RESETS = {"hard": 0.0, "soft": None}
ATAN = Surrogate("atan", (2.0,))
ROUNDS, WARM_UP = 9, 2

Run = Callable[[Tensor], Tensor]


def spikingjelly_contenders(kind: str, v_reset: float | None) -> dict[str, Run]:
    cls = {"IF": neuron.IFNode, "LIF": neuron.LIFNode, "PLIF": neuron.ParametricLIFNode}[kind]
    node = cls(step_mode="m", v_reset=v_reset, surrogate_function=surrogate.ATan(2.0))
    if hasattr(node, "backend"):
        node.backend = "torch"
    options: dict[str, Any] = {"v_reset": v_reset, "surrogate": ATAN, "through_time": True}

    def framework(x_seq: Tensor) -> Tensor:
        node.reset()
        spikes: Tensor = node(x_seq)
        return spikes

    def ours(x_seq: Tensor, backend: str) -> Tensor:
        if kind == "PLIF":
            return functional.multi_step_plif(x_seq, node.w, backend=backend, **options)[0]
        run = functional.multi_step_if if kind == "IF" else functional.multi_step_lif
        return run(x_seq, backend=backend, **options)[0]

    return {
        "framework": framework,
        "sltt_ext": lambda x_seq: ours(x_seq, "torch"),
        "sltt_ext compiled": lambda x_seq: ours(x_seq, "inductor"),
    }


def snntorch_contenders(reset_mechanism: str) -> dict[str, Run]:
    node = snntorch.Leaky(beta=0.9, reset_mechanism=reset_mechanism, spike_grad=snntorch.surrogate.atan(2.0))

    def framework(x_seq: Tensor) -> Tensor:
        mem, spikes = node.init_leaky(), []
        for x in x_seq:
            spike, mem = node(x, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    def ours(x_seq: Tensor) -> Tensor:
        return functional.multi_step_leaky(
            x_seq, beta=0.9, reset_mechanism=reset_mechanism, surrogate=ATAN, through_time=True
        )[0]

    return {"framework": framework, "sltt_ext": ours}


def seconds(run: Run, x_seq: Tensor, grad: Tensor) -> float:
    x_seq.grad = None
    start = time.perf_counter()
    run(x_seq).backward(grad)
    return time.perf_counter() - start


def saved_bytes(run: Run, x_seq: Tensor) -> int:
    """Bytes of memory that a forward keeps for its backward, each counted once."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x_seq)
    return sum(saved.values())


def measure(contenders: dict[str, Run]) -> list[dict[str, Any]]:
    """Milliseconds, ratio and saved bytes of each contender."""
    torch.manual_seed(0)
    x_seq, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    kept = {name: saved_bytes(run, x_seq) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + ROUNDS):
        for name, run in contenders.items():
            duration = seconds(run, x_seq, grad)
            if turn >= WARM_UP:
                times[name].append(duration)
    return [
        {
            "contender": name,
            "milliseconds": round(1e3 * statistics.median(durations), 2),
            "ratio": round(
                statistics.median(own / peer for own, peer in zip(durations, times["framework"])), 2
            ),
            "saved_bytes_per_input_byte": round(kept[name] / x_seq.nbytes, 2),
        }
        for name, durations in times.items()
    ]


def main() -> None:
    cases = [
        ("SpikingJelly", kind, reset, spikingjelly_contenders(kind, v_reset))
        for kind in ("IF", "LIF", "PLIF")
        for reset, v_reset in RESETS.items()
    ]
    cases += [("snnTorch", "Leaky", reset, snntorch_contenders(reset)) for reset in ("zero", "subtract")]
    rows = [
        {"framework": framework, "neuron": kind, "reset": reset, **row}
        for framework, kind, reset, contenders in track(cases, description="through time")
        for row in measure(contenders)
    ]
    versions = {"snntorch": version_of("snntorch")}
    write_results("through_time", [{**row, **versions} for row in rows])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
