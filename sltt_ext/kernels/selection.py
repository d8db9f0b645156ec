"""The backends, and the choice between them.

``backend="auto"`` runs float32, float16 and bfloat16 tensors on CUDA through the CUDA kernels, launched by CuPy
where it is installed and else by what PyTorch brings, and everything else in PyTorch. ``"inductor"`` is for who asks for
it: it compiles for each neuron's settings first, and takes longer where tensors are small. The environment variable ``SLTT_BACKEND``, read when sltt_ext is
imported, replaces ``"auto"``. A backend asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from sltt_ext.errors import BackendError, warn
from sltt_ext.kernels.backend import Backend, FusedNeuron
from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend
from sltt_ext.kernels.inductor_backend import InductorBackend
from sltt_ext.kernels.torch_backend import TorchBackend

__all__ = ["BACKENDS", "check_backend", "default_backend", "is_compiled", "select_backend", "select_kernels"]

Kernels = TypeVar("Kernels")

_TORCH: Backend = TorchBackend()
_REGISTERED: dict[str, Backend] = {
    backend.name: backend for backend in (_TORCH, CupyBackend(), NvrtcBackend(), InductorBackend())
}

BACKENDS = ("auto", *_REGISTERED)

_ENVIRONMENT = os.environ.get("SLTT_BACKEND", "auto")


def check_backend(backend: str, neuron: FusedNeuron[Any] | None = None) -> str:
    """Return ``backend`` if it can be used on this machine, and for ``neuron``.

    Raises:
        BackendError: If there is no backend of that name, or it is one that cannot be used here, or that does not run
            these neurons.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; use one of {', '.join(map(repr, BACKENDS))}")
    name = default_backend() if backend == "auto" and neuron is not None else backend
    if name == "auto":
        return backend
    if (problem := _REGISTERED[name].problem()) is not None:
        raise BackendError(f"backend={name!r} cannot be used: {problem}")
    if neuron is not None:
        _check_runs(_REGISTERED[name], neuron)
    return backend


def default_backend() -> str:
    """What ``"auto"`` stands for: itself, or what ``SLTT_BACKEND`` says.

    Raises:
        BackendError: If there is no backend of that name.
    """
    if _ENVIRONMENT not in BACKENDS:
        raise BackendError(
            f"the environment variable SLTT_BACKEND is {_ENVIRONMENT!r}; use one of {', '.join(map(repr, BACKENDS))}"
        )
    return _ENVIRONMENT


def select_kernels(
    backend: str, neuron: FusedNeuron[Kernels], x: Tensor, registered: bool = False
) -> Kernels:
    """The kernels that run ``x`` through neurons of a kind; see `select_backend`."""
    kernels: Kernels = select_backend(backend, neuron, x, registered).kernels[neuron]
    return kernels


def select_backend(backend: str, neuron: FusedNeuron[Any], x: Tensor, registered: bool = False) -> Backend:
    """What runs ``x`` through neurons of a kind. Nothing runs a fake tensor: ``"torch"`` tells its shapes.

    Raises:
        BackendError: If there is no such backend, or the one asked for by name cannot be used.
        InputError: If the backend asked for by name does not take the dtype of ``x``.
    """
    if backend == "torch" or (backend == "auto" and _ENVIRONMENT == "auto" and x.is_cpu):
        return _TORCH
    if backend == "auto":
        backend = default_backend()
    if backend == "auto":
        return _select_by_default(neuron, x)
    if backend not in _REGISTERED:
        check_backend(backend)
    asked_for = _REGISTERED[backend]
    _check_runs(asked_for, neuron)
    asked_for.check_input(x)
    return asked_for if asked_for.runs_itself(x, registered) else _TORCH


def is_compiled(backend: str, x: Tensor) -> bool:
    """Whether a step that a user has written in Python runs compiled; ``"auto"`` alone never asks for it."""
    asked_for = default_backend() if backend == "auto" else backend
    if asked_for != InductorBackend.name or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return not x.is_meta and _REGISTERED[asked_for].runs_itself(x, torch.compiler.is_compiling())


def _check_runs(backend: Backend, neuron: FusedNeuron[Any]) -> None:
    if neuron not in backend.kernels:
        raise BackendError(f"backend={backend.name!r} does not run {neuron.name}: use 'auto' or 'torch'")


def _select_by_default(neuron: FusedNeuron[Any], x: Tensor) -> Backend:
    """The first that wants the tensor and can be used; a warning if one wants it, and none can."""
    problems = {}
    for name, backend in _REGISTERED.items():
        if neuron in backend.kernels and backend.is_default_for(x):
            if (problem := backend.problem(x.device)) is None:
                return backend
            problems[name] = problem
    if problems:
        _warn_once("; ".join(f"not {name}: {problem}" for name, problem in problems.items()))
    return _TORCH


@functools.cache
def _warn_once(problem: str) -> None:
    warn(
        f"the neurons run as PyTorch operators, slower than sltt_ext's CUDA kernels: {problem}. "
        "Set backend='torch' or SLTT_BACKEND=torch if you want this; the warning then ends."
    )
