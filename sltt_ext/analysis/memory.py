"""Peak activation memory of a training iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sltt_ext.online.gradient_hooks import own
from sltt_ext.online.memory import ActivationMeter

__all__ = ["ActivationMeter", "peak_activation_bytes"]


def peak_activation_bytes(run: Callable[[], Any], net: nn.Module | None = None) -> int:
    """The most activation bytes in use at the same time during ``run()``.

    Args:
        run: What to measure, e.g. one training iteration without the optimizer.
        net: The network being trained. A parameter's gradient counts while it is computed, but not after it is accumulated
            into ``.grad``.

    Examples:
        >>> import torch
        >>> net = torch.nn.Linear(8, 8)
        >>> peak_activation_bytes(lambda: net(torch.ones(100, 8)).sum().backward(), net) > 100 * 8 * 4
        True
    """
    meter = ActivationMeter()

    @own
    def accumulated(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.exclude(parameter.grad)

    parameters = [] if net is None else [p for p in net.parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(accumulated) for parameter in parameters]
    try:
        with meter:
            run()
        return meter.peak_bytes
    finally:
        for hook in hooks:
            hook.remove()
