"""The gradients of several steps, added up by one operator a step instead of one for each parameter.

Autograd adds the gradients of a backward pass to ``.grad``, one parameter after the other. Here ``.grad`` is set aside while
a backward pass runs, so that afterwards it holds only the gradient of this pass. Then all gradients are added at once to
those that were set aside. These are the same sums in the same order, to the last bit, in the same tensors.

Anyone who reads ``.grad`` while backward runs would see the difference: a hook on a module or a parameter, a hook where
autograd accumulates gradients (as wrappers of several processes have), a ``backward=`` or an ``on_step=``. In these cases the
time loop leaves gradients to autograd. A parameter is also left alone if it is not a plain tensor, or if something that was
evaluated once has read it, because backward then reaches it once more.

For this, all gradients of a step have to be in memory at once. So it is done for the smallest parameters first, up to a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from sltt_ext.online.gradient_hooks import gradient_hooks
from sltt_ext.online.launching import pays_off

__all__ = ["MOST_BYTES", "SummedGradients"]

MOST_BYTES = 64 * 2**20

_MARK = "sltt_ext: seen"
_PLAIN = (Tensor, nn.Parameter)


class SummedGradients:
    """Adds up the gradients of the calls of one pass.

    Args:
        net: The network, with no graph of its own that lives.
        left_alone: The ids of the tensors that backward may reach more than once in a call; asked at every call.
    """

    def __init__(self, net: nn.Module, left_alone: Callable[[], Collection[int]]) -> None:
        self._parameters = _smallest_first(net)
        self._left_alone = left_alone
        self._one: Tensor | None = None

    def backward(self, loss: Tensor) -> None:
        """What ``loss.backward()`` does."""
        with self._around_backward():
            loss.backward(self._gradient_of(loss))

    def _gradient_of(self, loss: Tensor) -> Tensor | None:
        """The gradient to begin with: 1, the same tensor at every step."""
        if type(loss) is not Tensor or not pays_off(loss):
            return None
        one = self._one
        if one is None or (one.dtype, one.device, one._version) != (loss.dtype, loss.device, 0):
            self._one = one = torch.ones_like(loss)
        return one

    @contextmanager
    def _around_backward(self) -> Iterator[None]:
        """Set gradients aside, and add to them what backward finds."""
        alone = self._left_alone() if self._parameters else ()
        aside = [
            (parameter, gradient)
            for parameter in self._parameters
            if type(gradient := parameter.grad) is Tensor
            and not gradient.requires_grad
            and id(parameter) not in alone
            and not gradient_hooks(parameter)
        ]
        try:
            for parameter, _ in aside:
                parameter.grad = None
            yield
            found = [(parameter, gradient, parameter.grad) for parameter, gradient in aside]
        finally:
            for parameter, gradient in aside:
                parameter.grad = gradient
        _add_up(found)


def _add_up(found: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Add to each parameter's gradient what backward has found of it."""
    lists: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, gradient, part in found:
        if part is None:
            continue
        if _are_alike(gradient, part):
            sums, parts = lists.setdefault((gradient.device, gradient.dtype), ([], []))
            sums.append(gradient)
            parts.append(part)
        else:
            torch.autograd.backward(parameter, part)  # adds it as autograd does, whatever it is
    for sums, parts in lists.values():
        torch._foreach_add_(sums, parts)


def _are_alike(gradient: Tensor, part: Tensor) -> bool:
    return (
        type(part) is Tensor
        and part.layout is gradient.layout is torch.strided
        and part.dtype is gradient.dtype
        and part.device == gradient.device
        and part.stride() == gradient.stride()
    )


def _smallest_first(net: nn.Module) -> list[Tensor]:
    """The parameters whose gradients nobody but autograd handles, as many as the bound allows."""
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        return []
    if any(module._backward_hooks or module._backward_pre_hooks for module in net.modules()):
        return []
    plain: list[Tensor] = [
        parameter
        for parameter in net.parameters()
        if type(parameter) in _PLAIN
        and parameter.requires_grad
        and parameter.is_leaf
        and pays_off(parameter)
        and not _is_waited_at(parameter)
    ]
    chosen: list[Tensor] = []
    size = 0
    for parameter in sorted(plain, key=lambda parameter: parameter.nbytes):
        size += parameter.nbytes
        if size > MOST_BYTES:
            break
        chosen.append(parameter)
    return chosen


def _is_waited_at(parameter: Tensor) -> bool:
    """Whether someone holds the node that adds gradients up, as who has a hook on it does."""
    _accumulator(parameter).metadata[_MARK] = True  # which goes with the node, unless it is held
    return _MARK in _accumulator(parameter).metadata


@torch.enable_grad()
def _accumulator(parameter: Tensor) -> Any:
    node = parameter.view_as(parameter).grad_fn
    assert node is not None
    return node.next_functions[0][0]
