"""What batch norms may read where a network runs step by step: prototypes around an unchanged network.

A norm over all T steps of a batch, with the sums over all T N samples (and places)::

    y = w (x - mean) / sqrt(variance + eps) + b
    dL/dx = (g - m1 - z m2) / sqrt(variance + eps),   z = (x - mean) / sqrt(variance + eps),   g = w dL/dy
    m1 = mean of g,   m2 = mean of g z

Step by step neither the statistics (mean, variance) nor the moments of the gradient (m1, m2) are known. A *rule* says
which statistics a step is normalised by; the moments are those of the step, none, or given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

__all__ = [
    "METHODS",
    "TWICE",
    "Batch",
    "Moments",
    "Norms",
    "Statistics",
    "gradient",
]


class Statistics(NamedTuple):
    """Mean and biased variance of each channel."""

    mean: Tensor
    variance: Tensor


Moments = Literal["step", "none"] | Mapping[nn.Module, tuple[Tensor, Tensor]]
Rule = Callable[[nn.Module, Sequence[Statistics]], Statistics]
"""``(norm, statistics of each call so far, this one included) -> `` what this call is normalised by."""
Batch = tuple[Tensor, Tensor]
"""A sequence ``[T, N, ...]`` and labels ``[N]``."""


def pooled(seen: Sequence[Statistics], weights: Sequence[float] | None = None) -> Statistics:
    """The statistics over several calls of the same size."""
    share = torch.tensor(weights or [1.0] * len(seen), device=seen[0].mean.device)
    share = (share / share.sum()).unsqueeze(1)
    means = torch.stack([one.mean for one in seen])
    mean = (share * means).sum(0)
    variance = (share * (torch.stack([one.variance for one in seen]) + (means - mean) ** 2)).sum(0)
    return Statistics(mean, variance)


def of_the_step(norm: nn.Module, seen: Sequence[Statistics]) -> Statistics:
    """The statistics of this call alone."""
    return seen[-1]


def seen_so_far(norm: nn.Module, seen: Sequence[Statistics]) -> Statistics:
    """The statistics of all steps of the sequence up to this one."""
    return pooled(seen)


def half_life(norm: nn.Module, seen: Sequence[Statistics]) -> Statistics:
    """A moving average over the steps of the sequence, in which each step counts half as much as the next."""
    return pooled(seen, [0.5 ** (len(seen) - 1 - t) for t in range(len(seen))])


def running(norm: Any, seen: Sequence[Statistics]) -> Statistics:
    """The norm's running statistics."""
    return Statistics(norm.running_mean.clone(), norm.running_var.clone())


def fixed(table: Mapping[nn.Module, Statistics]) -> Rule:
    """The same statistics at every step."""
    return lambda norm, seen: table[norm]


