"""What the loss reads of what a network returns, and its mean over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype

__all__ = ["MeanOutput", "Output", "output_sequence"]

Output = Literal["spike", "membrane"] | Callable[[Any], Tensor] | None


def output_sequence(returned: Any, steps: int, output: Output, multi_step: bool) -> Tensor:
    """The output ``[C, N, ...]`` of a network for C steps.

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
    if not isinstance(chosen, Tensor):
        raise LossError(
            f"the network's output is a {type(chosen).__name__}, not a tensor: choose the tensor the loss "
            "reads with output=, a function of the network's return value"
        )
    if not multi_step:
        return chosen.unsqueeze(0)
    if chosen.dim() == 0 or chosen.shape[0] != steps:
        raise LossError(
            f"a multi-step network has to return [T, N, ...], here with T={steps}, got {list(chosen.shape)}: "
            "leave the average over time to the trainer"
        )
    return chosen


class MeanOutput:
    """Mean over time of outputs ``[C, N, ...]`` that arrive one after the other; of half precision in float32."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._steps = 0

    def add(self, output_seq: Tensor) -> None:
        """Take the next C outputs in."""
        part = output_seq.sum(0, dtype=state_dtype(output_seq.dtype))
        self._sum = part if self._sum is None else self._sum + part
        self._steps += output_seq.shape[0]

    def value(self) -> Tensor:
        """The mean ``[N, ...]`` of all so far."""
        assert self._sum is not None
        return self._sum / self._steps
