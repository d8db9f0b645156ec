"""snnTorch's Leaky neuron: what a backend is told of a layer of them, and what it has to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from sltt_ext.kernels.backend import FusedNeuron
from sltt_ext.surrogate import Surrogate

__all__ = ["LEAKY", "LeakyKernels", "LeakySettings"]


class LeakySettings(NamedTuple):
    """All that a layer of Leaky neurons is told, but for its tensors.

    Attributes:
        reset_mechanism: ``"subtract"``, ``"zero"`` or ``"none"``.
        reset_delay: Whether the reset happens in the next step.
        through_time: The gradient flows through the carried potentials, and to the initial one.
        surrogate: Surrogate gradient of the spike.
    """

    reset_mechanism: str
    reset_delay: bool
    through_time: bool
    surrogate: Surrogate

    @property
    def resets_in_step(self) -> bool:
        """Whether the potential a step ends with differs from the one it fired with."""
        return not self.reset_delay and self.reset_mechanism != "none"


class LeakyKernels(Protocol):
    """How a backend runs these neurons, forward and backward."""

    def forward(
        self,
        x_seq: Tensor,
        mem: Tensor,
        beta: Tensor,
        threshold: Tensor,
        settings: LeakySettings,
        return_mem_seq: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all steps, in snnTorch's own order of operations.

        Args:
            x_seq: Input currents ``[T, N, ...]``.
            mem: Initial membrane potential ``[N, ...]``.
            beta: Decay, which broadcasts to one step.
            threshold: Firing threshold, which broadcasts to one step.
            settings: The layer's.
            return_mem_seq: Whether to return the potentials of all steps.
            save: Whether backward will be called.

        Returns:
            Spikes ``[T, N, ...]``; membrane potentials, those of all steps ``[T, N, ...]`` or the last
            ``[N, ...]``; and what backward needs, charged potentials ``[T, N, ...]`` (empty if nothing is
            needed, or if they are the returned ``[T, N, ...]``). None is a view of another, of ``x_seq`` or ``mem``.
        """
        ...

    def backward(
        self,
        grad_s_seq: Tensor | None,
        grad_mem: Tensor | None,
        h_seq: Tensor,
        mem: Tensor | None,
        threshold: Tensor,
        settings: LeakySettings,
        beta_shape: Sequence[int] | None,
        learn_threshold: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``x_seq`` ``[T, N, ...]``, of beta and of the threshold (empty where not learned).

        Args:
            grad_s_seq: Gradient of the spikes ``[T, N, ...]``.
            grad_mem: Gradient of the membrane potentials: of all steps ``[T, N, ...]``, or of the last
                ``[1, N, ...]``.
            h_seq: Charged potentials ``[T, N, ...]``.
            mem: Initial membrane potential ``[N, ...]``; only needed if something is learned or
                the reset is not delayed.
            threshold: Firing threshold.
            settings: The layer's.
            beta_shape: Shape of beta if it is learned.
            learn_threshold: Whether the threshold is learned.
        """
        ...

    def backward_through_time(
        self,
        grad_s_seq: Tensor | None,
        grad_mem: Tensor | None,
        h_seq: Tensor,
        mem: Tensor | None,
        beta: Tensor,
        threshold: Tensor,
        settings: LeakySettings,
        learn_beta: bool,
        learn_threshold: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of ``x_seq``, of beta, of the threshold, and of the initial potential ``[N, ...]``.

        It walks from the last step to the first. What is not learned has an empty gradient.

        Args:
            grad_s_seq: Gradient of the spikes ``[T, N, ...]``.
            grad_mem: Gradient of the membrane potentials, as in `backward`.
            h_seq: Charged potentials ``[T, N, ...]``.
            mem: Initial membrane potential ``[N, ...]``; only needed if something is learned, the reset is not
                delayed, or it is to zero.
            beta: Decay.
            threshold: Firing threshold.
            settings: The layer's.
            learn_beta: Whether beta is learned.
            learn_threshold: Whether the threshold is learned.
        """
        ...


LEAKY: FusedNeuron[LeakyKernels] = FusedNeuron("snnTorch's Leaky")
