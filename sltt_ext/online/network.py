"""What the time loop has to know of a network before it runs: its neurons, and how many steps a call may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from sltt_ext.errors import ConfigurationError, SLTTError
from sltt_ext.neuron import SLTTNeuron, StatefulModule

__all__ = ["goes_through_time", "neurons_of", "whole_sequences"]


def goes_through_time(modules: Iterable[Any]) -> bool:
    """Whether there are neurons whose gradient goes back through time, within a call."""
    return any(isinstance(module, SLTTNeuron) and module.through_time for module in modules)


def neurons_of(net: nn.Module, chunk: int = 1) -> tuple[list[StatefulModule], bool]:
    """The network's neurons, and whether the network takes sequences.

    Raises:
        SLTTError: If the network is not converted.
        ConfigurationError: If it takes single steps, and a call was to have more, though no gradient goes through them.
    """
    neurons: list[StatefulModule] = [module for module in net.modules() if isinstance(module, StatefulModule)]
    if not any(isinstance(neuron, SLTTNeuron) for neuron in neurons):
        raise SLTTError(f"{type(net).__name__} is not converted: call sltt_ext.convert(net) first")
    multi_step = any(neuron.multi_step for neuron in neurons)
    if chunk > 1 and not (multi_step or goes_through_time(neurons)):
        raise ConfigurationError(
            f"chunk={chunk} needs a multi-step network, and this one takes single steps: use chunk=1, or "
            "set the network to multi-step mode (SpikingJelly: functional.set_step_mode(net, 'm'); snnTorch: "
            "sltt_ext.snntorch.MultiStep(net))"
        )
    return neurons, multi_step


def whole_sequences(neurons: Sequence[StatefulModule], time_steps: int, chunk: int, selects: bool) -> bool:
    """Whether there are neurons that take their whole sequence in one call.

    Raises:
        ConfigurationError: If they cannot have it.
    """
    whole = [neuron for neuron in neurons if neuron.whole_sequence]
    if whole and (selects or chunk < time_steps):
        raise ConfigurationError(
            f"{type(whole[0]).__name__} takes its whole sequence in one call: use "
            f"chunk={time_steps} (time_steps), and neither k nor schedule"
        )
    return bool(whole)
