"""The fused neuron as CUDA kernels (`lif.cu`): allocation, memory layout and launch.

Same functions and same numbers as `sltt_ext.kernels.torch_lif`. The kernels walk the elements in the
order they lie in memory, whatever that order is, as long as it is the same for all tensors; where it is
not, contiguous copies are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sltt_ext.kernels.geometry import MAX_BLOCKS, MAX_PARTIAL_SUMS, launch_geometry
from sltt_ext.kernels.launch import Launch
from sltt_ext.kernels.layout import same_layout
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.kernels.source import Kernel, make_kernel
from sltt_ext.surrogate import constants

# as in lif.cu
_INTEGRATE, _TAU_INPUT, _TAU, _DECAY_INPUT, _DECAY, _FACTORED_TAU, _FACTORED_DECAY = range(7)
NOTHING, DERIVATIVES, POTENTIALS = range(3)


def forward(
    x_seq: Tensor,
    v: Tensor | float,
    decay: Tensor | None,
    settings: LIFSettings,
    save: bool,
    save_slope: bool,
    overwrite: bool = False,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all steps; see `sltt_ext.kernels.lif.LIFKernels`."""
    s_seq = torch.empty_like(x_seq)
    if overwrite and isinstance(v, Tensor):
        final = v
    else:
        final = torch.empty_like(v if isinstance(v, Tensor) else x_seq[0], dtype=torch.float32)
    saved = POTENTIALS if save and settings.through_time else DERIVATIVES if save else NOTHING
    derivatives = torch.empty_like(x_seq[1:]) if saved == DERIVATIVES else x_seq.new_empty(0)
    if saved == POTENTIALS:
        h = torch.empty_like(x_seq, dtype=torch.float32)
    else:
        h = torch.empty_like(final) if save and not settings.charged else final.new_empty(0)
    slopes = torch.empty_like(x_seq) if save_slope else x_seq.new_empty(0)
    outputs = s_seq, final, derivatives, h, slopes
    if not x_seq.numel():
        return outputs
    if not same_layout(v if isinstance(v, Tensor) else final, x_seq, s_seq):
        start = v.contiguous() if isinstance(v, Tensor) else v
        computed = forward(x_seq.contiguous(), start, decay, settings, save, save_slope, launch=launch)
        for output, values in zip(outputs, computed):
            output.copy_(values)
        return outputs
    x_at, s_at, final_at, derivatives_at, h_at, slopes_at = (each.data_ptr() for each in (x_seq, *outputs))
    v_last_at, h_last_at = (0, final_at) if settings.charged else (final_at, h_at)
    written = s_at, v_last_at, derivatives_at, h_last_at, slopes_at
    v_at, v_start = (v.data_ptr(), 0.0) if isinstance(v, Tensor) else (0, float(v))
    geometry = launch_geometry(final.numel(), x_seq.element_size(), (x_at, v_at, *written))
    surrogate = settings.surrogate
    kernel = forward_kernel(
        x_seq.dtype, geometry.width, surrogate.name, _charge(decay, settings), settings.v_reset is None, saved,
        save_slope,
    )  # fmt: skip
    arguments = (
        x_at, v_at, 0 if decay is None else decay.data_ptr(), *written, final.numel(), x_seq.shape[0],
        int(settings.charged and isinstance(v, Tensor)), v_start, _tau(settings), settings.v_threshold, settings.v_reset or 0.0,
        *constants(surrogate.name, surrogate.parameters, settings.input_scale),
    )  # fmt: skip
    launch(kernel, geometry.blocks, arguments, x_seq.device)
    return outputs


