r"""The neurons of SpikingJelly 0.0.0.0.12, with their arguments in their order.

A step charges, fires and resets. With ``v_rest = v_reset`` (0 for a soft reset)::

    IF                      h = v + x
    LIF, decay_input        h = v + (x - (v - v_rest)) / tau
    LIF, not decay_input    h = v - (v - v_rest) / tau + x
    parametric LIF          the same, with sigmoid(w) for 1 / tau
    QIF                     h = v + (x + a0 (v - v_rest) (v - v_c)) / tau
    EIF                     h = v + (x + v_rest - v + delta_T exp((v - theta_rh) / delta_T)) / tau

    s = H(h - v_threshold)
    v = h - v_threshold s              soft reset (v_reset=None)
    v = (1 - s) h + s v_reset          hard reset

The ``MultiStep...`` neurons take sequences ``[T, N, ...]``, and keep the potentials of all steps in ``v_seq``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.clock_driven import surrogate
from sltt_ext.clock_driven.base import MemoryModule
from sltt_ext.errors import ConfigurationError

__all__ = [
    "BaseNode", "EIFNode", "IFNode", "LIAFNode", "LIFNode", "MultiStepEIFNode", "MultiStepIFNode", "MultiStepLIFNode",
    "MultiStepParametricLIFNode", "ParametricLIFNode", "QIFNode", "surrogate",
]  # fmt: skip

SurrogateFunction = Callable[[Tensor], Tensor]
_SIGMOID = surrogate.Sigmoid()


class BaseNode(MemoryModule):
    """A neuron; subclasses define ``neuronal_charge``, and what else of a step is another one's."""

    v: Any
    v_threshold: Any
    v_reset: Any

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("v_threshold", v_threshold), ("v_reset", 0.0 if v_reset is None else v_reset)):
            if not isinstance(value, (int, float, Tensor)):
                raise ConfigurationError(
                    f"{name} must be a number, got {value!r}: the arguments of {type(self).__name__} were in another order "
                    "before SpikingJelly 0.0.0.0.9; give them by name"
                )
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        self.register_memory("v_threshold", v_threshold)
        self.register_memory("v_reset", v_reset)
        self.detach_reset = detach_reset
        self.surrogate_function = surrogate_function

    def neuronal_charge(self, x: Tensor) -> None:
        """Make ``v`` the charged potential."""
        raise NotImplementedError

    def neuronal_fire(self) -> Tensor:
        """The spikes of the charged potential."""
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        """Make ``v`` what the spikes leave of it."""
        by = spike.detach() if self.detach_reset else spike
        if self.v_reset is None:
            self.v = self.v - by * self.v_threshold
        else:
            self.v = (1.0 - by) * self.v + by * self.v_reset

    def forward(self, x: Tensor) -> Tensor:
        """The spikes of one step."""
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike

    def extra_repr(self) -> str:
        """What the neuron is set to."""
        return f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}"


class IFNode(BaseNode):
    """Integrate-and-fire."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        cupy_fp32_inference: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.cupy_fp32_inference = cupy_fp32_inference

    def neuronal_charge(self, x: Tensor) -> None:
        """``h = v + x``."""
        self.v = self.v + x


class LIFNode(BaseNode):
    """Leaky integrate-and-fire."""

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        cupy_fp32_inference: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau = tau
        self.decay_input = decay_input
        self.cupy_fp32_inference = cupy_fp32_inference

    def neuronal_charge(self, x: Tensor) -> None:
        """Charge with a leak of ``1 / tau``."""
        away = self.v - self.v_reset if self.v_reset else self.v
        if self.decay_input:
            self.v = self.v + (x - away) / self.tau
        elif self.v_reset:
            self.v = self.v - away / self.tau + x
        else:
            self.v = self.v * (1.0 - 1.0 / self.tau) + x

    def extra_repr(self) -> str:
        """What the neuron is set to."""
        return f"{super().extra_repr()}, tau={self.tau}"


class ParametricLIFNode(BaseNode):
    """Leaky integrate-and-fire with a learnable leak."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.as_tensor(-math.log(init_tau - 1.0)))

    def neuronal_charge(self, x: Tensor) -> None:
        """Charge with a leak of ``sigmoid(w)``."""
        away = self.v - self.v_reset if self.v_reset else self.v
        if self.decay_input:
            self.v = self.v + (x - away) * self.w.sigmoid()
        elif self.v_reset:
            self.v = self.v - away * self.w.sigmoid() + x
        else:
            self.v = self.v * (1.0 - self.w.sigmoid()) + x


