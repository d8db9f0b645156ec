"""The fused multi-step neurons as functions, built on registered torch operators."""

from sltt_ext.functional.leaky import multi_step_leaky
from sltt_ext.functional.lif import after_reset, multi_step_if, multi_step_lif, multi_step_plif

__all__ = ["after_reset", "multi_step_if", "multi_step_leaky", "multi_step_lif", "multi_step_plif"]
