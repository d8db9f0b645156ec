"""How the classes of `spikingjelly.clock_driven` are called, in the package and in its copies."""

from __future__ import annotations

from torch import nn

__all__ = ["FUSED", "LAYERS", "NEURONS", "base_of", "kind_of", "takes_sequences"]

FUSED = ("IFNode", "LIFNode", "ParametricLIFNode")
_STEPWISE = (*FUSED, "EIFNode", "QIFNode", "GeneralNode")
NEURONS = frozenset(
    {
        "BaseNode",
        "AdaptiveBaseNode",
        "MultiStepBaseNode",
        *_STEPWISE,
        *(f"MultiStep{name}" for name in _STEPWISE),
    }
    - {"MultiStepQIFNode"}
)
LAYERS = frozenset(
    {
        "Dropout", "Dropout2d", "DropConnectLinear", "ElementWiseRecurrentContainer", "LinearRecurrentContainer",
        "MultiStepDropout", "MultiStepDropout2d", "NeuNorm", "STDPLearner", "SynapseFilter",
    }
)  # fmt: skip


def base_of(cls: type[nn.Module], name: str) -> type[nn.Module] | None:
    """The class of that name that ``cls`` is derived from."""
    return next((base for base in cls.__mro__ if base.__name__ == name), None)


def kind_of(cls: type[nn.Module]) -> str | None:
    """Which of the neurons with a fused operator a class is derived from."""
    return next((base.__name__ for base in cls.__mro__ if base.__name__ in FUSED), None)


def takes_sequences(module: nn.Module) -> bool:
    """Whether a module takes ``[T, N, ...]``: it, or what it is derived from, says so by its name."""
    if (step_mode := getattr(module, "step_mode", None)) is not None:
        return bool(step_mode == "m")
    return any(base.__name__.startswith(("MultiStep", "Multistep")) for base in type(module).__mro__)
