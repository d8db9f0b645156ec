"""``backend="cupy"`` and ``backend="nvrtc"``: the same CUDA kernels, launched by CuPy or by what PyTorch brings."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from sltt_ext.errors import BackendError, InputError
from sltt_ext.kernels import cuda_leaky, cuda_lif
from sltt_ext.kernels.backend import Backend, KernelsOf
from sltt_ext.kernels.cupy_launcher import CupyLauncher
from sltt_ext.kernels.launch import Launch, Launcher
from sltt_ext.kernels.leaky import LEAKY
from sltt_ext.kernels.lif import LIF
from sltt_ext.kernels.nvrtc_launcher import NvrtcLauncher
from sltt_ext.kernels.source import SCALARS

__all__ = ["CupyBackend", "NvrtcBackend", "kernels_launched_by"]


def kernels_launched_by(launch: Launch) -> KernelsOf:
    """The CUDA kernels of every kind of neurons."""
    entries = "forward", "backward", "backward_through_time"

    def launched(module: Any) -> Any:
        functions = {entry: functools.partial(getattr(module, entry), launch=launch) for entry in entries}
        return SimpleNamespace(**functions)

    return {LIF: launched(cuda_lif), LEAKY: launched(cuda_leaky)}


class _CudaBackend(Backend):
    """CUDA kernels for float32, float16 and bfloat16."""

    launcher: ClassVar[Launcher]

    def problem(self, device: torch.device | None = None) -> str | None:
        """What is wrong with the compiler, the driver or the device."""
        return self.launcher.problem(None if device is None else device.index)

    def is_default_for(self, x: Tensor) -> bool:
        """On CUDA, in the dtypes of the kernels."""
        return x.is_cuda and x.dtype in SCALARS and not isinstance(x, FakeTensor)

    def check_input(self, x: Tensor) -> None:
        """The machine first, so that what is missing is told before what could be changed."""
        problem = self.problem()
        if problem is None and not x.is_cuda:
            raise BackendError(
                f"backend={self.name!r} runs on CUDA tensors, x_seq is on {x.device}: use 'auto' or 'torch'"
            )
        if problem is None and x.dtype not in SCALARS:
            raise InputError(f"backend={self.name!r} does not compute in {x.dtype}: use backend='torch'")
        if problem is not None or (problem := self.problem(x.device)) is not None:
            raise BackendError(f"backend={self.name!r} cannot be used: {problem}")

    def runs_itself(self, x: Tensor, registered: bool) -> bool:
        """No launch for a fake tensor, which has no memory."""
        return not isinstance(x, FakeTensor)


class CupyBackend(_CudaBackend):
    """Launched by CuPy, where it is installed."""

    name = "cupy"
    launcher = CupyLauncher()
    kernels: ClassVar[KernelsOf] = kernels_launched_by(launcher.launch)


class NvrtcBackend(_CudaBackend):
    """Launched by PyTorch's own NVRTC and the driver, on every CUDA machine that PyTorch runs on."""

    name = "nvrtc"
    launcher = NvrtcLauncher()
    kernels: ClassVar[KernelsOf] = kernels_launched_by(launcher.launch)
