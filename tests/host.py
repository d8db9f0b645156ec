"""Runs the CUDA kernels on the CPU: the same source, built by g++ with `kernels/host.h`.

`launch` takes the place of `sltt_ext.kernels.launch.launch_on_device`, so that allocation, layouts, geometry
and arguments are those of the real thing. `HostBackend` takes the place of ``backend="cupy"``.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import variants

from sltt_ext.errors import InputError
from sltt_ext.kernels import cuda_leaky, cuda_lif, selection
from sltt_ext.kernels.cuda_backend import CudaBackend
from sltt_ext.kernels.geometry import THREADS
from sltt_ext.kernels.leaky import LEAKY
from sltt_ext.kernels.lif import LIF
from sltt_ext.kernels.source import SCALARS, Kernel, translation_unit
from sltt_ext.surrogate import SURROGATES

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

OPTIONS = ["-std=c++17", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
HEADER = Path(__file__).parent / "kernels" / "host.h"

_BUILT: dict[Kernel, ctypes.CDLL] = {}


def launch(kernel: Kernel, blocks: int, arguments: tuple[int | float, ...], device: torch.device) -> None:
    if kernel not in _BUILT:
        build(next((group for group in _groups() if kernel in group), [kernel]))
    values = [
        ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value)
        for value in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(
        *[ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
    )
    synchronises = dict(kernel.choices).get("REDUCE", 0)
    getattr(_BUILT[kernel], f"launch_{kernel.name}")(blocks, THREADS, bool(synchronises), pointers)


def _on_host(module):
    return SimpleNamespace(
        forward=functools.partial(module.forward, launch=launch),
        backward=functools.partial(module.backward, launch=launch),
        backward_through_time=functools.partial(module.backward_through_time, launch=launch),
    )


LIF_ON_HOST, LEAKY_ON_HOST = map(_on_host, (cuda_lif, cuda_leaky))


class HostBackend(CudaBackend):
    """The CUDA kernels, for tensors on the CPU."""

    kernels = {LIF: LIF_ON_HOST, LEAKY: LEAKY_ON_HOST}  # noqa: RUF012

    def problem(self, device=None):
        return None

    def is_default_for(self, x):
        return x.dtype in SCALARS

    def check_input(self, x):
        if x.dtype not in SCALARS:
            raise InputError(f"backend='cupy' does not compute in {x.dtype}")


def register(monkeypatch) -> None:
    """Make ``backend="cupy"`` run on the CPU."""
    monkeypatch.setitem(selection._REGISTERED, "cupy", HostBackend())


def build(kernels: list[Kernel]) -> None:
    """Build kernels together, once a session for all processes that test; `launch` does it by itself."""
    entries = [
        f'extern "C" void launch_{kernel.name}(unsigned blocks, unsigned threads, bool synchronises, void** '
        f"arguments) {{ launch<of_{kernel.name}::{kernel.name}>(blocks, threads, synchronises, arguments); }}"
        for kernel in kernels
    ]
    source = "\n".join([HEADER.read_text(), translation_unit(kernels), *entries])
    library = _folder() / f"{hashlib.sha256((source + str(OPTIONS)).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *OPTIONS, "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(library)
    _BUILT.update(dict.fromkeys(kernels, ctypes.CDLL(str(library))))


@functools.cache
def _groups() -> list[list[Kernel]]:
    """What is built together: g++ takes hardly longer for a group than for one kernel."""
    leaky = [variants.leaky_kernels(dtype, 4, name) for dtype in variants.DTYPES for name in SURROGATES]
    return [*variants.groups().values(), *leaky]


@functools.cache
def _folder() -> Path:
    """One folder for the processes of a test session, which share the parent process."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"sltt-host-{session}"
    folder.mkdir(exist_ok=True)
    return folder
