"""The functional form of the fused multi-step neurons, over registered torch operators."""

from sltt_ext.functional.leaky import multi_step_leaky
from sltt_ext.functional.lif import multi_step_if, multi_step_lif, multi_step_plif

__all__ = ["multi_step_if", "multi_step_leaky", "multi_step_lif", "multi_step_plif"]
