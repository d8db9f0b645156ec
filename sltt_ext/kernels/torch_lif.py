"""The fused neuron in plain PyTorch: any device, and the reference for every other backend.

Forward walks the T steps with buffers of its own and no autograd. What it keeps for backward is, per
element, one number a step: for all steps but the last the local derivative ``c H'(h - v_threshold)``
with ``c = dh/dx``, for the last step the charged potential ``h`` itself. From that ``h`` backward
derives both the last local derivative and the local gradient of the final state, so that a loss on
the membrane potential is exact at no cost. A learnable decay keeps one more tensor, ``dh/ddecay``.

Backward has no loop over time: no step depends on another. Only the gradient through time has one: it keeps
the charged potentials of all steps instead, and walks from the last step to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.neuron import state_dtype
from sltt_ext.surrogate import derivative as surrogate_derivative


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
    charged = settings.charged
    s_seq = torch.empty_like(x_seq)
    if overwrite and isinstance(v, Tensor):
        final = v
    else:
        final = torch.empty_like(v if isinstance(v, Tensor) else x_seq[0], dtype=state_dtype(x_seq.dtype))
    if save and settings.through_time:
        derivatives, kept = x_seq.new_empty(0), torch.empty_like(x_seq, dtype=final.dtype)
    else:
        derivatives = torch.empty_like(x_seq[1:]) if save else x_seq.new_empty(0)
        kept = torch.empty_like(final) if save and not charged else final.new_empty(0)
    slopes = torch.empty_like(x_seq) if save_slope else x_seq.new_empty(0)
    if charged and s_seq.dtype == final.dtype:
        room = list(s_seq)  # what enters a step lies where its spikes will
    else:
        room = [torch.empty_like(final) if charged else final] * (len(x_seq) + 1)
    if save and settings.through_time:
        h_seq = list(kept)
    else:
        h_seq = [final if charged else kept if save else torch.empty_like(final)] * len(x_seq)
    if not isinstance(v, Tensor):
        entering = room[0].fill_(v)
    elif charged:
        entering = after_reset(v, settings, room[0])
    else:
        entering = v
    _walk((x_seq, s_seq, derivatives, slopes), entering, h_seq, room, decay, settings)
    return s_seq, final, derivatives, kept, slopes


def _walk(
    sequences: Sequence[Tensor],
    v: Tensor,
    h_seq: Sequence[Tensor],
    room: Sequence[Tensor],
    decay: Tensor | None,
    settings: LIFSettings,
) -> None:
    """Walk through time from ``v``; ``h_seq[t]`` takes the charged potential, ``room[t]`` what enters step t."""
    x_seq, s_seq, derivatives, slopes = sequences
    charge = _charge_of(decay, settings, v)
    c = decay if settings.decay_input else None
    last = len(x_seq) - 1
    spikes = None if s_seq.dtype == v.dtype else torch.empty_like(h_seq[0])
    for t, (x, h) in enumerate(zip(x_seq, h_seq)):
        charge(x, v, h=h, slope=slopes[t] if slopes.numel() else None)
        s = torch.ge(h, settings.v_threshold, out=s_seq[t] if spikes is None else spikes)
        if spikes is not None:
            s_seq[t].copy_(spikes)
        if t < last or not settings.charged:
            v = _reset(h, s, settings, room[t + 1])
        if t < last and derivatives.numel():
            local = _derivative_at(h, derivatives[t], settings, c)
            if local.dtype != derivatives.dtype:
                derivatives[t].copy_(local)


def after_reset(h: Tensor, settings: LIFSettings, out: Tensor) -> Tensor:
    """The potential ``[N, ...]`` that the charged potential ``h`` leaves behind, written into ``out``."""
    return _reset(h, torch.ge(h, settings.v_threshold, out=out), settings, out)


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
    if grad_s_seq is None:
        grad_x = derivatives.new_zeros((len(derivatives) + 1, *h.shape))
    else:
        grad_x = torch.empty_like(grad_s_seq)
        torch.mul(grad_s_seq[:-1], derivatives, out=grad_x[:-1])
    scale = settings.input_scale
    c = decay if settings.decay_input else None
    grad = grad_x[-1]
    local = _derivative_at(h, grad, settings)
    state_part = None
    if grad_v is not None:
        state_part = grad_v * (scale if settings.charged else state_derivative(h, local, scale, settings))
    local = local.zero_() if grad_s_seq is None else local.mul_(grad_s_seq[-1])
    if state_part is not None:
        local.add_(state_part)
    if c is not None:
        local.mul_(c)
    if local.dtype != grad.dtype:
        grad.copy_(local)
    if not slopes.numel():
        return grad_x, h.new_empty(0)
    grad_decay = (grad_x.to(h.dtype) * slopes).sum(dtype=torch.float64)
    return grad_x, (grad_decay if c is None else grad_decay / c).to(h.dtype)


def backward_through_time(
    grad_s_seq: Tensor | None,
    grad_v: Tensor | None,
    h_seq: Tensor,
    slopes: Tensor,
    decay: Tensor | None,
    settings: LIFSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.lif.LIFKernels`."""
    c = decay if settings.decay_input and decay is not None else settings.input_scale
    a = settings.kept if decay is None else 1 - decay
    grad_x = torch.empty_like(h_seq if grad_s_seq is None else grad_s_seq, dtype=slopes.dtype)
    grad_decay = h_seq.new_zeros((), dtype=torch.float64)
    room = torch.empty_like(h_seq[0])
    g = torch.zeros_like(room) if grad_v is None else torch.empty_like(room).copy_(grad_v)
    no_gradient, scratch = room.new_zeros(()), None if grad_x.dtype == room.dtype else torch.empty_like(room)
    for t in reversed(range(len(h_seq))):
        grad_s = no_gradient if grad_s_seq is None else grad_s_seq[t].to(room.dtype)
        grad_h = _grad_h(h_seq[t], grad_s, g, settings, room, grad_x[t] if scratch is None else scratch)
        if slopes.numel():
            grad_decay += torch.mul(grad_h, slopes[t], out=room).sum(dtype=torch.float64)
        torch.mul(grad_h, a, out=g)
        if isinstance(c, Tensor) or c != 1:
            grad_h.mul_(c)
        if scratch is not None:
            grad_x[t].copy_(grad_h)
    return grad_x, grad_decay.to(g.dtype) if slopes.numel() else g.new_empty(0), g


