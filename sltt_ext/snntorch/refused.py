"""snnTorch modules that SLTT cannot train: those that compute all time steps in one call, or learn nothing."""

from __future__ import annotations

from typing import NoReturn

import snntorch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sltt_ext.conversion import register_adapter
from sltt_ext.errors import UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron, adapter_subclass
from sltt_ext.snntorch.neurons import StepwiseNeuron

_STEP_BY_STEP = "use a neuron that runs step by step, such as Leaky or RLeaky, or train with BPTT"

_REASONS = {
    "StateLeaky": f"convolves its input over time with a decaying kernel; {_STEP_BY_STEP}",
    "LinearLeaky": f"convolves its input over time with a decaying kernel; {_STEP_BY_STEP}",
    "LeakyParallel": f"runs a whole sequence through an RNN in one call; {_STEP_BY_STEP}",
    "AssociativeLeaky": f"computes an associative memory over all time steps at once; {_STEP_BY_STEP}",
}


def _refuse(reason: str, cls: type[nn.Module]) -> None:
    @register_adapter(cls)
    def rule(module: nn.Module) -> NoReturn:
        raise UnsupportedModuleError(reason)


for _name, _reason in _REASONS.items():
    if hasattr(snntorch, _name):  # snnTorch 0.9 has fewer
        _refuse(_reason, getattr(snntorch, _name))


@register_adapter(snntorch.Lapicque)
def _lapicque(module: nn.Module) -> type[SLTTNeuron]:
    own = ("forward", "_base_state_function")
    steps_as_ever = all(
        getattr(type_before_parametrizations(module), name) is getattr(snntorch.Lapicque, name)
        for name in own
    )
    if isinstance(module.beta, nn.Parameter) and steps_as_ever:
        raise UnsupportedModuleError(
            "learn_beta=True learns nothing: R and C are computed of beta when the neuron is made, and its steps read these. "
            "Use Leaky(learn_beta=True), or Lapicque with learn_beta=False"
        )
    return adapter_subclass(StepwiseNeuron, type_before_parametrizations(module))
