"""The arguments of a network over time: several, positional or named, each a tensor or a structure of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.online.frames import Frames
from sltt_ext.online.structures import Rebuild, flatten

__all__ = ["Arguments", "TimeDims"]

TimeDims = int | None | Mapping[str, int | None]
_AS_IT_IS = "as it is"


class Arguments:
    """What a network is called with for a whole sequence.

    Args:
        net: The network.
        args: Positional arguments.
        kwargs: Named ones.
        time_dim: See `over_time`.

    Attributes:
        tensors: All tensors in them.
    """

    def __init__(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], time_dim: TimeDims
    ) -> None:
        names = _names(net)
        others = [f"argument {place}" for place in range(len(names) + 1, len(args) + 1)]
        self._named = {**dict(zip([*names, *others], args)), **kwargs}
        self._positional = len(args)
        self.tensors: list[Tensor] = []
        self._axes: list[Any] = []
        self._parts: list[tuple[int, int, Rebuild]] = []
        axes = self._axes_of(net, time_dim)
        self._arrays = [
            name
            for name, value in self._named.items()
            if type(value).__module__ == "numpy" and isinstance(axes.get(name), int)
        ]
        for name, value in self._named.items():
            tensors, rebuild = flatten(value)
            self._parts.append((len(self.tensors), len(self.tensors) + len(tensors), rebuild))
            self.tensors += tensors
            self._axes += [axes.get(name, _AS_IT_IS)] * len(tensors)

    def time_steps(self, time_steps: int | None) -> int:
        """T: what was said, or what the sequences have.

        Raises:
            InputError: If they have another number of steps than was said, or than one another, or there is none.
        """
        lengths = set()
        if self._arrays:
            name = self._arrays[0]
            raise InputError(
                f"{name} is a NumPy array, and over time: give a tensor, torch.from_numpy({name})"
            )
        for tensor, axis in zip(self.tensors, self._axes):
            if isinstance(axis, int):
                if tensor.dim() <= axis:
                    raise InputError(
                        f"time_dim={axis} needs [T, N, ...] (0) or [N, T, ...] (1), got shape {list(tensor.shape)}"
                    )
                lengths.add(tensor.shape[axis])
            elif axis is None and (tensor.dim() == 0 or 0 in tensor.shape):
                raise InputError(
                    f"an input is empty: shape {list(tensor.shape)}; skip empty batches (drop_last=True in the DataLoader)"
                )
        if len(lengths) > 1 or 0 in lengths:
            raise InputError(
                f"the inputs' axes of time have {sorted(lengths)} steps: give each the same number, 1 or more"
            )
        found = lengths.pop() if lengths else None
        steps = found if time_steps is None else time_steps
        if steps is None:
            raise InputError(
                "nothing says how many time steps there are: give time_steps=, or time_dim= where an input has an axis of time"
            )
        if found not in (None, steps):
            raise InputError(
                f"an input has {found} steps along its axis of time, and time_steps={time_steps}: leave time_steps out for "
                "sequences of any length, or say which axis is time (time_dim=)"
            )
        return steps

    def frames(self, tensors: Sequence[Tensor], keeps_axis: bool, repeats: bool) -> Frames:
        """The arguments of each call, with ``tensors`` in the place of `tensors`.

        A single positional tensor is a frame by itself.

        Args:
            tensors: The tensors to take frames of.
            keeps_axis: Whether a call gets sequences, also of one step.
            repeats: Whether what is shown at every step is given to it ``[C, N, ...]``.
        """
        takes = [_take(tensor, axis, keeps_axis, repeats) for tensor, axis in zip(tensors, self._axes)]
        if self.single:
            static = tensors[0] if self._axes[0] is None and repeats == keeps_axis else None
            return Frames(takes[0], static=static)

        def take(start: int, stop: int) -> Any:
            given = [one(start, stop) for one in takes]
            values = [rebuild(given[first:last]) for first, last, rebuild in self._parts]
            named = dict(zip(self._named, values))
            return values[: self._positional], {
                name: named[name] for name in list(self._named)[self._positional :]
            }

        return Frames(take)

    def twice(self) -> list[Tensor]:
        """The tensors, with two steps where there is one."""
        return [
            torch.cat([tensor, tensor], axis) if isinstance(axis, int) else tensor
            for tensor, axis in zip(self.tensors, self._axes)
        ]

    def some(self, tensors: Sequence[Tensor], samples: int) -> list[Tensor]:
        """``tensors`` in the place of `tensors`, with at most so many samples where they have the batch of the first one."""

        def batch(tensor: Tensor, axis: Any) -> int:
            return tensor.shape[int(axis == 0)] if tensor.dim() > int(axis == 0) else 0

        pairs = list(zip(tensors, self._axes))
        first = next((batch(*pair) for pair in pairs if pair[1] != _AS_IT_IS), 0)
        return [
            tensor.narrow(int(axis == 0), 0, samples) if batch(tensor, axis) == first > samples else tensor
            for tensor, axis in pairs
        ]

    @property
    def single(self) -> bool:
        """Whether all there is is one positional tensor."""
        return len(self.tensors) == len(self._named) == self._positional == 1 and isinstance(
            next(iter(self._named.values())), Tensor
        )

    def _axes_of(self, net: nn.Module, time_dim: TimeDims) -> dict[str, int | None]:
        """By name; one that is for all is that of forward's first parameter, in whatever order the call has them."""
        if not isinstance(time_dim, Mapping):
            first = [name for name in _names(net) if name in self._named]
            return dict.fromkeys([*first, *self._named][:1], time_dim)
        unknown = [name for name in time_dim if name not in self._named]
        if unknown:
            raise ConfigurationError(
                f"time_dim names {', '.join(unknown)}, and the network was called with {', '.join(self._named)}: use the names "
                "of forward's parameters"
            )
        return dict(time_dim)


def _take(tensor: Tensor, axis: Any, keeps_axis: bool, repeats: bool) -> Callable[[int, int], Tensor]:
    if axis == _AS_IT_IS or (axis is None and not repeats):
        return lambda start, stop: tensor
    if axis is None:
        return lambda start, stop: tensor.unsqueeze(0).expand(stop - start, *tensor.shape)
    if not keeps_axis:
        return lambda start, stop: tensor.select(axis, start)
    if not repeats:  # the network itself knows where its time is
        return lambda start, stop: tensor.narrow(axis, start, stop - start)
    return lambda start, stop: tensor.movedim(axis, 0)[start:stop]


def _names(net: nn.Module) -> list[str]:
    """Names of a forward's parameters."""
    try:
        parameters = list(inspect.signature(net.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not of Python tells nothing
        return []
    return [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
