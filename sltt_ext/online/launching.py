"""Where fewer launches pay off: Python works ahead of a CUDA device, but the device waits if tensors are small."""

from __future__ import annotations

from torch import Tensor

__all__ = ["pays_off"]

DEVICES = frozenset({"cuda"})


def pays_off(tensor: Tensor) -> bool:
    """Whether an operator less on ``tensor`` is worth the Python that it takes."""
    return tensor.device.type in DEVICES
