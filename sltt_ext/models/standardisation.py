r"""Scaled weight standardisation, with the constants around a convolution folded into its weight.

For each output channel c of a convolution with ``fan_in`` inputs (Brock et al. 2021, "Characterizing signal
propagation to close the performance gap in unnormalized ResNets", Eq. 4)::

    W'[c] = gain[c] (W[c] - mean W[c]) / sqrt(var W[c] fan_in + 1e-4)

In a normaliser-free spiking block, a convolution reads spikes times the constant gamma = 2.74. The output of the last
one is multiplied by a skip gain and alpha before it is added to the skip connection::

    skip alpha (W' * (gamma s) + b)  =  (skip alpha gamma W') * s + skip alpha b

The right side needs no tensor of the activations' size between spikes and sum, and its weight does not depend on time. So
standardisation and skip gain are parametrisations (``torch.nn.utils.parametrize``).

The standardisation is computed as a group norm with one group for each output channel, which is one operator forward and one
backward. Group norm divides by the biased variance ``var W[c] (n - 1) / n`` with ``n = fan_in``, and adds its epsilon to that.
With ``r = n^2 / (n - 1)``::

    sqrt(var W[c] n + 1e-4)  =  sqrt(r) sqrt(var W[c] (n - 1) / n + 1e-4 / r)
"""

from __future__ import annotations

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["ScaledWeightStandardisation", "SkipGain", "standardised_conv"]

EPSILON = 1e-4


class SkipGain(nn.Module):
    """``alpha`` times a learnable gain that starts at 0: the weight of a residual branch in the sum.

    Args:
        alpha: The constant factor.
    """

    sltt_time_invariant = True

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, bias: Tensor) -> Tensor:
        """A convolution's ``bias``, scaled."""
        return bias * (self.gain * self.alpha)


class ScaledWeightStandardisation(nn.Module):
    """Zero mean and unit variance over each output channel's inputs, times a learnable gain.

    Args:
        channels: Output channels of the convolution.
        scale: A constant factor of the weight.
        skip: The gain of a residual branch, which is also a factor of the weight.
    """

    sltt_time_invariant = True

    def __init__(self, channels: int, scale: float = 1.0, skip: SkipGain | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.skip = skip
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """A convolution's ``weight`` ``[C, ...]``, standardised and scaled."""
        fan_in, channels = weight[0].numel(), len(weight)
        ratio = fan_in**2 / max(fan_in - 1, 1)
        constant = self.scale * ratio**-0.5
        if self.skip is None:
            factor = self.gain.flatten() * constant
        else:
            factor = self.gain.flatten() * (self.skip.gain * (constant * self.skip.alpha))
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        rows = weight.permute(0, 2, 3, 1) if last else weight  # in the order that they have in memory
        normal = F.group_norm(
            rows.reshape(1, channels, -1), channels, factor.to(weight.dtype), eps=EPSILON / ratio
        ).view(rows.shape)
        return normal.permute(0, 3, 1, 2) if last else normal


def standardised_conv(
    inputs: int,
    outputs: int,
    kernel_size: int,
    stride: int = 1,
    *,
    scale: float = 1.0,
    skip: SkipGain | None = None,
) -> nn.Module:
    """A step-mode-aware convolution with a standardised weight, a bias, and "same" padding."""
    conv: nn.Conv2d = layer.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    register_parametrization(conv, "weight", ScaledWeightStandardisation(outputs, scale, skip))
    if skip is not None:
        register_parametrization(conv, "bias", skip)
    return conv
