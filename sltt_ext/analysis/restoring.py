"""Measurements that leave no trace in the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sltt_ext.online.snapshot import Snapshot

__all__ = ["restoring"]

_DEPTH = (
    3  # the attributes of a module, a dict among them (hooks, SpikingJelly's states), and a list in that dict
)


@contextmanager
def restoring(net: nn.Module) -> Iterator[None]:
    """At its end, the block undoes everything that happened to ``net`` inside, also after an exception.

    Its classes (converted or not), attributes, hooks, carried state, gradients and buffers are as before, and so are torch's
    random number generators. Inside, gradients are enabled and start as None, and hooks on accumulated gradients do not fire,
    because an optimizer may step in one. Values of parameters are not kept, because nothing in this package changes them.
    """
    snapshot = Snapshot(net)
    modules = [(module, type(module), _kept(vars(module), _DEPTH)) for module in net.modules()]
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    hooks = [(found, dict(found)) for p in net.parameters() if (found := p._post_accumulate_grad_hooks)]
    try:
        for firing, _ in hooks:
            firing.clear()
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, cls, attributes in modules:
            module.__class__ = cls
            _put_back(attributes)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for firing, before in hooks:
            firing.clear()
            firing.update(before)
        snapshot.restore()


def _kept(value: Any, depth: int) -> tuple[Any, Any]:
    """A value, and what is in it now if it is a container."""
    if depth and isinstance(value, dict):
        return value, {key: _kept(element, depth - 1) for key, element in value.items()}
    if depth and isinstance(value, list):
        return value, [_kept(element, depth - 1) for element in value]
    return value, None


def _put_back(kept: tuple[Any, Any]) -> Any:
    value, content = kept
    if isinstance(content, dict):
        before = {key: _put_back(element) for key, element in content.items()}
        value.clear()
        value.update(before)
    elif isinstance(content, list):
        value[:] = [_put_back(element) for element in content]
    return value
