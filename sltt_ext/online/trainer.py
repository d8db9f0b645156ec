"""The time loop of SLTT and SLTT-K."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, LossError, SLTTError
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.frames import frames
from sltt_ext.online.schedule import Schedule, random_steps, runs, selected_steps

__all__ = ["OnlineResult", "OnlineTrainer"]

LossFn = Callable[[Tensor, Any], Tensor]
Output = str | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class OnlineResult:
    """What one iteration gives besides the gradients.

    Attributes:
        loss: The total loss, a detached scalar tensor.
        output: The network's output, averaged over the steps that were run; detached.
        time_steps: The steps that were back-propagated, in order.
    """

    loss: Tensor
    output: Tensor
    time_steps: tuple[int, ...]


class OnlineTrainer:
    """Gradients of a converted network, step by step in time, with the memory of one step.

    For each back-propagated step the network runs forward, the step's loss is back-propagated, and
    everything is freed before the next step. The gradient is SLTT's (Meng et al. 2023, Sec. 4): the
    sum over these steps of the spatial gradient. The trainer never owns the optimizer::

        online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps=6)
        for x, target in loader:
            optimizer.zero_grad()
            online.forward_backward(x, target)
            optimizer.step()

    Args:
        net: A converted network, also inside a wrapper.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T, how many steps one input is shown.
        k: None back-propagates every step (SLTT); a number K back-propagates K random ones (SLTT-K),
            the others run without gradients.
        chunk: How many consecutive steps go through the network in one call; more than 1 needs a
            multi-step network. Time is traded for the memory of ``chunk`` steps.
        scale: ``"mean"`` averages the loss over the back-propagated steps, so that SLTT-K's gradient is
            an unbiased estimate of SLTT's; ``"paper"`` divides by T whatever K is.
        schedule: Instead of ``k``: ``(time_steps, generator) -> indices`` of the steps to back-propagate.
        generator: Source of the random steps; None is torch's default generator.
        time_dim: None shows the same ``x`` ``[N, ...]`` at every step; 0 or 1 is the axis of time in
            ``x`` ``[T, N, ...]`` or ``[N, T, ...]``. Any other iterable is a stream of T frames.
        output: What the loss reads of the network's return value: None takes the tensor itself or the
            first of a tuple, ``"membrane"`` the last of a tuple, a function anything else.
        full_output: False stops after the last back-propagated step (same gradient, less time);
            ``result.output`` is then the mean over fewer steps.
        backward: How a loss is back-propagated; default ``loss.backward()``. For mixed precision
            ``lambda loss: scaler.scale(loss).backward()``.

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
        chunk: int = 1,
        *,
        scale: str = "mean",
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        time_dim: int | None = None,
        output: Output = None,
        full_output: bool = True,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        _check_count("time_steps", time_steps)
        _check_count("chunk", chunk)
        if k is not None:
            _check_count("k", k, at_most=time_steps)
        if k is not None and schedule is not None:
            raise ConfigurationError("give k or schedule, not both")
        if scale not in ("mean", "paper"):
            raise ConfigurationError(f"scale must be 'mean' or 'paper', got {scale!r}")
        if time_dim not in (None, 0, 1):
            raise ConfigurationError(f"time_dim must be None, 0 or 1, got {time_dim!r}")
        if isinstance(output, str) and output != "membrane":
            raise ConfigurationError(f"output must be None, 'membrane' or a function, got {output!r}")
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
        self._neurons()

    def forward_backward(self, x: Any, target: Any) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``.

        Args:
            x: The input; see ``time_dim``.
            target: Passed to the loss at every step.

        Raises:
            InputError: If ``x`` does not have ``time_steps`` steps, or is empty.
            ConfigurationError: If ``chunk`` or the schedule does not fit.
            LossError: If the loss is not a scalar tensor, or depends on nothing that can be trained.

        After any exception the gradients are what they were before the call, and the state is reset.
        """
        neurons, multi_step = self._neurons()
        if not torch.is_grad_enabled():
            raise LossError("gradients are disabled: call forward_backward outside of torch.no_grad()")
        if self.schedule is None:
            steps = tuple(range(self.time_steps))
        else:
            steps = selected_steps(self.schedule, self.time_steps, self.generator)
        divisor = len(steps) if self.scale == "mean" else self.time_steps
        last = self.time_steps if self.full_output else steps[-1] + 1
        take = frames(x, self.time_steps, self.time_dim, multi_step)
        mean = _Mean()
        total: Tensor | None = None
        with _all_or_nothing(self.net, neurons):
            _reset(neurons)
            for start, stop, selected in runs(last, steps, self.chunk):
                with torch.set_grad_enabled(selected):
                    output_seq = self._step(take(start, stop), stop - start, multi_step)
                if selected:
                    loss = self._loss(output_seq, target) / divisor
                    self._backward(loss)
                    total = loss.detach() if total is None else total + loss.detach()
                mean.add(output_seq.detach())
                del output_seq
                for neuron in neurons:
                    neuron.detach_state()
        assert total is not None  # the schedule selects at least one step
        return OnlineResult(total, mean.value(), steps)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The network's output averaged over all T steps, without gradients.

        Whether the network is in training or evaluation mode is the caller's choice.

        Raises:
            InputError: If ``x`` does not have ``time_steps`` steps, or is empty.
        """
        neurons, multi_step = self._neurons()
        take = frames(x, self.time_steps, self.time_dim, multi_step)
        mean = _Mean()
        _reset(neurons)
        for start, stop, _ in runs(self.time_steps, (), self.chunk):
            mean.add(self._step(take(start, stop), stop - start, multi_step))
        return mean.value()

    def _neurons(self) -> tuple[list[SLTTNeuron], bool]:
        """The network's neurons, and whether the network takes sequences."""
        neurons: list[SLTTNeuron] = [
            module for module in self.net.modules() if isinstance(module, SLTTNeuron)
        ]
        if not neurons:
            raise SLTTError(f"{type(self.net).__name__} is not converted: call sltt_ext.convert(net) first")
        multi_step = any(neuron.multi_step for neuron in neurons)
        if self.chunk > 1 and not multi_step:
            raise ConfigurationError(
                f"chunk={self.chunk} needs a multi-step network, and this one takes single steps: use chunk=1, or "
                "set the network to multi-step mode (SpikingJelly: functional.set_step_mode(net, 'm'))"
            )
        if self.chunk < self.time_steps or self.schedule is not None:
            for neuron in neurons:
                if neuron.whole_sequence:
                    raise ConfigurationError(
                        f"{type(neuron).__name__} takes its whole sequence in one call: use "
                        f"chunk={self.time_steps} (time_steps), and neither k nor schedule"
                    )
        return neurons, multi_step

    def _step(self, x: Any, steps: int, multi_step: bool) -> Tensor:
        """Outputs ``[C, N, ...]`` of the network for C frames."""
        returned = self.net(x)
        if callable(self.output):
            output = self.output(returned)
        elif isinstance(returned, (tuple, list)):
            output = returned[-1 if self.output == "membrane" else 0]
        else:
            output = returned
        if not isinstance(output, Tensor):
            raise LossError(
                f"the network's output is a {type(output).__name__}, not a tensor: choose the tensor the loss "
                "reads with output=, a function of the network's return value"
            )
        if not multi_step:
            return output.unsqueeze(0)
        if output.dim() == 0 or output.shape[0] != steps:
            raise LossError(
                f"a multi-step network has to return [T, N, ...], here with T={steps}, got {list(output.shape)}: "
                "leave the average over time to the trainer"
            )
        return output

    def _loss(self, output_seq: Tensor, target: Any) -> Tensor:
        losses = [self.loss_fn(output, target) for output in output_seq]
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


class _Mean:
    """Mean over time of outputs ``[C, N, ...]`` that arrive one after the other."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, output_seq: Tensor) -> None:
        part = output_seq.sum(0)
        self.sum = part if self.sum is None else self.sum + part
        self.count += output_seq.shape[0]

    def value(self) -> Tensor:
        assert self.sum is not None
        return self.sum / self.count


@contextmanager
def _all_or_nothing(net: nn.Module, neurons: list[SLTTNeuron]) -> Iterator[None]:
    """Put gradients and state back if anything goes wrong; out-of-memory and Ctrl-C included."""
    before = [
        (parameter, None if parameter.grad is None else parameter.grad.clone())
        for parameter in net.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    except BaseException:
        for parameter, grad in before:
            if grad is None or parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad.copy_(grad)
        _reset(neurons)
        raise


def _reset(neurons: list[SLTTNeuron]) -> None:
    for neuron in neurons:
        neuron.reset_state()


def _check_count(name: str, value: Any, at_most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (at_most and value > at_most):
        limit = "a positive integer" if at_most is None else f"an integer from 1 to time_steps={at_most}"
        raise ConfigurationError(f"{name} must be {limit}, got {value!r}")
