"""Tests of the CUDA kernels run on a device, and on the CPU with the same kernels built for it: see `host`."""

import devices
import pytest
import torch

from sltt_ext.kernels import geometry


@pytest.fixture(params=["host", pytest.param("cuda", marks=devices.CUDA)])
def device(request, monkeypatch):
    """Where ``backend="cupy"`` runs."""
    if request.param == "cuda":
        return "cuda"
    import host

    host.register(monkeypatch)
    monkeypatch.setattr(geometry, "_ENOUGH_THREADS", 0)  # wide loads in small tensors
    return "cpu"


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
