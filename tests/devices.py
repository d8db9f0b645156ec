"""What needs a CUDA device on which the kernels can be used, by one of their launchers."""

import pytest
import torch

from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend

LAUNCHERS = {backend.name: backend.launcher for backend in (CupyBackend, NvrtcBackend)}


def _marks(names):
    """Marks of what runs on a device through any of the launchers."""
    problems = ["needs a CUDA device"]
    if torch.cuda.is_available():
        problems = [LAUNCHERS[name].problem(0) for name in names]
    return [pytest.mark.gpu, pytest.mark.skipif(None not in problems, reason="; ".join(map(str, problems)))]


CUDA = {name: _marks([name]) for name in LAUNCHERS}
"""The marks of each launcher."""


def needs_cuda(test):
    """Decorate a test that has no meaning on the CPU."""
    for mark in _marks(LAUNCHERS):
        test = mark(test)
    return test
