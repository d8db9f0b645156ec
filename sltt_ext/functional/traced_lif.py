"""The LIF neurons as ordinary operators, for networks that are compiled.

These are the equations of `sltt_ext.functional.lif`, in the frameworks' order of operations, under autograd. The compiler sees
what a neuron does, fuses it with the operators around it, and decides what backward computes again. Only the derivatives that
autograd cannot know are written out: the surrogate derivative of a spike, and with it that of the reset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.kernels.torch_lif import state_derivative
from sltt_ext.neuron import state_dtype
from sltt_ext.surrogate import derivative

__all__ = ["traced_lif"]


def traced_lif(
    x_seq: Tensor, v: Tensor | float, decay: Tensor | None, settings: LIFSettings, single_step: bool
) -> tuple[Tensor, Tensor]:
    """Spikes and final state; see `sltt_ext.functional.lif_operator.run_lif`.

    Args:
        x_seq: Input currents ``[T, N, ...]``, or one step ``[N, ...]``.
        v: Initial state ``[N, ...]``, already checked, or one number for all, which is not reset at the start.
        decay: The learnable decay, or None.
        settings: The settings of the layer.
        single_step: Whether ``x_seq`` is one step.
    """
    steps = [x_seq] if single_step else x_seq.unbind(0)
    if not isinstance(v, Tensor):
        state = torch.full_like(steps[0], v, dtype=state_dtype(x_seq.dtype), requires_grad=False)
    else:
        state = _after_reset(v, settings) if settings.charged else v
    spikes = []
    for t, x in enumerate(steps):
        entering = state if settings.through_time else state.detach()
        h = _charge(x.to(state.dtype), entering, decay, settings)
        if settings.charged and t == len(steps) - 1:
            s, state = _Fire.apply(h, settings), h
        else:
            s, state = _FireAndReset.apply(h, settings)
        spikes.append(s.to(x.dtype))
    return spikes[0] if single_step else torch.stack(spikes), state


def _charge(x: Tensor, v: Tensor, decay: Tensor | None, settings: LIFSettings) -> Tensor:
    """The charged potential; see `sltt_ext.kernels.torch_lif`, whose order of operations this is."""
    tau, v_rest = settings.tau, settings.v_reset or 0.0
    if decay is None and tau is None:
        return v + x
    if settings.factored_leak:
        return v * (_number(1 - 1 / tau, v) if decay is None else 1 - decay) + x  # type: ignore[operator]
    above_rest = v if v_rest == 0 else v - v_rest
    drive = x - above_rest if settings.decay_input else above_rest
    change = drive / _number(tau, v) if decay is None else drive * decay  # type: ignore[arg-type]
    return v + change if settings.decay_input else v - change + x


def _number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor, because compilers divide by a plain number with another rounding."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _after_reset(h: Tensor, settings: LIFSettings) -> Tensor:
    spikes = h >= settings.v_threshold
    if settings.v_reset is None:
        return h - spikes.to(h.dtype) * settings.v_threshold
    return torch.where(spikes, settings.v_reset, h)


def _local(h: Tensor, settings: LIFSettings) -> Tensor:
    return derivative(h - settings.v_threshold, settings.surrogate.name, settings.surrogate.parameters)


class _Fire(torch.autograd.Function):
    """Spikes of charged potentials."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, settings: LIFSettings) -> Tensor:
        ctx.save_for_backward(h)
        ctx.settings = settings
        return (h >= settings.v_threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> Any:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return grad_s * _local(h, ctx.settings), None


class _FireAndReset(torch.autograd.Function):
    """Spikes of charged potentials, and the potentials after the reset."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, settings: LIFSettings) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.settings = settings
        return (h >= settings.v_threshold).to(h.dtype), _after_reset(h, settings)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor, grad_v: Tensor) -> Any:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        local = _local(h, ctx.settings)
        return grad_s * local + grad_v * state_derivative(h, local, 1.0, ctx.settings), None