def backward(
    grad_s_seq: Tensor | None,
    grad_v: Tensor | None,
    derivatives: Tensor,
    h: Tensor,
    slopes: Tensor,
    decay: Tensor | None,
    settings: LIFSettings,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.lif.LIFKernels`."""
    time_steps = derivatives.shape[0] + 1
    if grad_s_seq is None:
        grad_x = derivatives.new_empty((time_steps, *h.shape))
    else:
        grad_x = torch.empty_like(grad_s_seq)
    reduce = slopes.numel() > 0
    if not grad_x.numel():
        return grad_x, h.new_empty(0)
    sequences = [derivatives, grad_x]
    sequences += [] if grad_s_seq is None else [grad_s_seq]
    sequences += [] if grad_v is None else [grad_v.unsqueeze(0)]
    sequences += [slopes] if reduce else []
    if not same_layout(h, *sequences):
        computed, grad_decay = backward(
            None if grad_s_seq is None else grad_s_seq.contiguous(),
            None if grad_v is None else grad_v.contiguous(),
            derivatives.contiguous(), h.contiguous(), slopes.contiguous(), decay, settings, launch=launch,
        )  # fmt: skip
        return grad_x.copy_(computed), grad_decay
    c = decay if settings.decay_input else None
    read = [
        0 if tensor is None else tensor.data_ptr() for tensor in (grad_s_seq, grad_v, derivatives, h, slopes)
    ]
    geometry = launch_geometry(
        h.numel(), grad_x.element_size(), (*read, grad_x.data_ptr()),
        time_steps, MAX_PARTIAL_SUMS if reduce else MAX_BLOCKS,
    )  # fmt: skip
    partials = h.new_empty(geometry.blocks if reduce else 0, dtype=torch.float64)
    scale, surrogate = settings.input_scale, settings.surrogate
    arguments = (
        *read, 0 if c is None else c.data_ptr(), grad_x.data_ptr(), partials.data_ptr(), h.numel(), time_steps,
        int(settings.detach_reset), int(settings.charged), scale, settings.v_threshold, settings.v_reset or 0.0,
        *constants(surrogate.name, surrogate.parameters, scale),
    )  # fmt: skip
    soft_reset = settings.v_reset is None
    kernel = backward_kernel(grad_x.dtype, geometry.width, surrogate.name, soft_reset, reduce)
    launch(kernel, geometry.blocks, arguments, h.device)
    if not reduce:
        return grad_x, h.new_empty(0)
    grad_decay = partials.sum()
    return grad_x, (grad_decay if c is None else grad_decay / c).to(h.dtype)


def backward_through_time(
    grad_s_seq: Tensor | None,
    grad_v: Tensor | None,
    h_seq: Tensor,
    slopes: Tensor,
    decay: Tensor | None,
    settings: LIFSettings,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.lif.LIFKernels`."""
    step, time_steps, reduce = h_seq[0], h_seq.shape[0], slopes.numel() > 0
    grad_x = torch.empty_like(h_seq if grad_s_seq is None else grad_s_seq, dtype=slopes.dtype)
    grad_start = torch.empty_like(step)
    if not grad_x.numel():
        return grad_x, h_seq.new_empty(0), grad_start
    given = [grad_s_seq, None if grad_v is None else grad_v.unsqueeze(0), slopes if reduce else None]
    if not same_layout(step, h_seq, grad_x, *(tensor for tensor in given if tensor is not None)):
        computed, grad_decay, start = backward_through_time(
            None if grad_s_seq is None else grad_s_seq.contiguous(),
            None if grad_v is None else grad_v.contiguous(),
            h_seq.contiguous(), slopes.contiguous(), decay, settings, launch=launch,
        )  # fmt: skip
        return grad_x.copy_(computed), grad_decay, grad_start.copy_(start)
    read = [0 if tensor is None else tensor.data_ptr() for tensor in (grad_s_seq, grad_v, h_seq, slopes)]
    written = grad_x.data_ptr(), grad_start.data_ptr()
    geometry = launch_geometry(
        step.numel(), grad_x.element_size(), (*read, *written), 1, MAX_PARTIAL_SUMS if reduce else MAX_BLOCKS
    )
    partials = h_seq.new_empty(geometry.blocks if reduce else 0, dtype=torch.float64)
    surrogate = settings.surrogate
    arguments = (
        *read, 0 if decay is None else decay.data_ptr(), *written, partials.data_ptr(), step.numel(), time_steps,
        int(settings.detach_reset), int(settings.decay_input), settings.input_scale, settings.kept,
        settings.v_threshold, settings.v_reset or 0.0, *constants(surrogate.name, surrogate.parameters),
    )  # fmt: skip
    kernel = backward_kernel(
        grad_x.dtype, geometry.width, surrogate.name, settings.v_reset is None, reduce, through_time=True
    )
    launch(kernel, geometry.blocks, arguments, h_seq.device)
    return grad_x, partials.sum().to(h_seq.dtype) if reduce else h_seq.new_empty(0), grad_start


def forward_kernel(
    dtype: torch.dtype,
    width: int,
    surrogate: str,
    charge: int,
    soft_reset: bool,
    saved: int,
    save_slopes: bool,
) -> Kernel:
    """The forward kernel for the given choices; only where derivatives are saved there is something of the surrogate in it."""
    return make_kernel(
        "lif", "forward", dtype, width, surrogate if saved == DERIVATIVES else None,
        CHARGE=charge, SOFT_RESET=int(soft_reset), SAVE=saved, SAVE_SLOPES=int(save_slopes),
    )  # fmt: skip


def backward_kernel(
    dtype: torch.dtype,
    width: int,
    surrogate: str,
    soft_reset: bool,
    reduce: bool,
    through_time: bool = False,
) -> Kernel:
    """The backward kernel for the given choices."""
    entry = "backward_through_time" if through_time else "backward"
    return make_kernel("lif", entry, dtype, width, surrogate, SOFT_RESET=int(soft_reset), REDUCE=int(reduce))


def _tau(settings: LIFSettings) -> float:
    """What the kernel divides the leak by, or with a factored leak multiplies the potential by."""
    if settings.tau is None:
        return 1.0
    return 1 - 1 / settings.tau if settings.factored_leak else settings.tau


def _charge(decay: Tensor | None, settings: LIFSettings) -> int:
    if settings.factored_leak:
        return _FACTORED_TAU if decay is None else _FACTORED_DECAY
    if decay is not None:
        return _DECAY_INPUT if settings.decay_input else _DECAY
    if settings.tau is not None:
        return _TAU_INPUT if settings.decay_input else _TAU
    return _INTEGRATE
