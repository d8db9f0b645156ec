"""What launches CUDA kernels: each compiled once for a device and process, and run on PyTorch's current stream.

PyTorch allocates all memory. There are two launchers, for the same source with the same options, so that results are
equal bit for bit: `sltt_ext.kernels.cupy_launcher` and `sltt_ext.kernels.nvrtc_launcher`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from sltt_ext.errors import BackendError
from sltt_ext.kernels.source import Kernel, make_kernel

__all__ = ["Launch", "Launcher", "LoadedKernel", "first_lines"]

Launch = Callable[[Kernel, int, tuple[int | float, ...], torch.device], None]
"""``(kernel, blocks, arguments, device)``: addresses and integers as 64-bit integers, numbers as double."""

LoadedKernel = Callable[[int, tuple[int | float, ...], int], None]
"""``(blocks, arguments, stream)``: launches on a stream, given as CUDA's handle, of the device it is loaded on."""


class Launcher(ABC):
    """Compiles kernels, keeps them, and launches them; one for a process.

    Attributes:
        name: Of the backend that uses it.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._loaded: dict[tuple[Kernel, int], LoadedKernel] = {}
        self._problems: dict[int | None, str | None] = {}
        self._lock = threading.RLock()

    def launch(
        self, kernel: Kernel, blocks: int, arguments: tuple[int | float, ...], device: torch.device
    ) -> None:
        """Launch on PyTorch's current stream of ``device``.

        Raises:
            BackendError: If the kernel does not compile, or is not compiled yet while a CUDA graph is captured.
        """
        index: int = device.index
        loaded = self._loaded.get((kernel, index)) or self._compile(kernel, index)
        loaded(blocks, arguments, torch.cuda.current_stream(index).cuda_stream)

    def problem(self, index: int | None = None) -> str | None:
        """Why it cannot be used, and what to do; None if it can.

        Args:
            index: The device to use it on; None asks about the machine, without using a device.
        """
        if index not in self._problems:
            self._problems[index] = self._found_problem(index)
        return self._problems[index]

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what it uses, by name.

        Raises:
            Exception: Whatever is wrong with it.
        """

    @abstractmethod
    def _load(self, kernel: Kernel, index: int) -> LoadedKernel:
        """Compile for a device and load; raises whatever goes wrong."""

    @abstractmethod
    def _problem_of_software(self, cuda: str) -> str | None:
        """What is wrong with what is installed, for PyTorch built for CUDA ``cuda``."""

    @abstractmethod
    def _cure(self, device: str, cuda: str) -> str:
        """What may help where nothing is wrong with what is installed, and still no kernel runs on ``device``."""

    def _compile(self, kernel: Kernel, index: int) -> LoadedKernel:
        with self._lock, torch.cuda.device(index):
            if (loaded := self._loaded.get((kernel, index))) is not None:
                return loaded
            _refuse_during_capture()
            try:
                self._loaded[kernel, index] = self._load(kernel, index)
            except Exception as error:
                said = str(error) if isinstance(error, BackendError) else first_lines(error)
                raise BackendError(f"the kernel {kernel.name} cannot be compiled: {said}") from error
            return self._loaded[kernel, index]

    def _found_problem(self, index: int | None) -> str | None:
        if index is not None:
            return self.problem() or self._problem_of_device(index)
        if torch.version.hip is not None:
            return "PyTorch is built for ROCm, the kernels are for CUDA"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "PyTorch finds no CUDA device (torch.cuda.is_available() is False)"
        return self._problem_of_software(torch.version.cuda)

    def _problem_of_device(self, index: int) -> str | None:
        """Compiling a small kernel shows what else can be wrong: headers, architectures, the driver."""
        _refuse_during_capture()
        trial = make_kernel(
            "lif", "forward", torch.float32, 1, None, CHARGE=0, SOFT_RESET=1, SAVE=0, SAVE_SLOPES=0
        )
        try:
            self._compile(trial, index)
        except BackendError as error:
            assert torch.version.cuda is not None
            return f"{error}. {self._cure(torch.cuda.get_device_name(index), torch.version.cuda)}"
        return None


def _refuse_during_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "a kernel is not compiled yet, and it cannot be compiled while a CUDA graph is captured: run the same forward "
            "and backward once before the capture"
        )


def first_lines(error: Exception) -> str:
    """Kind and first lines of an error of someone else's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([type(error).__name__ + ":", *lines[:3]])
