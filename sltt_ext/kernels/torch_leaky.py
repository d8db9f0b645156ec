"""snnTorch's Leaky neuron in plain PyTorch: any device, and the reference for every other backend.

Forward walks the T steps without autograd. What it keeps for backward is one number per element and
step, the charged potential ``h``: where the reset is delayed that *is* the membrane potential the
neuron returns and carries, so that keeping it costs nothing. Everything else backward needs follows from
``h`` and the initial state: the surrogate's derivative, the carried potentials, the resets.

Backward treats all steps at once. Only the carried potentials of a neuron that resets within the step
are found again by walking through time, with two element-wise operations a step. For a gradient through time
it walks from the last step to the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sltt_ext.kernels.leaky import LeakySettings
from sltt_ext.surrogate import derivative as surrogate_derivative


def forward(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    return_mem_seq: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all steps; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    keep = save or return_mem_seq
    s_seq = torch.empty_like(x_seq)
    h_seq = torch.empty_like(x_seq if keep else x_seq[:1], dtype=mem.dtype)
    mem_seq = torch.empty_like(h_seq) if return_mem_seq and settings.resets_in_step else None
    last = torch.empty_like(h_seq[0]) if not return_mem_seq else None
    for part in _parts(mem, beta, threshold):
        mem_part = _walk(
            x_seq[part], mem[part[1:]], beta, threshold, settings,
            s_seq[part], h_seq[part], None if mem_seq is None else mem_seq[part],
        )  # fmt: skip
        if last is not None:
            last[part[1:]] = mem_part
    nothing = h_seq.new_empty(0)
    if last is not None:
        return s_seq, last, h_seq if save else nothing
    return (s_seq, h_seq, nothing) if mem_seq is None else (s_seq, mem_seq, h_seq if save else nothing)


def _walk(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    s_seq: Tensor,
    h_seq: Tensor,
    mem_seq: Tensor | None,
) -> Tensor:
    """Walk through time; ``h_seq`` has room for every step or for one. Returns the last potential."""
    reset_mechanism, same_step = settings.reset_mechanism, settings.resets_in_step
    r = torch.gt(mem, threshold).to(mem.dtype)
    for t, x in enumerate(x_seq):
        h = h_seq[t % len(h_seq)]
        torch.mul((1 - r).mul_(mem) if reset_mechanism == "zero" else mem, beta, out=h).add_(x)
        if reset_mechanism == "subtract":
            h.addcmul_(r, threshold, value=-1)
        s = torch.gt(h, threshold, out=s_seq[t]).to(mem.dtype)
        if same_step:
            mem = reset_within_step(h, s, r, threshold, reset_mechanism)
            r = torch.gt(mem, threshold).to(mem.dtype)
            if mem_seq is not None:
                mem_seq[t] = mem
        else:
            mem, r = h, s
    return mem


def _parts(mem: Tensor, beta: Tensor, threshold: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples of ``[T, N, ...]`` that split a small step on the CPU into parts of the batch.

    PyTorch spreads an operator over threads from 32,768 elements on. For a few times as many, run
    step after step, waiting for the threads costs more than they save.
    """
    grain, size = 32768, mem.numel()
    varies = any(tensor.dim() == mem.dim() and tensor.shape[:1] != (1,) for tensor in (beta, threshold))
    if mem.device.type != "cpu" or varies or not grain <= size <= 4 * grain:
        yield (slice(None),)
        return
    samples = max(1, (grain - 1) * len(mem) // size)
    for start in range(0, len(mem), samples):
        yield slice(None), slice(start, start + samples)


def backward(
    grad_s_seq: Tensor | None,
    grad_mem: Tensor | None,
    h_seq: Tensor,
    mem: Tensor | None,
    threshold: Tensor,
    settings: LeakySettings,
    beta_shape: Sequence[int] | None,
    learn_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    surrogate = settings.surrogate
    slope = surrogate_derivative(h_seq - threshold, surrogate.name, surrogate.parameters)
    last = slice(0 if grad_mem is None else h_seq.shape[0] - grad_mem.shape[0], None)
    if mem is None:
        grad_h = slope.zero_() if grad_s_seq is None else slope.mul_(grad_s_seq)
        if grad_mem is not None:
            grad_h[last] += grad_mem
        return grad_h, h_seq.new_empty(0), h_seq.new_empty(0)

    reset_mechanism, same_step = settings.reset_mechanism, settings.resets_in_step
    carried = torch.stack(_entered(h_seq, mem, threshold, settings))
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


def backward_through_time(
    grad_s_seq: Tensor | None,
    grad_mem: Tensor | None,
    h_seq: Tensor,
    mem: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    learn_beta: bool,
    learn_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    entered = [] if mem is None else _entered(h_seq, mem, threshold, settings)
    grad_x, g = torch.empty_like(h_seq), torch.zeros_like(h_seq[0])
    by_threshold = torch.empty_like(h_seq) if learn_threshold else None
    has_mem = len(h_seq) - (0 if grad_mem is None else len(grad_mem))
    no_gradient = g.new_zeros(())
    for t in reversed(range(len(h_seq))):
        if grad_mem is not None and t >= has_mem:
            g += grad_mem[t - has_mem]
        grad_s = no_gradient if grad_s_seq is None else grad_s_seq[t].to(g.dtype)
        r = torch.gt(entered[t], threshold).to(g.dtype) if entered else None
        of_threshold = None if by_threshold is None else by_threshold[t]
        grad_h = _grad_h(h_seq[t], grad_s, g, r, threshold, settings, grad_x[t], of_threshold)
        torch.mul(grad_h, beta, out=g)
        if r is not None and settings.reset_mechanism == "zero":
            g *= 1 - r
    carried = torch.stack(entered) if learn_beta else h_seq.new_empty(0)
    if learn_beta and settings.reset_mechanism == "zero":
        carried *= torch.le(carried, threshold)
    return (
        grad_x,
        _summed(carried.mul_(grad_x), beta.shape) if learn_beta else carried,
        h_seq.new_empty(0) if by_threshold is None else _summed(by_threshold, threshold.shape),
        g,
    )


def _grad_h(
    h: Tensor,
    grad_s: Tensor,
    grad_mem: Tensor,
    r: Tensor | None,
    threshold: Tensor,
    settings: LeakySettings,
    out: Tensor,
    of_threshold: Tensor | None,
) -> Tensor:
    """The gradient of ``h`` at one step, written into ``out``, and of the threshold, into ``of_threshold``.

    ``grad_mem`` is the whole gradient of the potential that the step ends with.
    """
    subtracts, surrogate = settings.reset_mechanism == "subtract", settings.surrogate
    slope = surrogate_derivative(torch.sub(h, threshold, out=out), surrogate.name, surrogate.parameters)
    by_reset = None
    if r is not None and settings.resets_in_step:
        by_reset = grad_mem * (torch.gt(h, threshold).to(h.dtype) - r)
        grad_s = grad_s - grad_mem * (threshold if subtracts else h)
        if not subtracts:
            grad_mem = grad_mem - by_reset
    if of_threshold is not None:
        torch.mul(slope, grad_s, out=of_threshold).neg_()
    grad_h = torch.addcmul(grad_mem, slope, grad_s, out=out)
    if of_threshold is not None and r is not None and subtracts:
        of_threshold -= grad_h * r if by_reset is None else by_reset + grad_h * r
    return grad_h


def reset_within_step(h: Tensor, s: Tensor, r: Tensor, threshold: Tensor, reset_mechanism: str) -> Tensor:
    """The potential after firing; what was reset on entry already is not reset again."""
    return torch.addcmul(h, s - r, threshold if reset_mechanism == "subtract" else h, value=-1)


def _entered(h_seq: Tensor, mem: Tensor, threshold: Tensor, settings: LeakySettings) -> list[Tensor]:
    """The potential ``[N, ...]`` that entered each step."""
    entered = [mem]
    for h in h_seq[:-1]:
        if settings.resets_in_step:
            s, r = (torch.gt(potential, threshold).to(h.dtype) for potential in (h, entered[-1]))
            entered.append(reset_within_step(h, s, r, threshold, settings.reset_mechanism))
        else:
            entered.append(h)
    return entered


def _summed(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum over time, and over what was broadcast."""
    return gradient.sum(0, dtype=torch.float64).sum_to_size(shape).to(gradient.dtype)
