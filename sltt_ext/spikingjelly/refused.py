"""SpikingJelly modules that SLTT cannot train.

They mix time steps inside one call, or carry state where the conversion does not see it.
"""

from __future__ import annotations

from typing import NoReturn

from spikingjelly.activation_based import layer, neuron
from torch import nn

from sltt_ext.conversion import register_adapter
from sltt_ext.errors import UnsupportedModuleError

_STEP_BY_STEP = "use a neuron that runs step by step, such as LIFNode or ParametricLIFNode"

_REASONS = {
    neuron: {
        "PSN": f"computes all time steps at once from a T x T matrix; {_STEP_BY_STEP}",
        "MaskedPSN": f"computes all time steps at once from a T x T matrix; {_STEP_BY_STEP}",
        "SlidingPSN": f"convolves its input over time; {_STEP_BY_STEP}",
        "DSRIFNode": f"represents a whole spike train by its rate; {_STEP_BY_STEP}",
        "DSRLIFNode": f"represents a whole spike train by its rate; {_STEP_BY_STEP}",
        "NonSpikingBaseNode": "integrates a whole sequence in one call; read out the mean of the step outputs "
        "instead, or the potential v of an IFNode or LIFNode with v_threshold=float('inf')",
        "STBIFNode": "is for inference with a converted network: SpikingJelly gives it no gradient",
        "ILCBaseNode": f"connects its neurons over time inside one call; {_STEP_BY_STEP}",
        "NoisyBaseNode": f"runs a whole sequence inside one call; {_STEP_BY_STEP}",
        "NoisyNonSpikingBaseNode": f"runs a whole sequence inside one call; {_STEP_BY_STEP}",
    },
    layer: {
        "TemporalWiseAttention": "attends over all time steps at once; remove it or train with BPTT",
        "MultiDimensionalAttention": "attends over all time steps at once; remove it or train with BPTT",
    },
}


def _refuse(reason: str, refused: type[nn.Module] | str) -> None:
    @register_adapter(refused)
    def rule(module: nn.Module) -> NoReturn:
        raise UnsupportedModuleError(reason)


for _room, _reasons in _REASONS.items():
    for _name, _reason in _reasons.items():
        if hasattr(_room, _name):
            _refuse(_reason, getattr(_room, _name))

_refuse(
    "feeds earlier steps back through plain attributes, out of the conversion's reach; use celltype='forward' or "
    "train it with BPTT",
    "spikingjelly.activation_based.model.snas_net.Neuronal_Cell_backward",
)

if hasattr(neuron, "FewSpikeNode"):

    @register_adapter(neuron.FewSpikeNode)
    def _few_spike(module: nn.Module) -> None:
        if module.step_mode == "m":
            raise UnsupportedModuleError(f"sums its input over time in step mode 'm'; {_STEP_BY_STEP}")
