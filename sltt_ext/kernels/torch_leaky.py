"""snnTorch's Leaky neuron in plain PyTorch: any device, and the reference for every other backend.

Forward walks the T steps without autograd. What it keeps for backward is one number per element and
step, the charged potential ``h``: where the reset is delayed that *is* the membrane potential the
neuron returns and carries, so that keeping it costs nothing. Everything else backward needs follows from
``h`` and the initial state: the surrogate's derivative, the carried potentials, the resets.

Backward treats all steps at once. Only the carried potentials of a neuron that resets within the step
are found again by walking through time, with two element-wise operations a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sltt_ext.surrogate import derivative as surrogate_derivative


def forward(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    return_mem_seq: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all steps, in snnTorch's own order of operations.

    Returns:
        Spikes ``[T, N, ...]``; membrane potentials, those of all steps ``[T, N, ...]`` or the last
        ``[N, ...]``; and what backward needs, charged potentials ``[T, N, ...]`` (empty if nothing is
        needed, or if they are the returned ``[T, N, ...]``).
    """
    same_step = resets_in_step(reset_mechanism, reset_delay)
    resets, keep = reset_mechanism != "none", save or return_mem_seq
    s_seq = torch.empty_like(x_seq)
    h_seq = torch.empty_like(x_seq if keep else x_seq[:1], dtype=mem.dtype)
    mem_seq = torch.empty_like(h_seq) if return_mem_seq and same_step else h_seq
    r = torch.gt(mem, threshold).to(mem.dtype)
    for t, x in enumerate(x_seq):
        h = h_seq[t if keep else 0]
        torch.mul((1 - r).mul_(mem) if reset_mechanism == "zero" else mem, beta, out=h).add_(x)
        if reset_mechanism == "subtract":
            h.addcmul_(r, threshold, value=-1)
        s = torch.gt(h, threshold, out=s_seq[t]).to(mem.dtype)
        if same_step:
            mem = reset_within_step(h, s, r, threshold, reset_mechanism)
            if return_mem_seq:
                mem_seq[t] = mem
        else:
            mem = h
        if resets:
            r = torch.gt(mem, threshold).to(mem.dtype) if same_step else s
    nothing = h_seq.new_empty(0)
    if return_mem_seq:
        return s_seq, mem_seq, h_seq if save and same_step else nothing
    return s_seq, mem if same_step else mem.clone(), h_seq if save else nothing


def backward(
    grad_s_seq: Tensor | None,
    grad_mem: Tensor | None,
    h_seq: Tensor,
    mem: Tensor | None,
    threshold: Tensor,
    reset_mechanism: str,
    reset_delay: bool,
    surrogate: str,
    parameters: Sequence[float],
    beta_shape: Sequence[int] | None,
    learn_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x_seq`` ``[T, N, ...]``, of beta and of the threshold (empty where not learned).

    Args:
        grad_s_seq: Gradient of the spikes ``[T, N, ...]``.
        grad_mem: Gradient of the membrane potentials: of all steps ``[T, N, ...]``, or of the last
            ``[1, N, ...]``.
        h_seq: Charged potentials ``[T, N, ...]``.
        mem: Initial membrane potential ``[N, ...]``; only needed if something is learned or
            the reset is not delayed.
        threshold: Firing threshold.
        reset_mechanism: ``"subtract"``, ``"zero"`` or ``"none"``.
        reset_delay: Whether the reset happens in the next step.
        surrogate: Name of the surrogate.
        parameters: Its parameters.
        beta_shape: Shape of beta if it is learned.
        learn_threshold: Whether the threshold is learned.
    """
    slope = surrogate_derivative(h_seq - threshold, surrogate, parameters)
    last = slice(0 if grad_mem is None else h_seq.shape[0] - grad_mem.shape[0], None)
    if mem is None:
        grad_h = slope.zero_() if grad_s_seq is None else slope.mul_(grad_s_seq)
        if grad_mem is not None:
            grad_h[last] += grad_mem
        return grad_h, h_seq.new_empty(0), h_seq.new_empty(0)

    same_step = resets_in_step(reset_mechanism, reset_delay)
    carried = _carried(h_seq, mem, threshold, reset_mechanism, same_step)
    r_seq = torch.gt(carried, threshold).to(h_seq.dtype)
    grad_s = torch.zeros_like(h_seq) if grad_s_seq is None else grad_s_seq.to(h_seq.dtype, copy=True)
    grad_threshold = torch.zeros_like(h_seq)
    by_mem = grad_mem
    if grad_mem is not None and same_step:
        h = h_seq[last]
        by_reset = grad_mem * (torch.gt(h, threshold).to(h.dtype) - r_seq[last])
        if reset_mechanism == "subtract":
            grad_s[last] -= grad_mem * threshold
            grad_threshold[last] -= by_reset
        else:
            grad_s[last] -= grad_mem * h
            by_mem = grad_mem - by_reset
    grad_h = slope.mul_(grad_s)
    grad_threshold -= grad_h
    if by_mem is not None:
        grad_h[last] += by_mem
    if reset_mechanism == "subtract":
        grad_threshold -= grad_h * r_seq
    if reset_mechanism == "zero":
        carried *= 1 - r_seq
    return (
        grad_h,
        h_seq.new_empty(0) if beta_shape is None else _summed(carried * grad_h, beta_shape),
        _summed(grad_threshold, threshold.shape) if learn_threshold else h_seq.new_empty(0),
    )


def resets_in_step(reset_mechanism: str, reset_delay: bool) -> bool:
    """Whether the potential a step ends with differs from the one it fired with."""
    return not reset_delay and reset_mechanism != "none"


def reset_within_step(h: Tensor, s: Tensor, r: Tensor, threshold: Tensor, reset_mechanism: str) -> Tensor:
    """The potential after firing; what was reset on entry already is not reset again."""
    return torch.addcmul(h, s - r, threshold if reset_mechanism == "subtract" else h, value=-1)


def _carried(h_seq: Tensor, mem: Tensor, threshold: Tensor, reset_mechanism: str, same_step: bool) -> Tensor:
    """The potentials ``[T, N, ...]`` that entered each step."""
    entered = [mem]
    for h in h_seq[:-1]:
        if same_step:
            s, r = (torch.gt(potential, threshold).to(h.dtype) for potential in (h, entered[-1]))
            entered.append(reset_within_step(h, s, r, threshold, reset_mechanism))
        else:
            entered.append(h)
    return torch.stack(entered)


def _summed(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum over time, and over what was broadcast."""
    return gradient.sum(0, dtype=torch.float64).sum_to_size(shape).to(gradient.dtype)
