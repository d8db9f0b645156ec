"""The neuron alone: training forward and backward over [T=8, N=32, C=64, 16, 16] on the CPU.

SpikingJelly's SLTTLIFNode steps through the data. Ours is compared with it, stepping and multi-step, as PyTorch operators
and compiled (``backend="inductor"``), in float32 and bfloat16. "paper" is the neuron of the paper's experiments. Each
contender has a process of its own, since what one leaves in the allocator changes the other's page faults. The
processes take turns. Each first frees one 30 MB tensor, as any training process has done. From then on glibc
keeps freed memory instead of returning it to the system after every step.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection

import torch
from measure import write_results
from rich.progress import track
from spikingjelly.activation_based import neuron, surrogate

import sltt_ext

TIME_STEPS, SHAPE = 8, (32, 64, 16, 16)
PAPER = {"tau": 1.1, "decay_input": False}
NEURONS = [
    ("Sigmoid", "hard", {}),
    ("Sigmoid", "soft", {}),
    ("ATan", "hard", {}),
    ("ATan", "soft", {}),
    ("PiecewiseQuadratic", "hard", {}),
    ("PiecewiseQuadratic", "soft", {}),
    ("PiecewiseQuadratic", "paper", PAPER),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEER = "spikingjelly SLTTLIFNode, steps"
CONTENDERS = {
    "sltt_ext, steps": ("torch", "s"),
    "sltt_ext, multi-step": ("torch", "m"),
    "sltt_ext compiled, steps": ("inductor", "s"),
    "sltt_ext compiled, multi-step": ("inductor", "m"),
}
ROUNDS, REPEATS = 7, 9


@lru_cache(1)
def make_run(contender: str, neuron_index: int, dtype: torch.dtype) -> Callable[[], None]:
    surrogate_name, reset, settings = NEURONS[neuron_index]
    cls = neuron.SLTTLIFNode if contender == PEER else neuron.LIFNode
    node = cls(
        v_reset=0.0 if reset == "hard" else None,
        detach_reset=True,
        surrogate_function=getattr(surrogate, surrogate_name)(),
        **settings,
    )
    if contender != PEER:
        backend, node.step_mode = CONTENDERS[contender]
        sltt_ext.convert(node, backend=backend)
    torch.manual_seed(0)
    x_seq, grad_seq = torch.randn(2, TIME_STEPS, *SHAPE).to(dtype)

    def steps() -> None:
        node.reset()
        for x, grad in zip(x_seq, grad_seq):
            node(x.detach().requires_grad_()).backward(grad)

    def multi_step() -> None:
        node.reset()
        node(x_seq.detach().requires_grad_()).backward(grad_seq)

    return multi_step if node.step_mode == "m" else steps


def serve(contender: str, requests: Connection) -> None:
    """Answer each request (neuron, dtype) with the median seconds of some runs, until None comes."""
    warnings.filterwarnings("ignore")
    torch.ones(7_500_000)
    while (asked := requests.recv()) is not None:
        neuron_index, dtype = asked
        run = make_run(contender, neuron_index, DTYPES[dtype])
        for _ in range(3):
            run()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        requests.send(statistics.median(seconds))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    ends = {}
    for contender in (PEER, *CONTENDERS):
        ends[contender], theirs = context.Pipe()
        context.Process(target=serve, args=(contender, theirs), daemon=True).start()
        theirs.close()  # a process that dies ends its connection
    cases = [(dtype, index) for dtype in DTYPES for index in range(len(NEURONS))]
    rows = []
    for dtype, index in track(cases, description="neuron"):
        seconds: dict[str, list[float]] = {contender: [] for contender in ends}
        for _ in range(ROUNDS):
            for contender, end in ends.items():
                end.send((index, dtype))
                seconds[contender].append(end.recv())
        medians = {contender: statistics.median(values) for contender, values in seconds.items()}
        rows += [
            {
                "dtype": dtype,
                "surrogate": NEURONS[index][0],
                "reset": NEURONS[index][1],
                "contender": contender,
                "milliseconds": round(1e3 * median, 2),
                "times_as_fast": round(medians[PEER] / median, 2),
            }
            for contender, median in medians.items()
        ]
    for end in ends.values():
        end.send(None)
    write_results("neuron", rows)


if __name__ == "__main__":
    main()
