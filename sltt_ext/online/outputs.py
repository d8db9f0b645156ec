"""What the loss reads of the network's return value, and its mean over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype

__all__ = ["MeanOutput", "Output", "OutputSequence", "Outputs", "output_sequence", "weights_like"]

Output = Literal["spike", "membrane"] | Callable[[Any], Any] | None


def output_sequence(returned: Any, steps: int, output: Output, multi_step: bool) -> Any:
    """The output of a network for C steps: a tensor ``[C, N, ...]``, or several such in a dict, tuple or list.

    Args:
        returned: What it returned.
        steps: C; 1 where it takes single steps.
        output: See `OnlineTrainer`.
        multi_step: Whether it takes sequences.

    Raises:
        LossError: If there is no such tensor.
    """
    if callable(output):
        chosen = output(returned)
    elif isinstance(returned, (tuple, list)):
        chosen = returned[-1 if output == "membrane" else 0]
    else:
        chosen = returned
    leaves, structure = tree_flatten(chosen)
    if not (
        isinstance(chosen, Tensor)
        or (callable(output) and leaves and all(isinstance(leaf, Tensor) for leaf in leaves))
    ):
        raise LossError(
            f"the network's output is a {type(chosen).__name__}, not a tensor: choose what the loss reads with output=, a "
            "function of the network's return value; it may return several tensors, in a dict, tuple or list"
        )
    if not multi_step:
        return tree_unflatten([leaf.unsqueeze(0) for leaf in leaves], structure)
    for leaf in leaves:
        if leaf.dim() == 0 or leaf.shape[0] != steps:
            raise LossError(
                f"a multi-step network has to return [T, N, ...], here with T={steps}, got {list(leaf.shape)}: "
                "leave the average over time to the trainer, or show such a network one step in a call, chunk=1"
            )
    return chosen


class Outputs(Protocol):
    """What becomes of the outputs of a pass."""

    def add(self, output_seq: Any) -> None:
        """Take the next C outputs ``[C, N, ...]`` in, without their graph."""


class MeanOutput(Outputs):
    """Mean over time of outputs ``[C, N, ...]`` that arrive one after the other; of half precision in float32.

    An output is a tensor, or several in a dict, tuple or list.

    Args:
        weights: What each step of each sample counts, ``[T, N]``; None where all count the same.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        self._weights = weights
        self._sums: list[Tensor] = []
        self._structure: Any = None
        self._steps = 0

    def add(self, output_seq: Any) -> None:
        """Add the next C outputs up."""
        leaves, self._structure = tree_flatten(output_seq)
        steps, parts = leaves[0].shape[0], [leaf.detach() for leaf in leaves]
        if self._weights is not None:
            weights = self._weights[self._steps : self._steps + steps]
            parts = [part * weights_like(part, weights) for part in parts]
        if steps == 1 and self._sums:
            parts = [part[0] for part in parts]
        else:
            parts = [part.sum(0, dtype=state_dtype(part.dtype)) for part in parts]
        self._sums = (
            [sum_ + part for sum_, part in zip(self._sums, parts, strict=True)] if self._sums else parts
        )
        self._steps += steps

    def value(self) -> Any:
        """The mean ``[N, ...]`` of all so far."""
        divisor = self._steps if self._weights is None else 1
        return tree_unflatten([sum_ / divisor for sum_ in self._sums], self._structure)


def weights_like(output_seq: Tensor, weights: Tensor) -> Tensor:
    """Weights ``[C, N]`` of the steps of each sample, to multiply an output ``[C, N, ...]`` with.

    Raises:
        LossError: If the output does not have the batch in front.
    """
    if output_seq.dim() < 2 or output_seq.shape[1] != weights.shape[1]:
        raise LossError(
            f"lengths= has {weights.shape[1]} samples, and an output of one step is {list(output_seq.shape[1:])}: return outputs "
            "[N, ...], or use returns='sequence' and weigh the steps in the loss"
        )
    return weights.to(output_seq.device).view(*weights.shape, *([1] * (output_seq.dim() - 2)))


class OutputSequence(Outputs):
    """The outputs of all steps ``[T, N, ...]``, of several heads each."""

    def __init__(self) -> None:
        self._parts: list[list[Tensor]] = []
        self._structure: Any = None

    def add(self, output_seq: Any) -> None:
        """Keep the next C outputs."""
        leaves, self._structure = tree_flatten(output_seq)
        self._parts.append([leaf.detach() for leaf in leaves])

    def value(self) -> Any:
        """All so far."""
        return tree_unflatten([torch.cat(parts) for parts in zip(*self._parts, strict=True)], self._structure)
