"""Rate-based backpropagation: gradients of rates instead of spikes, in one backward pass for all time steps.

Written after Yu et al., "Advancing Training Efficiency of Deep Spiking Neural Networks through Rate-based
Backpropagation", NeurIPS 2024 (arXiv 2410.11488). One iteration has two parts.

1. All T steps run without gradients. Each neuron keeps, besides its potential, two running tensors: its mean
   spike r, and the mean over time of the derivative of its spikes to a constant added to its input at all steps::

       e = 1/T sum_t sigma'(h[t] - V_th) d[t],   d[0] = 1,   d[t+1] = 1 + lambda d[t]

   with lambda = 1 - 1/tau, for a soft reset that is detached (else lambda (1 - sigma'(h[t] - V_th)) takes the
   place of lambda). Each batch norm keeps the statistics it has used.
2. The network runs once more on the mean input, forward and backward: a neuron's output is r, its derivative e;
   batch norm normalises by the statistics kept, and differentiates through them as through the batch's own.

The loss is that of the mean output. The first part can run step by step, in the memory of one step, or as one
sequence, with larger and fewer operators; with batch norm these differ in the statistics, over a step or over
all steps. The statistics of steps are averaged: the means, and harmonically the variances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sltt_ext.online import OnlineResult


class RateLIFNode(nn.Module):
    """LIF neuron with a soft reset and the triangle surrogate, on sequences ``[C, N, ...]``.

    Without gradients it runs C steps and keeps the running tensors; with gradients it takes the rates of its
    input ``[1, N, ...]`` and returns its own.
    """

    def __init__(self, tau: float, v_threshold: float = 1.0, detach_reset: bool = True, **_: Any) -> None:
        super().__init__()
        self.decay = 1 - 1 / tau
        self.v_threshold = v_threshold
        self.detach_reset = detach_reset
        self.reset()

    def reset(self) -> None:
        """Forget potential and running tensors."""
        self.steps = 0
        self.v: Any = None
        self.d: Any = 1.0
        self.spikes: Any = None
        self.trace: Any = None

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes ``[C, N, ...]`` without gradients, rates ``[1, N, ...]`` with."""
        if torch.is_grad_enabled():
            self.v = self.d = None
            return _Rate.apply(x_seq, self.spikes.div_(self.steps), self.trace.div_(self.steps))
        if self.v is None:
            self.v, self.spikes, self.trace = (
                torch.zeros_like(x_seq[0], dtype=torch.float32) for _ in range(3)
            )
        s_seq = torch.empty_like(x_seq)
        for x, s in zip(x_seq, s_seq):
            self._step(x, s)
        return s_seq

    def _step(self, x: Tensor, s: Tensor) -> None:
        self.v.mul_(self.decay).add_(x)
        derivative = (self.v - self.v_threshold).abs_().neg_().add_(1).clamp_(min=0)
        s.copy_(self.v >= self.v_threshold)
        self.v.sub_(s, alpha=self.v_threshold)
        self.spikes.add_(s)
        if self.detach_reset:
            self.trace.add_(derivative, alpha=self.d)
            self.d = 1 + self.decay * self.d
        else:
            self.trace.addcmul_(derivative, torch.as_tensor(self.d))
            self.d = 1 + self.decay * (1 - derivative) * self.d
        self.steps += 1


class _Rate(torch.autograd.Function):
    """The rates, with the trace as their derivative."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, rates: Tensor, trace: Tensor) -> Tensor:
        ctx.save_for_backward(trace)
        return rates.unsqueeze(0).to(x_seq.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (trace,) = ctx.saved_tensors
        return (gradient * trace).to(gradient.dtype), None, None


class _Statistics:
    """Mean and variance ``[channels]`` that one batch norm has used, averaged over the calls without gradients."""

    def __init__(self) -> None:
        self.calls = 0
        self.mean: Any = 0.0
        self.precision: Any = 0.0

    def add(self, mean: Tensor, invstd: Tensor) -> None:
        self.calls += 1
        self.mean = self.mean + mean
        self.precision = self.precision + invstd.square()

    def averages(self) -> tuple[Tensor, Tensor]:
        """Mean, and one over the standard deviation."""
        return self.mean / self.calls, (self.precision / self.calls).sqrt()


class _RateNorm(torch.autograd.Function):
    """Batch norm by statistics kept, and its derivative as if they were those of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        variance = invstd.pow(-2)
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(), x, weight, None, None, mean, invstd, True, 0.0, needed
        )
        return (*gradients, None, None)


