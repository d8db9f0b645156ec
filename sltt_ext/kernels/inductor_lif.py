"""The fused neuron compiled by `torch.compile`: each direction is one loop over the elements.

Same functions as `sltt_ext.kernels.torch_lif`, and the same numbers: on the CPU Inductor rounds every operation
by itself, so that charged potentials and spikes are equal bit for bit. As in `sltt_ext.kernels.cuda_lif` the
elements are walked in the order they lie in memory, and contiguous copies are made where that is not the same for
all tensors.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sltt_ext.kernels import torch_lif
from sltt_ext.kernels.inductor import run_compiled
from sltt_ext.kernels.layout import restored, rows
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.neuron import state_dtype
from sltt_ext.surrogate import derivative


class _Constants(NamedTuple):
    """What becomes constants of the compiled forward; ``from_number``: all neurons start from the same one."""

    neuron: LIFSettings
    save: bool
    save_slope: bool
    from_number: bool


def forward(
    x_seq: Tensor,
    v: Tensor | float,
    decay: Tensor | None,
    settings: LIFSettings,
    save: bool,
    save_slope: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all steps; see `sltt_ext.kernels.lif.LIFKernels`."""
    step = torch.empty_like(v if isinstance(v, Tensor) else x_seq[0], dtype=state_dtype(x_seq.dtype))
    if step.numel() < 2:
        return torch_lif.forward(x_seq, v, decay, settings, save, save_slope)
    number = partial(torch.full, (), dtype=step.dtype, device=step.device)
    # tensors: Inductor of torch 2.6 divides by constants with another rounding, and any returns x itself for x + 0
    divisor = None if settings.tau is None else number(settings.tau)
    flat_v = rows(step, v.unsqueeze(0))[0] if isinstance(v, Tensor) else number(v)
    constants = _Constants(settings, save, save_slope, from_number=not isinstance(v, Tensor))
    s_seq, final, derivatives, h, slopes = run_compiled(
        _forward, constants, rows(step, x_seq), flat_v, decay, divisor
    )
    nothing = x_seq.new_empty(0)
    no_step = torch.empty_like(x_seq[1:]) if save and not settings.through_time else nothing
    if h is None:
        h = step.new_empty(0)
    elif settings.through_time:
        h = restored(h, step, x_seq)
    else:
        h = h.as_strided_(step.shape, step.stride())
    return (
        restored(s_seq, step, x_seq),
        final.as_strided_(step.shape, step.stride()),
        no_step if derivatives is None else restored(derivatives, step, x_seq[1:]),
        h,
        nothing if slopes is None else restored(slopes, step, x_seq),
    )


