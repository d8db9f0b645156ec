"""How the fused operators run, and which backend runs them."""

from sltt_ext.kernels.selection import BACKENDS, check_backend, default_backend, is_compiled, select_kernels

__all__ = ["BACKENDS", "check_backend", "default_backend", "is_compiled", "select_kernels"]
