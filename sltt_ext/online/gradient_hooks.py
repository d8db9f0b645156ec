"""Hooks on gradients: a hook on the gradient of a tensor sees how often it comes, and from how many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["gradient_hooks", "has_gradient_hooks", "is_own", "own"]

Hook = TypeVar("Hook", bound=Callable[..., Any])
_OWN = "_sltt_own"


def own(hook: Hook) -> Hook:
    """Mark a hook of this package, which changes no gradient, and may be called once for several steps."""
    setattr(hook, _OWN, True)
    return hook


def is_own(hook: Any) -> bool:
    """Whether a hook is marked so."""
    return bool(getattr(hook, _OWN, False))


def gradient_hooks(tensor: Tensor) -> int:
    """How many of the user's wait for the gradient of ``tensor``; ``retain_grad`` is one of them."""
    hooks = [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]
    return sum(not is_own(hook) for hook in hooks) + (tensor.retains_grad and not tensor.is_leaf)


def has_gradient_hooks(net: nn.Module) -> bool:
    """Whether a module or a parameter of ``net`` has a hook on its gradient."""
    modules = (module._backward_hooks or module._backward_pre_hooks for module in net.modules())
    return any(modules) or any(map(gradient_hooks, net.parameters()))