def backward(
    grad_s_seq: Tensor | None,
    grad_v: Tensor | None,
    derivatives: Tensor,
    h: Tensor,
    slopes: Tensor,
    decay: Tensor | None,
    settings: LIFSettings,
) -> tuple[Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.lif.LIFKernels`."""
    if h.numel() < 2 or grad_s_seq is None:
        return torch_lif.backward(grad_s_seq, grad_v, derivatives, h, slopes, decay, settings)
    step = torch.empty_like(h)
    grad_x, grad_decay = run_compiled(
        _backward, settings, rows(step, grad_s_seq), None if grad_v is None else rows(step, grad_v.unsqueeze(0))[0],
        rows(step, derivatives) if len(derivatives) else None, rows(step, h.unsqueeze(0))[0],
        rows(step, slopes) if slopes.numel() else None, decay,
    )  # fmt: skip
    return restored(grad_x, step, grad_s_seq), h.new_empty(0) if grad_decay is None else grad_decay


def backward_through_time(
    grad_s_seq: Tensor | None,
    grad_v: Tensor | None,
    h_seq: Tensor,
    slopes: Tensor,
    decay: Tensor | None,
    settings: LIFSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.lif.LIFKernels`."""
    step = torch.empty_like(h_seq[0])
    if step.numel() < 2 or grad_s_seq is None:
        return torch_lif.backward_through_time(grad_s_seq, grad_v, h_seq, slopes, decay, settings)
    grad_x, grad_decay, grad_start = run_compiled(
        _backward_through_time, settings, rows(step, grad_s_seq),
        None if grad_v is None else rows(step, grad_v.unsqueeze(0))[0], rows(step, h_seq),
        rows(step, slopes) if slopes.numel() else None, decay,
    )  # fmt: skip
    return (
        restored(grad_x, step, grad_s_seq),
        step.new_empty(0) if grad_decay is None else grad_decay,
        grad_start.as_strided_(step.shape, step.stride()),
    )


def _forward(
    constants: _Constants, x_seq: Tensor, v: Tensor, decay: Tensor | None, tau: Tensor | None
) -> Any:
    """All steps of ``x_seq`` ``[T, elements]``; what is not needed is None."""
    neuron, dtype = constants.neuron, state_dtype(x_seq.dtype)
    if constants.from_number:
        v = torch.ones_like(x_seq[0], dtype=dtype) * v
    elif neuron.charged:
        v = _reset(neuron, v)
    s_seq, h_seq, derivatives, slopes = [], [], [], []
    for x in x_seq:
        h, slope = _charge(neuron, x.to(dtype), v, decay, tau)
        v = _reset(neuron, h)
        h_seq.append(h)
        s_seq.append((h >= neuron.v_threshold).to(x_seq.dtype))
        slopes.append(slope.to(x_seq.dtype))
        derivatives.append(_local_derivative(neuron, h, decay).to(x_seq.dtype))
    save, several = constants.save, len(x_seq) > 1
    kept: Tensor | None = None
    if save and neuron.through_time:
        kept = torch.stack(h_seq)
    elif save and not neuron.charged:
        kept = h
    return (
        torch.stack(s_seq),
        h if neuron.charged else v,
        torch.stack(derivatives[:-1]) if save and several and not neuron.through_time else None,
        kept,
        torch.stack(slopes) if constants.save_slope else None,
    )


def _backward(
    neuron: LIFSettings,
    grad_s_seq: Tensor,
    grad_v: Tensor | None,
    derivatives: Tensor | None,
    h: Tensor,
    slopes: Tensor | None,
    decay: Tensor | None,
) -> Any:
    """Gradients of ``x_seq`` ``[T, elements]`` and of the decay, or None."""
    c = decay if neuron.decay_input else None
    last = grad_s_seq[-1] * _local_derivative(neuron, h, c)
    if grad_v is not None:
        last = last + grad_v * _state_derivative(neuron, h, c)
    grad_x = last.to(grad_s_seq.dtype).unsqueeze(0)
    if derivatives is not None:
        grad_x = torch.cat([grad_s_seq[:-1] * derivatives, grad_x])
    if slopes is None or decay is None:
        return grad_x, None
    grad_decay = (grad_x.to(h.dtype) * slopes).sum(dtype=torch.float64)
    return grad_x, (grad_decay if c is None else grad_decay / c).to(h.dtype)


def _backward_through_time(
    neuron: LIFSettings,
    grad_s_seq: Tensor,
    grad_v: Tensor | None,
    h_seq: Tensor,
    slopes: Tensor | None,
    decay: Tensor | None,
) -> Any:
    """Gradients of ``x_seq`` ``[T, elements]``, of the decay, or None, and of the initial state."""
    dtype, surrogate = h_seq.dtype, neuron.surrogate
    c = decay if neuron.decay_input and decay is not None else neuron.input_scale
    a = neuron.kept if decay is None else 1 - decay
    g = torch.zeros_like(h_seq[0]) if grad_v is None else grad_v
    grad_x, grad_h = [], []
    for h, grad_s in zip(reversed(h_seq.unbind()), reversed(grad_s_seq.unbind())):
        by_spike = grad_s.to(dtype)
        if not neuron.detach_reset:
            by_spike = by_spike + g * (-neuron.v_threshold if neuron.v_reset is None else neuron.v_reset - h)
        if neuron.v_reset is not None:
            g = torch.where(h < neuron.v_threshold, g, 0)
        local = derivative(h - neuron.v_threshold, surrogate.name, surrogate.parameters)
        grad_h.append(local * by_spike + g)
        grad_x.append((grad_h[-1] * c).to(grad_s.dtype))
        g = grad_h[-1] * a
    grad_x_seq = torch.stack(grad_x[::-1])
    if slopes is None:
        return grad_x_seq, None, g
    return grad_x_seq, (torch.stack(grad_h[::-1]) * slopes).sum(dtype=torch.float64).to(dtype), g


def _charge(
    neuron: LIFSettings, x: Tensor, v: Tensor, decay: Tensor | None, tau: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The charged potential and its derivative by the decay, in the frameworks' order of operations."""
    if neuron.factored_leak:
        return v * (1 - 1 / neuron.tau if neuron.tau is not None else 1 - decay) + x, -v  # type: ignore[operator]
    leak = v - (neuron.v_reset or 0.0)
    slope = x - leak if neuron.decay_input else -leak
    if decay is not None:
        change = slope * decay
    elif tau is not None:
        change = slope / tau
    else:
        return v + x, slope
    return (v + change if neuron.decay_input else v + change + x), slope


def _reset(neuron: LIFSettings, h: Tensor) -> Tensor:
    """The potential after the reset."""
    fires = h >= neuron.v_threshold
    if neuron.v_reset is None:
        return h - fires.to(h.dtype) * neuron.v_threshold
    return torch.where(fires, neuron.v_reset, h)


def _local_derivative(neuron: LIFSettings, h: Tensor, decay: Tensor | None) -> Tensor:
    """``c H'(h - v_threshold)`` with ``c = dh/dx``."""
    u = h - neuron.v_threshold
    local = derivative(u, neuron.surrogate.name, neuron.surrogate.parameters, neuron.input_scale)
    return local * decay if decay is not None and neuron.decay_input else local


def _state_derivative(neuron: LIFSettings, h: Tensor, decay: Tensor | None) -> Tensor:
    """``c`` times the derivative of the final state by ``h``."""
    c = h.new_full((), neuron.input_scale)
    c = c if decay is None else c * decay
    if neuron.charged:
        return c
    local = derivative(h - neuron.v_threshold, neuron.surrogate.name, neuron.surrogate.parameters)
    return c * torch_lif.state_derivative(h, local, 1.0, neuron)
