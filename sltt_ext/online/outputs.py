"""What the loss reads of what a network returns, and its mean over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype

__all__ = ["MeanOutput", "Output", "output_sequence"]

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


class MeanOutput:
    """Mean over time of outputs ``[C, N, ...]`` that arrive one after the other; of half precision in float32.

    An output is a tensor, or several in a dict, tuple or list.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._structure: Any = None
        self._steps = 0

    def add(self, output_seq: Any) -> None:
        """Take the next C outputs in, without their graph."""
        leaves, self._structure = tree_flatten(output_seq)
        parts = [leaf.detach().sum(0, dtype=state_dtype(leaf.dtype)) for leaf in leaves]
        self._sums = (
            [sum_ + part for sum_, part in zip(self._sums, parts, strict=True)] if self._sums else parts
        )
        self._steps += leaves[0].shape[0]

    def value(self) -> Any:
        """The mean ``[N, ...]`` of all so far."""
        return tree_unflatten([sum_ / self._steps for sum_ in self._sums], self._structure)
