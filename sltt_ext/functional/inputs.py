"""The inputs of every fused neuron: a sequence of currents and an initial state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.neuron import state_dtype

__all__ = ["broadcasts", "check_device", "check_number", "initial_state", "plain", "step_shape"]

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def step_shape(x_seq: Tensor, single_step: bool) -> torch.Size:
    """Shape of one step of ``x_seq``, ``[T, N, ...]`` or, for a single step, ``[N, ...]``.

    Raises:
        InputError: If ``x_seq`` has no step or is not floating point.
    """
    if x_seq.dtype not in _FLOATING:
        raise InputError(f"x_seq must be floating point, got {x_seq.dtype}: convert it with x_seq.float()")
    if not single_step and (x_seq.dim() < 1 or x_seq.shape[0] == 0):
        raise InputError(f"x_seq must be [T, N, ...] with T >= 1, got shape {list(x_seq.shape)}")
    return x_seq.shape if single_step else x_seq.shape[1:]


def initial_state(
    name: str, state: Tensor | float, x_seq: Tensor, single_step: bool, constant: bool = True
) -> Tensor:
    """The state ``[N, ...]`` in the dtype of states, from a tensor or one number for all; detached if ``constant``.

    Raises:
        InputError: If ``x_seq`` has no step or is not floating point, or shapes or devices disagree.
    """
    shape, dtype = step_shape(x_seq, single_step), state_dtype(x_seq.dtype)
    if not isinstance(state, Tensor):
        one_step = x_seq if single_step else x_seq[0]
        return torch.full_like(one_step, state, dtype=dtype, requires_grad=False)
    if state.shape != shape:
        raise InputError(
            f"{name} has shape {list(state.shape)}, one step of x_seq has {list(shape)}: reset the network between "
            "batches of different shape"
        )
    check_device(name, state, x_seq)
    state = state.detach() if constant else state
    return state if state.dtype is dtype else state.to(dtype)


def check_device(name: str, tensor: Tensor, x_seq: Tensor) -> None:
    """Raise an InputError unless ``tensor`` is on the device of ``x_seq``."""
    if tensor.device != x_seq.device:
        raise InputError(f"{name} is on {tensor.device}, x_seq on {x_seq.device}: move one with .to(device)")


def plain(value: Any) -> Any:
    """A tensor of a user's subclass as a plain tensor, because the subclass's operators would make other views.

    A subclass with its own ``__torch_dispatch__`` stays as it is: it may wrap another tensor.
    """
    kind = type(value)
    if (
        kind is Tensor
        or not isinstance(value, Tensor)
        or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return value
    return value.as_subclass(Tensor)


def broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a tensor of ``shape`` broadcasts to ``whole``."""
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole)))


def check_number(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ConfigurationError: If it is NaN.
    """
    value = float(value)
    if not torch.compiler.is_compiling() and math.isnan(value):
        raise ConfigurationError(f"{name} must be a number, got nan")
    return value
