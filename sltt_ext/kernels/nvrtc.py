"""NVRTC, CUDA's run-time compiler, through ctypes: the one that PyTorch brings. It needs no device and no headers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from sltt_ext.errors import BackendError, one_line

__all__ = ["NVRTC", "find_nvrtc"]

_LOG_LINES = 3
_SIGNATURES: dict[str, list[Any]] = {
    "nvrtcVersion": [POINTER(c_int), POINTER(c_int)],
    "nvrtcGetNumSupportedArchs": [POINTER(c_int)],
    "nvrtcGetSupportedArchs": [POINTER(c_int)],
    "nvrtcCreateProgram": [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p],
    "nvrtcCompileProgram": [c_void_p, c_int, POINTER(c_char_p)],
    "nvrtcDestroyProgram": [POINTER(c_void_p)],
    **{
        f"nvrtcGet{what}{kind}": [c_void_p, POINTER(c_size_t) if kind else c_char_p]
        for what in ("CUBIN", "PTX", "ProgramLog")
        for kind in ("Size", "")
    },
}


class NVRTC:
    """A loaded library.

    Attributes:
        path: Where it was found.
        version: ``(major, minor)``.
        architectures: Compute capabilities that it makes machine code for, as ``10 * major + minor``, ascending.

    Raises:
        BackendError: If it lacks a function that is needed.
    """

    def __init__(self, library: Any, path: str) -> None:
        self._library, self.path = library, path
        try:
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
        except AttributeError as error:
            raise BackendError(f"{path} is not an NVRTC of CUDA 11.2 or newer: {error}") from error
        library.nvrtcGetErrorString.argtypes, library.nvrtcGetErrorString.restype = [c_int], c_char_p
        major, minor, count = c_int(), c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        architectures = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", architectures)
        self.version = major.value, minor.value
        self.architectures = sorted(architectures)

    def target(self, architecture: int) -> str:
        """What to compile for on a device: its machine code, or, if that is too new, PTX, which its driver compiles.

        Raises:
            BackendError: If the device is older than all that this NVRTC knows.
        """
        if architecture in self.architectures:
            return f"sm_{architecture}"
        older = [known for known in self.architectures if known < architecture]
        if not older:
            raise BackendError(
                f"NVRTC {'.'.join(map(str, self.version))} compiles for sm_{self.architectures[0]} and newer, the "
                f"device is sm_{architecture}: use backend='torch', or PyTorch built for an older CUDA"
            )
        return f"compute_{older[-1]}"

    def compile(self, source: str, options: Sequence[str], target: str) -> bytes:
        """Machine code of ``source`` for ``sm_...``, or PTX for ``compute_...``, with a null byte at its end.

        Raises:
            BackendError: If it does not compile, with the first lines of NVRTC's log.
        """
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), b"sltt_ext.cu", 0, None, None)
        try:
            given = [option.encode() for option in (*options, f"--gpu-architecture={target}")]
            status = self._library.nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*given))
            if status:
                log = self._read("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
                lines = [line.strip() for line in log.splitlines() if line.strip()]
                raise BackendError(" ".join([self._error(status) + ":", *lines[:_LOG_LINES]]))
            return self._read("nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX", program)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _read(self, function: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"{function}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.raw

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise BackendError(f"{function} failed in NVRTC ({self.path}): {self._error(status)}")

    def _error(self, status: int) -> str:
        return str(self._library.nvrtcGetErrorString(status).decode())


def find_nvrtc(cuda: str) -> NVRTC:
    """The NVRTC for PyTorch built for CUDA ``cuda``, such as ``"13.2"``.

    Looked for where pip puts NVIDIA's packages and where PyTorch keeps its own libraries, then by name, which finds
    what the process has loaded and what the system knows, then in ``CUDA_PATH``, ``CUDA_HOME`` and conda's folder.

    Raises:
        BackendError: If there is none, with the command that installs it.
    """
    major = cuda.partition(".")[0]
    tried = []
    for name in _candidates(major):
        try:
            return NVRTC(ctypes.CDLL(name), name)
        except (OSError, BackendError) as error:
            tried.append(one_line(error, 120))
    package = "nvidia-cuda-nvrtc" + (f"-cu{major}" if int(major) < 13 else "")
    raise BackendError(
        f"NVRTC of CUDA {major} cannot be loaded ({'; '.join(tried)}): pip install '{package}=={cuda}.*', or set "
        f"CUDA_PATH to a CUDA {major} toolkit"
    )


def _candidates(major: str) -> Iterator[str]:
    names = _names(major)
    yield from _in(_package_folders(), names)
    yield f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    toolkits = [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    places = ("lib64", "lib", "bin", "bin/x64", "Library/bin")
    yield from _in((root / place for root in (*toolkits, Path(sys.prefix)) for place in places), names)


def _names(major: str) -> re.Pattern[str]:
    """The library alone: not what it loads by itself (builtins), nor its other build (alt)."""
    if sys.platform == "win32":
        return re.compile(rf"nvrtc64_{major}\d_0\.dll")
    return re.compile(rf"libnvrtc(-[0-9a-f]+)?\.so\.{major}(\.\d+)*")


def _package_folders() -> Iterator[Path]:
    """Where pip puts what PyTorch asks for, newer and older packages, and what is inside of its own."""
    spec = importlib.util.find_spec("nvidia")
    for root in map(Path, (spec and spec.submodule_search_locations) or ()):
        for pattern in (
            "cu[0-9]*/lib",
            "cu[0-9]*/bin/x86_64",
            "cu[0-9]*/bin",
            "cuda_nvrtc/lib",
            "cuda_nvrtc/bin",
        ):
            yield from sorted(root.glob(pattern))
    yield Path(torch.__file__).parent / "lib"


def _in(folders: Iterable[Path], names: re.Pattern[str]) -> Iterator[str]:
    for folder in folders:
        if folder.is_dir():
            yield from sorted(str(path) for path in folder.iterdir() if names.fullmatch(path.name))
