"""How much of SLTT's gradient is left if K of the T steps are back-propagated: which K a network needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.analysis import plots
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.analysis.similarity import gradients_by
from sltt_ext.conversion import convert
from sltt_ext.methods import GradientTrainer, Method, check_time_steps
from sltt_ext.online.objective import Backward, LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output

__all__ = ["DrawnSteps", "drawn_steps"]


@dataclass(frozen=True)
class DrawnSteps:
    """What `drawn_steps` measured.

    Attributes:
        time_steps: T.
        spread: How far the gradients of single steps are from their mean: root mean square, relative to the norm of the mean.
    """

    time_steps: int
    spread: float

    def cosine(self, k: int) -> float:
        """The average cosine similarity of the gradient of K drawn steps with that of all steps.

        The mean of K of T numbers, drawn without replacement, has the variance ``S^2 / K (T - K) / (T - 1)``. In a space of
        many dimensions, nearly all of the deviation is perpendicular to the mean.
        """
        if k >= self.time_steps:
            return 1.0
        variance = self.spread**2 / k * (self.time_steps - k) / (self.time_steps - 1)
        return 1 / math.sqrt(1 + variance)

    def smallest(self, cosine: float = 0.9) -> int:
        """The smallest K whose cosine similarity is at least ``cosine``."""
        return next(k for k in range(1, self.time_steps + 1) if self.cosine(k) >= cosine)

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: the cosine similarity against K."""
        ks = range(1, self.time_steps + 1)
        values = {"cosine similarity with all steps": [self.cosine(k) for k in ks]}
        return plots.lines(
            dict.fromkeys(values, ks), values, xlabel="K", ylabel="of SLTT's gradient", from_zero=True
        )


def drawn_steps(
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    time_dim: TimeDim | None = None,
    output: Output = None,
) -> DrawnSteps:
    """How far SLTT-K's gradient is from SLTT's, for every K. It is computed from the gradients of the single steps.

    Afterwards the network is as before.

    Args:
        net: A network that `convert` knows, converted or not.
        x: One batch, as `OnlineTrainer` takes it.
        target: Its target.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.

    Raises:
        ConversionError: If the network has no neuron, or has neurons that SLTT cannot train.
        ConfigurationError: If a module takes its whole sequence, as no steps can be drawn from it.

    Examples:
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 2))
        >>> x, target = torch.rand(5, 4), torch.randint(2, (5,))
        >>> drawn_steps(net, x, target, nn.functional.cross_entropy, time_steps=6).cosine(6)
        1.0
    """
    check_time_steps(time_steps)
    net = without_multi_step(net)
    total: Tensor | None = None
    squares = 0.0
    for t in range(time_steps):
        gradient = _gradient_of_step(t, net, x, target, loss_fn, time_steps, time_dim, output)
        squares += float(gradient @ gradient) / time_steps
        total = gradient if total is None else total + gradient
    assert total is not None
    mean = total / time_steps
    square = float(mean @ mean)
    spread = math.sqrt(max(squares - square, 0.0) / square) if square else 0.0
    return DrawnSteps(time_steps, spread)


def _gradient_of_step(
    t: int,
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    time_dim: TimeDim | None,
    output: Output,
) -> Tensor:
    """SLTT's gradient of the loss of one step, with all parameters in one vector."""

    def trainer_of(loss_fn: LossFn, backward: Backward) -> GradientTrainer:
        convert(net, temporal="step")
        return Method("sltt", cache_invariant=False, full_output=False).trainer(
            net, loss_fn, time_steps, backward=backward, schedule=_only(t), time_dim=time_dim, output=output
        )

    gradients, _ = gradients_by(net, trainer_of, loss_fn, (x, target))
    return torch.stack([torch.cat([tensor.double().flatten() for tensor in part]) for part in gradients]).sum(
        0
    )


def _only(t: int) -> Callable[[int, Any], list[int]]:
    return lambda time_steps, generator: [t]
