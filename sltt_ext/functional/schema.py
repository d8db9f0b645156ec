"""A neuron's settings as the flat arguments of a registered operator, and back."""

from __future__ import annotations

from typing import Any, TypeVar

from sltt_ext.kernels.leaky import LeakySettings
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.surrogate import Surrogate

__all__ = ["flat", "packed"]

Settings = TypeVar("Settings", LIFSettings, LeakySettings)


def flat(settings: LIFSettings | LeakySettings) -> tuple[Any, ...]:
    """The fields. The last one, the surrogate, becomes its name and its parameters."""
    *before, surrogate = settings
    return (*before, surrogate.name, surrogate.parameters)


def packed(cls: type[Settings], *fields: Any) -> Settings:
    """The inverse of `flat`."""
    *before, name, parameters = fields
    return cls._make((*before, Surrogate(name, tuple(parameters))))
