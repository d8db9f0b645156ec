"""Modules whose time loop is their own: recurrent cells and their networks, gated LIF, FlexSN, containers."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import base, functional, layer, neuron, rnn
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sltt_ext.conversion import register_adapter
from sltt_ext.errors import InputError, UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, constant
from sltt_ext.sequences import Container, RecurrentCell, WholeSequence
from sltt_ext.spikingjelly.stepwise import States, StepwiseNode, Tensors, stepwise

__all__ = ["GatedLIF"]


class GatedLIF(StepwiseNode):
    """``GatedLIFNode``, which has parameters for each of its T steps and runs them in one call."""

    whole_sequence = True

    def multi_step_forward(self, x_seq: Tensor) -> Any:
        return base.MemoryModule.multi_step_forward(self, x_seq)

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        x_seq, v = inputs[0], states[0]
        if len(x_seq) != self.T:
            raise InputError(f"{type(self).__name__} has parameters for T={self.T} steps, got {len(x_seq)}")
        if self.through_time:
            entering = self._entering(states, self.T)
            return super(StepwiseNode, self).multi_step_functional_forward(inputs, entering, **kwargs)
        names = ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset")
        gates = [_per_channel(getattr(self, name)) for name in names]
        s, s_seq = torch.zeros_like(x_seq[0]), []
        for x, conduct in zip(x_seq, self.conduct):
            s, v = functional.gated_lif_step(
                x, constant(v), constant(s), *gates, _per_channel(conduct), self.surrogate_function
            )
            s_seq.append(s)
        return (torch.stack(s_seq),), (v, v)


def _per_channel(parameter: Tensor) -> Tensor:
    return parameter.view(1, -1, 1, 1).sigmoid()


class FlexSN(StepwiseNode):
    """``FlexSN`` has a ``forward`` of its own; its sequences take the step-by-step form."""

    def forward(self, *inputs: Tensor) -> Any:
        if not self.multi_step:
            return super().forward(*inputs)
        return self.multi_step_forward(*inputs)

    def single_step_forward(self, *inputs: Tensor) -> Any:
        return super().single_step_forward(*inputs, static_inputs=self.static_inputs)


class Delayed(StepwiseNode):
    """``Delay``: what it passes on has entered at an earlier step."""

    caveat = (
        "passes on inputs of earlier steps, which are constants in SLTT: the layers before it get no gradient "
        "through it"
    )


class ResonateAndFire(StepwiseNode):
    """``RAFNode``: its input drives the current u, and u the potential v of the next step."""

    caveat = (
        "its input reaches the spike one step later, so SLTT's gradient through it is zero: the layers before it "
        "get no gradient through it"
    )


@register_adapter(rnn.SpikingRNNCellBase)
def _cell(module: nn.Module) -> type[SLTTNeuron]:
    return adapter_subclass(RecurrentCell, type_before_parametrizations(module))


def _installed(*names: str) -> list[type[nn.Module]]:
    return [getattr(layer, name) for name in names if hasattr(layer, name)]


@register_adapter(*_installed("MultiStepContainer", "TLastMultiStepContainer", "StepModeContainer"))
def _container(module: nn.Module) -> type[SLTTNeuron]:
    return adapter_subclass(Container, type_before_parametrizations(module))


@register_adapter(
    rnn.SpikingRNNBase,
    *_installed(*(f"TemporalEffectiveBatchNorm{n}d" for n in (1, 2, 3))),
)
def _whole_sequence(module: nn.Module) -> type[SLTTNeuron]:
    return adapter_subclass(WholeSequence, type_before_parametrizations(module))


@register_adapter(layer.Delay)
def _delay(module: nn.Module) -> type[SLTTNeuron]:
    return stepwise(module, Delayed if module.delay_steps else StepwiseNode)


@register_adapter(layer.DropConnectLinear)
def _drop_connect(module: nn.Module) -> type[SLTTNeuron]:
    if module.invariant:
        raise UnsupportedModuleError(
            "with invariant=True it carries its weights over time as state, which SLTT would hold constant; use "
            "invariant=False, or layer.Dropout, which keeps its mask over time"
        )
    return stepwise(module)


for _name, _adapter in {"FlexSN": FlexSN, "GatedLIFNode": GatedLIF, "RAFNode": ResonateAndFire}.items():
    if hasattr(neuron, _name):

        @register_adapter(getattr(neuron, _name))
        def _special(module: nn.Module, adapter: type[SLTTNeuron] = _adapter) -> type[SLTTNeuron]:
            return adapter_subclass(adapter, type_before_parametrizations(module))
