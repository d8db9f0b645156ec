"""Gradients that raise an error if they are differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltt_ext.errors import ConfigurationError

__all__ = ["differentiable_once"]

Backward = Callable[..., Any]


def differentiable_once(backward: Backward) -> Backward:
    """Decorate the ``backward`` of a `torch.autograd.Function`, so that a gradient of its gradients is an error.

    Unlike with `torch.autograd.function.once_differentiable`, it is an error even if the incoming gradients are constants,
    because the second derivative goes through the tensors that backward has saved.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # no create_graph=True
            return backward(ctx, *grads)
        with torch.no_grad():
            computed = backward(ctx, *grads)
        return tuple(
            _Refused.apply(grad.requires_grad_()) if isinstance(grad, Tensor) else grad for grad in computed
        )

    return once


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ConfigurationError(
            "the gradient of a fused neuron cannot be differentiated again (create_graph=True): give the neuron a "
            "surrogate function of your own, e.g. a subclass of SpikingJelly's or a function around snnTorch's, which "
            "runs by the generic rule; run a declared step with backend='torch'"
        )
