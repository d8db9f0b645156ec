"""Whether a CUDA graph is being captured: what is decided meanwhile is decided for every replay."""

from __future__ import annotations

import torch

__all__ = ["capturing"]


def capturing() -> bool:
    """Whether the current stream of the current CUDA device is recorded into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
