"""Where it pays to launch fewer operators: a CUDA device works ahead of Python, and waits for launches where tensors are small."""

from __future__ import annotations

from torch import Tensor

__all__ = ["pays_off"]

DEVICES = frozenset({"cuda"})


def pays_off(tensor: Tensor) -> bool:
    """Whether an operator less on ``tensor`` is worth the Python that it takes."""
    return tensor.device.type in DEVICES
