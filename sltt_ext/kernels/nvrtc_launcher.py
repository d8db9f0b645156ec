"""Kernels compiled by PyTorch's own NVRTC and launched through the CUDA driver: nothing else is needed.

Nothing is kept on disk: each process compiles what it runs, in a fraction of a second a kernel.
"""

from __future__ import annotations

import torch

from sltt_ext.errors import BackendError
from sltt_ext.kernels.driver import Driver, find_driver
from sltt_ext.kernels.launch import Launcher, LoadedKernel
from sltt_ext.kernels.nvrtc import NVRTC, find_nvrtc
from sltt_ext.kernels.source import COMPILE_OPTIONS, CUPYS_OPTIONS, Kernel, translation_unit

__all__ = ["NvrtcLauncher"]


class NvrtcLauncher(Launcher):
    """Needs what PyTorch itself brings where it runs on CUDA."""

    name = "nvrtc"

    def __init__(self) -> None:
        super().__init__()
        self._nvrtc: NVRTC | None = None
        self._driver: Driver | None = None

    def versions(self) -> dict[str, str]:
        """NVRTC's, and where it was found, and the newest CUDA that the driver runs."""
        if torch.version.cuda is None:
            raise BackendError("PyTorch is built without CUDA")
        nvrtc = self._find_nvrtc()
        try:
            runs = "CUDA " + ".".join(map(str, self._find_driver().version))
        except BackendError as error:
            runs = f"none: {error}"
        return {"PyTorch's NVRTC": f"{'.'.join(map(str, nvrtc.version))}, {nvrtc.path}", "CUDA driver": runs}

    def _load(self, kernel: Kernel, index: int) -> LoadedKernel:
        major, minor = torch.cuda.get_device_capability(index)
        nvrtc, driver = self._find_nvrtc(), self._find_driver()
        target = nvrtc.target(10 * major + minor)
        image = nvrtc.compile(translation_unit([kernel]), (*COMPILE_OPTIONS, *CUPYS_OPTIONS), target)
        return driver.load(image, kernel.name, index)

    def _problem_of_software(self, cuda: str) -> str | None:
        try:
            self._find_nvrtc()
            self._find_driver()
        except BackendError as error:
            return str(error)
        return None

    def _cure(self, device: str, cuda: str) -> str:
        return f"If NVRTC or the driver is older than {device}: install a newer driver, or PyTorch built for a CUDA newer than {cuda}"

    def _find_nvrtc(self) -> NVRTC:
        if self._nvrtc is None:
            assert torch.version.cuda is not None
            self._nvrtc = find_nvrtc(torch.version.cuda)
        return self._nvrtc

    def _find_driver(self) -> Driver:
        if self._driver is None:
            self._driver = find_driver()
        return self._driver
