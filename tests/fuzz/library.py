"""The library's part: a case as a user of the library runs it, through the trainer or through ``over_time``."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from fuzz import networks_snntorch
from fuzz.description import SEQUENCE_LOSSES, Case
from fuzz.hooks import everywhere
from fuzz.networks import Net, TimeInside, WithState
from fuzz.reference import FRAMEWORKS
from fuzz.training import (
    Around,
    Batch,
    Iteration,
    LossFn,
    backward,
    batch,
    chosen,
    loss_fn,
    loss_of_calls,
    observed,
    optimizer,
    output_of,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sltt_ext
from sltt_ext.errors import SLTTWarning
from sltt_ext.online import stopwatch
from sltt_ext.online.options import UNASKED
from sltt_ext.snntorch import MultiStep, Stateful

_EXCUSE_NOTHING = (  # and the values are right all the same
    "tensors are kept from step to step as plain attributes",
    "batch norms take their statistics over",
    "chunk=",  # that does not divide T
    "memory_budget=",
)


@dataclass(frozen=True)
class Run:
    """What the library made of a case.

    Attributes:
        steps: Those that each iteration back-propagated; of several calls, counted on from call to call.
        error: What ended it early.
        warned: What it said of it in warnings.
    """

    iterations: list[Iteration]
    steps: list[tuple[int, ...]]
    error: Exception | None
    warned: list[str]


def run(case: Case, fresh: bool) -> Run:
    """The iterations of ``case``; each with a trainer or a loop over time of its own if ``fresh``, which can learn nothing."""
    iterations: list[Iteration] = []
    steps: list[tuple[int, ...]] = []
    ticks = itertools.count()  # a clock of its own: a case is the same at any time
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.object(stopwatch, "now", partial(next, ticks)),
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SLTTWarning)
        error: Exception | None = None
        net = FRAMEWORKS[case.framework].build(case)
        try:
            around = Around()
            update = optimizer(net, around)
            way: Any = {"trainer": _Trainers, "over_time": _OverTime}[case.options.way]
            train = way(case, net, around, update, fresh)
            for iteration in range(case.iterations):
                torch.default_generator.manual_seed(case.seed + iteration)
                data = batch(case, iteration)
                loss_on = case.loss_on(iteration)
                update.zero_grad()
                with everywhere(case.everywhere, net, net.record):
                    selected, loss, output = train(data, loss_on, loss_fn(case, net, around, data.x))
                steps.append(selected)
                iterations.append(observed(case, net, around, data, loss, output, loss_on))
                update.step()
        except Exception as raised:  # all of them are looked at
            error = raised
    steps += [_first_steps(case)] * (case.iterations - len(steps))
    said = [str(one.message)[:160] for one in caught if issubclass(one.category, SLTTWarning)]
    said = [message for message in said if not message.startswith(_EXCUSE_NOTHING)]
    return Run(iterations, steps, error, said)


def _first_steps(case: Case) -> tuple[int, ...]:
    """Some steps that an iteration may select."""
    select, time_steps = case.options.select, case.options.time_steps
    drawn = (select or time_steps) * case.options.window if isinstance(select, int) else time_steps
    first = select if isinstance(select, tuple) else range(min(drawn, time_steps))
    return tuple(call * time_steps + t for call in range(case.options.calls) for t in first)


def _converted(case: Case, net: Net) -> nn.Module:
    for module in net.modules():
        if isinstance(module, networks_snntorch.NormsOfSteps):
            module.whole = case.form == "multi"
    if case.form == "stateful":
        return Stateful(sltt_ext.convert(WithState(net), temporal=case.options.temporal))
    sltt_ext.convert(net, temporal=case.options.temporal)
    return MultiStep(net) if case.framework == "snntorch" and case.form == "multi" else net


def _selection(case: Case) -> dict[str, Any]:
    """The options that select steps."""
    select = case.options.select
    if isinstance(select, tuple):
        counted = {t: case.count(t) for t in select}
        return {"schedule": lambda time_steps, generator: counted if case.options.counts else list(select)}
    return {"k": select}


class _Loss:
    """The loss of the iteration that runs."""

    of_iteration: LossFn
    loss_on: str

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        return loss_of_calls(self.loss_on, self.of_iteration, [output], target)


class _LossWithHead(nn.Module):
    """The same as a module that shows its parameters."""

    def __init__(self, loss: _Loss, around: Around):
        super().__init__()
        self.loss, self.head = loss, around

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return self.loss(output, target)


class _Trainers:
    """An `sltt_ext.OnlineTrainer`, or several that take turns."""

    def __init__(self, case: Case, net: Net, around: Around, update: torch.optim.Optimizer, fresh: bool):
        self.case, self.net, self.update, self.fresh = case, net, update, fresh
        self.network = _converted(case, net)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.loss = _Loss()
        self.shown = _LossWithHead(self.loss, around) if case.options.loss == "head" else self.loss
        self.trainers: dict[str, sltt_ext.OnlineTrainer] = {}

    def __call__(self, data: Batch, loss_on: str, loss: LossFn) -> tuple[tuple[int, ...], Tensor, Any]:
        if loss_on not in self.trainers or self.fresh:
            self.trainers[loss_on] = self._trainer("sequence" if loss_on in SEQUENCE_LOSSES else loss_on)
        self.loss.of_iteration, self.loss.loss_on = loss, loss_on
        result = self.trainers[loss_on].forward_backward(data.given(self.case), data.target)
        return result.time_steps, result.loss, result.output

    def _trainer(self, loss_on: Any) -> sltt_ext.OnlineTrainer:
        options = self.case.options
        return sltt_ext.OnlineTrainer(
            self.network,
            self.shown,
            options.time_steps,
            **_selection(self.case),
            generator=self.generator,
            chunk=UNASKED if options.pack_spikes == "auto" else options.chunk,
            memory_budget=options.memory_budget,
            scale=options.scale,
            time_dim={"time 0": 0, "time 1": 1}.get(options.frames),
            output=output_of(self.case),
            full_output=options.full_output,
            backward=backward(self.case, self.net),
            loss_on=loss_on,
            target_time_dim=options.target_time_dim,
            on_step=self._on_step if options.on_step else None,
            cache_invariant=options.cache_invariant,
            pack_spikes=options.pack_spikes,
        )

    def _on_step(self, t: int) -> None:
        self.update.step()
        self.update.zero_grad()


class _OverTime:
    """A network over time, one or several calls of it, and an ordinary backward."""

    def __init__(self, case: Case, net: Net, around: Around, update: torch.optim.Optimizer, fresh: bool):
        self.case, self.around, self.fresh = case, around, fresh
        self.network = _converted(case, net)
        if case.options.inside:
            self.network = TimeInside(case, self.network, around.behind)
        self.generator, self.same = (torch.Generator().manual_seed(case.seed) for _ in range(2))
        self.backward: Callable[[Tensor], Any] = backward(case, net) or (lambda loss: loss.backward())
        self._over_time()

    def __call__(self, data: Batch, loss_on: str, loss: LossFn) -> tuple[tuple[int, ...], Tensor, Any]:
        options, steps, outputs = self.case.options, [], []
        if self.fresh:
            self._over_time()
        for call in range(options.calls):
            steps += [call * options.time_steps + t for t in self._drawn()]
            given = data.view(self.case, call, self.around).given(self.case)
            named = {"lengths": data.lengths} if options.lengths else {}
            outputs.append(tree_map(self._over_steps, chosen(self.case, self.network(given, **named))))
        total = loss_of_calls(loss_on, loss, outputs, data.target)
        self.backward(total)
        return tuple(steps), total.detach(), tree_map(Tensor.detach, outputs)

    def _over_time(self) -> None:
        options = self.case.options
        sltt_ext.over_time(
            self.network,
            None if options.inside or options.frames != "static" else options.time_steps,
            **_selection(self.case),
            chunk=options.chunk,
            time_dim={"time 0": 0, "time 1": 1}.get(options.frames),
            time_inside="T" if options.inside else None,
            returns=None if self._as_it_is else "sequence" if self._of_all_steps else "mean",
            carry=options.carry,
            generator=self.generator,
            memory_budget=options.memory_budget,
            pack_spikes=options.pack_spikes,
            cache_invariant=options.cache_invariant,
        )

    @property
    def _of_all_steps(self) -> bool:
        return self.case.loss_on(0) in SEQUENCE_LOSSES

    @property
    def _as_it_is(self) -> bool:
        """Whether the loss reads what a network with time inside returns."""
        return bool(self.case.options.inside) and self._of_all_steps == ("steps" in self.case.options.inside)

    def _over_steps(self, output: Tensor) -> Tensor:
        """An output ``[T, N, ...]``, if it is of all steps."""
        of_a_sample = self._as_it_is and self.case.options.inside == "steps of a sample"
        return output.movedim(1, 0) if of_a_sample else output

    def _drawn(self) -> list[int]:
        """The steps that the next call draws."""
        select, time_steps = self.case.options.select, self.case.options.time_steps
        if isinstance(select, int):
            window = self.case.options.window
            drawn = torch.randperm(-(-time_steps // window), generator=self.same)[:select].tolist()
            return sorted(t for one in drawn for t in range(time_steps)[one * window : (one + 1) * window])
        return list(select or range(time_steps))