class QIFNode(BaseNode):
    """Quadratic integrate-and-fire."""

    def __init__(
        self,
        tau: float = 2.0,
        v_c: float = 0.8,
        a0: float = 1.0,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau, self.v_c, self.a0, self.v_rest = tau, v_c, a0, v_rest

    def neuronal_charge(self, x: Tensor) -> None:
        """Charge with a quadratic drive."""
        self.v = self.v + (x + self.a0 * (self.v - self.v_rest) * (self.v - self.v_c)) / self.tau


class EIFNode(BaseNode):
    """Exponential integrate-and-fire."""

    def __init__(
        self,
        tau: float = 2.0,
        delta_T: float = 1.0,  # noqa: N803  the name that code has
        theta_rh: float = 0.8,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau, self.delta_T, self.theta_rh, self.v_rest = tau, delta_T, theta_rh, v_rest

    def neuronal_charge(self, x: Tensor) -> None:
        """Charge with an exponential drive."""
        v = torch.as_tensor(self.v, device=x.device)
        self.v = (
            v
            + (x + self.v_rest - v + self.delta_T * torch.exp((v - self.theta_rh) / self.delta_T)) / self.tau
        )


class LIAFNode(LIFNode):
    """Leaky integrate, and pass on an activation of the potential instead of the spike."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], threshold_related: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.act, self.threshold_related = act, threshold_related

    def forward(self, x: Tensor) -> Tensor:
        """The activations of one step."""
        self.neuronal_charge(x)
        output = self.act(self.v - self.v_threshold if self.threshold_related else self.v)
        self.neuronal_reset(self.neuronal_fire())
        return output


class MultiStepBaseNode(BaseNode):
    """The step of the neuron that comes after it among the bases, for all steps of a sequence."""

    v_seq: Any

    def _take_sequences(self, backend: str) -> None:
        if backend not in ("torch", "cupy"):
            raise ConfigurationError(
                f"backend={backend!r} of the old neurons is not available here: use 'torch' or 'cupy'"
            )
        self.register_memory("v_seq", None)
        self.backend = backend

    def forward(self, x_seq: Tensor) -> Tensor:
        """The spikes of all steps ``[T, N, ...]``."""
        spikes, potentials = [], []
        for x in x_seq:
            spikes.append(super().forward(x))
            potentials.append(self.v)
        self.v_seq = torch.stack(potentials)
        return torch.stack(spikes)


class MultiStepIFNode(MultiStepBaseNode, IFNode):
    """`IFNode` for sequences."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        backend: str = "torch",
        lava_s_cale: int = 1 << 6,
    ) -> None:
        IFNode.__init__(self, v_threshold, v_reset, surrogate_function, detach_reset)
        self._take_sequences(backend)


class MultiStepLIFNode(MultiStepBaseNode, LIFNode):
    """`LIFNode` for sequences."""

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        backend: str = "torch",
        lava_s_cale: int = 1 << 6,
    ) -> None:
        LIFNode.__init__(self, tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)
        self._take_sequences(backend)


class MultiStepParametricLIFNode(MultiStepBaseNode, ParametricLIFNode):
    """`ParametricLIFNode` for sequences."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        backend: str = "torch",
    ) -> None:
        ParametricLIFNode.__init__(
            self, init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset
        )
        self._take_sequences(backend)


class MultiStepEIFNode(MultiStepBaseNode, EIFNode):
    """`EIFNode` for sequences."""

    def __init__(
        self,
        tau: float = 2.0,
        delta_T: float = 1.0,  # noqa: N803
        theta_rh: float = 0.8,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: SurrogateFunction = _SIGMOID,
        detach_reset: bool = False,
        backend: str = "torch",
    ) -> None:
        EIFNode.__init__(
            self, tau, delta_T, theta_rh, v_threshold, v_rest, v_reset, surrogate_function, detach_reset
        )
        self._take_sequences(backend)
