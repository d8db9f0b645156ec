"""The neurons of `spikingjelly.cext`, older still: sequences only in part, and an arc tangent for a surrogate."""

from __future__ import annotations

from sltt_ext.clock_driven import neuron
from sltt_ext.errors import ConfigurationError

__all__ = ["IFNode", "LIFNode", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode"]

_SURROGATES = {"ATan": neuron.surrogate.ATan, "Sigmoid": neuron.surrogate.Sigmoid}


def _surrogate(name: str, alpha: float) -> neuron.SurrogateFunction:
    if name not in _SURROGATES:
        raise ConfigurationError(
            f"surrogate_function={name!r} of spikingjelly.cext is not available here: use one of {', '.join(_SURROGATES)}"
        )
    made: neuron.SurrogateFunction = _SURROGATES[name](alpha)
    return made


class IFNode(neuron.IFNode):
    """Integrate-and-fire."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str = "ATan",
        alpha: float = 2.0,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, _surrogate(surrogate_function, alpha), detach_reset)


class MultiStepIFNode(neuron.MultiStepIFNode):
    """Integrate-and-fire, for sequences."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str = "ATan",
        alpha: float = 2.0,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, _surrogate(surrogate_function, alpha), detach_reset)


class LIFNode(neuron.LIFNode):
    """Leaky integrate-and-fire."""

    def __init__(
        self,
        tau: float = 100.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str = "ATan",
        alpha: float = 2.0,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(tau, True, v_threshold, v_reset, _surrogate(surrogate_function, alpha), detach_reset)


class MultiStepLIFNode(neuron.MultiStepLIFNode):
    """Leaky integrate-and-fire, for sequences."""

    def __init__(
        self,
        tau: float = 100.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str = "ATan",
        alpha: float = 2.0,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(tau, True, v_threshold, v_reset, _surrogate(surrogate_function, alpha), detach_reset)


class MultiStepParametricLIFNode(neuron.MultiStepParametricLIFNode):
    """Leaky integrate-and-fire with a learnable leak, for sequences."""

    def __init__(
        self,
        init_tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str = "ATan",
        alpha: float = 2.0,
        detach_reset: bool = False,
    ) -> None:
        fires = _surrogate(surrogate_function, alpha)
        super().__init__(init_tau, True, v_threshold, v_reset, fires, detach_reset)
