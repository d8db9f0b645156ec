"""Data sets that need no download."""

from sltt_ext.data.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
