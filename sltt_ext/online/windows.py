"""Windows: a call of a single-step network that has several steps, in one graph.

A network that takes sequences gets C steps in one call. A network that takes single steps is called C times instead::

    frames of C steps -> [ net, net, ... net ] -> outputs [C, N, ...] -> one loss -> one backward

Neurons that go through time are told of all C steps, and pass their state with its graph from one step to the next. For all
other neurons each step is a call by itself, after which their state is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sltt_ext.errors import LossError
from sltt_ext.neuron import SLTTNeuron, StatefulModule
from sltt_ext.online.frames import Frames
from sltt_ext.online.states import detach, one_call

__all__ = ["each_frame", "each_step", "read_each"]


def each_frame(source: Frames) -> Frames:
    """The frames of the steps of a call in a list, from those of single steps."""

    def take(start: int, stop: int) -> list[Any]:
        return [source.take(t, t + 1) for t in range(start, stop)]

    return Frames(take, source.elements)


def each_step(neurons: Sequence[StatefulModule], run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``run``, which takes the frame of one step, as a function of those of several."""
    stepwise = [neuron for neuron in neurons if isinstance(neuron, SLTTNeuron) and not neuron.through_time]

    def run_all(frames: Sequence[Any]) -> list[Any]:
        returned = []
        for frame in frames:
            for neuron in stepwise:
                neuron.begin_step()
            with one_call(stepwise, 1):
                returned.append(run(frame))
            detach(
                stepwise
            )  # though they cut what they have left: a graph that is compiled cannot be asked for it
        return returned

    return run_all


def read_each(read: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """``read``, which takes what one step has returned, as a function of what several have.

    Raises:
        LossError: If the network returned other outputs at one step than at another.
    """

    def read_all(returned: Sequence[Any], steps: int) -> Any:
        leaves, structures = zip(*(tree_flatten(read(one, 1)) for one in returned))
        if any(structure != structures[0] for structure in structures):
            raise LossError(
                "the network returned other tensors at one step than at another: return the same outputs at every step"
            )
        joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*leaves)]
        return tree_unflatten(joined, structures[0])

    return read_all
