"""Compiling and launching CUDA kernels through CuPy: the only file that imports it.

PyTorch allocates all memory; CuPy compiles with NVRTC and launches on PyTorch's current stream. A kernel is
compiled once per device and process, and kept on disk by CuPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sltt_ext.errors import BackendError
from sltt_ext.kernels.geometry import THREADS
from sltt_ext.kernels.source import COMPILE_OPTIONS, Kernel, translation_unit

__all__ = ["Launch", "compile_on_device", "launch_on_device"]

Launch = Callable[[Kernel, int, tuple[int | float, ...], torch.device], None]
"""``(kernel, blocks, arguments, device)``: addresses and integers as 64-bit integers, numbers as double."""

_COMPILED: dict[tuple[Kernel, int], Any] = {}


class _Stream(NamedTuple):
    """What CuPy reads off a stream."""

    ptr: int


def launch_on_device(
    kernel: Kernel, blocks: int, arguments: tuple[int | float, ...], device: torch.device
) -> None:
    """Launch on PyTorch's current stream of ``device``.

    Raises:
        BackendError: If the kernel does not compile, or is not compiled yet while a CUDA graph is captured.
    """
    index: int = device.index
    with torch.cuda.device(index):
        function = _COMPILED.get((kernel, index)) or compile_on_device(kernel, index)
        stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
        function((blocks,), (THREADS,), arguments, stream=stream)


def compile_on_device(kernel: Kernel, index: int) -> Any:
    """Compile a kernel for a device, which has to be the current one."""
    import cupy

    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"the kernel {kernel.name} is not compiled yet, which cannot be done while a CUDA graph is captured: "
            "run the same forward and backward once before the capture"
        )
    module = cupy.RawModule(code=translation_unit([kernel]), options=COMPILE_OPTIONS)
    try:
        function = module.get_function(kernel.name).kernel
    except Exception as error:
        raise BackendError(f"NVRTC cannot compile {kernel.name}: {error}") from error
    _COMPILED[kernel, index] = function
    return function
