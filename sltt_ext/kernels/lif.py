"""IF, LIF and parametric LIF neurons: what a backend is told of a layer of them, and what it has to do."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sltt_ext.kernels.backend import FusedNeuron
from sltt_ext.surrogate import Surrogate

__all__ = ["LIF", "LIFKernels", "LIFSettings"]


class LIFSettings(NamedTuple):
    """All that a layer of IF, LIF or parametric LIF neurons is told, but for its tensors.

    Attributes:
        tau: Membrane time constant; None where there is no leak, or a learnable decay.
        decay_input: Whether the input current decays with the potential.
        factored_leak: Compute the leak as ``v (1 - d)``.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike, or None for a soft reset.
        detach_reset: Leave the reset out of the gradient of the states.
        charged: The final state is the charged potential, and so is a tensor to start from: it is reset on entry.
        through_time: The gradient flows through the carried state, and to the initial one; not where it is charged.
        surrogate: Surrogate gradient of the spike.
    """

    tau: float | None
    decay_input: bool
    factored_leak: bool
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    charged: bool
    through_time: bool
    surrogate: Surrogate

    @property
    def input_scale(self) -> float:
        """``dh/dx``, but for a learnable decay."""
        return 1 / self.tau if self.tau is not None and self.decay_input else 1.0

    @property
    def kept(self) -> float:
        """``dh/dv``, but for a learnable decay."""
        return 1.0 if self.tau is None else 1 - 1 / self.tau


class LIFKernels(Protocol):
    """How a backend runs these neurons, forward and backward."""

    def forward(
        self,
        x_seq: Tensor,
        v: Tensor | float,
        decay: Tensor | None,
        settings: LIFSettings,
        save: bool,
        save_slope: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run all steps.

        Args:
            x_seq: Input currents ``[T, N, ...]``.
            v: Initial state ``[N, ...]``, or one number for all neurons, which is never reset on entry.
            decay: The learnable decay, a tensor of one element without a dimension.
            settings: The layer's.
            save: Whether backward will be called.
            save_slope: Whether backward has to find the gradient of the decay.
            overwrite: The final state may be written into ``v``, where it is charged on both ends.

        Returns:
            Spikes ``[T, N, ...]``, final state ``[N, ...]``, and what backward needs: local derivatives
            ``[T - 1, N, ...]``, the last charged potential ``[N, ...]`` and ``dh/ddecay`` ``[T, N, ...]``
            (each empty where it is not needed, or is the final state). For a gradient through time there are no
            derivatives but all charged potentials ``[T, N, ...]``. None is a view of another, of ``x_seq``, or,
            without ``overwrite``, of ``v``.
        """
        ...

    def backward(
        self,
        grad_s_seq: Tensor | None,
        grad_v: Tensor | None,
        derivatives: Tensor,
        h: Tensor,
        slopes: Tensor,
        decay: Tensor | None,
        settings: LIFSettings,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``x_seq`` ``[T, N, ...]`` and of the decay (empty where it is not learned).

        No step depends on another.
        """
        ...

    def backward_through_time(
        self,
        grad_s_seq: Tensor | None,
        grad_v: Tensor | None,
        h_seq: Tensor,
        slopes: Tensor,
        decay: Tensor | None,
        settings: LIFSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``x_seq``, of the decay (empty where it is not learned), and of the initial state ``[N, ...]``.

        It walks from the last step to the first.

        Args:
            grad_s_seq: Gradient of the spikes ``[T, N, ...]``.
            grad_v: Gradient of the final state ``[N, ...]``.
            h_seq: Charged potentials ``[T, N, ...]``.
            slopes: ``dh/ddecay`` ``[T, N, ...]``, or empty; always in the dtype of ``x_seq``.
            decay: The learnable decay.
            settings: The layer's.
        """
        ...


LIF: FusedNeuron[LIFKernels] = FusedNeuron("IF, LIF and parametric LIF neurons")
