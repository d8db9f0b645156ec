"""The neuron alone: training forward and backward over [T=8, N=32, C=64, 16, 16] on the CPU.

SpikingJelly's SLTTLIFNode stepping through the data against ours, stepping and multi-step. Each
contender runs in a process of its own, since what one leaves in the allocator changes the other's
page faults; the processes take turns. Each first frees one 30 MB tensor, as any training process has done:
from then on glibc keeps freed memory instead of returning it to the system after every step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from measure import write_results
from spikingjelly.activation_based import neuron, surrogate

import sltt_ext

TIME_STEPS, SHAPE = 8, (32, 64, 16, 16)
SURROGATES = ["Sigmoid", "ATan", "PiecewiseQuadratic"]
RESETS = {"hard": 0.0, "soft": None}
CONTENDERS = ["spikingjelly SLTTLIFNode, steps", "sltt_ext, steps", "sltt_ext, multi-step"]
ROUNDS, REPEATS = 5, 9


def make_run(contender: str, surrogate_name: str, reset: str) -> Callable[[], None]:
    node = neuron.SLTTLIFNode(
        v_reset=RESETS[reset], detach_reset=True, surrogate_function=getattr(surrogate, surrogate_name)()
    )
    if contender != CONTENDERS[0]:
        node = neuron.LIFNode(
            v_reset=RESETS[reset], detach_reset=True, surrogate_function=getattr(surrogate, surrogate_name)()
        )
        sltt_ext.convert(node)
    torch.manual_seed(0)
    x_seq, grad_seq = torch.randn(TIME_STEPS, *SHAPE), torch.randn(TIME_STEPS, *SHAPE)

    def steps() -> None:
        node.reset()
        for x, grad in zip(x_seq, grad_seq):
            node(x.detach().requires_grad_()).backward(grad)

    def multi_step() -> None:
        node.reset()
        node(x_seq.detach().requires_grad_()).backward(grad_seq)

    if contender != CONTENDERS[2]:
        return steps
    node.step_mode = "m"
    return multi_step


def measure_one(contender: str, surrogate_name: str, reset: str) -> float:
    torch.ones(7_500_000)
    run = make_run(contender, surrogate_name, reset)
    for _ in range(3):
        run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    rows = []
    for surrogate_name in SURROGATES:
        for reset in RESETS:
            seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
            for _ in range(ROUNDS):
                for contender in CONTENDERS:
                    command = [sys.executable, __file__, contender, surrogate_name, reset]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    seconds[contender].append(json.loads(done.stdout.splitlines()[-1]))
            medians = {contender: statistics.median(values) for contender, values in seconds.items()}
            rows += [
                {
                    "surrogate": surrogate_name,
                    "reset": reset,
                    "contender": contender,
                    "milliseconds": round(1e3 * median, 2),
                    "times_as_fast": round(medians[CONTENDERS[0]] / median, 2),
                }
                for contender, median in medians.items()
            ]
    write_results("neuron", rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if len(sys.argv) > 1:
        print(json.dumps(measure_one(*sys.argv[1:])))
    else:
        main()
