"""Memory layouts that element-wise kernels can walk in storage order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_dense", "restored", "rows", "same_layout"]


def same_layout(step: Tensor, *sequences: Tensor) -> bool:
    """Whether each step of each sequence ``[T, N, ...]`` lies in memory as ``step`` ``[N, ...]`` does.

    That is: all without gaps and overlaps, dimensions in the same order, time the slowest.
    """
    if step.is_contiguous() and all(sequence.is_contiguous() for sequence in sequences):
        return True
    if not is_dense(step.shape, step.stride()):
        return False
    return all(
        (sequence.shape[0] == 1 or sequence.stride(0) == step.numel())
        and all(
            size == 1 or stride == expected
            for size, stride, expected in zip(step.shape, sequence.stride()[1:], step.stride())
        )
        for sequence in sequences
        if sequence.numel()
    )


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their memory without gaps and overlaps, in any order of dimensions.

    Examples:
        >>> is_dense((2, 3), (1, 2)), is_dense((2, 3), (4, 1)), is_dense((2, 3), (0, 1))
        (True, False, False)
    """
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def rows(step: Tensor, sequence: Tensor) -> Tensor:
    """``sequence`` ``[T, N, ...]`` as ``[T, elements]`` in the order of ``step``, which has no gaps; copied if it must be."""
    if not same_layout(step, sequence):
        strides = (step.numel(), *step.stride())
        sequence = sequence.new_empty_strided(sequence.shape, strides).copy_(sequence)
    return sequence.as_strided((len(sequence), step.numel()), (step.numel(), 1))


def restored(flat: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows`, with the shape and the strides of ``torch.empty_like(like)``; ``flat`` itself, no view of it."""
    sequence = flat.as_strided_((len(flat), *step.shape), (step.numel(), *step.stride()))
    return sequence if same_layout(step, like) else torch.empty_like(like, dtype=flat.dtype).copy_(sequence)
