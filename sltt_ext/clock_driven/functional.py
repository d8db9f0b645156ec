"""The functions of SpikingJelly 0.0.0.0.12 that code calls on modules; others as the installed one has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.clock_driven.newer import newer

__all__ = ["multi_step_forward", "reset_net", "seq_to_ann_forward"]


def reset_net(net: nn.Module) -> None:
    """Put every state of a network back to rest."""
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()  # type: ignore[operator]


def _through(modules: Any, x: Tensor) -> Tensor:
    for module in modules if isinstance(modules, (list, tuple, nn.Sequential)) else [modules]:
        x = module(x)
    return x


def multi_step_forward(x_seq: Tensor, single_step_module: Any) -> Tensor:
    """A module, or several one after the other, called step by step."""
    return torch.stack([_through(single_step_module, x) for x in x_seq])


def seq_to_ann_forward(x_seq: Tensor, stateless_module: Any) -> Tensor:
    """A module without a state, or several, called once for all steps."""
    y = _through(stateless_module, x_seq.flatten(0, 1))
    return y.view(*x_seq.shape[:2], *y.shape[1:])


def __getattr__(name: str) -> Any:
    return newer("functional", name)
