"""Measure what SLTT does to a network."""

from sltt_ext.analysis.activity import dead_neurons, firing_rates
from sltt_ext.analysis.credit import temporal_credit
from sltt_ext.analysis.draws import drawn_steps
from sltt_ext.analysis.memory import ActivationMeter, peak_activation_bytes
from sltt_ext.analysis.memory_profile import memory_profile
from sltt_ext.analysis.operations import operation_counts
from sltt_ext.analysis.similarity import gradient_similarity

__all__ = [
    "ActivationMeter",
    "dead_neurons",
    "drawn_steps",
    "firing_rates",
    "gradient_similarity",
    "memory_profile",
    "operation_counts",
    "peak_activation_bytes",
    "temporal_credit",
]
