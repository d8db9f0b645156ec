"""SpikingJelly's layers that carry nothing from step to step, in both release lines."""

from __future__ import annotations

from spikingjelly.activation_based import layer

from sltt_ext.time_invariant import register_folding, register_time_invariant

__all__: list[str] = []

_DIMENSIONS = ("1d", "2d", "3d")
_KINDS = ("Conv", "ConvTranspose", "BatchNorm", "AvgPool", "MaxPool", "AdaptiveAvgPool")
_NAMES = [kind + dimension for kind in _KINDS for dimension in _DIMENSIONS]
_NAMES += ["Flatten", "GroupNorm", "Linear", "SeqToANNContainer", "Upsample", "WSConv2d", "WSLinear"]

register_time_invariant(*(getattr(layer, name) for name in _NAMES if hasattr(layer, name)))

register_folding(layer.SeqToANNContainer)
