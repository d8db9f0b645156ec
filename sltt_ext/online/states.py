"""The neurons' states over a pass through time: reset before it, constant after each call, and lean within it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from sltt_ext.forwards import Replacements
from sltt_ext.neuron import SLTTNeuron, StatefulModule

__all__ = ["all_or_nothing", "begin", "carry_charged", "detach", "keep_charged", "one_call", "reset"]


def reset(neurons: Sequence[StatefulModule]) -> None:
    """Put all states back to rest."""
    for neuron in neurons:
        neuron.reset_state()


def all_or_nothing(leaves: Iterable[Tensor], reset: Callable[[], Any]) -> Replacements:
    """A block that puts the gradients of ``leaves``, and states, back if anything goes wrong; out-of-memory and Ctrl-C included.

    To be entered twice.
    """
    block = Replacements()
    block.if_cut_short(reset)
    for leaf in leaves:
        if leaf.requires_grad and leaf.is_leaf:
            block.if_cut_short(partial(_put_back, leaf, None if leaf.grad is None else leaf.grad.clone()))
    return block


def _put_back(leaf: Tensor, grad: Tensor | None) -> None:
    if grad is None or leaf.grad is None:
        leaf.grad = grad
    else:
        leaf.grad.copy_(grad)


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


def begin(modules: Sequence[StatefulModule], replaced: Replacements, from_rest: bool) -> None:
    """Put all states to rest, if what follows begins there, and if it is cut short: what settles may have no memory to.

    What neurons are told of calls is forgotten at the end, also where an interrupt keeps `one_call` from it.
    """
    replaced.if_cut_short(partial(reset, modules))
    for module in modules:
        if isinstance(module, SLTTNeuron):
            replaced.at_end(partial(module.tell_steps, module.told_steps))
    if from_rest:
        reset(modules)


def carry_charged(modules: Sequence[StatefulModule], replaced: Replacements) -> None:
    """One tensor a neuron from step to step, where its backward reads what it carries."""
    for module in modules:
        if isinstance(module, SLTTNeuron):
            replaced.at_end(partial(module.carry_charged, False))
            module.carry_charged(True)


def keep_charged(modules: Sequence[StatefulModule]) -> None:
    """From here on, and up to the end of the pass, no step writes over what another has left: a graph may have saved it."""
    for module in modules:
        if isinstance(module, SLTTNeuron):
            module.keep_charged()
