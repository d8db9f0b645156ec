"""Batch norms with the statistics of all steps, in a multi-step network that runs some steps at a time.

In one call with the whole sequence, a norm reads the mean and the variance of all T N samples. Without a graph, such a call
holds the tensors of only one layer at a time. So it is made first, and gives the statistics. Then the steps run with these::

    y = w z + b,   z = (x - mean) / sqrt(variance + eps)

The gradient through the statistics needs two moments of g = w dL/dy over all T N samples. A call uses the moments of its own
samples instead::

    dL/dx = (g - mean(g) - z mean(g z)) / sqrt(variance + eps)

So spikes and outputs are those of the original network. In the gradient, only the two means differ.
``benchmarks/norms_over_time.py`` measures how close this comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import Layer, Replacements
from sltt_ext.neuron import state_dtype
from sltt_ext.online.norms import norms_of_batches, takes_sequences
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.passes import CallSizes, Pass, SpeedUp, through_time
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.time_invariant import is_batch_norm

__all__ = ["NormsOfSequence", "Statistics", "statistics_over_time"]

Statistics = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Mean and biased variance of each channel, by norm."""


class NormsOfSequence(SpeedUp):
    """Has batch norms read the statistics of all steps.

    Args:
        statistics: Those.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for their forwards; they are not in training, as their running statistics have moved."""
        for norm, (mean, variance) in self._statistics.items():
            one.replaced.attribute(norm, "training", False)
            one.replaced.forward(norm, Layer.OWN, partial(_normalise, mean, variance))
        yield


@torch.no_grad()
def statistics_over_time(one: Pass, speed_ups: Sequence[SpeedUp]) -> Statistics:
    """Show the network all steps in one call. Nothing stays of it but that running statistics have moved.

    Args:
        one: The pass that is to come, with an input of its own.
        speed_ups: What the network needs to run so many steps.

    Raises:
        ConfigurationError: If the network takes single steps, or a norm has no statistics of all steps.
    """
    if not one.multi_step:
        raise ConfigurationError(
            "norms='sequence' keeps the statistics that a multi-step network has over all steps, but this one takes single steps: "
            "use norms='step', or set it to multi-step mode (SpikingJelly: functional.set_step_mode(net, 'm'))"
        )
    seen = _Seen()
    whole = CallSizes(one.stop, one.stop, one.stop)
    looking = replace(
        one, selected=(), differentiable=False, keeps_from=None, sizes=whole, output=_nothing, replaced=Replacements()
    )  # fmt: skip
    before = Snapshot(one.net)
    try:
        through_time(looking, None, (*speed_ups, seen), _Nowhere())
        moved = {
            norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in seen.statistics
        }
    finally:
        before.restore()
    for norm, buffers in moved.items():
        for name, buffer in buffers.items():
            norm.get_buffer(name).copy_(buffer)
    return seen.statistics


class _Seen(SpeedUp):
    """The statistics of what each norm is called with."""

    def __init__(self) -> None:
        self.statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._paths: dict[nn.Module, str] = {}

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Look at what norms are called with."""
        for path, norm, _ in norms_of_batches(one.net):
            self._paths[norm] = path
            one.replaced.forward(norm, Layer.OWN, self._see if is_batch_norm(norm) else self._refuse)
        yield

    def _see(self, norm: nn.Module, forward: Any, x: Tensor) -> Tensor:
        if norm in self.statistics:
            raise ConfigurationError(
                f"the network calls the batch norm {self._paths[norm]!r} more than once, so it has no single statistics over all "
                "steps: use chunk=T, or norms='step'"
            )
        folded = x.flatten(0, 1) if takes_sequences(norm) else x
        over = [d for d in range(folded.dim()) if d != 1]
        variance, mean = torch.var_mean(folded.to(state_dtype(x.dtype)), over, correction=0)
        self.statistics[norm] = mean, variance
        output: Tensor = forward(x)
        return output

    def _refuse(self, norm: nn.Module, *_: Any) -> Tensor:
        raise ConfigurationError(
            f"{self._paths[norm]!r}, a {type(norm).__name__}, reads a batch in a way of its own, but norms='sequence' knows only "
            "torch's and SpikingJelly's batch norms: use chunk=T, or norms='step'"
        )


class _Nowhere(Outputs):
    """Outputs that nobody needs."""

    def add(self, output_seq: Any) -> None:
        """Let them go."""


def _nothing(returned: Any, steps: int) -> None:
    return None


def _normalise(mean: Tensor, variance: Tensor, norm: Any, forward: Any, x: Tensor) -> Tensor:
    folded = x.flatten(0, 1) if takes_sequences(norm) else x
    normalised: Tensor = _Normalised.apply(folded, norm.weight, norm.bias, mean, variance, norm.eps)
    return normalised.view(x.shape)


class _Normalised(torch.autograd.Function):
    """The equations above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, mean, scale = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, None, None, mean, scale, True, ctx.eps, wanted
        )
        return *(one if wants else None for one, wants in zip(found, wanted)), None, None, None
