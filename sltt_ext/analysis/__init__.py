"""What SLTT does to a network, measured."""

from sltt_ext.analysis.memory import ActivationMeter, peak_activation_bytes

__all__ = ["ActivationMeter", "peak_activation_bytes"]
