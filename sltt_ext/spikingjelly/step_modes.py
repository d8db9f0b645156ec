"""SpikingJelly's layers and neurons that take single steps and sequences alike, in both release lines."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import layer, neuron

from sltt_ext.step_modes import register_step_modes

__all__: list[str] = []

_DIMENSIONS = ("1d", "2d", "3d")
_KINDS = ("Conv", "ConvTranspose", "BatchNorm", "AvgPool", "MaxPool", "AdaptiveAvgPool")
_LAYERS = [kind + dimension for kind in _KINDS for dimension in _DIMENSIONS]
_LAYERS += ["Flatten", "GroupNorm", "Linear", "Upsample", "WSConv2d", "WSLinear"]
_NEURONS = ("IFNode", "LIFNode", "ParametricLIFNode", "SLTTLIFNode")
_RECORDS = ("store_v_seq", "store_state_seqs")


def _takes_both(module: Any) -> bool:
    """Whether it is set to single steps, and keeps no record of a sequence."""
    records = any(getattr(module, name, False) for name in _RECORDS)
    return vars(module).get("_step_mode", "s") == "s" and not records and "m" in module.supported_step_mode()


def _flattens_samples(module: Any) -> bool:
    """Whether a flattening keeps the batch."""
    return _takes_both(module) and getattr(module, "start_dim", 1) == 1


for _names, _room in ((_LAYERS, layer), (_NEURONS, neuron)):
    for _name in _names:
        if hasattr(_room, _name):
            register_step_modes(
                "_step_mode",
                "m",
                _flattens_samples if _name == "Flatten" else _takes_both,
                getattr(_room, _name),
            )
