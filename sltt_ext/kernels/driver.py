"""The CUDA driver through ctypes: kernels loaded into the contexts that PyTorch uses, and launched there."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

from sltt_ext.errors import BackendError, one_line
from sltt_ext.kernels.geometry import THREADS

__all__ = ["Driver", "find_driver"]

_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
}
_MOST_ARGUMENTS = 32


class Driver:
    """A loaded library, with the primary context of each device: that which PyTorch uses, and keeps.

    Attributes:
        version: Newest CUDA it runs, as ``(major, minor)``.

    Raises:
        BackendError: If it lacks a function that is needed, or finds no device.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        try:
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
        except AttributeError as error:
            raise BackendError(f"this is not a CUDA driver: {error}") from error
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self._call("cuInit", 0)
        self.version = version.value // 1000, version.value % 1000 // 10
        self._contexts: dict[int, int] = {}
        self._memory: list[_Memory] = []

    def load(
        self, image: bytes, name: str, index: int
    ) -> Callable[[int, tuple[int | float, ...], int], None]:
        """The kernel ``name`` of ``image`` on device ``index``, ready to be launched: ``(blocks, arguments, stream)``.

        It stays loaded. Launching it allocates nothing on the device and never waits for it, so it may be captured.

        Raises:
            BackendError: If the device cannot load it.
        """
        context, module, function = self._context(index), c_void_p(), c_void_p()
        with self._current(context):
            self._call("cuModuleLoadData", byref(module), image)
            self._call("cuModuleGetFunction", byref(function), module, name.encode())
        launch, get_current = self._library.cuLaunchKernel, self._library.cuCtxGetCurrent
        memory_of_threads, handle = self._memory, function.value
        layout: list[struct.Struct] = []

        def run(blocks: int, arguments: tuple[int | float, ...], stream: int) -> None:
            if not layout:
                layout.append(_layout(arguments))
            try:
                memory = memory_of_threads.pop()
            except IndexError:
                memory = _Memory()
            layout[0].pack_into(memory.values, 0, *arguments)
            given = handle, blocks, 1, 1, THREADS, 1, 1, 0, stream, memory.addresses, None
            status = get_current(memory.context_at)
            if status == 0 and memory.context.value == context:
                status = launch(*given)
            else:  # autograd's threads have no context before PyTorch needs one there
                with self._current(context):
                    status = launch(*given)
            memory_of_threads.append(memory)
            if status:
                raise self._error(f"the launch of {name}", status)

        return run

    def _context(self, index: int) -> int:
        """The device's primary context, retained once and never released, as PyTorch has it until the process ends."""
        if index not in self._contexts:
            device, context = c_int(), c_void_p()
            self._call("cuDeviceGet", byref(device), index)
            self._call("cuDevicePrimaryCtxRetain", byref(context), device)
            assert context.value is not None
            self._contexts[index] = context.value
        return self._contexts[index]

    @contextmanager
    def _current(self, context: int) -> Iterator[None]:
        """``context`` as this thread's current one; then whatever it was before, as it is PyTorch's current device."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise self._error(function, status)

    def _error(self, what: str, status: int) -> BackendError:
        said = []
        for ask in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = c_char_p()
            ask(status, byref(text))
            said.append((text.value or b"error %d" % status).decode())
        return BackendError(f"{what} failed in the CUDA driver: {said[0]}: {said[1]}")


class _Memory:
    """What one launch hands over; used again by the next one, of any thread, when it is done."""

    def __init__(self) -> None:
        self.values = (ctypes.c_int64 * _MOST_ARGUMENTS)()
        first = ctypes.addressof(self.values)
        self.addresses = (c_void_p * _MOST_ARGUMENTS)(*(first + 8 * k for k in range(_MOST_ARGUMENTS)))
        self.context = c_void_p()
        self.context_at = ctypes.pointer(self.context)


def _layout(arguments: tuple[int | float, ...]) -> struct.Struct:
    """Addresses and integers as ``long long``, numbers as ``double``: all parameters of the kernels are of these."""
    return struct.Struct("@" + "".join("d" if isinstance(value, float) else "q" for value in arguments))


def find_driver() -> Driver:
    """The machine's driver, which PyTorch has loaded where it finds a device.

    Raises:
        BackendError: If there is none, or it cannot be used.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise BackendError(
            f"NVIDIA's driver cannot be loaded ({one_line(error, 120)}): install it, or start the container with its "
            "GPUs (docker run --gpus all)"
        ) from error
    return Driver(library)
