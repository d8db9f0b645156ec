"""Where the outputs of a network that runs over time inside its own forward have their time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.structures import Rebuild, flatten

__all__ = ["AVERAGED", "OutputAxes", "axis_of_time"]

AVERAGED = -1


class OutputAxes:
    """Where the outputs of a network have their time.

    Args:
        axes: Of each output; -1 where it is the average.
    """

    def __init__(self, axes: Sequence[int]) -> None:
        self.axes = list(axes)

    @property
    def averages(self) -> bool:
        """Whether the network averages all of its outputs over time itself."""
        return all(axis == AVERAGED for axis in self.axes)

    def tensors(self, returned: Any, steps: int) -> tuple[list[Tensor], Rebuild]:
        """All tensors that the network returns for C steps, each ``[C, N, ...]``; an average counts C times.

        Raises:
            ConfigurationError: If they have their time elsewhere than in the first call, or are not as many.
        """
        tensors, rebuild = flatten(returned)
        if len(tensors) != len(self.axes):
            raise ConfigurationError(
                f"the network returned {len(tensors)} tensors, and {len(self.axes)} in its first call: return the same in each call"
            )
        pairs = list(zip(tensors, self.axes))
        for tensor, axis in pairs:
            if axis != AVERAGED and (tensor.dim() <= axis or tensor.shape[axis] != steps):
                raise ConfigurationError(
                    f"an output of {steps} step{'s' * (steps > 1)} is {list(tensor.shape)}, and in the first call its time was on axis "
                    f"{axis}: return [T, N, ...] or the average, for every number of samples"
                )
        return [
            tensor.expand(steps, *tensor.shape) if axis == AVERAGED else tensor.movedim(axis, 0)
            for tensor, axis in pairs
        ], rebuild

    def returned(self, tensor: Tensor, head: int) -> Tensor:
        """An output as the network itself returns it, of ``[T, N, ...]`` or the mean ``[N, ...]``."""
        axis = self.axes[head]
        if axis != AVERAGED:
            return tensor.movedim(0, axis)
        return tensor if self.averages else tensor.mean(0)

    def check_each_step(self, part: int, asked_by: str) -> None:
        """See that the steps of its outputs can be told from one another.

        Args:
            part: How many steps a call has.
            asked_by: Who asks for that.

        Raises:
            ConfigurationError: If a call gives their average.
        """
        if part > 1 and AVERAGED in self.axes:
            raise ConfigurationError(
                f"{asked_by} asks for each step, but the network averages the {part} steps of a call: use chunk=1"
            )


def axis_of_time(whole: Tensor, part: Tensor, time_steps: int) -> int | None:
    """The axis of time of an output, by what it is for all steps and for one; None if there is none."""
    if whole.shape == part.shape:
        return AVERAGED
    axes = (
        [axis for axis, (a, b) in enumerate(zip(whole.shape, part.shape)) if a != b]
        if whole.dim() == part.dim()
        else []
    )
    is_time = len(axes) == 1 and part.shape[axes[0]] == 1 and whole.shape[axes[0]] == time_steps
    return axes[0] if is_time else None
