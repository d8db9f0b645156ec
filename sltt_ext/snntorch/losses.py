"""snnTorch's losses over whole recordings as losses of one time step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snntorch import functional
from torch import Tensor

from sltt_ext.errors import ConfigurationError

__all__ = ["step_loss"]

_MEANS_OVER_TIME = (functional.ce_rate_loss, functional.mse_membrane_loss)


def step_loss(loss_fn: Any) -> Callable[[Tensor, Any], Tensor]:
    """One of snnTorch's losses for recordings ``[T, N, classes]``, as the loss of one step ``[N, classes]``.

    For those that are a mean over time, `OnlineTrainer`'s total is then snnTorch's own number.

    Args:
        loss_fn: ``ce_rate_loss(...)``, or ``mse_membrane_loss(...)`` with targets that do not change.

    Raises:
        ConfigurationError: If the loss is no mean over time steps (spike counts, spike times, the largest
            membrane potential), so that one step's part of it does not exist.

    Examples:
        >>> loss_fn = step_loss(functional.ce_rate_loss())
    """
    if not isinstance(loss_fn, _MEANS_OVER_TIME) or getattr(loss_fn, "time_var_targets", False):
        raise ConfigurationError(
            f"{type(loss_fn).__name__} is not a mean over time steps with one target for all: use ce_rate_loss or "
            "mse_membrane_loss, your own loss for one step, or convert() and your own loop over time"
        )

    def loss_of_step(output: Tensor, target: Any) -> Tensor:
        loss: Tensor = loss_fn(output.unsqueeze(0), target)
        return loss.squeeze()  # snnTorch returns shape [1]

    return loss_of_step
