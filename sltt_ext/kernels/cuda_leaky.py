"""snnTorch's Leaky neuron as CUDA kernels (`leaky.cu`): allocation, memory layout and launch.

Same functions and same numbers as `sltt_ext.kernels.torch_leaky`. As in
`sltt_ext.kernels.cuda_lif` the elements are walked in the order they lie in memory; a beta or threshold
of more than one number needs contiguous tensors, and copies are made if they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sltt_ext.kernels.geometry import MAX_BLOCKS, MAX_PARTIAL_SUMS, launch_geometry
from sltt_ext.kernels.launch import Launch
from sltt_ext.kernels.layout import same_layout
from sltt_ext.kernels.leaky import LeakySettings
from sltt_ext.kernels.source import Kernel, make_kernel
from sltt_ext.surrogate import constants

_RESETS = {"subtract": 0, "zero": 1, "none": 2}  # as in leaky.cu
_STATE_BYTES = 4


def forward(
    x_seq: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    settings: LeakySettings,
    return_mem_seq: bool,
    save: bool,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all steps; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    returned = torch.empty_like(x_seq if return_mem_seq else x_seq[0], dtype=mem.dtype)
    has_h = save and (settings.resets_in_step or not return_mem_seq)
    h_seq = torch.empty_like(x_seq, dtype=mem.dtype) if has_h else mem.new_empty(0)
    outputs = torch.empty_like(x_seq), returned, h_seq
    if not x_seq.numel():
        return outputs
    sequences = [x_seq, outputs[0], h_seq, returned if return_mem_seq else returned.unsqueeze(0)]
    if not _can_walk(mem, [tensor for tensor in sequences if tensor.numel()], beta, threshold):
        computed = forward(
            x_seq.contiguous(),
            mem.contiguous(),
            beta,
            threshold,
            settings,
            return_mem_seq,
            save,
            launch=launch,
        )
        for output, values in zip(outputs, computed):
            output.copy_(values)
        return outputs
    beta, *beta_period = _periodic(beta, mem.shape)
    threshold, *threshold_period = _periodic(threshold, mem.shape)
    x_at, mem_at, s_at, returned_at, h_at = (tensor.data_ptr() for tensor in (x_seq, mem, *outputs))
    geometry = launch_geometry(mem.numel(), _STATE_BYTES, (x_at, mem_at, s_at, returned_at, h_at))
    arguments = (
        x_at, mem_at, beta.data_ptr(), threshold.data_ptr(), s_at,
        *((returned_at, 0) if return_mem_seq else (0, returned_at)), h_at,
        mem.numel(), x_seq.shape[0], *beta_period, *threshold_period,
    )  # fmt: skip
    kernel = forward_kernel(x_seq.dtype, geometry.width, settings.reset_mechanism, settings.resets_in_step)
    launch(kernel, geometry.blocks, arguments, x_seq.device)
    return outputs


def backward(
    grad_s_seq: Tensor | None,
    grad_mem: Tensor | None,
    h_seq: Tensor,
    mem: Tensor | None,
    threshold: Tensor,
    settings: LeakySettings,
    beta_shape: Sequence[int] | None,
    learn_threshold: bool,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    surrogate, same_step = settings.surrogate, settings.resets_in_step
    threshold_shape = threshold.shape if learn_threshold else None
    grad_x = torch.empty_like(h_seq)
    step, time_steps = h_seq[0], h_seq.shape[0]
    if not h_seq.numel():
        nothing = [h_seq.new_zeros(0 if shape is None else shape) for shape in (beta_shape, threshold_shape)]
        return grad_x, nothing[0], nothing[1]
    given = [grad_s_seq, grad_mem, None if mem is None else mem.unsqueeze(0)]
    sequences = [h_seq, grad_x, *(tensor for tensor in given if tensor is not None)]
    per_element = [shape is not None and math.prod(shape) > 1 for shape in (beta_shape, threshold_shape)]
    if not _can_walk(step, sequences, threshold) or (any(per_element) and not step.is_contiguous()):
        computed, grad_beta, grad_threshold = backward(
            None if grad_s_seq is None else grad_s_seq.contiguous(),
            None if grad_mem is None else grad_mem.contiguous(),
            h_seq.contiguous(), None if mem is None else mem.contiguous(), threshold, settings, beta_shape,
            learn_threshold, launch=launch,
        )  # fmt: skip
        return grad_x.copy_(computed), grad_beta, grad_threshold
    threshold, *threshold_period = _periodic(threshold, step.shape)
    read = [0 if tensor is None else tensor.data_ptr() for tensor in (grad_s_seq, grad_mem, h_seq, mem)]
    walk, reduce = same_step or any(per_element), beta_shape is not None or learn_threshold
    geometry = launch_geometry(
        step.numel(), _STATE_BYTES, (*read, grad_x.data_ptr()), 1 if walk else time_steps,
        MAX_PARTIAL_SUMS if reduce else MAX_BLOCKS,
    )  # fmt: skip
    sums = _room_for_sums(step, (beta_shape, threshold_shape), per_element, geometry.blocks)
    arguments = (
        *read, threshold.data_ptr(), grad_x.data_ptr(), *(tensor.data_ptr() for tensor in sums), step.numel(),
        time_steps, 0 if grad_mem is None else time_steps - grad_mem.shape[0], int(walk), *map(int, per_element),
        *threshold_period, *constants(surrogate.name, surrogate.parameters),
    )  # fmt: skip
    dtype = h_seq.dtype if grad_s_seq is None else grad_s_seq.dtype
    kernel = backward_kernel(
        dtype, geometry.width, surrogate.name, settings.reset_mechanism, same_step, reduce
    )
    launch(kernel, geometry.blocks, arguments, h_seq.device)
    grad_beta, grad_threshold = (
        _summed(tensor, shape, whole).to(h_seq.dtype)
        for tensor, shape, whole in zip(sums, (beta_shape, threshold_shape), per_element)
    )
    return grad_x, grad_beta, grad_threshold


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
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients; see `sltt_ext.kernels.leaky.LeakyKernels`."""
    beta_shape, threshold_shape = (
        beta.shape if learn_beta else None,
        threshold.shape if learn_threshold else None,
    )
    step, time_steps = h_seq[0], h_seq.shape[0]
    grad_x, grad_start = torch.empty_like(h_seq), torch.empty_like(step)
    if not h_seq.numel():
        nothing = [h_seq.new_zeros(0 if shape is None else shape) for shape in (beta_shape, threshold_shape)]
        return grad_x, nothing[0], nothing[1], grad_start
    given = [grad_s_seq, grad_mem, None if mem is None else mem.unsqueeze(0)]
    sequences = [h_seq, grad_x, *(tensor for tensor in given if tensor is not None)]
    if not _can_walk(step, sequences, beta, threshold):
        computed, grad_beta, grad_threshold, start = backward_through_time(
            None if grad_s_seq is None else grad_s_seq.contiguous(),
            None if grad_mem is None else grad_mem.contiguous(),
            h_seq.contiguous(), None if mem is None else mem.contiguous(), beta, threshold, settings, learn_beta,
            learn_threshold, launch=launch,
        )  # fmt: skip
        return grad_x.copy_(computed), grad_beta, grad_threshold, grad_start.copy_(start)
    beta, *beta_period = _periodic(beta, step.shape)
    threshold, *threshold_period = _periodic(threshold, step.shape)
    read = [0 if tensor is None else tensor.data_ptr() for tensor in (grad_s_seq, grad_mem, h_seq, mem)]
    written = grad_x.data_ptr(), grad_start.data_ptr()
    reduce = learn_beta or learn_threshold
    per_element = [shape is not None and math.prod(shape) > 1 for shape in (beta_shape, threshold_shape)]
    geometry = launch_geometry(
        step.numel(), _STATE_BYTES, (*read, *written), 1, MAX_PARTIAL_SUMS if reduce else MAX_BLOCKS
    )
    sums = _room_for_sums(step, (beta_shape, threshold_shape), per_element, geometry.blocks)
    surrogate = settings.surrogate
    arguments = (
        *read, beta.data_ptr(), threshold.data_ptr(), *written, *(tensor.data_ptr() for tensor in sums), step.numel(),
        time_steps, 0 if grad_mem is None else time_steps - grad_mem.shape[0], *map(int, per_element), *beta_period,
        *threshold_period, *constants(surrogate.name, surrogate.parameters),
    )  # fmt: skip
    dtype = h_seq.dtype if grad_s_seq is None else grad_s_seq.dtype
    kernel = backward_kernel(
        dtype, geometry.width, surrogate.name, settings.reset_mechanism, settings.resets_in_step, reduce,
        through_time=True,
    )  # fmt: skip
    launch(kernel, geometry.blocks, arguments, h_seq.device)
    grad_beta, grad_threshold = (
        _summed(tensor, shape, whole).to(h_seq.dtype)
        for tensor, shape, whole in zip(sums, (beta_shape, threshold_shape), per_element)
    )
    return grad_x, grad_beta, grad_threshold, grad_start