def rate_forward(norm: _BatchNorm, statistics: _Statistics) -> Callable[[Tensor], Tensor]:
    """What takes the place of ``norm.forward`` in both parts of an iteration."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _RateNorm.apply(x, norm.weight, norm.bias, *statistics.averages())
        norm.num_batches_tracked.add_(1)
        y, mean, invstd = torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        statistics.add(mean, invstd)
        return y

    return forward


@contextmanager
def rate_norms(net: nn.Module) -> Iterator[None]:
    """Let the batch norms in training mode keep and use the statistics of rates."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        vars(norm)["forward"] = _folded(rate_forward(norm, _Statistics()), norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _folded(forward: Callable[[Tensor], Tensor], norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Time into the batch, where the norm is one of SpikingJelly's in multi-step mode."""
    if getattr(norm, "step_mode", "s") == "s":
        return forward
    return lambda x_seq: forward(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def rate_gradients(net: nn.Module, x_seq: Tensor, loss: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Accumulate the rate-based gradient of one batch into ``.grad``.

    Args:
        net: A multi-step network of `RateLIFNode` neurons.
        x_seq: The input ``[T, N, ...]``; one that is the same at all steps may be expanded.
        loss: ``mean output -> scalar``.
        chunk: How many steps go through the network in one call without gradients.

    Returns:
        The loss, detached.
    """
    _reset(net)
    with rate_norms(net):
        with torch.no_grad():
            for part in x_seq.split(chunk):
                net(part)
        torch.clear_autocast_cache()  # it has weights that were cast without gradients
        x = x_seq[0] if x_seq.stride(0) == 0 else x_seq.mean(0)
        total = loss(net(x.unsqueeze(0)).squeeze(0))
        total.backward()
    return total.detach()


class RateBasedTrainer:
    """Rate-based backpropagation behind the interface of `sltt_ext.OnlineTrainer`, step by step in time.

    Args:
        net: A network of SpikingJelly, whose LIF neurons are replaced in place; they have a soft reset, no decay of the input,
            and the triangle surrogate.
        loss_fn: ``(mean output, target) -> scalar``.
        time_steps: T.
        time_dim: The axis of time in the input; None shows it at every step.
    """

    backward = wrapper = None

    def __init__(
        self,
        net: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        time_steps: int,
        *,
        time_dim: int | None = None,
    ) -> None:
        self.net, self.loss_fn, self.time_steps, self.time_dim = net, loss_fn, time_steps, time_dim
        for parent in list(net.modules()):
            for name, child in parent.named_children():
                if isinstance(child, neuron.LIFNode):
                    setattr(parent, name, RateLIFNode(child.tau, child.v_threshold, child.detach_reset))
        functional.set_step_mode(net, "m")

    def forward_backward(self, x: Tensor, target: Any, *, sync: bool = True) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``."""
        loss = rate_gradients(self.net, self._sequence(x), lambda output: self.loss_fn(output, target), 1)
        return OnlineResult(loss, None, (), self.time_steps)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The network's output averaged over all T steps, without gradients."""
        _reset(self.net)
        return torch.cat([self.net(part) for part in self._sequence(x).split(1)]).mean(0)

    def _sequence(self, x: Tensor) -> Tensor:
        """``[T, N, ...]``."""
        return x.expand(self.time_steps, *x.shape) if self.time_dim is None else x.movedim(self.time_dim, 0)


def _reset(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, RateLIFNode):
            module.reset()
