"""snnTorch's Leaky neuron as ordinary operators, for networks that are compiled; see `sltt_ext.functional.traced_lif`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sltt_ext.kernels.leaky import LeakySettings
from sltt_ext.surrogate import derivative

__all__ = ["traced_leaky"]


def traced_leaky(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    return_mem_seq: bool,
    single_step: bool,
) -> tuple[Tensor, Tensor]:
    """Spikes and potentials; see `sltt_ext.functional.leaky_operator.run_leaky`.

    Args:
        x_seq: Input currents ``[T, N, ...]``, or one step ``[N, ...]``.
        mem: Initial potential ``[N, ...]``, checked.
        beta: Decay, within 0..1.
        threshold: Firing threshold.
        settings: The settings of the layer.
        return_mem_seq: Whether to return the potentials of all steps or only the last one.
        single_step: Whether ``x_seq`` is one step.
    """
    mechanism = settings.reset_mechanism
    spikes, potentials = [], []
    for x in [x_seq] if single_step else x_seq.unbind(0):
        if not settings.through_time:
            mem = mem.detach()
        reset = (mem > threshold).to(mem.dtype)
        h = (mem * (1 - reset) if mechanism == "zero" else mem) * beta + x.to(mem.dtype)
        if mechanism == "subtract":
            h = h - reset * threshold
        s = _Fire.apply(h, threshold, settings)
        mem = h
        if settings.resets_in_step:
            mem = h - (s - reset) * (threshold if mechanism == "subtract" else h)
        spikes.append(s.to(x.dtype))
        potentials.append(mem)
    if single_step:
        return spikes[0], mem
    return torch.stack(spikes), torch.stack(potentials) if return_mem_seq else mem


class _Fire(torch.autograd.Function):
    """Spikes of charged potentials."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, settings: LeakySettings) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.surrogate = settings.surrogate
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> Any:  # type: ignore[override]
        h, threshold = ctx.saved_tensors
        grad_h = grad_s * derivative(h - threshold, ctx.surrogate.name, ctx.surrogate.parameters)
        return (
            grad_h,
            (-grad_h).sum_to_size(threshold.shape),
            None,
        )  # which the compiler leaves out where nobody needs it
