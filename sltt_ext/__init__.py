"""sltt-ext: Spatial Learning Through Time for SpikingJelly and snnTorch networks."""

from __future__ import annotations

import importlib
from types import ModuleType

from sltt_ext.conversion import convert, is_converted, revert
from sltt_ext.declared import declare_neuron
from sltt_ext.errors import ConversionError, SLTTError
from sltt_ext.module_over_time import over_time
from sltt_ext.online import CrossEntropyMSELoss, OnlineResult, OnlineTrainer

__version__ = "0.2.0"

__all__ = [
    "ConversionError",
    "CrossEntropyMSELoss",
    "OnlineResult",
    "OnlineTrainer",
    "SLTTError",
    "convert",
    "declare_neuron",
    "is_converted",
    "over_time",
    "revert",
]

_ROOMS = ("analysis", "bptt", "checkpoint", "data", "lightning", "models", "snntorch", "spikingjelly")


def __getattr__(name: str) -> ModuleType:
    """What needs more than torch is imported when it is first used, as in ``sltt_ext.snntorch.Stateful``."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
