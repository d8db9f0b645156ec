"""The network's input over time: a static input, a sequence tensor, several of either, or a stream of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_structure, tree_unflatten

from sltt_ext.errors import InputError

__all__ = ["Frames", "frames"]


@dataclass(frozen=True)
class Frames:
    """The input of one pass through time.

    Attributes:
        take: ``(start, stop) -> `` the frames of these steps, asked for once each and in order: a tensor
            ``[C, N, ...]`` (or a dict or tuple of such) for a multi-step network, the one frame for a single-step network.
        elements: Size of one frame; 0 where it is not known before it is taken.
        static: What every frame is ``[N, ...]``; None where they differ.
    """

    take: Callable[[int, int], Any]
    elements: int = 0
    static: Tensor | None = None


def frames(x: Any, time_steps: int, time_dim: int | None, multi_step: bool) -> Frames:
    """How to get the frames of ``x``, a static ``[N, ...]``, a sequence along ``time_dim``, or an iterable.

    A mapping is one input of several tensors, static or sequences; any other iterable is a stream of frames.

    Raises:
        InputError: If the length of ``x`` disagrees with ``time_steps``, the batch is empty, or ``x`` is no sequence.
    """
    if isinstance(x, Tensor):
        return _tensor_frames(x, time_steps, time_dim, multi_step)
    if isinstance(x, Mapping):
        return _mapping_frames(x, time_steps, time_dim, multi_step)
    if time_dim is not None:
        raise InputError(
            f"time_dim={time_dim} needs a tensor, got {type(x).__name__}: leave time_dim out for frames"
        )
    if type(x).__module__ == "numpy":
        raise InputError("x is a NumPy array: give a tensor, torch.from_numpy(x)")
    if not isinstance(x, Iterable):
        raise InputError(f"x must be a tensor or an iterable of frames, got {type(x).__name__}")
    if isinstance(x, (list, tuple)) and not all(_alike(x[0], frame) for frame in x):
        raise InputError(
            f"x is a {type(x).__name__} of {', '.join(map(_kind, x))}, which are not frames of one sequence: unpack a batch, "
            "forward_backward(x, target)"
        )
    if isinstance(x, Sized) and len(x) != time_steps:
        raise InputError(
            f"x has {len(x)} frames, the trainer was made for time_steps={time_steps}: give a frame for each step; "
            "unpack a batch, forward_backward(x, target)"
        )
    return _stream_frames(x, time_steps, multi_step)


def _tensor_frames(x: Tensor, time_steps: int, time_dim: int | None, multi_step: bool) -> Frames:
    if x.is_nested or (x.layout is not torch.strided and multi_step):
        raise InputError(
            "x must be a dense tensor: use x.to_dense() for a sparse tensor, and padded samples instead of a nested one"
        )
    if x.dim() == 0 or 0 in x.shape:
        raise InputError(
            f"x is empty: shape {list(x.shape)}; skip empty batches (drop_last=True in the DataLoader)"
        )
    if time_dim is None:
        return Frames(
            lambda start, stop: x.unsqueeze(0).expand(stop - start, *x.shape) if multi_step else x,
            elements=x.numel(),
            static=x if x.layout is torch.strided else None,
        )
    if time_dim not in (0, 1) or x.dim() <= time_dim:
        raise InputError(
            f"time_dim must be 0 ([T, N, ...]) or 1 ([N, T, ...]), got {time_dim} for {list(x.shape)}"
        )
    if x.shape[time_dim] != time_steps:
        other = 1 - time_dim
        hint = ""
        if x.dim() > other and x.shape[other] == time_steps:
            hint = f"; axis {other} has {time_steps}: is it time_dim={other}?"
        raise InputError(
            f"x of shape {list(x.shape)} has {x.shape[time_dim]} steps along time_dim={time_dim}, "
            f"the trainer was made for time_steps={time_steps}{hint}"
        )
    x_seq = x.movedim(time_dim, 0)
    return Frames(
        lambda start, stop: x_seq[start:stop] if multi_step else x_seq[start],
        elements=x.numel() // time_steps,
    )


def _mapping_frames(x: Mapping[Any, Any], time_steps: int, time_dim: int | None, multi_step: bool) -> Frames:
    leaves, structure = tree_flatten(x)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise InputError(
            f"x must have tensors only, got a {type(x).__name__} of {', '.join(map(_kind, leaves))}: choose those "
            "that the network reads"
        )
    parts = [_tensor_frames(leaf, time_steps, time_dim, multi_step) for leaf in leaves]
    return Frames(
        lambda start, stop: tree_unflatten([part.take(start, stop) for part in parts], structure),
        elements=sum(part.elements for part in parts),
    )


def _stream_frames(x: Iterable[Any], time_steps: int, multi_step: bool) -> Frames:
    stream = iter(x)

    def take(start: int, stop: int) -> Any:
        got = list(islice(stream, stop - start))
        if len(got) < stop - start:
            raise InputError(
                f"x ended after {start + len(got)} frames, the trainer was made for time_steps={time_steps}"
            )
        for frame in got:
            if isinstance(frame, Tensor) and (frame.dim() == 0 or 0 in frame.shape):
                raise InputError(f"x has an empty frame at step {start}: shape {list(frame.shape)}")
        return _stacked(got) if multi_step else got[0]

    return Frames(take)


def _stacked(got: Sequence[Any]) -> Any:
    """Frames ``[N, ...]`` as one ``[C, N, ...]``, whatever holds their tensors."""
    leaves, (structure, *others) = zip(*map(tree_flatten, got), strict=True)
    same = all(other == structure for other in others)
    if not same or not all(
        isinstance(leaf, Tensor) and leaf.shape == first.shape
        for frame in leaves
        for leaf, first in zip(frame, leaves[0])
    ):
        raise InputError(
            f"the frames of a multi-step network must be tensors of the same shapes, got {', '.join(map(_kind, got))}: pad "
            "them, or use a single-step network"
        )
    return tree_unflatten([torch.stack(parts) for parts in zip(*leaves)], structure)


def _alike(first: Any, frame: Any) -> bool:
    """Whether two frames may be of one sequence; the first axis may differ, as events in number do."""
    if isinstance(first, Tensor) and isinstance(frame, Tensor):
        return (first.dtype, first.shape[1:]) == (frame.dtype, frame.shape[1:])
    return tree_structure(first) == tree_structure(frame)


def _kind(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
