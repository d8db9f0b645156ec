"""The tensors that a network returns, over time: what the caller gets of them, and the part of each step in their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype
from sltt_ext.online.outputs import MeanOutput, OutputSequence, weights_like
from sltt_ext.online.passes import Call
from sltt_ext.online.structures import Rebuild, flatten

__all__ = ["Heads", "Read", "Returns", "tensors_over_time"]

Returns = Literal["mean", "sequence"]
Read = Callable[[Any, int], tuple[list[Tensor], Rebuild]]
"""``(returned, steps) -> `` tensors ``[C, N, ...]`` of C steps, and how to make what is returned again of others."""


class Heads:
    """The outputs of one pass.

    Args:
        returns: Their mean over time, or all steps.
        time_steps: T.
        counts: How many times each step counts in the gradient, which is the mean of these steps.
        divisor: How many steps it is divided by.
        read: What is an output.
        keeps_dtype: Whether a mean has the outputs' own dtype; that of half precision is computed in float32.
        weights: What each step of each sample counts in the mean, ``[T, N]``; None where all count the same.

    Attributes:
        outputs: Where they go.
    """

    def __init__(
        self,
        returns: Returns,
        time_steps: int,
        counts: Mapping[int, float],
        divisor: float,
        read: Read,
        keeps_dtype: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        self.outputs: MeanOutput | OutputSequence = (
            MeanOutput(weights) if returns == "mean" else OutputSequence()
        )
        self._weights = weights
        self._counts = counts
        self._returns = returns
        self._time_steps = time_steps
        self._divisor = divisor
        self._read = read
        self._keeps_dtype = keeps_dtype
        self._rebuild: Rebuild = tuple
        self._dtypes: list[torch.dtype] = []

    def of_call(self, returned: Any, steps: int) -> list[Tensor]:
        """Each output of a call of C steps, ``[C, N, ...]``.

        Raises:
            LossError: If there is none, or one has no mean, or there are others than in the call before.
        """
        tensors, self._rebuild = self._read(returned, steps)
        if not tensors:
            raise LossError(
                f"the network returned a {type(returned).__name__} without a tensor: return what the loss reads"
            )
        dtypes = [tensor.dtype for tensor in tensors]
        if self._returns == "mean" and not all(
            dtype.is_floating_point or dtype.is_complex for dtype in dtypes
        ):
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise LossError(
                f"an output has no mean over time, got {kinds}: use returns='sequence', or return floats only"
            )
        if self._dtypes and len(self._dtypes) != len(dtypes):
            raise LossError(
                f"the network returned {len(self._dtypes)} tensors at one step and {len(dtypes)} at another: return the same "
                "outputs at every step"
            )
        self._dtypes = dtypes
        return tensors

    def values(self) -> list[Tensor]:
        """What the caller gets."""
        values: list[Tensor] = self.outputs.value()
        if not self._keeps_dtype:
            return values
        return [value.to(dtype) for value, dtype in zip(values, self._dtypes, strict=True)]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over time of what the caller gets, without its graph."""
        value = value.detach()
        return value if self._returns == "mean" else value.mean(0, dtype=state_dtype(value.dtype))

    def rebuild(self, values: Sequence[Tensor]) -> Any:
        """These tensors, as the network returns its own."""
        return self._rebuild(values)

    def share(self, gradient: Tensor, call: Call) -> Tensor:
        """What a call of C steps has in the gradient of an output ``[C, N, ...]``: its own part, each step as often as it counts."""
        part = self._part(gradient, call)
        counts = [self._counts[t] for t in range(call.start, call.stop)]
        if all(count == 1 for count in counts):
            return part
        # one by one: a tensor of them would have to be copied to the device
        return torch.stack([of_step * count for of_step, count in zip(part, counts, strict=True)])

    def _part(self, gradient: Tensor, call: Call) -> Tensor:
        """The part of the steps of a call; with K of T steps, times T / K."""
        if self._returns == "mean" and self._weights is None:
            return (gradient / self._divisor).expand(call.steps, *gradient.shape)
        if self._weights is not None:
            part = gradient * weights_like(gradient.unsqueeze(0), self._weights[call.start : call.stop])
        else:
            part = gradient[call.start : call.stop]
        return part if self._divisor == self._time_steps else part * (self._time_steps / self._divisor)


def tensors_over_time(returned: Any, steps: int, multi_step: bool) -> tuple[list[Tensor], Rebuild]:
    """All tensors that a network returns for C steps, each ``[C, N, ...]``.

    Args:
        returned: What it returns.
        steps: C; 1 where it takes single steps.
        multi_step: Whether it takes sequences.

    Raises:
        LossError: If it returns no sequence, though it takes sequences.
    """
    tensors, rebuild = flatten(returned)
    if not multi_step:
        return [tensor.unsqueeze(0) for tensor in tensors], rebuild
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] != steps:
            raise LossError(
                f"a multi-step network has to return [T, N, ...], here with T={steps}, got {list(tensor.shape)}: if it "
                "repeats its input or averages over time itself, name the attribute that holds its number of steps with time_inside="
            )
    return [tensor if tensor.dim() else tensor.expand(steps) for tensor in tensors], rebuild
