"""What a backend is: kernels for fused neurons, and the answers to what it can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Backend", "FusedNeuron", "KernelsOf"]

Kernels = TypeVar("Kernels")


class FusedNeuron(Generic[Kernels]):
    """A kind of neurons that backends have kernels for; ``Kernels`` is the protocol these satisfy.

    Attributes:
        name: What errors call them.
    """

    def __init__(self, name: str) -> None:
        self.name = name


KernelsOf = Mapping[FusedNeuron[Any], Any]


class Backend(Protocol):
    """A way to run fused neurons; all questions about what it can run are asked here.

    Attributes:
        name: What users call it.
        kernels: Its kernels for each kind of neurons that it runs.
    """

    name: ClassVar[str]
    kernels: ClassVar[KernelsOf]

    def problem(self, device: torch.device | None = None) -> str | None:
        """Why it cannot be used on this machine, or on one of its devices, and what to do; None if it can."""
        return None

    def is_default_for(self, x: Tensor) -> bool:
        """Whether ``"auto"`` takes it for ``x`` where there is no problem with it."""
        return False

    def check_input(self, x: Tensor) -> None:
        """Nothing if it takes input currents like ``x``.

        Raises:
            BackendError: If it cannot run on the device of ``x``.
            InputError: If it does not compute in the dtype of ``x``.
        """
        return None

    def runs_itself(self, x: Tensor, registered: bool) -> bool:
        """Whether it runs ``x``, or leaves that to PyTorch's operators, as where nothing is computed.

        Args:
            x: Input currents.
            registered: Whether a registered operator asks, inside of a network that is compiled itself.
        """
        return True
