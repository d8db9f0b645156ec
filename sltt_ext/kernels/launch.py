"""Compiling and launching CUDA kernels through CuPy: the only file that imports it.

PyTorch allocates all memory; CuPy compiles with NVRTC and launches on PyTorch's current stream. A kernel is
compiled once per device and process; CuPy keeps it on disk for the next process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sltt_ext.errors import BackendError
from sltt_ext.kernels.geometry import THREADS
from sltt_ext.kernels.source import COMPILE_OPTIONS, Kernel, make_kernel, translation_unit

__all__ = ["Launch", "cupy_problem", "cupy_versions", "launch_on_device"]

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
        function = _COMPILED.get((kernel, index)) or _compile(kernel, index)
        stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
        function((blocks,), (THREADS,), arguments, stream=stream)


def _compile(kernel: Kernel, index: int) -> Any:
    """Compile a kernel for the current device."""
    _refuse_during_capture()
    import cupy

    module = cupy.RawModule(code=translation_unit([kernel]), options=COMPILE_OPTIONS)
    try:
        _COMPILED[kernel, index] = module.get_function(kernel.name).kernel
    except Exception as error:
        raise BackendError(f"the kernel {kernel.name} cannot be compiled: {_first_lines(error)}") from error
    return _COMPILED[kernel, index]


def _refuse_during_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "a kernel is not compiled yet, and cannot be while a CUDA graph is captured: run the same forward "
            "and backward once before the capture"
        )


def cupy_versions() -> dict[str, str]:
    """Versions of CuPy, of the CUDA it was built for, and of the NVRTC it loads.

    Raises:
        Exception: Whatever importing CuPy or loading NVRTC raises.
    """
    import cupy

    driver, nvrtc = cupy.cuda.driver, cupy.cuda.nvrtc

    built_for = driver.get_build_version()
    return {
        "CuPy": cupy.__version__,
        "CuPy's CUDA": f"{built_for // 1000}.{built_for % 1000 // 10}",
        "NVRTC": ".".join(map(str, nvrtc.getVersion())),
    }


def cupy_problem(index: int | None = None) -> str | None:
    """Why the CuPy kernels cannot be used, and what to do; None if they can.

    Args:
        index: The device to use them on; None asks about the machine, without using a device.
    """
    problem = _problem_of_machine()
    return problem if problem is not None or index is None else _problem_of_device(index)


@functools.cache
def _problem_of_machine() -> str | None:
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm, the kernels are for CUDA"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "PyTorch finds no CUDA device (torch.cuda.is_available() is False)"
    return _problem_of_cupy(torch.version.cuda)


def _problem_of_cupy(cuda: str) -> str | None:
    major = cuda.partition(".")[0]
    reinstall = f"pip uninstall every cupy package, then pip install 'sltt-ext[cupy{major}]'"
    try:
        import cupy  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install 'sltt-ext[cupy{major}]'"
    except Exception as error:
        return f"CuPy cannot be imported ({_first_lines(error)}): {reinstall}"
    try:
        built_for = cupy_versions()["CuPy's CUDA"]
    except Exception as error:
        return (
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({_first_lines(error)}): "
            f"pip install 'cupy-cuda{major}x[ctk]', or set CUDA_PATH to a CUDA {major} toolkit"
        )
    if built_for.partition(".")[0] != major:
        return f"CuPy is built for CUDA {built_for}, PyTorch for {cuda}: {reinstall}"
    return None


@functools.cache
def _problem_of_device(index: int) -> str | None:
    """Compiling a small kernel shows what else can be wrong: headers, architectures, the driver."""
    _refuse_during_capture()
    trial = make_kernel(
        "lif", "forward", torch.float32, 1, None, CHARGE=0, SOFT_RESET=1, SAVE=0, SAVE_SLOPES=0
    )
    try:
        with torch.cuda.device(index):
            _compile(trial, index)
    except BackendError as error:
        assert torch.version.cuda is not None
        major = torch.version.cuda.partition(".")[0]
        return (
            f"{error}. If CUDA headers or NVRTC are missing or older than {torch.cuda.get_device_name(index)}: "
            f"pip install -U 'cupy-cuda{major}x[ctk]'"
        )
    return None


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([type(error).__name__ + ":", *lines[:3]])
