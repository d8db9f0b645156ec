"""Whether a CUDA graph is being captured: a decision made during the capture holds for every replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["capturing", "recording"]

_RECORDING: list[bool] = []


def capturing() -> bool:
    """Whether the current stream of the current CUDA device is recorded into a graph, or a trainer records an iteration."""
    return bool(_RECORDING) or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextmanager
def recording() -> Iterator[None]:
    """Say that an iteration is recorded, on whatever device."""
    _RECORDING.append(True)
    try:
        yield
    finally:
        _RECORDING.pop()
