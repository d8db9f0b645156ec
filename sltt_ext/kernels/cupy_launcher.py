"""Kernels compiled and launched by CuPy: the only file that imports it.

CuPy finds NVRTC, compiles, and keeps kernels on disk for the next process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sltt_ext.kernels.geometry import THREADS
from sltt_ext.kernels.launch import Launcher, LoadedKernel, first_lines
from sltt_ext.kernels.source import COMPILE_OPTIONS, Kernel, translation_unit

__all__ = ["CupyLauncher"]


class _Stream(NamedTuple):
    """What CuPy reads off a stream."""

    ptr: int


class CupyLauncher(Launcher):
    """Needs the CuPy for the CUDA that PyTorch is built for."""

    name = "cupy"

    def versions(self) -> dict[str, str]:
        """CuPy's, of the CUDA it was built for, and of the NVRTC it loads."""
        import cupy

        driver, nvrtc = cupy.cuda.driver, cupy.cuda.nvrtc

        built_for = driver.get_build_version()
        return {
            "CuPy": cupy.__version__,
            "CuPy's CUDA": f"{built_for // 1000}.{built_for % 1000 // 10}",
            "CuPy's NVRTC": ".".join(map(str, nvrtc.getVersion())),
        }

    def _load(self, kernel: Kernel, index: int) -> LoadedKernel:
        import cupy

        module = cupy.RawModule(code=translation_unit([kernel]), options=COMPILE_OPTIONS)
        function = module.get_function(kernel.name).kernel

        def run(blocks: int, arguments: tuple[int | float, ...], stream: int) -> None:
            if torch.cuda.current_device() == index:
                function((blocks,), (THREADS,), arguments, stream=_Stream(stream))
                return
            with torch.cuda.device(index):
                function((blocks,), (THREADS,), arguments, stream=_Stream(stream))

        return run

    def _problem_of_software(self, cuda: str) -> str | None:
        major = cuda.partition(".")[0]
        reinstall = f"pip uninstall every cupy package, then pip install 'sltt-ext[cupy{major}]'"
        try:
            import cupy  # noqa: F401
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed: pip install 'sltt-ext[cupy{major}]'"
        except Exception as error:
            return f"CuPy cannot be imported ({first_lines(error)}): {reinstall}"
        try:
            built_for = self.versions()["CuPy's CUDA"]
        except Exception as error:
            return (
                f"NVRTC, CUDA's run-time compiler, cannot be loaded ({first_lines(error)}): "
                f"pip install 'cupy-cuda{major}x[ctk]', or set CUDA_PATH to a CUDA {major} toolkit"
            )
        if built_for.partition(".")[0] != major:
            return f"CuPy is built for CUDA {built_for}, PyTorch for {cuda}: {reinstall}"
        return None

    def _cure(self, device: str, cuda: str) -> str:
        return (
            f"If CUDA headers or NVRTC are missing or older than {device}: "
            f"pip install -U 'cupy-cuda{cuda.partition('.')[0]}x[ctk]'"
        )
