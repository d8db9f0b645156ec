"""Time and memory of the possible plans for a network, and which of them the trainer takes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sltt_ext.analysis.memory import peak_activation_bytes
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.analysis.timing import Costs, device_name, interleaved_seconds, synchronised_clock
from sltt_ext.conversion import convert
from sltt_ext.errors import ConfigurationError
from sltt_ext.methods import COMPARED, GradientTrainer, Method, method_named
from sltt_ext.online import OnlineTrainer
from sltt_ext.online.objective import LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.online.plan import Way

__all__ = ["PlanCost", "Plans", "plans"]

_AT_MOST = 60
"""Iterations until a plan is decided; it takes about twenty."""


@dataclass(frozen=True)
class PlanCost:
    """Time and memory of one training iteration (forward and backward, no update) of one method under one plan.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"``.
        plan: How it is run, in words.
        is_taken: Whether `OnlineTrainer` takes this plan.
        seconds: The median over the repetitions.
        relative_seconds: Relative to the first row.
        peak_bytes: The most bytes in use at the same time: activations, states, gradients.
        relative_bytes: Relative to the first row.
    """

    method: str
    plan: str
    is_taken: bool
    seconds: float
    relative_seconds: float
    peak_bytes: int
    relative_bytes: float


class Plans(Costs[PlanCost]):
    """What `plans` measured: one row for each method and plan."""


def plans(
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    methods: Sequence[str] = COMPARED,
    memory_budget: int | str | None = None,
    repeats: int = 5,
    time_dim: TimeDim | None = None,
    output: Output = None,
    on_progress: Callable[[str], Any] = lambda what: None,
) -> Plans:
    """Time and memory of an iteration under each plan that a trainer tries, and which one it takes, on copies of ``net``.

    All plans of all methods take turns, so that other work on the machine slows all of them alike.

    Args:
        net: A network that `convert` knows, at rest (between sequences).
        x: One batch, as `OnlineTrainer` takes it.
        target: Its target.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T.
        methods: ``"bptt"``, ``"sltt"``, ``"sltt-2"``, .... The others are compared with the first.
        memory_budget: As in `OnlineTrainer`.
        repeats: How often each is timed, after one run that is not timed.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.
        on_progress: Called before every iteration with a text that says what it is for.

    Raises:
        ConfigurationError: If an option cannot work.
    """
    if repeats < 1 or not methods:
        raise ConfigurationError("plans are measured with at least one method and one repetition")
    runs: dict[tuple[str, str, bool], Callable[[], None]] = {}
    for name in methods:
        method = method_named(name).for_at_most(time_steps)
        own = copy.deepcopy(without_multi_step(net))
        if method.is_bptt:
            trainer = method.trainer(own, loss_fn, time_steps, time_dim=time_dim, output=output)
            runs[method.name, "all steps in memory", False] = _Run(trainer, x, target)
            continue
        online = OnlineTrainer(
            convert(own),
            loss_fn,
            time_steps,
            method.k,
            time_dim=time_dim,
            output=output,
            memory_budget=memory_budget,
        )
        runs |= _of_trainer(method, online, x, target, on_progress)
    peaks = {}
    for key, run in runs.items():
        on_progress(f"memory: {key[0]}, {key[1]}")
        peaks[key] = peak_activation_bytes(run)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    clock = time.perf_counter if device.type == "cpu" else synchronised_clock
    seconds = interleaved_seconds(
        {str(number): run for number, run in enumerate(runs.values())},
        repeats,
        clock,
        lambda: on_progress("time, in turns"),
    )
    medians = dict(zip(runs, (statistics.median(values) for values in seconds.values())))
    first = next(iter(runs))
    rows = [
        PlanCost(*key, medians[key], medians[key] / medians[first], peaks[key], peaks[key] / peaks[first])
        for key in runs
    ]
    return Plans(tuple(rows), time_steps, repeats, device_name(str(device)))


@dataclass
class _Run:
    """A call runs one iteration, for an `OnlineTrainer` in the given way."""

    trainer: GradientTrainer
    x: Any
    target: Any
    way: Way | None = None

    def __call__(self) -> None:
        if isinstance(self.trainer, OnlineTrainer):
            self.trainer._planner.hold(self.way)
        self.trainer.net.zero_grad()
        self.trainer.forward_backward(self.x, self.target)


def _of_trainer(
    method: Method, online: OnlineTrainer, x: Any, target: Any, on_progress: Callable[[str], Any]
) -> dict[tuple[str, str, bool], Callable[[], None]]:
    """The ways that a trainer tries, once it has decided."""
    decide, planner = _Run(online, x, target), online._planner
    for _ in range(_AT_MOST):
        if online.plan.is_decided:
            break
        on_progress(f"{method.name} tries {online.plan.measuring}")
        decide()
    taken = online.plan.how
    runs: dict[tuple[str, str, bool], Callable[[], None]] = {}
    for way in sorted({*planner.ways(), planner.taken()}, key=lambda way: (way.chunk, way.packs, way.caches)):
        planner.hold(way)
        how = online.plan.how
        runs[method.name, how, how == taken] = _Run(online, x, target, way)
    planner.hold(None)
    return runs
