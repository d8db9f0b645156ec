"""SpikingJelly modules that SLTT cannot train.

They mix time steps inside one call, pass on nothing of a step's own input, or have their state passed by
the caller, where the conversion does not see it.
"""

from __future__ import annotations

import importlib
from typing import NoReturn

from torch import nn

from sltt_ext.conversion import register_adapter
from sltt_ext.errors import UnsupportedModuleError

_STEP_BY_STEP = "use a neuron that runs step by step, such as LIFNode or ParametricLIFNode"

_REASONS = {
    "neuron": {
        "PSN": f"computes all time steps at once from a T x T matrix; {_STEP_BY_STEP}",
        "MaskedPSN": f"computes all time steps at once from a T x T matrix; {_STEP_BY_STEP}",
        "SlidingPSN": f"convolves its input over time; {_STEP_BY_STEP}",
        "DSRIFNode": f"represents a whole spike train by its rate; {_STEP_BY_STEP}",
        "DSRLIFNode": f"represents a whole spike train by its rate; {_STEP_BY_STEP}",
        "NonSpikingBaseNode": "integrates a whole sequence in one call; read out the mean of the step outputs "
        "instead, or the potential v of an IFNode or LIFNode with v_threshold=float('inf')",
        "RAFNode": f"its input reaches the spike one step later, so SLTT's gradient through it is zero; {_STEP_BY_STEP}",
        "ILCBaseNode": f"connects its neurons over time inside one call; {_STEP_BY_STEP}",
        "NoisyBaseNode": f"runs a whole sequence inside one call; {_STEP_BY_STEP}",
        "NoisyNonSpikingBaseNode": f"runs a whole sequence inside one call; {_STEP_BY_STEP}",
    },
    "layer": {
        "Delay": "passes on earlier inputs only, so SLTT's gradient through it is zero; remove it or train with BPTT",
        "DropConnectLinear": "carries weights over time as state, which SLTT would hold constant; use Dropout",
        "TemporalWiseAttention": "attends over all time steps at once; remove it or train with BPTT",
        "MultiDimensionalAttention": "attends over all time steps at once; remove it or train with BPTT",
    },
    "rnn": {
        "SpikingRNNBase": "runs a whole sequence inside one call; train it with BPTT",
        "SpikingRNNCellBase": "gets its state from the caller, out of the conversion's reach; train it with BPTT",
    },
}


def _refuse(reason: str, *classes: type[nn.Module]) -> None:
    @register_adapter(*classes)
    def rule(module: nn.Module) -> NoReturn:
        raise UnsupportedModuleError(reason)


for _room, _reasons in _REASONS.items():
    _namespace = vars(importlib.import_module(f"spikingjelly.activation_based.{_room}"))
    for _name, _reason in _reasons.items():
        if _name in _namespace:
            _refuse(_reason, _namespace[_name])
