"""The layers of SpikingJelly 0.0.0.0.12 that carry a state, or take sequences; others as the installed one has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sltt_ext.clock_driven import functional
from sltt_ext.clock_driven.base import MemoryModule
from sltt_ext.clock_driven.newer import newer

__all__ = [
    "Dropout", "Dropout2d", "ElementWiseRecurrentContainer", "LinearRecurrentContainer", "MultiStepContainer",
    "MultiStepDropout", "MultiStepDropout2d", "MultiStepThresholdDependentBatchNorm1d",
    "MultiStepThresholdDependentBatchNorm2d", "MultiStepThresholdDependentBatchNorm3d", "NeuNorm", "SeqToANNContainer",
    "SynapseFilter",
]  # fmt: skip


class Dropout(MemoryModule):
    """Drops the same in all steps of a sequence."""

    mask: Any

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.register_memory("mask", None)
        self.p = p

    def create_mask(self, x: Tensor) -> None:
        """Draw what is dropped."""
        self.mask = F.dropout(torch.ones_like(x.detach()), self.p)

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        if not self.training:
            return x
        if self.mask is None:
            self.create_mask(x)
        kept: Tensor = x * self.mask
        return kept

    def extra_repr(self) -> str:
        """What the layer is set to."""
        return f"p={self.p}"


class Dropout2d(Dropout):
    """Drops whole channels."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__(p)

    def create_mask(self, x: Tensor) -> None:
        """Draw what is dropped."""
        self.mask = F.dropout2d(torch.ones_like(x.detach()), self.p)


class MultiStepDropout(Dropout):
    """`Dropout` for sequences."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, N, ...]``."""
        if self.training and self.mask is None:
            self.create_mask(x_seq[0])
        return super().forward(x_seq)


class MultiStepDropout2d(Dropout2d):
    """`Dropout2d` for sequences."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, N, ...]``."""
        if self.training and self.mask is None:
            self.create_mask(x_seq[0])
        return super().forward(x_seq)


class SynapseFilter(MemoryModule):
    """A current that decays between spikes, and grows by one at each."""

    out_i: Any

    def __init__(self, tau: float = 100.0, learnable: bool = False) -> None:
        super().__init__()
        self.learnable = learnable
        if learnable:
            self.w = nn.Parameter(torch.as_tensor(-math.log(tau - 1)))
        else:
            self.tau = tau
        self.register_memory("out_i", 0.0)

    def forward(self, in_spikes: Tensor) -> Tensor:
        """The current of one step."""
        decay = self.w.sigmoid() if self.learnable else 1.0 / self.tau
        self.out_i = self.out_i - (1 - in_spikes) * self.out_i * decay + in_spikes
        current: Tensor = self.out_i
        return current


class NeuNorm(MemoryModule):
    """Subtracts a running sum over the channels, weighted."""

    x: Any

    def __init__(
        self, in_channels: int, height: int, width: int, k: float = 0.9, shared_across_channels: bool = False
    ) -> None:
        super().__init__()
        self.register_memory("x", 0.0)
        self.k0, self.k1 = k, (1.0 - k) / in_channels**2
        self.w = nn.Parameter(torch.empty(1 if shared_across_channels else in_channels, height, width))
        nn.init.kaiming_uniform_(self.w, a=math.sqrt(5))

    def forward(self, in_spikes: Tensor) -> Tensor:
        """One step."""
        self.x = self.k0 * self.x + self.k1 * in_spikes.sum(dim=1, keepdim=True)
        return in_spikes - self.w * self.x


class ElementWiseRecurrentContainer(MemoryModule):
    """Feeds the last output of a module back to its input, by a function of both."""

    y: Tensor | None

    def __init__(
        self, sub_module: nn.Module, element_wise_function: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.sub_module, self.element_wise_function = sub_module, element_wise_function
        self.register_memory("y", None)

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        y = torch.zeros_like(x.detach()) if self.y is None else self.y
        self.y = self.sub_module(self.element_wise_function(y, x))
        return self.y


class LinearRecurrentContainer(MemoryModule):
    """Feeds the last output of a module back to its input, through a linear layer."""

    y: Tensor | None

    def __init__(self, sub_module: nn.Module, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.sub_module_out_features = out_features
        self.rc = nn.Linear(in_features + out_features, in_features, bias)
        self.sub_module = sub_module
        self.register_memory("y", None)

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        y = x.new_zeros(*x.shape[:-1], self.sub_module_out_features) if self.y is None else self.y
        self.y = self.sub_module(self.rc(torch.cat((x, y), dim=-1)))
        return self.y


class MultiStepContainer(nn.Sequential):
    """Calls what is in it step by step."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, N, ...]``."""
        return functional.multi_step_forward(x_seq, list(self))


class SeqToANNContainer(nn.Sequential):
    """Calls layers without a state once for all steps."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, N, ...]``."""
        return functional.seq_to_ann_forward(x_seq, list(self))


class _MultiStepThresholdDependentBatchNorm(_BatchNorm):
    """Batch norm over all steps, scaled to the threshold of the neuron behind it."""

    dimensions: tuple[int, ...]

    def __init__(self, alpha: float, v_th: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.v_th = alpha, v_th
        nn.init.constant_(self.weight, alpha * v_th)

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, N, C, ...]``."""
        return super().forward(x_seq.flatten(0, 1)).view(x_seq.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dimensions:
            raise ValueError(
                f"expected [T, N, C, ...] of the norm's dimensions, got steps of shape {list(input.shape)}"
            )


class MultiStepThresholdDependentBatchNorm1d(_MultiStepThresholdDependentBatchNorm):
    """For ``[T, N, C]`` or ``[T, N, C, L]``."""

    dimensions = (2, 3)


class MultiStepThresholdDependentBatchNorm2d(_MultiStepThresholdDependentBatchNorm):
    """For ``[T, N, C, H, W]``."""

    dimensions = (4,)


class MultiStepThresholdDependentBatchNorm3d(_MultiStepThresholdDependentBatchNorm):
    """For ``[T, N, C, D, H, W]``."""

    dimensions = (5,)


def __getattr__(name: str) -> Any:
    return newer("layer", name)
