"""The conditions of a pass other than its tensors, so that it can run again under the conditions of the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sltt_ext.errors import LossError

__all__ = ["Conditions"]


class Conditions:
    """Autocast, the modes of all modules, and their hooks, as they are now.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(parameter.device.type for parameter in net.parameters())})
            if torch.amp.is_autocast_available(kind)
        ]
        self._caches = torch.is_autocast_cache_enabled()
        self._modes = [(module, module.training) for module in net.modules()]
        self._hooks = _hooks(net)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have the network run under these conditions.

        Raises:
            LossError: If its hooks are others than they were.
        """
        for name, hooks in _hooks(self._net).items():
            if self._hooks.get(name) != hooks:
                raise LossError(
                    f"forward hooks of {name or 'the network'!r} were added or removed between forward and backward, which runs "
                    "the time steps again: call backward() first"
                )
        others = [
            (module, module.training) for module, training in self._modes if module.training != training
        ]
        with ExitStack() as contexts:
            for kind, enabled, dtype in self._autocast:
                contexts.enter_context(torch.autocast(kind, dtype, enabled, self._caches))
            try:
                for module, training in others:
                    module.training = not training
                yield
            finally:
                for module, training in others:
                    module.training = training


def _hooks(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """The forward hooks of each module, by path."""
    return {
        path: (*map(id, module._forward_pre_hooks.values()), *map(id, module._forward_hooks.values()))
        for path, module in net.named_modules()
    }
