"""``backend="nvrtc"`` without a device: all of it but for NVRTC's machine code, whose place g++ takes, and the driver.

`library` is a CUDA driver for the host (`kernels/driver.cpp`), called through ctypes like the real one.
"""

import contextlib
import ctypes
import functools
from pathlib import Path
from types import SimpleNamespace

import host
import torch

from sltt_ext.kernels import nvrtc, selection
from sltt_ext.kernels.cuda_backend import kernels_launched_by
from sltt_ext.kernels.driver import Driver
from sltt_ext.kernels.nvrtc_launcher import NvrtcLauncher

SOURCE = Path(__file__).parent / "kernels" / "driver.cpp"
CONTEXTS = 1040, 1041
"""The primary contexts of its devices."""


@functools.cache
def library():
    """One for the process, with the record of its calls."""
    headers = [f"-I{folder.parent / 'include'}" for folder in nvrtc._package_folders()]
    options = ["-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-Werror", *headers, "-ldl"]
    loaded = ctypes.CDLL(str(host.built_library(SOURCE.read_text(), options)))
    loaded.calls.restype = ctypes.c_char_p
    loaded.set_current.argtypes, loaded.current.restype = [ctypes.c_ulonglong], ctypes.c_ulonglong
    return loaded


def calls():
    """What was called since the last time, one call a line."""
    lines = library().calls().decode().splitlines()
    library().forget_calls()
    return lines


class HostLauncher(NvrtcLauncher):
    """Loads what g++ makes of a kernel."""

    def __init__(self):
        super().__init__()
        self._driver = Driver(library())
        self._nvrtc = SimpleNamespace(target=lambda architecture: f"sm_{architecture}", compile=self._image)

    def _load(self, kernel, index):
        self._kernel = kernel
        return super()._load(kernel, index)

    def _image(self, source, options, target):
        assert f"#define KERNEL {self._kernel.name}\n" in source
        assert target == "sm_90"
        return host.library_of(self._kernel)._name.encode()


def reset():
    """No call has been made, none fails, and this thread has no context, as one of autograd's at first."""
    library().set_current(0)
    library().fail(b"", 0)
    library().pause_for(0)
    calls()


def machine(monkeypatch):
    """A launcher on a machine with two devices."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=700 + index))
    reset()
    return HostLauncher()


def register(monkeypatch):
    """Make ``backend="nvrtc"`` run on the CPU."""
    launcher = machine(monkeypatch)

    def launch(kernel, blocks, arguments, device):
        launcher.launch(kernel, blocks, arguments, torch.device("cuda", 0))

    backend = host.HostBackend("nvrtc", kernels_launched_by(launch))
    monkeypatch.setitem(selection._REGISTERED, "nvrtc", backend)
    return launcher
