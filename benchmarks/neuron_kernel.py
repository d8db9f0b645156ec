"""The fused neuron on a CUDA device: bytes per second, against a plain copy and SpikingJelly's own LIF.

It measures training forward, backward and evaluation of a LIF neuron over T steps, for every size and dtype. A contender's
share of the copy bandwidth is (bytes that have to move) / (its time) / (bandwidth of a copy of the same size,
measured in the same round). These bytes have to move, for each element of x: training forward reads x, and writes s and
the derivative. Backward reads two and writes one. Evaluation reads x and writes s. State comes on top and is
not counted, which is to our disadvantage where T is small.

    python benchmarks/neuron_kernel.py            results/neuron_kernel.csv and .png, named after the device
    python benchmarks/neuron_kernel.py --smoke    on the CPU, small, to a folder of its own: shows that it runs
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

from sltt_ext.functional import multi_step_lif
from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend

TIME_STEPS = [6, 1, 32, 4, 16]
ELEMENTS = [2**k for k in (24, 20, 26, 18, 22)]
"""From the most telling to the least: what is cut short has those that come first."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDS = 15
ARRAYS_MOVED = {"forward": 3, "backward": 3, "evaluation": 2}

Neuron = Callable[[Tensor], Tensor]


def contenders(device: str) -> dict[str, Neuron]:
    """What runs here: functions from ``x_seq`` to spikes, each from a state at rest."""
    found: dict[str, Neuron] = {"sltt_ext torch": lambda x_seq: multi_step_lif(x_seq, backend="torch")[0]}
    for backend in (CupyBackend, NvrtcBackend):
        if device != "cpu" and backend.launcher.problem(0) is None:
            run = functools.partial(multi_step_lif, backend=backend.name)
            found[f"sltt_ext {backend.name}"] = lambda x_seq, run=run: run(x_seq)[0]  # type: ignore[misc]
    return found | spikingjelly_contenders(device)


def spikingjelly_contenders(device: str) -> dict[str, Neuron]:
    """SpikingJelly's multi-step LIF with each of its backends. Version 2.0 chooses one by itself."""
    if importlib.util.find_spec("spikingjelly") is None:
        print("SpikingJelly is not installed: measured without it")
        return {}
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    version = measure.version_of("spikingjelly")
    backends: list[str | None] = [None]
    if hasattr(neuron.LIFNode(), "backend"):
        backends = ["torch"] if device == "cpu" else ["torch", "cupy"]
    found = {}
    for backend in backends:
        node = neuron.LIFNode(step_mode="m", **({} if backend is None else {"backend": backend})).to(device)

        def run(x_seq: Tensor, node: Any = node) -> Tensor:
            node.reset()
            return node(x_seq)  # type: ignore[no-any-return]

        found[f"SpikingJelly {version}{'' if backend is None else ' ' + backend}"] = run
    return found


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # keeps the device busy while work is queued: what counts is its time alone
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def phases(neuron: Neuron, x_seq: Tensor, grad: Tensor, device: str) -> dict[str, float]:
    """Seconds of one training forward, its backward, and one evaluation."""
    x_seq.requires_grad_(True)
    outputs: list[Tensor] = []
    forward = seconds(lambda: outputs.append(neuron(x_seq)), device)
    backward = seconds(lambda: torch.autograd.grad(outputs[0], x_seq, grad), device)
    outputs.clear()
    x_seq.requires_grad_(False)
    with torch.no_grad():
        evaluation = seconds(lambda: neuron(x_seq), device)
    return {"forward": forward, "backward": backward, "evaluation": evaluation}


def measure_one(
    time_steps: int, elements: int, dtype: torch.dtype, device: str, rounds: int
) -> list[dict[str, Any]]:
    """All contenders at one size, in turns with the copy."""
    neurons_per_step = elements // time_steps // 16 * 16
    x_seq, grad, target = (
        torch.randn(time_steps, neurons_per_step, device=device, dtype=dtype) for _ in range(3)
    )
    runs = contenders(device)
    copies: list[float] = []
    taken: dict[tuple[str, str], list[float]] = {}
    for name in list(runs):
        try:
            phases(runs[name], x_seq, grad, device)
        except Exception as error:
            print(f"{name} cannot run in {dtype}: {type(error).__name__}: {error}")
            del runs[name]
    for _ in range(rounds):
        copies.append(seconds(lambda: target.copy_(grad), device))
        for name, neuron in runs.items():
            for phase, duration in phases(neuron, x_seq, grad, device).items():
                taken.setdefault((name, phase), []).append(duration)
    copy_rate = 2 * grad.nbytes / statistics.median(copies)
    return [
        {
            "time_steps": time_steps,
            "elements": elements,
            "dtype": str(dtype).removeprefix("torch."),
            "phase": phase,
            "contender": name,
            "microseconds": round(1e6 * (median := statistics.median(durations)), 1),
            "copy_gigabytes_per_second": round(copy_rate / 1e9, 1),
            "share_of_copy_bandwidth": round(ARRAYS_MOVED[phase] * grad.nbytes / median / copy_rate, 3),
        }
        for (name, phase), durations in taken.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the copy bandwidth over elements, one panel per phase and dtype, at the longest T."""
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    longest = max(row["time_steps"] for row in rows)
    figure, panels = pyplot.subplots(
        len(dtypes), len(ARRAYS_MOVED), figsize=(12, 3.2 * len(dtypes)), sharex=True, squeeze=False
    )
    for (dtype, phase), panel in zip(itertools.product(dtypes, ARRAYS_MOVED), panels.flat):
        chosen = [
            row for row in rows if (row["dtype"], row["phase"], row["time_steps"]) == (dtype, phase, longest)
        ]
        for name in dict.fromkeys(row["contender"] for row in chosen):
            points = [row for row in chosen if row["contender"] == name]
            panel.plot(
                [row["elements"] for row in points],
                [row["share_of_copy_bandwidth"] for row in points],
                marker="o",
                label=name,
            )
        panel.set(xscale="log", title=f"{phase}, {dtype}, T = {longest}")
        panel.axhline(1, color="grey", linewidth=0.8)
    panels[0][0].legend(fontsize="small")
    figure.supylabel("share of the copy bandwidth")
    figure.supxlabel("elements (T x N)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The fused neuron on a CUDA device.")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, small, in a moment")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder for table and plot")
    options = parser.parse_args()
    device = "cpu" if options.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --smoke runs on the CPU")
    if options.smoke and options.output == measure.RESULTS:
        raise SystemExit("--smoke needs --output: its figures mean nothing and are not to be kept")
    sizes = [(4, 2**10)] if options.smoke else list(itertools.product(TIME_STEPS, ELEMENTS))
    rows: list[dict[str, Any]] = []
    measure.RESULTS = options.output
    for (time_steps, elements), dtype in itertools.product(sizes, DTYPES):
        own = measure_one(time_steps, elements, dtype, device, rounds=2 if options.smoke else ROUNDS)
        rows += own
        shares = ", ".join(
            f"{row['contender']} {row['phase']} {row['share_of_copy_bandwidth']}" for row in own
        )
        print(f"{time_steps} steps, {elements} elements, {dtype}: {shares}", flush=True)
        measure.write_results("neuron_kernel", rows, device, show=False, say=False)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
    else:
        plot(rows, options.output / "neuron_kernel.png")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="spikingjelly")
    main()
