"""How a trainer's iterations run: the pass of an iteration, its speed-ups, and what is back-propagated.

The options are those of `OnlineTrainer`, which adds the user's interface to this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import InputError, LossError
from sltt_ext.neuron import StatefulModule
from sltt_ext.online import options
from sltt_ext.online.block_plan import Blocks, check_options
from sltt_ext.online.blocks import CompiledCode
from sltt_ext.online.blockwise import Blockwise
from sltt_ext.online.counting import FirstCalls
from sltt_ext.online.distributed import (
    Step,
    common_generator,
    has_static_graph,
    is_distributed,
    is_sharded,
    is_synchronised,
    largest_of_all,
    no_synchronisation,
    unwrapped,
)
from sltt_ext.online.explanations import explaining_steps
from sltt_ext.online.frames import Frames, frames
from sltt_ext.online.grouping import Grouping, Measuring
from sltt_ext.online.guards import Alone, GraphOfStep, OneBackward, WeightsStay
from sltt_ext.online.heads import Heads
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.kept_graphs import Found
from sltt_ext.online.lean_blocks import LeanBlocks, Results
from sltt_ext.online.mixing import PartsTried
from sltt_ext.online.objective import (
    Backward,
    LossFn,
    back_propagate,
    back_propagate_all,
    reaches_every_leaf,
    sum_of_losses,
)
from sltt_ext.online.outputs import MeanOutput, Output, output_sequence
from sltt_ext.online.outside import KeptTensors
from sltt_ext.online.packing import PackedSpikes, others_save
from sltt_ext.online.passes import Call, CallSizes, Objective, Pass, SpeedUp, through_time
from sltt_ext.online.planner import Given, Iteration, Planner
from sltt_ext.online.recording import recorded
from sltt_ext.online.schedule import Schedule, selected_steps, steps_of_a_draw
from sltt_ext.online.speed_ups import speed_ups_of
from sltt_ext.online.stand_ins import outer_tensors
from sltt_ext.online.states import all_or_nothing, reset
from sltt_ext.online.structures import flatten
from sltt_ext.online.summed_gradients import SummedGradients
from sltt_ext.online.windows import each_frame, each_step, read_each

__all__ = ["Iterations"]


class Iterations:
    """Runs iterations; what it reads is set by `OnlineTrainer`, where each option is described."""

    net: nn.Module
    wrapper: nn.Module | None
    loss_fn: LossFn
    time_steps: int
    chunk: int | Literal["auto"]
    scale: options.Scale
    schedule: Schedule | None
    generator: torch.Generator | None
    time_dim: options.TimeDim | None
    output: Output
    backward: Backward | None
    loss_on: options.LossOn
    on_step: Callable[[int], Any] | None
    memory_budget: int | str | None
    cache_invariant: bool | Literal["auto"]
    pack_spikes: bool | Literal["auto"]
    compile: bool | Literal["try"]

    _window: int
    """Through how many steps the gradient goes back."""
    _drawn: int | None
    """How many steps each of the K windows has, where they are drawn."""
    _common: torch.Generator | None
    """The generator that several processes share."""
    _planner: Planner
    _grouping: Grouping
    _modules: InvariantModules
    _kept: KeptTensors
    _found: Found
    _tried: PartsTried
    _first: FirstCalls
    _code: CompiledCode
    _blocks: Blocks | None
    _lean: LeanBlocks
    _is_measuring: bool

    def _neurons(self) -> tuple[list[StatefulModule], bool]:
        raise NotImplementedError

    def _leaves(self, x: Any) -> list[Tensor]:
        raise NotImplementedError

    def _run(
        self,
        x: Any,
        stop: int,
        iteration: Iteration,
        steps: tuple[int, ...] = (),
        loss_of_call: Callable[[Any, Call], Tensor] | None = None,
        step: Step = no_synchronisation,
        guards: Sequence[SpeedUp] = (),
    ) -> tuple[Tensor | None, Any]:
        """The sum of the losses and the mean output of a run from rest, ``steps`` of it back-propagated if there is a loss."""
        neurons, multi_step = self._neurons()
        multi_step = multi_step or bool(iteration.settings)
        source = self._source(x, multi_step)
        self._is_measuring = iteration.trial is not None
        learns = loss_of_call is not None
        output = self._first.reading(self._read(multi_step))
        run = self._all_of_window(neurons) if self._in_windows(multi_step) else self.net
        one = Pass(self.net, run, neurons, multi_step, source, stop, steps, learns, iteration.sizes, output)
        speed_ups, once = self._speed_ups(one, step, iteration)
        objective = None
        if loss_of_call is not None:
            objective = Objective(loss_of_call, self._back_propagating(once), self._after)
        with explaining_steps(self.net, x, self.time_steps, self.time_dim, multi_step):
            if self._blocks is not None and objective is not None:
                check_options(self.loss_on, self.on_step, self.chunk, self._in_windows(multi_step))
                return self._in_blocks(self._plan_of(self._blocks, one, iteration, x), objective, guards)
            if iteration.way.blocks and objective is not None:
                results = self._lean.run(
                    self.net, iteration,
                    plan=lambda blocks: self._plan_of(blocks, one, iteration, x),
                    run=lambda plan: self._in_blocks(plan, objective, guards),
                    whole=lambda: self._run(x, stop, replace(iteration, way=iteration.way._replace(blocks=False), trial=None))[1],
                    undone=lambda: all_or_nothing(self._leaves(x), partial(reset, neurons)),
                )  # fmt: skip
                if results is not None:
                    return results
            mean = MeanOutput()
            loss = through_time(one, objective, (Alone(), *guards, *speed_ups), mean)
            return loss, mean.value()

    def _plan_of(self, blocks: Blocks, one: Pass, iteration: Iteration, x: Any) -> Blockwise:
        """How a run goes block by block."""
        if isinstance(x, Iterator):
            raise InputError(
                "blocks= goes through the frames twice: give a tensor or a list, not an iterator"
            )
        return blocks.plan(
            one, x, partial(self._source, x, one.multi_step), modules=self._modules, caches=self._caches(iteration),
            packs=iteration.way.packs, grouping=self._grouping, tried=self._tried, wrapper=self.wrapper,
        )  # fmt: skip

    def _in_blocks(self, plan: Blockwise, objective: Objective, guards: Sequence[SpeedUp]) -> Results:
        """The sum of the losses of a run that goes block by block, and the mean output."""
        mean = MeanOutput()
        back_propagates = Objective(
            objective.loss, partial(back_propagate_all, backward=self.backward), objective.after
        )
        return plan.run(back_propagates, guards, mean), mean.value()

    def _speed_ups(
        self, one: Pass, step: Step, iteration: Iteration, once: EvaluatedOnce | None = None
    ) -> tuple[tuple[SpeedUp, ...], EvaluatedOnce]:
        windows, settings = self._in_windows(one.multi_step), iteration.settings
        asked = self.pack_spikes is True or self.memory_budget == "least"
        packs = iteration.way.packs and (asked or not others_save())
        iteration.packed.append(packed := PackedSpikes(packs))
        measuring = Measuring(iteration.bytes) if iteration.counts_bytes and one.learns else None
        return speed_ups_of(
            one.sizes, tried=SpeedUp() if settings else self._tried, first=self._first, kept=self._kept, step=step,
            grouping=self._grouping, measuring=measuring, stopwatch=iteration.stopwatch, settings=settings,
            modules=self._modules, caches=self._caches(iteration) and not windows, keeps_graphs=not is_distributed(self.wrapper or self.net),
            packed=packed, once=once, charges=not windows, code=None if windows else self._code,
        )  # fmt: skip

    def _caches(self, iteration: Iteration) -> bool:
        """Whether what does not depend on time is evaluated once: weights have to stay as they are, and versions to be counted."""
        return iteration.way.caches and self.on_step is None and not torch.is_inference_mode_enabled()

    def _whole(
        self,
        x: Any,
        target: Any,
        counts: Mapping[int, float],
        divisor: float,
        iteration: Iteration,
        step: Step,
    ) -> tuple[Tensor, Any]:
        """One loss of the outputs of all steps, and their mean; backward runs the steps again."""
        steps = tuple(counts)
        if isinstance(x, Iterator):
            raise InputError(
                f"loss_on={self.loss_on!r} goes through the frames twice: give a tensor or a list, not an iterator"
            )
        neurons, multi_step = self._neurons()
        multi_step = multi_step or bool(iteration.settings)
        net, call = unwrapped(self.net)
        read = self._first.reading(self._read(multi_step))
        heads = Heads(
            "sequence" if self.loss_on == "sequence" else "mean",
            self.time_steps,
            counts,
            divisor,
            lambda returned, calls: flatten(read(returned, calls)),
            keeps_dtype=False,
        )

        def outputs(forward: Callable[[Any], Any], x: Any) -> list[Tensor]:
            inputs, rebuild = flatten(x)

            def source(tensors: Sequence[Tensor]) -> Frames:
                return self._source(rebuild(tensors), multi_step)

            run = each_step(neurons, forward) if self._in_windows(multi_step) else forward
            one = Pass(
                net, run, neurons, multi_step, source(inputs), self.time_steps, steps, False, iteration.sizes, heads.of_call,
                differentiable=True,
            )  # fmt: skip
            # sharded parameters get their gradients from the wrapper itself, and not from autograd
            own = [torch.zeros((), requires_grad=True)] if is_sharded(net) else outer_tensors(net)
            wanting = [tensor for tensor in (*inputs, *own) if tensor.requires_grad]

            def speed_ups(one: Pass, once: EvaluatedOnce | None) -> tuple[Sequence[SpeedUp], EvaluatedOnce]:
                around = step if is_sharded(net) else no_synchronisation
                of_pass, once = self._speed_ups(one, around, iteration, once)
                return (Alone(), *of_pass), once

            with explaining_steps(self.net, x, self.time_steps, self.time_dim, multi_step):
                return recorded(one, heads, inputs, source, speed_ups, wanting, self._found)

        with nullcontext() if is_sharded(net) else step(True):
            tensors = call(outputs, x)
            output = heads.rebuild(tensors)
            loss = sum_of_losses(self.loss_fn, [(output, target)])
            back_propagate(loss, self.backward)
        return loss.detach(), heads.rebuild([heads.mean(tensor) for tensor in tensors])

    def _guards(self, x: Any, target: Any) -> list[SpeedUp]:
        """What must not happen to an iteration that does not ask for it by an option."""
        own_graph = isinstance(x, (Tensor, Mapping))  # frames may have one each
        return [
            *([WeightsStay(self.net)] if self.on_step is None else []),
            *([OneBackward()] if self.on_step is None and has_static_graph(self.wrapper or self.net) else []),
            *([GraphOfStep(x if own_graph else None, target)] if self.backward is None else []),
        ]

    def _back_propagating(self, once: EvaluatedOnce) -> Callable[[Tensor], None]:
        """What back-propagates the losses of one pass."""
        own = self.wrapper or self.net
        if self.backward is not None or self.on_step is not None or is_distributed(own):
            return partial(self._back_propagate, once)
        summed = SummedGradients(own, once.read)
        return partial(back_propagate, backward=summed.backward)

    def _back_propagate(self, once: EvaluatedOnce, loss: Tensor) -> None:
        if self.backward is None or not self.cache_invariant:
            back_propagate(loss, self.backward)
        elif not reaches_every_leaf(loss, self.backward):
            self._modules.off = True
            if once.in_use:
                raise LossError(
                    "backward= no longer gives a gradient to everything that the loss depends on (does it name "
                    "inputs=?), and modules were evaluated once for all steps: use cache_invariant=False"
                )

    def _after(self, call: Call) -> None:
        if self.on_step is not None:
            self.on_step(call.stop - 1)
            torch.clear_autocast_cache()  # it has the weights as they were

    def _steps(self) -> dict[int, float]:
        """The steps to back-propagate, the same in all processes, and how many times each counts."""
        if self.schedule is None:
            return dict.fromkeys(range(self.time_steps), 1.0)
        net = self.wrapper or self.net
        if self._common is None and is_distributed(net):
            self._common = common_generator(net, self.generator)
        return selected_steps(self.schedule, self.time_steps, self._common or self.generator)

    def _divisor(self, steps: tuple[int, ...]) -> float:
        """What the sum of the losses is divided by."""
        if self.scale == "paper":
            return self.time_steps
        return len(steps) if self._drawn is None else steps_of_a_draw(steps, self.time_steps, self._drawn)

    def _iteration(
        self,
        x: Any,
        neurons: list[StatefulModule],
        multi_step: bool,
        longest: dict[bool, int],
        sync: bool = True,
        learns: bool = True,
    ) -> Iteration:
        """How the network is run."""
        fixed = None
        if any(neuron.whole_sequence for neuron in neurons):
            fixed = CallSizes(self.time_steps, self.time_steps, self.time_steps)
        elif self._in_windows(multi_step):
            fixed = CallSizes(self._window, self._window, self._window)
        elif self.compile and multi_step and isinstance(self.chunk, int):  # a graph for each length
            fixed = CallSizes(self.chunk, self.chunk, self.chunk)
        net = self.wrapper or self.net
        alone = not is_distributed(net)
        # what a function reads of a step's output, and frames of their own shapes, are not known of a sequence
        dense = all(isinstance(leaf, Tensor) and leaf.layout is torch.strided for leaf in tree_leaves(x))
        whole = isinstance(x, (Tensor, Mapping)) and dense and not callable(self.output)
        given = Given(
            self._source(x, multi_step).elements if learns else 0,
            longest,
            self.schedule is not None,
            multi_step,
            (lambda steps: self._source(x, True).take(0, steps)) if whole and not multi_step else None,
            fixed,
            alone,
        )
        return self._planner.iteration(self.net, given, learns and (alone or is_synchronised(net, sync)))

    def _combined(self, numbers: list[float]) -> list[float]:
        """The largest of each number in all processes."""
        net = self.wrapper or self.net
        return largest_of_all(net, numbers) if is_distributed(net) else numbers

    def _in_windows(self, multi_step: bool) -> bool:
        """Whether a call stands for several of a network that takes single steps."""
        return self._window > 1 and not multi_step

    def _source(self, x: Any, multi_step: bool) -> Frames:
        """The input over time."""
        source = frames(x, self.time_steps, self.time_dim, multi_step)
        return each_frame(source) if self._in_windows(multi_step) else source

    def _read(self, multi_step: bool) -> Callable[[Any, int], Any]:
        """``(returned, steps) -> `` the outputs of a call."""
        read = partial(output_sequence, output=self.output, multi_step=multi_step)
        return read_each(read) if self._in_windows(multi_step) else read

    def _all_of_window(self, neurons: Sequence[StatefulModule]) -> Callable[[Any], Any]:
        """Calls the network for each step of a window; a wrapper, which counts its calls, once."""
        _, call = unwrapped(self.net)
        return lambda given: call(lambda forward, given: each_step(neurons, forward)(given), given)
