"""What a newer SpikingJelly has under the same name."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["newer"]


def newer(room: str, name: str) -> Any:
    """The function or class ``name`` of `spikingjelly.activation_based`, for the ``__getattr__`` of a room here.

    Raises:
        AttributeError: If there is none.
    """
    if not name.startswith("__"):
        try:
            return getattr(importlib.import_module(f"spikingjelly.activation_based.{room}"), name)
        except ModuleNotFoundError:
            pass  # only the old package is installed, which is used as it is
    raise AttributeError(f"module 'spikingjelly.clock_driven.{room}' has no attribute {name!r}")
