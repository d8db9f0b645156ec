"""The neurons' states over a pass through time: reset before it, put back after a failure, lean within it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from sltt_ext.neuron import SLTTNeuron, StatefulModule

__all__ = ["all_or_nothing", "carrying_charged", "reset"]


def reset(neurons: Sequence[StatefulModule]) -> None:
    """Put all states back to rest."""
    for neuron in neurons:
        neuron.reset_state()


@contextmanager
def all_or_nothing(net: nn.Module, reset: Callable[[], Any]) -> Iterator[None]:
    """Put gradients and state back if anything goes wrong; out-of-memory and Ctrl-C included."""
    before = [
        (parameter, None if parameter.grad is None else parameter.grad.clone())
        for parameter in net.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    except BaseException:
        for parameter, grad in before:
            if grad is None or parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad.copy_(grad)
        reset()
        raise


@contextmanager
def carrying_charged(modules: Sequence[StatefulModule]) -> Iterator[None]:
    """One tensor a neuron from step to step, where its backward reads what it carries."""
    neurons = [module for module in modules if isinstance(module, SLTTNeuron)]
    for neuron in neurons:
        neuron.carry_charged(True)
    try:
        yield
    except BaseException:
        reset(modules)  # a state that settles needs memory, which may be what has run out
        raise
    finally:
        for neuron in neurons:
            neuron.carry_charged(False)
