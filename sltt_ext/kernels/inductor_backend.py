"""``backend="inductor"``: neurons as `torch.compile` makes them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sltt_ext.kernels import inductor_lif
from sltt_ext.kernels.backend import Backend, KernelsOf
from sltt_ext.kernels.inductor import inductor_problem
from sltt_ext.kernels.lif import LIF, LIFKernels

__all__ = ["InductorBackend"]

_LIF: LIFKernels = inductor_lif


class InductorBackend(Backend):
    """Compiled for each neuron's settings; never the default."""

    name = "inductor"
    kernels: ClassVar[KernelsOf] = {LIF: _LIF}

    def problem(self, device: torch.device | None = None) -> str | None:
        """What is wrong with the compiler."""
        return inductor_problem()

    def runs_itself(self, x: Tensor, registered: bool) -> bool:
        """Nothing is compiled in a network that is, nor where a dispatch mode (fake tensors, counters) looks on."""
        return not registered and _get_current_dispatch_mode() is None
