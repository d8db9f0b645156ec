"""What the installed SpikingJelly has under the same name."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["newer"]

_PACKAGES = ("spikingjelly.activation_based", "spikingjelly.clock_driven")


def newer(room: str, name: str) -> Any:
    """The function or class ``name`` of the installed package's ``room``, for the ``__getattr__`` of a room here.

    Raises:
        AttributeError: If there is none.
    """
    for package in () if name.startswith("__") else _PACKAGES:
        try:
            installed = importlib.import_module(f"{package}.{room}")
        except ModuleNotFoundError:
            continue  # only the old package is there
        if not installed.__name__.startswith("sltt_ext.") and hasattr(installed, name):
            return getattr(installed, name)
    raise AttributeError(f"module 'spikingjelly.clock_driven.{room}' has no attribute {name!r}")
