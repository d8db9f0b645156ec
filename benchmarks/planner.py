"""The trainer with the plan that it takes by itself, against BPTT: time, peak memory, and what the rule demands.

python benchmarks/planner.py                  everything; writes benchmarks/results/planner.csv
python benchmarks/planner.py --repeats 3      a quick look

All contenders of a network take turns. Over the repetitions, SLTT-1 draws each step equally often. ``least`` has
``memory_budget="least"``. ``fastest`` has ``memory_budget="0.8"``: the fastest plan that fits into that part of the memory.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import measure
import torch
from peers.contenders import bptt_sequence, bptt_steps
from peers.measurements import draws
from peers.networks import NF_RESNET34, Network, Task
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from spikingjelly.activation_based import functional, neuron
from torch import nn

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.analysis.timing import interleaved_medians
from sltt_ext.cli.bench import spiking_resnet18
from sltt_ext.online.schedule import Schedule


@dataclass
class Run:
    """Runs an iteration of a contender at each call."""

    net: nn.Module
    iterate: Callable[[], object]
    online: sltt_ext.OnlineTrainer | None = None

    def __call__(self) -> None:
        """Run an iteration, after the gradients of the last one are removed."""
        self.net.zero_grad()
        self.iterate()


class ResNet18(Network):
    """SpikingJelly's own, with batch norm, as `sltt bench` has it."""

    def build(self, node: Callable[..., nn.Module] = neuron.LIFNode, step_mode: str = "s") -> nn.Module:
        """The network in a step mode, with the same weights at every call."""
        torch.manual_seed(0)
        net = spiking_resnet18()
        functional.set_step_mode(net, step_mode)
        return net


RESNET18 = ResNet18("spiking ResNet-18", lambda maker: spiking_resnet18(), (3, 64, 64), 16)
CONVOLUTIONS = "convolutions alone, T in a call"
BUDGETS = {"least": "least", "fastest": "0.8"}
CASES = ((NF_RESNET34, 6, ("s", "m")), (RESNET18, 4, ("m",)))
BARS = {
    ("NF-ResNet-34", "SLTT", True): (0.40, 0.80),
    ("NF-ResNet-34", "SLTT-1", True): (0.22, 0.44),
    ("NF-ResNet-34", "SLTT-1", False): (0.18, 0.36),
    ("spiking ResNet-18", "SLTT", True): ("", 0.72),
}


def fixed(steps: Iterator[tuple[int, ...]]) -> Schedule:
    return lambda time_steps, generator: next(steps)


def online(
    task: Task, step_mode: str, k: int | None, full_output: bool, repeats: int, budget: str | None
) -> Run:
    """The trainer with its own options, once it has decided."""
    net = sltt_ext.convert(task.network.build(step_mode=step_mode))
    steps = cycle(draws(task.time_steps, k, repeats))
    trainer = sltt_ext.OnlineTrainer(
        net,
        lambda output, target: task.loss(output),
        task.time_steps,
        schedule=None if k is None else fixed(steps),
        full_output=full_output,
        memory_budget=budget,
    )
    run = Run(net, lambda: trainer.forward_backward(task.x, task.target), trainer)
    measure.until_decided(lambda: trainer.plan.is_decided, run)
    return run


def convolutions(net: nn.Module, task: Task) -> Callable[[], object]:
    """The convolutions of a multi-step network forward and backward, all steps in one call, and nothing else of it.

    A convolution that does not depend on time runs for one step, as SLTT evaluates it once. No plan can be faster than this.
    """
    seen: list[tuple[nn.Conv2d, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, _: seen.append((module, args[0].shape)))
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        net(task.x.expand(task.time_steps, *task.x.shape))
    functional.reset_net(net)
    for hook in hooks:
        hook.remove()
    calls = []
    for i, (module, shape) in enumerate(seen):
        images = task.x.shape[0] * (task.time_steps if i else 1)
        spikes = torch.rand(images, *shape[-3:]).gt(0.8).float().requires_grad_(i > 0)
        weight = module.weight.detach().clone().requires_grad_()
        run = partial(nn.functional.conv2d, spikes, weight, None, module.stride, module.padding)
        calls.append((run, torch.randn_like(run()), spikes, weight))

    def iteration() -> None:
        for run, gradient, *leaves in calls:
            for leaf in leaves:
                leaf.grad = None
            run().backward(gradient)

    return iteration


def contenders(
    network: Network, time_steps: int, step_modes: tuple[str, ...], repeats: int
) -> dict[str, Run]:
    task = network.task(time_steps)
    steps, sequence = network.build(step_mode="s"), network.build(step_mode="m")
    runs = {
        "BPTT, steps": Run(steps, lambda: bptt_steps(steps, task, ())),
        "BPTT, sequence": Run(sequence, lambda: bptt_sequence(sequence, task, ())),
        CONVOLUTIONS: Run(sequence, convolutions(sequence, task)),
    }
    for mode in step_modes:
        kind = {"s": "single-step", "m": "multi-step"}[mode]
        for k, full in ((None, True), (1, True), (1, False)):
            name = "SLTT" if k is None else f"SLTT-{k}" + ", tail skipped" * (not full)
            runs[f"{name}, {kind}"] = online(task, mode, k, full, repeats, None)
        for name, budget in BUDGETS.items():
            runs[f"SLTT, {kind}, {name}"] = online(task, mode, None, True, repeats, budget)
    return runs


def rows(
    network: Network, time_steps: int, step_modes: tuple[str, ...], repeats: int, on_run: Callable[[], object]
) -> list[dict[str, object]]:
    runs = contenders(network, time_steps, step_modes, repeats)
    peaks = {}
    for name, run in runs.items():
        if name != CONVOLUTIONS:
            peaks[name] = peak_activation_bytes(run, run.net)
        on_run()
    seconds = interleaved_medians(runs, repeats, on_run=on_run)
    found = []
    for name, run in runs.items():
        method, full = name.partition(",")[0], "tail" not in name
        bars = (
            BARS.get((network.name, method, full), ("", ""))
            if run.online and not name.endswith((*BUDGETS,))
            else ("", "")
        )
        found.append(
            {
                "network": network.name,
                "batch": network.batch,
                "pixels": network.frame[-1],
                "time_steps": time_steps,
                "contender": name,
                "plan": "" if run.online is None else run.online.plan.how,
                "repeats": repeats,
                "seconds": round(seconds[name], 4),
                "to_bptt_steps": round(seconds[name] / seconds["BPTT, steps"], 3),
                "bar_steps": bars[0],
                "to_bptt_sequence": round(seconds[name] / seconds["BPTT, sequence"], 3),
                "bar_sequence": bars[1],
                "peak_mb": round(peaks[name] / 1e6, 1) if name in peaks else "",
                "peak_to_bptt_steps": round(peaks[name] / peaks["BPTT, steps"], 3) if name in peaks else "",
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, default=12, help="a multiple of six has every draw of SLTT-1 alike"
    )
    parser.add_argument("--only", choices=[network.name for network, *_ in CASES])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, object]] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for network, time_steps, step_modes in CASES:
            if options.only not in (None, network.name):
                continue
            number = 3 + (3 + len(BUDGETS)) * len(step_modes)
            task = progress.add_task(network.name, total=number * (options.repeats + 2))
            found += rows(
                network, time_steps, step_modes, options.repeats, lambda task=task: progress.advance(task)
            )  # type: ignore[misc]
    measure.write_results("planner", found)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="spikingjelly")
    main()
