"""``backend="cupy"``: CUDA kernels, compiled and launched by CuPy."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from sltt_ext.errors import BackendError, InputError
from sltt_ext.kernels import cuda_leaky, cuda_lif
from sltt_ext.kernels.backend import Backend, KernelsOf
from sltt_ext.kernels.launch import cupy_problem
from sltt_ext.kernels.leaky import LEAKY, LeakyKernels
from sltt_ext.kernels.lif import LIF, LIFKernels
from sltt_ext.kernels.source import SCALARS

__all__ = ["CudaBackend"]

_LIF: LIFKernels = cuda_lif
_LEAKY: LeakyKernels = cuda_leaky


class CudaBackend(Backend):
    """CUDA kernels for float32, float16 and bfloat16."""

    name = "cupy"
    kernels: ClassVar[KernelsOf] = {LIF: _LIF, LEAKY: _LEAKY}

    def problem(self, device: torch.device | None = None) -> str | None:
        """What is wrong with CuPy, NVRTC or the device."""
        return cupy_problem(None if device is None else device.index)

    def is_default_for(self, x: Tensor) -> bool:
        """On CUDA, in the dtypes of the kernels."""
        return x.is_cuda and x.dtype in SCALARS and not isinstance(x, FakeTensor)

    def check_input(self, x: Tensor) -> None:
        """The machine first, so that what is missing is told before what could be changed."""
        problem = self.problem()
        if problem is None and not x.is_cuda:
            raise BackendError(
                f"backend='cupy' runs on CUDA tensors, x_seq is on {x.device}: use 'auto' or 'torch'"
            )
        if problem is None and x.dtype not in SCALARS:
            raise InputError(f"backend='cupy' does not compute in {x.dtype}: use backend='torch'")
        if problem is not None or (problem := self.problem(x.device)) is not None:
            raise BackendError(f"backend='cupy' cannot be used: {problem}")

    def runs_itself(self, x: Tensor, registered: bool) -> bool:
        """No launch for a fake tensor, which has no memory."""
        return not isinstance(x, FakeTensor)
