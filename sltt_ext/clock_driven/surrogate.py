"""The base classes of SpikingJelly 0.0.0.0.12's surrogate functions, for those of one's own; the functions as the newer ones are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sltt_ext.clock_driven.newer import newer

__all__ = ["MultiArgsSurrogateFunctionBase", "SurrogateFunctionBase", "heaviside"]


def heaviside(x: Tensor) -> Tensor:
    """One where ``x`` is not negative, zero elsewhere."""
    return (x >= 0).to(x)


class MultiArgsSurrogateFunctionBase(nn.Module):
    """A surrogate function with parameters of its own."""

    def __init__(self, spiking: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.spiking = spiking

    def set_spiking_mode(self, spiking: bool) -> None:
        """Whether it fires, or returns the function whose derivative it has."""
        self.spiking = spiking


class SurrogateFunctionBase(MultiArgsSurrogateFunctionBase):
    """A surrogate function with the parameter ``alpha``: subclasses define what it computes in either mode."""

    def __init__(self, alpha: float, spiking: bool = True) -> None:
        super().__init__(spiking)
        self.alpha = alpha

    @staticmethod
    def spiking_function(x: Tensor, alpha: float) -> Tensor:
        """Spikes, with a surrogate gradient."""
        raise NotImplementedError

    @staticmethod
    def primitive_function(x: Tensor, alpha: float) -> Tensor:
        """The function whose derivative that is."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Spikes, or the function itself outside of spiking mode."""
        return (self.spiking_function if self.spiking else self.primitive_function)(x, self.alpha)

    def extra_repr(self) -> str:
        """What the function is set to."""
        return f"alpha={self.alpha}, spiking={self.spiking}"


def __getattr__(name: str) -> Any:
    return newer("surrogate", name)
