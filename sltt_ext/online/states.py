"""The neurons' states over a pass through time: reset before it, constant after each call, lean within it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sltt_ext.neuron import SLTTNeuron, StatefulModule

__all__ = ["all_or_nothing", "carrying_charged", "detach", "one_call", "reset"]


def reset(neurons: Sequence[StatefulModule]) -> None:
    """Put all states back to rest."""
    for neuron in neurons:
        neuron.reset_state()


@contextmanager
def all_or_nothing(leaves: Iterable[Tensor], reset: Callable[[], Any]) -> Iterator[None]:
    """Put the gradients of ``leaves``, and states, back if anything goes wrong; out-of-memory and Ctrl-C included."""
    before = [
        (leaf, None if leaf.grad is None else leaf.grad.clone())
        for leaf in leaves
        if leaf.requires_grad and leaf.is_leaf
    ]
    try:
        yield
    except BaseException:
        for leaf, grad in before:
            if grad is None or leaf.grad is None:
                leaf.grad = grad
            else:
                leaf.grad.copy_(grad)
        reset()
        raise


@contextmanager
def one_call(modules: Sequence[StatefulModule], steps: int) -> Iterator[None]:
    """Tell neurons that what they do in here is one call of the network, of so many steps, whose end is told by `detach`."""
    neurons = [module for module in modules if isinstance(module, SLTTNeuron)]
    before = [neuron.told_steps for neuron in neurons]
    try:
        for neuron in neurons:
            neuron.tell_steps(steps)
        yield
    finally:
        for neuron, told in zip(neurons, before):
            neuron.tell_steps(told)


def detach(modules: Sequence[StatefulModule]) -> None:
    """Make what a call has left a constant for the next one, and let go of its graph."""
    for module in modules:
        module.detach_state()


@contextmanager
def carrying_charged(modules: Sequence[StatefulModule]) -> Iterator[None]:
    """One tensor a neuron from step to step, where its backward reads what it carries."""
    neurons = [module for module in modules if isinstance(module, SLTTNeuron)]
    try:
        for neuron in neurons:
            neuron.carry_charged(True)
        yield
    except BaseException:
        reset(modules)  # a state that settles needs memory, which may be what has run out
        raise
    finally:
        for neuron in neurons:
            neuron.carry_charged(False)
