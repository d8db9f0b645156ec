"""Losses of one time step, as in the paper's experiments."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sltt_ext.errors import ConfigurationError

__all__ = ["CrossEntropyMSELoss"]


class CrossEntropyMSELoss(nn.Module):
    r"""``(1 - mse_weight) * cross-entropy + mse_weight * mean squared error`` of one step's output.

    This is the loss of the paper's experiments (Meng et al. 2023, Sec. 5), where ``mse_weight`` is called ``lambda``.

    Args:
        mse_weight: Weight of the mean squared error, from 0 to 1; the paper's value is 0.05.
        mse_target: The value to which the squared error pulls the output: a constant (1.0 in the paper), or
            ``"one_hot"`` for the one-hot label.

    Shape: output ``[N, classes]``, target class indices ``[N]``; returns a scalar.

    Examples:
        >>> import torch
        >>> loss_fn = CrossEntropyMSELoss(mse_weight=0.05)
        >>> loss_fn(torch.zeros(4, 10), torch.arange(4)).shape
        torch.Size([])
    """

    def __init__(self, mse_weight: float = 0.05, mse_target: float | str = 1.0) -> None:
        super().__init__()
        if not 0 <= mse_weight <= 1:
            raise ConfigurationError(f"mse_weight must be from 0 to 1, got {mse_weight}")
        if isinstance(mse_target, str) and mse_target != "one_hot":
            raise ConfigurationError(f"mse_target must be a number or 'one_hot', got {mse_target!r}")
        self.mse_weight = mse_weight
        self.mse_target = mse_target

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of ``output`` ``[N, classes]`` for class indices ``target`` ``[N]``."""
        cross_entropy = F.cross_entropy(output, target)
        if self.mse_weight == 0:
            return cross_entropy
        if isinstance(self.mse_target, str):
            pull = F.one_hot(target, output.shape[-1]).to(output.dtype)
        else:
            pull = output.new_full((), self.mse_target).expand_as(output)
        return (1 - self.mse_weight) * cross_entropy + self.mse_weight * F.mse_loss(output, pull)

    def extra_repr(self) -> str:  # noqa: D102
        return f"mse_weight={self.mse_weight}, mse_target={self.mse_target!r}"
