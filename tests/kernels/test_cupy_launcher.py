"""The launcher that uses CuPy, on machines that are made up."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from sltt_ext.kernels import cuda_lif
from sltt_ext.kernels.cupy_launcher import CupyLauncher

KERNEL = cuda_lif.forward_kernel(torch.float32, 4, "sigmoid", 0, True, cuda_lif.NOTHING, False)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with PyTorch for CUDA 13, as far as looking for problems goes."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=700 + index))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setattr(CupyLauncher, "versions", lambda self: {"CuPy's CUDA": "13.2"})
    return monkeypatch


def raises(error):
    def call(*args):
        raise error

    return call


def problem(index=None):
    return CupyLauncher().problem(index)


def test_nothing_is_wrong(cuda):
    assert problem() is None


def test_cupy_is_missing(cuda):
    cuda.setitem(sys.modules, "cupy", None)
    assert problem() == "cupy is not installed: pip install 'sltt-ext[cupy13]'"
    cuda.setattr(torch.version, "cuda", "12.8")
    assert problem() == "cupy is not installed: pip install 'sltt-ext[cupy12]'"


def test_cupy_for_another_cuda(cuda):
    cuda.setattr(CupyLauncher, "versions", lambda self: {"CuPy's CUDA": "12.9"})
    assert "CuPy is built for CUDA 12.9, PyTorch for 13.2" in problem()
    assert "pip install 'sltt-ext[cupy13]'" in problem()


def test_nvrtc_is_missing(cuda):
    error = RuntimeError("CuPy failed to load libnvrtc.so.13: OSError")
    cuda.setattr(CupyLauncher, "versions", raises(error))
    assert "libnvrtc.so.13" in problem()
    assert "pip install 'cupy-cuda13x[ctk]'" in problem()


@pytest.fixture
def compiler(cuda):
    """A CuPy that makes kernels by a function of their names; returns what it was given."""
    given = []

    def set_compiler(get_function):
        def module(**options):
            given.append(options)
            return SimpleNamespace(get_function=get_function)

        cuda.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=module))
        return given

    return set_compiler


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find CUDA headers."),
        RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)"),
        RuntimeError(
            "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"
        ),
    ],
    ids=str,
)
def test_a_compiler_that_fails(compiler, error):
    compiler(raises(error))
    assert problem() is None
    assert str(error) in problem(0)
    assert "older than NVIDIA Test: pip install -U 'cupy-cuda13x[ctk]'" in problem(0)


def test_launches_on_the_current_stream_and_device(compiler, cuda):
    """With a device guard only where another device is the current one."""
    launched, entered = [], []

    @contextlib.contextmanager
    def guard(index):
        entered.append(index)
        yield

    def function(*args, stream):
        launched.append((*args, stream.ptr, list(entered)))

    given = compiler(lambda name: SimpleNamespace(kernel=function))
    launcher = CupyLauncher()
    for index in (0, 3):
        launcher.launch(KERNEL, 12, (1, 2.0), torch.device("cuda", index))
        entered.clear()
        cuda.setattr(torch.cuda, "device", guard)
        launcher.launch(KERNEL, 12, (1, 2.0), torch.device("cuda", index))
    blocks_threads_and_arguments = (12,), (256,), (1, 2.0)
    assert launched == [
        (*blocks_threads_and_arguments, 700, []),
        (*blocks_threads_and_arguments, 700, []),
        (*blocks_threads_and_arguments, 703, [3, 3]),
        (*blocks_threads_and_arguments, 703, [3]),
    ]
    assert given[0]["options"] == ("--std=c++17", "--fmad=false")
    assert f"#define KERNEL {KERNEL.name}\n" in given[0]["code"]
