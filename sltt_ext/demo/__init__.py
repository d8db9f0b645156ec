"""`sltt demo`: one network, one data set, trained with BPTT, SLTT and SLTT-K, side by side."""

from sltt_ext.demo.run import run_demo
from sltt_ext.demo.training import METHODS, DemoSettings, MethodResult

__all__ = ["METHODS", "DemoSettings", "MethodResult", "run_demo"]
