"""``backend="torch"``: PyTorch's operators. It runs every neuron, on any device, in every dtype."""

from __future__ import annotations

from typing import ClassVar

from sltt_ext.kernels import torch_leaky, torch_lif
from sltt_ext.kernels.backend import Backend, KernelsOf
from sltt_ext.kernels.leaky import LEAKY, LeakyKernels
from sltt_ext.kernels.lif import LIF, LIFKernels

__all__ = ["TorchBackend"]

_LIF: LIFKernels = torch_lif
_LEAKY: LeakyKernels = torch_leaky


class TorchBackend(Backend):
    """PyTorch's operators, the reference for every other backend."""

    name = "torch"
    kernels: ClassVar[KernelsOf] = {LIF: _LIF, LEAKY: _LEAKY}
