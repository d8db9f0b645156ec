"""Tests of the CUDA kernels run on a device, and on the CPU with the same kernels built for it: see `host`."""

import devices
import pytest
import torch

from sltt_ext.kernels import geometry

ON_A_DEVICE = [pytest.param(name, marks=marks, id=f"cuda-{name}") for name, marks in devices.CUDA.items()]


@pytest.fixture(params=["host", pytest.param("host nvrtc", marks=pytest.mark.slow), *ON_A_DEVICE])
def backend(request, monkeypatch):
    """What runs the kernels, on `device`: on the CPU through no launcher, or the one that needs no CuPy."""
    if request.param in devices.CUDA:
        return request.param
    import fake_driver
    import host

    monkeypatch.setattr(geometry, "_ENOUGH_THREADS", 0)  # wide loads in small tensors
    if request.param == "host":
        host.register(monkeypatch)
        return "cupy"
    fake_driver.register(monkeypatch)
    return "nvrtc"


@pytest.fixture
def device(request, backend):
    """Where `backend` runs."""
    return "cuda" if request.node.callspec.params["backend"] in devices.CUDA else "cpu"


@pytest.fixture(params=ON_A_DEVICE)
def cuda_backend(request):
    """What runs the kernels on a device, for what has no meaning on the CPU."""
    return request.param


@pytest.fixture(autouse=True)
def _full_precision():
    """Matrix products and convolutions in float32, so that only the kernels differ."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Every test compiles its own few variants of a function, and counts against the limit of no other."""
    torch._dynamo.reset()
