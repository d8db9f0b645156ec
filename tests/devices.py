"""What needs a CUDA device on which the kernels can be used."""

import pytest
import torch

from sltt_ext.kernels import launch

_PROBLEM = launch.cupy_problem(0) if torch.cuda.is_available() else "needs a CUDA device"

CUDA = [pytest.mark.gpu, pytest.mark.skipif(_PROBLEM is not None, reason=str(_PROBLEM))]


def needs_cuda(test):
    """Decorate a test that has no meaning on the CPU."""
    for mark in CUDA:
        test = mark(test)
    return test
