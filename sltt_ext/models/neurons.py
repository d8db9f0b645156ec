"""The neuron of the paper's experiments, and how a network makes its neurons."""

from __future__ import annotations

from collections.abc import Callable

from spikingjelly.activation_based import surrogate
from torch import nn

from sltt_ext.conversion import convert, is_converted
from sltt_ext.errors import ConfigurationError
from sltt_ext.spikingjelly import SLTTLIFNode

__all__ = ["Neuron", "new_neuron", "paper_lif", "with_converted_dropout"]

Neuron = Callable[[], nn.Module]
"""A neuron class of SpikingJelly, or a function without arguments that makes a neuron."""


def paper_lif() -> nn.Module:
    """The LIF neuron of the paper's experiments, with SLTT's gradient.

    It has ``tau = 1.1``, ``V_th = 1``, a soft reset, no decay of the input, and the triangle surrogate, which is SpikingJelly's
    ``PiecewiseQuadratic`` with ``alpha = 1`` (Meng et al. 2023, Sec. 5).
    """
    return SLTTLIFNode(
        tau=1.1,
        decay_input=False,
        v_threshold=1.0,
        v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
    )


def new_neuron(neuron: Neuron) -> nn.Module:
    """A new neuron for one place in a network.

    Raises:
        ConfigurationError: If ``neuron`` does not make one.
    """
    made = neuron() if callable(neuron) and not isinstance(neuron, nn.Module) else neuron
    if made is neuron or not isinstance(made, nn.Module):
        raise ConfigurationError(
            "neuron must be a neuron class, or a function that makes a new neuron at each call, such as "
            f"partial(LIFNode, tau=2.0); got {neuron!r}"
        )
    return made


def with_converted_dropout(net: nn.Module) -> None:
    """In a network of SLTT neurons, make the time loop also reset dropout's mask, which is a state."""
    if is_converted(net):
        convert(net)
