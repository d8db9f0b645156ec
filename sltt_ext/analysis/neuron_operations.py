"""How many scalar operations one neuron takes in one time step, from the equations of its dynamics.

A leaky integrate-and-fire neuron computes, and back-propagates with the surrogate derivative ``s'``::

    h[t] = leak v[t-1] + x[t]                    charge
    s[t] = H(h[t] - v_threshold)                 fire
    v[t] = h[t] - v_threshold s[t]               soft reset     (hard: v[t] = (1 - s[t]) h[t] + v_reset s[t])

    g[t] = dL/ds[t] s'(h[t] - v_threshold)       spatial
    dL/dv[t-1] = leak dL/dh[t]                   temporal: the leak,
    dL/ds[t] += -v_threshold dL/dv[t]            through the reset (not where it is detached),
    dL/dh[t] = g[t] + dL/dv[t]                   and the sum of both routes

The evaluation of the surrogate derivative is left out. Its cost depends on the surrogate, and both methods need it
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Count", "NeuronOperations", "neuron_operations"]


class Count(NamedTuple):
    """Scalar multiplications and additions (subtractions and comparisons with a threshold are additions)."""

    multiplications: int = 0
    additions: int = 0

    def __add__(self, other: Any) -> Count:
        return Count(self.multiplications + other[0], self.additions + other[1])

    def times(self, factor: int) -> Count:
        """The count, ``factor`` times."""
        return Count(self.multiplications * factor, self.additions * factor)


@dataclass(frozen=True)
class NeuronOperations:
    """Operations of one neuron in one time step.

    Attributes:
        forward_spatial: For its input and its spike.
        forward_temporal: For the state that it carries: leak and reset.
        backward_spatial: From its spike to its input, and to its own learnable parameters.
        backward_temporal: From the state that it passes on to the state with which it started; BPTT only.
        assumed: There is no formula for this neuron, and it was counted as a LIF neuron with soft reset.
    """

    forward_spatial: Count
    forward_temporal: Count
    backward_spatial: Count
    backward_temporal: Count
    assumed: bool = False


def neuron_operations(neuron: Any) -> NeuronOperations:
    """The operations of a converted neuron.

    There are formulas for SpikingJelly's IF, LIF and parametric LIF, for snnTorch's Leaky, and for subclasses that change
    only defaults. All of these run through the fused operator.
    """
    rules = {base.__name__ for base in type(neuron).__mro__}
    if "FusedNode" in rules:
        learned = "_FusedParametricLIF" in rules
        decay_input = "_FusedIF" not in rules and bool(neuron.decay_input)
        leak = 0 if "_FusedIF" in rules else 1
        reset = "subtract" if neuron.v_reset is None else "zero" if neuron.v_reset == 0 else "value"
        return _leaky(leak, decay_input, reset, bool(neuron.detach_reset), learned)
    if "FusedLeaky" in rules:
        learned = any(True for _ in neuron.parameters())
        return _leaky(1, False, neuron.reset_mechanism, True, learned)  # snnTorch detaches its reset
    known = _leaky(1, False, "subtract", False, False)
    return NeuronOperations(
        known.forward_spatial,
        known.forward_temporal,
        known.backward_spatial,
        known.backward_temporal,
        assumed=True,
    )


_RESET_FORWARD = {
    "none": Count(),
    "subtract": Count(1, 1),  # h - v_threshold s
    "zero": Count(1, 1),  # (1 - s) h
    "value": Count(2, 2),  # (1 - s) h + v_reset s
}
_RESET_BACKWARD = {
    "none": Count(),
    "subtract": Count(),  # dL/dh takes dL/dv as it is
    "zero": Count(1, 1),  # (1 - s) dL/dv
    "value": Count(1, 1),
}
_THROUGH_SPIKE = {
    "none": Count(),
    "subtract": Count(1, 1),  # dL/ds - v_threshold dL/dv
    "zero": Count(1, 1),  # dL/ds - h dL/dv
    "value": Count(1, 2),  # dL/ds + (v_reset - h) dL/dv
}


def _leaky(leak: int, decay_input: bool, reset: str, detach_reset: bool, learned: bool) -> NeuronOperations:
    own = Count(1, 1) if learned else Count()  # its term in the sum for the gradient of a learnable leak
    temporal = Count(leak, 1) + _RESET_BACKWARD[reset]
    return NeuronOperations(
        forward_spatial=Count(int(decay_input), 1),  # x / tau, and h - v_threshold
        forward_temporal=Count(leak, 1) + _RESET_FORWARD[reset],
        backward_spatial=Count(1 + int(decay_input), 0) + own,
        backward_temporal=temporal if detach_reset else temporal + _THROUGH_SPIKE[reset],
    )
