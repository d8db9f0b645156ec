"""Leaves that stand in for the tensors that a network is given from outside, so that a separate pass gathers their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from sltt_ext.neuron import SLTTNeuron, StatefulModule
from sltt_ext.online.gradient_hooks import own
from sltt_ext.online.passes import Pass, SpeedUp

__all__ = ["StandIns", "is_leaf", "outer_tensors"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def outer_tensors(net: nn.Module) -> list[Tensor]:
    """Everything that ``net`` holds and that wants a gradient: parameters, and tensors computed before it is called."""
    found = {id(tensor): tensor for _, _, tensor in _places(net)}
    return list(found.values())


def is_leaf(tensor: Tensor) -> bool:
    """Whether a tensor was not computed; torch refuses to tell of a view without gradients whose base has changed."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


class StandIns(SpeedUp):
    """A leaf of the same memory in the place of each tensor.

    The gradient of a pass is gathered by the leaves. Hooks on the tensors' own gradients, and wrappers that wait for
    them, see the one sum that autograd hands on.

    Args:
        net: The network that reads the tensors.
        tensors: The tensors.
        guard: Called with each gradient that comes to a leaf.
    """

    def __init__(
        self, net: nn.Module, tensors: Iterable[Tensor], guard: Callable[[Tensor], None] | None = None
    ) -> None:
        self._net = net
        self._leaves = {id(tensor): _leaf(tensor) for tensor in tensors}
        if guard is not None:
            for leaf in self._leaves.values():
                leaf.register_hook(own(guard))

    def of(self, tensor: Any) -> Any:
        """What stands in for a tensor; anything else is returned as it is."""
        return self._leaves.get(id(tensor), tensor)

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Have the network read the leaves."""
        for store, name, tensor in _places(self._net):
            leaf = self._leaves.get(id(tensor))
            if leaf is not None and one.again:
                one.replaced.entry(store, name, leaf)
            elif leaf is not None:
                one.replaced.at_end(partial(_give_back, store, name, leaf, tensor))
                store[name] = leaf
        yield

    def sums(self) -> list[Tensor]:
        """By which to see whether the leaves are written to."""
        plain = [leaf for leaf in self._leaves.values() if type(leaf) in (Tensor, nn.Parameter)]
        return [leaf.detach().sum().nan_to_num() for leaf in plain]

    def forget_gradients(self) -> None:
        """Begin anew."""
        for leaf in self._leaves.values():
            leaf.grad = None

    def gradients(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of these tensors."""
        return [self._leaves[id(tensor)].grad for tensor in tensors]


def _give_back(store: dict[str, Any], name: str, leaf: Tensor, tensor: Tensor) -> None:
    """Put the tensor back, unless the network has computed another one."""
    if store.get(name) is leaf:
        store[name] = tensor


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        leaf = nn.Parameter(leaf)
        vars(leaf).update(vars(tensor))
    return leaf.requires_grad_()


def _places(net: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where ``net`` holds tensors that want a gradient, and are not what a step has left."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                yield module._parameters, name, parameter
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        for store in (module._buffers, own):
            for name, value in store.items():
                if isinstance(value, Tensor) and value.requires_grad and not _is_left(module, value):
                    yield (vars(module) if store is own else module._buffers), name, value


def _is_left(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor is the state of a module, which an earlier step has left."""
    if isinstance(module, SLTTNeuron):
        return module._has_left(tensor)
    return isinstance(module, StatefulModule)
