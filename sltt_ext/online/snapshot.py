"""What a pass through time changes besides the neurons' states, so that it can run twice as if once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Snapshot", "without_modes"]

without_modes = torch._C._DisableTorchDispatch
"""A context without dispatch modes, entered and left in C: torch's own takes the modes off, and Ctrl-C may keep them off."""


class Snapshot:
    """A copy of a network's buffers and of the states of torch's random number generators it draws from.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in net.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
        with without_modes():  # real states also where the network runs on fake tensors
            self._random: Tensor = torch.get_rng_state()
            self._random_cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    @torch.no_grad()
    def restore(self) -> None:
        """Make buffers and generators what they were."""
        for module, name, buffer, value in self._buffers:
            buffer.data.copy_(value)  # unseen by autograd: a graph may need the buffer as it was
            module._buffers[name] = buffer
        with without_modes():
            torch.set_rng_state(self._random)
            for device, state in self._random_cuda.items():
                torch.cuda.set_rng_state(state, device)