def _grad_h(h: Tensor, grad_s: Tensor, g: Tensor, settings: LIFSettings, room: Tensor, out: Tensor) -> Tensor:
    """``H' (grad_s + g dv/ds) + g dv/dh``, written into ``out``; ``g`` is overwritten."""
    v_threshold, v_reset, surrogate = settings.v_threshold, settings.v_reset, settings.surrogate
    u = torch.sub(h, v_threshold, out=out)
    local = surrogate_derivative(u, surrogate.name, surrogate.parameters)
    if settings.detach_reset:
        by_spike = grad_s
    elif v_reset is None:
        by_spike = torch.sub(grad_s, g, alpha=v_threshold, out=room)
    else:
        distance = h if v_reset == 0 else torch.sub(h, v_reset, out=room)
        by_spike = torch.addcmul(grad_s, distance, g, value=-1, out=room)
    if v_reset is not None:
        g.mul_(h < v_threshold)
    return torch.addcmul(g, local, by_spike, out=out)


def state_derivative(h: Tensor, local: Tensor, scale: float, settings: LIFSettings) -> Tensor:
    """``scale * dv/dh`` of the reset, from ``local = scale * H'(h - v_threshold)``."""
    if settings.v_reset is None:
        return torch.full_like(h, scale) if settings.detach_reset else scale - settings.v_threshold * local
    silent = (h < settings.v_threshold).to(h.dtype).mul_(scale)
    return silent if settings.detach_reset else silent.add_((settings.v_reset - h).mul_(local))


def _reset(h: Tensor, s: Tensor, settings: LIFSettings, out: Tensor) -> Tensor:
    """``h`` after the spikes ``s``; ``out`` may be either of them."""
    if settings.v_reset is None:
        return torch.sub(h, s, alpha=settings.v_threshold, out=out)
    return torch.lerp(h, torch.full((), settings.v_reset, dtype=h.dtype, device=h.device), s, out=out)


def _derivative_at(h: Tensor, out: Tensor, settings: LIFSettings, decay: Tensor | None = None) -> Tensor:
    """``c H'(h - v_threshold)`` with ``c = dh/dx``, in the memory of ``out`` if its dtype allows."""
    threshold = settings.v_threshold
    u = torch.sub(h, threshold, out=out) if out.dtype == h.dtype else h - threshold
    name, parameters = settings.surrogate.name, settings.surrogate.parameters
    local = surrogate_derivative(u, name, parameters, settings.input_scale)
    return local if decay is None else local.mul_(decay)


def _charge_of(decay: Tensor | None, settings: LIFSettings, like: Tensor) -> Callable[..., None]:
    """How ``x`` and ``v`` make ``h``, and ``slope``, which is ``dh/ddecay``.

    The order of operations is the frameworks' own: charged potentials are equal to theirs bit for bit.
    """
    tau = settings.tau
    number = partial(torch.full, (), dtype=like.dtype, device=like.device)
    if settings.factored_leak and decay is not None:
        return partial(_charge_factored, kept=1 - decay)
    if settings.factored_leak and tau is not None:
        return partial(_charge_factored, kept=number(1 - 1 / tau))
    charge = _charge_and_decay_input if settings.decay_input else _charge
    if decay is None and tau is None:
        return _integrate
    divisor = number(1.0 if tau is None else tau)
    return partial(charge, decay=decay, tau=divisor, v_rest=settings.v_reset or 0.0)


def _integrate(x: Tensor, v: Tensor, h: Tensor, slope: Tensor | None) -> None:
    torch.add(v, x, out=h)


def _charge_and_decay_input(
    x: Tensor, v: Tensor, h: Tensor, slope: Tensor | None, decay: Tensor | None, tau: Tensor, v_rest: float
) -> None:
    """``h = v + (x - (v - v_rest)) d``, where without ``decay`` d is one by ``tau``."""
    drive = torch.sub(x, v if v_rest == 0 else torch.sub(v, v_rest, out=h), out=h)
    if slope is not None:
        slope.copy_(drive)
    if decay is None:
        torch.addcdiv(v, drive, tau, out=h)
    else:
        torch.add(v, drive.mul_(decay), out=h)


def _charge(
    x: Tensor, v: Tensor, h: Tensor, slope: Tensor | None, decay: Tensor | None, tau: Tensor, v_rest: float
) -> None:
    """``h = v - (v - v_rest) d + x``, where without ``decay`` d is one by ``tau``."""
    leak = v if v_rest == 0 else torch.sub(v, v_rest, out=h)
    if slope is not None:
        slope.copy_(leak).neg_()
    if decay is None:
        torch.addcdiv(v, leak, tau, value=-1, out=h)
    else:
        torch.sub(v, torch.mul(leak, decay, out=h), out=h)
    h.add_(x)


def _charge_factored(x: Tensor, v: Tensor, h: Tensor, slope: Tensor | None, kept: Tensor) -> None:
    """``h = v (1 - d) + x``."""
    if slope is not None:
        slope.copy_(v).neg_()
    torch.mul(v, kept, out=h).add_(x)