def forward_kernel(dtype: torch.dtype, width: int, reset_mechanism: str, same_step: bool) -> Kernel:
    """The forward kernel for the given choices."""
    return make_kernel(
        "leaky", "forward", dtype, width, None, RESET=_RESETS[reset_mechanism], SAME_STEP=int(same_step)
    )


def backward_kernel(
    dtype: torch.dtype,
    width: int,
    surrogate: str,
    reset_mechanism: str,
    same_step: bool,
    reduce: bool,
    through_time: bool = False,
) -> Kernel:
    """The backward kernel for the given choices."""
    return make_kernel(
        "leaky", "backward_through_time" if through_time else "backward", dtype, width, surrogate,
        RESET=_RESETS[reset_mechanism], SAME_STEP=int(same_step), REDUCE=int(reduce),
    )  # fmt: skip


def _can_walk(step: Tensor, sequences: Sequence[Tensor], *numbers: Tensor) -> bool:
    """Whether the kernels can walk tensors with the layout of ``step``, given beta and threshold."""
    if any(tensor.numel() > 1 for tensor in numbers) and not step.is_contiguous():
        return False
    return same_layout(step, *sequences)


def _periodic(numbers: Tensor, shape: torch.Size) -> tuple[Tensor, int, int]:
    """Contiguous numbers with ``inner`` and ``count``: element i of ``shape`` has number ``i // inner % count``."""
    sizes = list(numbers.shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    behind = len(sizes)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    if tuple(sizes) != tuple(shape[len(shape) - behind :][: len(sizes)]):  # ones in between
        return numbers.expand(shape).contiguous(), 1, shape.numel()
    inner = math.prod(shape[len(shape) - (behind - len(sizes)) :]) if behind > len(sizes) else 1
    return numbers.contiguous(), inner, math.prod(sizes)


def _room_for_sums(
    step: Tensor, shapes: Sequence[Sequence[int] | None], per_element: Sequence[bool], blocks: int
) -> list[Tensor]:
    return [
        step.new_empty(0 if shape is None else step.shape if whole else blocks, dtype=torch.float64)
        for shape, whole in zip(shapes, per_element)
    ]


def _summed(sums: Tensor, shape: Sequence[int] | None, per_element: bool) -> Tensor:
    if shape is None:
        return sums
    return sums.sum_to_size(shape) if per_element else sums.sum().reshape(tuple(shape))
