"""How a layer of LIF neurons computes."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LIFSettings"]


class LIFSettings(NamedTuple):
    """All that a layer of IF, LIF or parametric LIF neurons is told, but for its tensors.

    Attributes:
        tau: Membrane time constant; None where there is no leak, or a learnable decay.
        decay_input: Whether the input current decays with the potential.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike, or None for a soft reset.
        detach_reset: Leave the reset out of the final state's gradient.
        surrogate: Name of the surrogate gradient in `sltt_ext.surrogate`.
        parameters: Its parameters.
        factored_leak: Compute the leak as ``v (1 - d)``.
        charged_in: The initial state is the charged potential of the step before, which is reset on entry.
        charged_out: So is the final state, for the step after.
    """

    tau: float | None
    decay_input: bool
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate: str
    parameters: tuple[float, ...]
    factored_leak: bool = False
    charged_in: bool = False
    charged_out: bool = False

    @property
    def input_scale(self) -> float:
        """``dh/dx``, but for a learnable decay."""
        return 1 / self.tau if self.tau is not None and self.decay_input else 1.0
