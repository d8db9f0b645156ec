"""The time loop of SLTT and SLTT-K."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, InputError, LossError, SLTTError
from sltt_ext.neuron import SLTTNeuron, StatefulModule
from sltt_ext.online.distributed import Step, common_generator, is_distributed, synchronised_once
from sltt_ext.online.frames import Frames, frames
from sltt_ext.online.grouping import Grouping, Sizes, batch_norms_in_parts
from sltt_ext.online.invariant import Invariants
from sltt_ext.online.options import check_options
from sltt_ext.online.outputs import MeanOutput, Output, output_sequence
from sltt_ext.online.packing import packing
from sltt_ext.online.schedule import Schedule, longest_runs, random_steps, runs, selected_steps
from sltt_ext.online.states import all_or_nothing, carrying_charged, reset
from sltt_ext.online.surroundings import Surroundings

__all__ = ["LossFn", "OnlineResult", "OnlineTrainer"]

LossFn = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class OnlineResult:
    """What one iteration gives besides the gradients.

    Attributes:
        loss: The total loss, a detached scalar tensor.
        output: The network's output, averaged over the steps that were run; detached, float32 where the
            network's is of half precision.
        time_steps: The steps that were back-propagated, in order.
        output_steps: How many steps, from the first on, ``output`` is the mean of: T, or fewer with
            ``full_output=False``.
    """

    loss: Tensor
    output: Tensor
    time_steps: tuple[int, ...]
    output_steps: int


class OnlineTrainer:
    """Gradients of a converted network, step by step in time, with the memory of one step.

    For each back-propagated step the network runs forward, the step's loss is back-propagated, and
    everything is freed before the next step. The gradient is SLTT's (Meng et al. 2023, Sec. 4): the
    sum over these steps of the spatial gradient. The trainer never owns the optimizer:

        online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps=6)
        for x, target in loader:
            optimizer.zero_grad()
            online.forward_backward(x, target)
            optimizer.step()

    Args:
        net: A converted network, also inside DistributedDataParallel, ``fully_shard`` or ``torch.compile``.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T, how many steps one input is shown.
        k: None back-propagates every step (SLTT); a number K back-propagates K random ones (SLTT-K),
            the others run without gradients.
        chunk: How many consecutive back-propagated steps go through the network in one call; more than 1
            needs a multi-step network. Time is traded for the memory of ``chunk`` steps. ``"auto"`` takes as
            many as fit into ``memory_budget``, from the second iteration on. In a multi-step network, steps
            that are not back-propagated share a call as far as that needs no more memory than the others do.
        scale: ``"mean"`` averages the loss over the back-propagated steps, so that SLTT-K's gradient is
            an unbiased estimate of SLTT's; ``"paper"`` divides by T whatever K is.
        schedule: Instead of ``k``: ``(time_steps, generator) -> indices`` of the steps to back-propagate.
        generator: Source of the random steps; None is torch's default generator.
        time_dim: None shows the same ``x`` ``[N, ...]`` at every step; 0 or 1 is the axis of time in
            ``x`` ``[T, N, ...]`` or ``[N, T, ...]``. Any other iterable is a stream of T frames.
        output: What the loss reads of the network's return value: None or ``"spike"`` takes the tensor
            itself or the first of a tuple, ``"membrane"`` the last of a tuple, a function anything else.
        full_output: False stops after the last back-propagated step (same gradient, less time);
            ``result.output`` is then the mean over ``result.output_steps`` steps.
        backward: How a loss is back-propagated; default ``loss.backward()``. For mixed precision
            ``lambda loss: scaler.scale(loss).backward()``.
        loss_on: ``"step"`` takes the loss of every step's output and averages the losses; ``"mean"`` takes
            one loss, of the output averaged over all T steps, in two passes through time: the first, without
            gradients, for the mean output, the second for SLTT's gradient. With K steps back-propagated, it
            is their part of that gradient, times T / K where ``scale="mean"``.
        target_time_dim: The axis of time in a target that differs from step to step; None gives the same
            target to every step.
        on_step: Called with the number t of the time step after each back-propagation, for an update at
            every step: ``lambda t: (optimizer.step(), optimizer.zero_grad())``.
        memory_budget: For ``chunk="auto"``: bytes for activations, states and gradients, or a part of the
            memory that a CUDA device has left (of all memory on the CPU) as text; default ``"0.8"``.
        cache_invariant: Evaluate what does not depend on time once an iteration: every stateless module until
            the first neuron where one input is shown at all steps, and every weight parametrisation. Modules
            that torch.compile runs are left out, and so is all with ``on_step``. Your own module takes part
            with an attribute ``sltt_time_invariant = True``.
        pack_spikes: Store spikes that are saved for backward as bits, and of what average pooling saves the
            shape: less memory, a little more time.
        wrapper: The DistributedDataParallel module around ``net``, where ``net`` is called without it (as
            inside a LightningModule); None where ``net`` itself is the wrapped one.

    Raises:
        ConfigurationError: If an option cannot work.
        SLTTError: If ``net`` is not converted.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        time_steps: int,
        k: int | None = None,
        chunk: int | str = 1,
        *,
        scale: str = "mean",
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        time_dim: int | None = None,
        output: Output = None,
        full_output: bool = True,
        backward: Callable[[Tensor], Any] | None = None,
        loss_on: str = "step",
        target_time_dim: int | None = None,
        on_step: Callable[[int], Any] | None = None,
        memory_budget: int | str | None = None,
        cache_invariant: bool = True,
        pack_spikes: bool = False,
        wrapper: nn.Module | None = None,
    ) -> None:
        check_options(
            loss_fn=loss_fn, time_steps=time_steps, k=k, chunk=chunk, scale=scale, schedule=schedule, time_dim=time_dim,
            output=output, loss_on=loss_on, target_time_dim=target_time_dim, on_step=on_step,
        )  # fmt: skip
        self.net = net
        self.loss_fn = loss_fn
        self.time_steps = time_steps
        self.chunk = chunk
        self.scale = scale
        self.schedule = random_steps(k) if k is not None else schedule
        self.generator = generator
        self.time_dim = time_dim
        self.output = output
        self.full_output = full_output
        self.backward = backward
        self.loss_on = loss_on
        self.target_time_dim = target_time_dim
        self.on_step = on_step
        self.cache_invariant = cache_invariant
        self.pack_spikes = pack_spikes
        self.wrapper = wrapper
        self._common: torch.Generator | None = None
        self._grouping = Grouping(chunk, memory_budget)
        self._invariants = Invariants()
        self._neurons()

    def forward_backward(self, x: Any, target: Any, *, sync: bool = True) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``.

        Args:
            x: The input; see ``time_dim``.
            target: Passed to the loss at every step; see ``target_time_dim``.
            sync: With several processes: whether gradients are synchronised at the end. To accumulate over
                several batches, False in all but the last, as with ``no_sync()``.

        Raises:
            InputError: If ``x`` or the target does not have ``time_steps`` steps, or is empty.
            ConfigurationError: If ``chunk`` or the schedule does not fit.
            LossError: If the loss is not a scalar tensor, or depends on nothing that can be trained.

        After any exception the gradients are what they were before the call, and the state is reset.
        """
        neurons, multi_step = self._neurons()
        if not torch.is_grad_enabled():
            raise LossError("gradients are disabled: call forward_backward outside of torch.no_grad()")
        steps = self._steps()
        divisor = len(steps) if self.scale == "mean" else self.time_steps
        last = self.time_steps if self.full_output else steps[-1] + 1
        targets = self._targets(target)

        def loss_of_run(output_seq: Tensor, start: int) -> Tensor:
            return self._loss(output_seq, targets[start : start + len(output_seq)]) / divisor

        synchronised = synchronised_once(self.wrapper or self.net, sync, self.on_step is not None)
        with all_or_nothing(self.net, partial(reset, neurons)), synchronised as step:
            if self.loss_on == "mean":
                loss, output = self._two_passes(x, target, steps, divisor, step)
            else:
                source = frames(x, self.time_steps, self.time_dim, multi_step)
                loss, output = self._through_time(source, last, steps, loss_of_run, step)
        assert loss is not None  # the schedule selects at least one step
        return OnlineResult(loss, output, steps, self.time_steps if self.loss_on == "mean" else last)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The network's output averaged over all T steps, without gradients.

        Whether the network is in training or evaluation mode is the caller's choice.

        Raises:
            InputError: If ``x`` does not have ``time_steps`` steps, or is empty.
        """
        _, multi_step = self._neurons()
        source = frames(x, self.time_steps, self.time_dim, multi_step)
        return self._through_time(source, self.time_steps)[1]

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator that draws the steps, and what was measured of the calls; for checkpoints.

        The former is None where the trainer draws from torch's default generator, whose state is torch's to save.
        """
        generator = self._common or self.generator
        return {
            "generator": None if generator is None else generator.get_state(),
            "calls": self._grouping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a trainer left off.

        Args:
            state: What `state_dict` returned.

        Raises:
            ConfigurationError: If the trainer has a generator and the state has none.
        """
        saved = state["generator"]
        if saved is None and self.generator is not None:
            raise ConfigurationError(
                "the checkpoint is of a trainer without generator=: leave it out here, too"
            )
        self._grouping.load_state_dict(state["calls"])
        if saved is None:
            return
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.set_state(saved.cpu())
        self._common = None

    def _steps(self) -> tuple[int, ...]:
        """The steps to back-propagate, the same in all processes."""
        if self.schedule is None:
            return tuple(range(self.time_steps))
        net = self.wrapper or self.net
        if self._common is None and is_distributed(net):
            self._common = common_generator(net, self.generator)
        return selected_steps(self.schedule, self.time_steps, self._common or self.generator)

    def _two_passes(
        self, x: Any, target: Any, steps: tuple[int, ...], divisor: int, step: Step
    ) -> tuple[Tensor | None, Tensor]:
        """Loss of the mean output, and the mean output; the gradient step by step, in a second pass."""
        if isinstance(x, Iterator):
            raise InputError(
                "loss_on='mean' goes through the frames twice: give a tensor or a list, not an iterator"
            )
        _, multi_step = self._neurons()
        before = Surroundings(self.net)
        with torch.no_grad():
            source = frames(x, self.time_steps, self.time_dim, multi_step)
            _, mean = self._through_time(source, self.time_steps, step=step)
        output = mean.requires_grad_()
        loss = self._loss(output.unsqueeze(0), [target])
        (gradient,) = torch.autograd.grad(loss, output)
        after = Surroundings(self.net)
        before.restore()
        try:
            source = frames(x, self.time_steps, self.time_dim, multi_step)

            def part_of_run(output_seq: Tensor, start: int) -> Tensor:
                return (output_seq.to(gradient.dtype) * (gradient / divisor)).sum()

            self._through_time(source, steps[-1] + 1, steps, part_of_run, step)
        finally:
            after.restore()
        return loss.detach(), output.detach()

    def _through_time(
        self,
        source: Frames,
        last: int,
        steps: tuple[int, ...] = (),
        loss_of_run: Callable[[Tensor, int], Tensor] | None = None,
        step: Step = lambda last: nullcontext(),
    ) -> tuple[Tensor | None, Tensor]:
        """The sum of the losses and the mean output of a run from rest, ``steps`` of it back-propagated."""
        neurons, multi_step = self._neurons()
        sizes = self._sizes(neurons, multi_step, source.elements, longest_runs(last, steps))
        mean = MeanOutput()
        total: Tensor | None = None
        cast_without_grad = True
        reset(neurons)
        with (
            self._grouping.measured(),
            carrying_charged(neurons),
            self._invariants.evaluated_once(
                self.net,
                source.static,
                multi_step,
                differentiable=bool(steps),
                enabled=self._caches(),
                keeps_graphs=not is_distributed(self.wrapper or self.net),
            ) as invariants,
            packing(self.net, self.pack_spikes) as packed,
        ):
            invariants.saving = packed.saving
            for start, stop, selected in runs(last, steps, sizes.chunk, sizes.group):
                if selected and cast_without_grad:
                    torch.clear_autocast_cache()  # torch 2.6 takes weights cast under no_grad from it, as constants
                cast_without_grad = not selected
                is_last = selected and stop > steps[-1]
                parts = self._grouping.parts(stop - start)
                with ExitStack() as call:
                    call.enter_context(self._grouping.call(selected, stop - start))
                    call.enter_context(step(is_last))
                    frame = source.take(start, stop)
                    call.enter_context(invariants.call(frame, parts, selected, is_last))
                    if len(parts) > 1:
                        call.enter_context(batch_norms_in_parts(self.net, parts, invariants.has))
                    if selected and self.pack_spikes:
                        call.enter_context(packed.saving())
                    with torch.set_grad_enabled(selected):
                        output_seq = self._step(frame, stop - start, multi_step)
                    if selected and loss_of_run is not None:
                        loss = loss_of_run(output_seq, start)
                        self._backward(loss)
                        total = loss.detach() if total is None else total + loss.detach()
                        del loss
                    mean.add(output_seq.detach())
                    del output_seq
                    for neuron in neurons:
                        neuron.detach_state()
                if selected and self.on_step is not None:
                    self.on_step(stop - 1)
                    torch.clear_autocast_cache()  # it has the weights as they were
        return total, mean.value()

    def _caches(self) -> bool:
        """Whether modules are evaluated once that can be: weights have to stay as they are, versions to be counted."""
        return self.cache_invariant and self.on_step is None and not torch.is_inference_mode_enabled()

    def _sizes(
        self, neurons: list[StatefulModule], multi_step: bool, elements: int, longest: dict[bool, int]
    ) -> Sizes:
        """How many steps share a call of the network."""
        if any(neuron.whole_sequence for neuron in neurons):
            return Sizes(self.time_steps, self.time_steps)
        if not multi_step:
            return Sizes(1, 1)
        return self._grouping.sizes(self.net, self.time_steps, elements, longest)

    def _neurons(self) -> tuple[list[StatefulModule], bool]:
        """The network's neurons, and whether the network takes sequences."""
        neurons: list[StatefulModule] = [
            module for module in self.net.modules() if isinstance(module, StatefulModule)
        ]
        if not any(isinstance(neuron, SLTTNeuron) for neuron in neurons):
            raise SLTTError(f"{type(self.net).__name__} is not converted: call sltt_ext.convert(net) first")
        multi_step = any(neuron.multi_step for neuron in neurons)
        if isinstance(self.chunk, int) and self.chunk > 1 and not multi_step:
            raise ConfigurationError(
                f"chunk={self.chunk} needs a multi-step network, and this one takes single steps: use chunk=1, or "
                "set the network to multi-step mode (SpikingJelly: functional.set_step_mode(net, 'm'); snnTorch: "
                "sltt_ext.snntorch.MultiStep(net))"
            )
        if self.schedule is not None or (isinstance(self.chunk, int) and self.chunk < self.time_steps):
            for neuron in neurons:
                if neuron.whole_sequence:
                    raise ConfigurationError(
                        f"{type(neuron).__name__} takes its whole sequence in one call: use "
                        f"chunk={self.time_steps} (time_steps), and neither k nor schedule"
                    )
        return neurons, multi_step

    def _step(self, x: Any, steps: int, multi_step: bool) -> Tensor:
        """Outputs ``[C, N, ...]`` of the network for C frames."""
        return output_sequence(self.net(x), self.output, steps, multi_step)

    def _targets(self, target: Any) -> Any:
        """The target of each step."""
        if self.target_time_dim is None:
            return [target] * self.time_steps
        dim = self.target_time_dim
        if not isinstance(target, Tensor) or target.dim() <= dim or target.shape[dim] != self.time_steps:
            got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise InputError(
                f"the target needs {self.time_steps} steps along target_time_dim={dim}, got {got}: give a tensor "
                "with one target for each step, or leave target_time_dim out"
            )
        return target.unbind(dim)

    def _loss(self, output_seq: Tensor, targets: Any) -> Tensor:
        losses = [self.loss_fn(output, target) for output, target in zip(output_seq, targets, strict=True)]
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise LossError(
                    f"loss_fn must return a scalar tensor, got {got}: reduce it, e.g. with .mean()"
                )
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if not total.requires_grad:
            raise LossError(
                "the loss needs no gradient: no parameter of the network requires one, or the network or the "
                "loss detaches its output"
            )
        return total

    def _backward(self, loss: Tensor) -> None:
        try:
            if self.backward is None:
                loss.backward()
            else:
                self.backward(loss)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise LossError(
                "the loss reaches back to an earlier time step: a module carries a tensor from step to step that "
                "the conversion does not see. Register it as state (SpikingJelly: register_memory), or detach it "
                "before the module keeps it"
            ) from error