class Norms:
    """The batch norms of a multi-step network whose neurons are converted.

    Args:
        net: The network; its norms read ``[C * N, channels, ...]``.

    Attributes:
        seen: The statistics of each call of the last run, by norm.
        moments: The moments of the gradient of each call that was back-propagated since, by norm.
        latest: The statistics over all steps of an earlier batch, by norm.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.seen: dict[nn.Module, list[Statistics]] = defaultdict(list)
        self.moments: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.latest: dict[nn.Module, Statistics] = {}
        self._norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    def run(
        self, x_seq: Tensor, rule: Rule = of_the_step, moments: Moments = "step", chunk: int = 1
    ) -> Tensor:
        """The mean output over time of a batch that is run ``chunk`` steps at a time."""
        functional.reset_net(self.net)
        self.seen.clear()
        self.moments.clear()
        with self._replaced(rule, moments):
            return torch.cat([self.net(part) for part in x_seq.split(chunk)]).mean(0)

    @torch.no_grad()
    def evaluated(self, x_seq: Tensor) -> Tensor:
        """The mean output over time of the network itself, in evaluation mode with its running statistics."""
        functional.reset_net(self.net)
        return self.net(x_seq).mean(0)

    def over_all_steps(self) -> dict[nn.Module, Statistics]:
        """The statistics of the last run, over all its steps."""
        return {norm: pooled(seen) for norm, seen in self.seen.items()}

    def moments_over_all_steps(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """The moments of the gradient of the last run, over all its steps."""
        return {norm: _mean(calls) for norm, calls in self.moments.items()}

    @torch.no_grad()
    def move(self, at_each_call: bool) -> None:
        """Move the running statistics after the last run: for each call, as torch does, or once with those over all steps."""
        for norm, seen in self.seen.items():
            for mean, variance in seen if at_each_call else [pooled(seen)]:
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(variance, norm.momentum)

    @contextmanager
    def _replaced(self, rule: Rule, moments: Moments) -> Iterator[None]:
        for norm in self._norms:
            norm.forward = partial(self._normalise, norm, rule, moments)
        try:
            yield
        finally:
            for norm in self._norms:
                del norm.forward

    def _normalise(self, norm: nn.BatchNorm2d, rule: Rule, moments: Moments, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        self.seen[norm].append(Statistics(mean, variance))
        mean, variance = rule(norm, self.seen[norm])
        given = moments if isinstance(moments, str) else moments[norm]
        return _Normalise.apply(
            x, norm.weight, norm.bias, mean, (variance + norm.eps).rsqrt(), given, self.moments[norm]
        )


class _Normalise(torch.autograd.Function):
    """The equations above."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, given: Any, told: Any
    ) -> Tensor:
        z = (x - _channels(mean)) * _channels(scale)
        ctx.save_for_backward(z, weight, scale)
        ctx.given, ctx.told = given, told
        return z * _channels(weight) + _channels(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (dy,) = gradients
        z, weight, scale = ctx.saved_tensors
        over = (0, 2, 3)
        d_weight, d_bias = (dy * z).sum(over), dy.sum(over)
        samples = dy.numel() // dy.shape[1]
        own = weight * d_bias / samples, weight * d_weight / samples
        ctx.told.append(own)
        dx = dy * _channels(weight)
        if ctx.given != "none":
            m1, m2 = own if ctx.given == "step" else ctx.given
            dx = dx - _channels(m1) - z * _channels(m2)
        return dx * _channels(scale), d_weight, d_bias, None, None, None, None


def _mean(calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*calls, strict=True)
    return torch.stack(first).mean(0), torch.stack(second).mean(0)


def _channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _passes(number: int) -> Callable[[Norms, Tensor], Tensor]:
    """The last of several passes step by step. It has the statistics over all steps of the pass before it."""

    def run(norms: Norms, x_seq: Tensor) -> Tensor:
        rule: Rule = of_the_step
        for _ in range(number - 1):
            with torch.no_grad():
                norms.run(x_seq, rule)
            rule = fixed(norms.over_all_steps())
        return norms.run(x_seq, rule)

    return run


def _replayed(norms: Norms, x_seq: Tensor) -> Tensor:
    """The output of a pass with each step's statistics, and the gradient of one with the statistics over all its steps."""
    with torch.no_grad():
        first = norms.run(x_seq)
    again = norms.run(x_seq, fixed(norms.over_all_steps()))
    return first + (again - again.detach())


def _whole_first(moments: Moments = "step") -> Callable[[Norms, Tensor], Tensor]:
    """A pass step by step, with the statistics of a call that shows the network all steps, without a graph."""

    def run(norms: Norms, x_seq: Tensor) -> Tensor:
        with torch.no_grad():
            norms.run(x_seq, chunk=len(x_seq))
        return norms.run(x_seq, fixed(norms.over_all_steps()), moments)

    return run


METHODS: dict[str, Callable[[Norms, Tensor], Tensor]] = {
    "chunk=T": lambda norms, x_seq: norms.run(x_seq, chunk=len(x_seq)),
    "step": lambda norms, x_seq: norms.run(x_seq),
    "chunk=T/2": lambda norms, x_seq: norms.run(x_seq, chunk=len(x_seq) // 2),
    "first pass in replay": _replayed,
    "two passes": _passes(2),
    "three passes": _passes(3),
    "running": lambda norms, x_seq: norms.run(x_seq, running),
    "running, no moments": lambda norms, x_seq: norms.run(x_seq, running, "none"),
    "latest iteration": lambda norms, x_seq: norms.run(x_seq, fixed(norms.latest)),
    "half-life of a step": lambda norms, x_seq: norms.run(x_seq, half_life),
    "seen so far": lambda norms, x_seq: norms.run(x_seq, seen_so_far),
    "whole pass first": _whole_first(),
    "whole pass first, no moments": _whole_first("none"),
}
"""Name -> how a batch is run, to be back-propagated."""

TWICE = "whole pass first, two backward"
"""With the moments over all steps of a first backward pass."""


def gradient(
    norms: Norms, batch: Batch, method: str, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The whole gradient of a batch by one of `METHODS`, or `TWICE`, and its output."""
    x_seq, target = batch
    parameters = list(norms.net.parameters())

    def back_propagated(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_fn(output, target), parameters)

    output = METHODS["whole pass first" if method == TWICE else method](norms, x_seq)
    gradients = back_propagated(output)
    if method == TWICE:
        table, moments = norms.over_all_steps(), norms.moments_over_all_steps()
        gradients = back_propagated(norms.run(x_seq, fixed(table), moments))
    return torch.cat([gradient.flatten() for gradient in gradients]), output.detach()
