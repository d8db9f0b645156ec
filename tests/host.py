"""Runs the CUDA kernels on the CPU: the same source, built by g++ with `kernels/host.h`.

`launch` takes the place of `sltt_ext.kernels.launch.Launcher.launch`, so that allocation, layouts, geometry
and arguments are those of the real thing. `HostBackend` takes the place of ``backend="cupy"``, and with `fake_driver`
of ``backend="nvrtc"``.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import variants

from sltt_ext.errors import InputError
from sltt_ext.kernels import selection
from sltt_ext.kernels.cuda_backend import CupyBackend, kernels_launched_by
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
    library = library_of(kernel)
    kinds = getattr(library, f"kinds_{kernel.name}")
    kinds.restype = ctypes.c_char_p
    assert kinds().decode() == "".join("d" if isinstance(value, float) else "q" for value in arguments)
    values = [
        ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value)
        for value in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(
        *[ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
    )
    getattr(library, f"launch_{kernel.name}")(blocks, THREADS, pointers)


KERNELS = kernels_launched_by(launch)
LIF_ON_HOST, LEAKY_ON_HOST = KERNELS[LIF], KERNELS[LEAKY]


class HostBackend(CupyBackend):
    """The CUDA kernels, for tensors on the CPU."""

    kernels = KERNELS

    def __init__(self, name="cupy", kernels=KERNELS):
        self.name, self.kernels = name, kernels

    def problem(self, device=None):
        return None

    def is_default_for(self, x):
        return x.dtype in SCALARS

    def check_input(self, x):
        if x.dtype not in SCALARS:
            raise InputError(f"backend={self.name!r} does not compute in {x.dtype}")


def register(monkeypatch) -> None:
    """Make ``backend="cupy"`` run on the CPU."""
    monkeypatch.setitem(selection._REGISTERED, "cupy", HostBackend())


def library_of(kernel: Kernel) -> ctypes.CDLL:
    """The library that holds a kernel."""
    if kernel not in _BUILT:
        build(next((group for group in _groups() if kernel in group), [kernel]))
    return _BUILT[kernel]


def build(kernels: list[Kernel]) -> None:
    """Build kernels together, once a session for all processes that test; `library_of` does it by itself."""
    entries = []
    for kernel in kernels:
        name, synchronises = kernel.name, str(bool(dict(kernel.choices).get("REDUCE", 0))).lower()
        entries += [
            f'extern "C" void launch_{name}(unsigned blocks, unsigned threads, void** arguments) '
            f"{{ launch<of_{name}::{name}>(blocks, threads, {synchronises}, arguments); }}",
            f'extern "C" const char* kinds_{name}() {{ return kinds_of(of_{name}::{name}); }}',
        ]
    source = "\n".join([HEADER.read_text(), translation_unit(kernels), *entries])
    library = ctypes.CDLL(str(built_library(source, OPTIONS)))
    _BUILT.update(dict.fromkeys(kernels, library))


def built_library(source: str, options: list[str]) -> Path:
    """A library built by g++, once a session."""
    library = (
        Path(os.environ["SLTT_BUILT"])
        / f"{hashlib.sha256((source + str(options)).encode()).hexdigest()[:24]}.so"
    )
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *options, "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(library)
    return library


@functools.cache
def _groups() -> list[list[Kernel]]:
    """What is built together: g++ takes hardly longer for a group than for one kernel."""
    leaky = [variants.leaky_kernels(dtype, 4, name) for dtype in variants.DTYPES for name in SURROGATES]
    return [*variants.groups().values(), *leaky]
