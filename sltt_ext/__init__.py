"""sltt-ext: Spatial Learning Through Time for SpikingJelly and snnTorch networks."""

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
