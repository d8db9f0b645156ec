"""Time and memory of a training iteration by method, and the name of the machine."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from sltt_ext.analysis.memory import peak_activation_bytes
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.errors import ConfigurationError
from sltt_ext.methods import COMPARED, GradientTrainer, method_named
from sltt_ext.online.objective import LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = [
    "Benchmark",
    "Costs",
    "IterationCost",
    "benchmark",
    "device_name",
    "interleaved_medians",
    "interleaved_seconds",
    "synchronised_clock",
]


@dataclass(frozen=True)
class IterationCost:
    """Time and memory of one training iteration (forward and backward, no update) of one method.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"``.
        seconds: The median over the repetitions.
        relative_seconds: Relative to the first method.
        peak_bytes: Peak memory, as `memory_profile` counts it.
        relative_bytes: Relative to the first method.
        fastest_seconds: The shortest of the repetitions.
        slowest_seconds: The longest of them.
    """

    method: str
    seconds: float
    relative_seconds: float
    peak_bytes: int
    relative_bytes: float
    fastest_seconds: float
    slowest_seconds: float


Row = TypeVar("Row")


@dataclass(frozen=True)
class Costs(Generic[Row]):
    """Costs of iterations that were measured in turns.

    Attributes:
        rows: One for each method or plan.
        time_steps: T.
        repeats: How often each was timed.
        device: Name of the device.
    """

    rows: tuple[Row, ...]
    time_steps: int
    repeats: int
    device: str

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])  # type: ignore[call-overload]


class Benchmark(Costs[IterationCost]):
    """What `benchmark` measured: one row for each method."""


def benchmark(
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    methods: Sequence[str] = COMPARED,
    repeats: int = 11,
    time_dim: TimeDim | None = None,
    output: Output = None,
    on_run: Callable[[], Any] = lambda: None,
) -> Benchmark:
    """Time and memory of one training iteration of each method, on copies of ``net``.

    The methods take turns, so that other work on the machine slows all of them alike. SLTT steps through time with
    ``chunk=1``; BPTT gives a multi-step network all steps in one call.

    Args:
        net: A network that `convert` knows, at rest (between sequences).
        x: One batch, as `OnlineTrainer` takes it.
        target: Its target.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T.
        methods: ``"bptt"``, ``"sltt"``, ``"sltt-2"``, .... The others are compared with the first.
        repeats: How often each is timed, after one run that is not timed.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.
        on_run: Called after every run.
    """
    if repeats < 1 or not methods:
        raise ConfigurationError("a benchmark needs at least one method and one repetition")
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    runs, peaks = {}, {}
    for name in methods:
        method = method_named(name)
        own = copy.deepcopy(without_multi_step(net))
        trainer = method.for_at_most(time_steps).trainer(
            own, loss_fn, time_steps, time_dim=time_dim, output=output
        )
        runs[method.name] = run = partial(_iteration, trainer, x, target)
        peaks[method.name] = peak_activation_bytes(run)
        on_run()
    clock = time.perf_counter if device.type == "cpu" else synchronised_clock
    seconds = interleaved_seconds(runs, repeats, clock, on_run)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(runs))
    rows = [
        IterationCost(
            name, medians[name], medians[name] / medians[first], peaks[name], peaks[name] / peaks[first],
            min(values), max(values),
        )
        for name, values in seconds.items()
    ]  # fmt: skip
    return Benchmark(tuple(rows), time_steps, repeats, device_name(str(device)))


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run, after one to warm up. The runs take turns, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        on_run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
            on_run()
    return seconds


def interleaved_medians(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """The medians of `interleaved_seconds`."""
    seconds = interleaved_seconds(runs, repeats, clock, on_run)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_name(device: str = "cpu") -> str:
    """Name of a device, and for the CPU also the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model = platform.processor()
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    threads = torch.get_num_threads()
    return f"{model or platform.machine()}, {threads} thread{'s' * (threads != 1)}"


def _iteration(trainer: GradientTrainer, x: Any, target: Any) -> None:
    trainer.net.zero_grad()
    trainer.forward_backward(x, target)


def synchronised_clock() -> float:
    """The time in seconds, after a CUDA device has finished its work."""
    torch.cuda.synchronize()
    return time.perf_counter()
