"""The network that is measured, which of its modules are neurons, and which module is running."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sltt_ext.neuron import SLTTNeuron

__all__ = ["neurons_of", "running_module", "without_multi_step"]


def without_multi_step(net: nn.Module) -> nn.Module:
    """The network inside a `sltt_ext.snntorch.MultiStep`, which BPTT cannot run, or ``net`` itself."""
    room = sys.modules.get("sltt_ext.snntorch.multi_step")
    if room is not None and isinstance(net, room.MultiStep):
        inner: nn.Module = net.net
        return inner
    return net


@contextmanager
def running_module(net: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Yields a function that returns the path of the innermost module whose forward is running; None outside."""
    stack: list[str] = []

    def entered(path: str) -> Any:
        return lambda module, args: stack.append(path)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = []
    for path, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(entered(path), prepend=True))
        handles.append(module.register_forward_hook(left, always_call=True))
    try:
        yield lambda: stack[-1] if stack else None
    finally:
        for handle in handles:
            handle.remove()


def neurons_of(net: nn.Module) -> dict[str, nn.Module]:
    """The neurons of a converted network by path. A module that contains neurons does not count as a neuron."""
    return {
        path: module
        for path, module in net.named_modules()
        if _is_neuron(module)
        and not any(_is_neuron(child) for child in module.modules() if child is not module)
    }


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, SLTTNeuron) and module.fires
