"""The generic rule: what a step has left is constant on entry of the next one, and a sequence runs step by step.

It is right for any stateful module of SpikingJelly, in both release lines: 2.x writes a step as
``single_step_functional_forward(inputs, states)``, 0.0.0.0.14 as ``single_step_forward(x)``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from spikingjelly.activation_based import base, layer, neuron
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sltt_ext.charging import ChargeHeld, check_charges
from sltt_ext.conversion import register_adapter
from sltt_ext.errors import InputError, UnsupportedModuleError
from sltt_ext.neuron import (
    SLTTNeuron,
    adapter_subclass,
    constant,
    framework_neurons,
    is_taken_apart,
    snapshot,
)

__all__ = ["FUNCTIONAL_FORM", "MaskedStepwiseNode", "States", "StepwiseNode", "Tensors", "stepwise"]

States = tuple[Any, ...]
Tensors = tuple[Tensor, ...]

FUNCTIONAL_FORM = hasattr(base.MemoryModule, "single_step_functional_forward")  # SpikingJelly 2.x
_LAYERS = tuple(  # they carry state and fire no spikes
    cls
    for cls in vars(layer).values()
    if isinstance(cls, type)
    and cls.__module__.startswith(layer.__name__)
    and issubclass(cls, base.MemoryModule)
)


class StepwiseNode(SLTTNeuron, base.MemoryModule):
    """Any stateful SpikingJelly module, with SLTT's gradient.

    Carried state is what the module registers with ``register_memory``, as SpikingJelly's own
    ``reset_net`` and ``detach_net`` have it.
    """

    v_seq: Any
    keeps_steps_apart = True

    @property
    def multi_step(self) -> bool:
        return bool(self.step_mode == "m")

    @property
    def fires(self) -> bool:
        return not isinstance(self, _LAYERS)

    def reset_state(self) -> None:
        self.reset()

    def detach_state(self) -> None:
        self._hold_state()
        for name in ("v_seq", "i_seq", "state_seqs"):  # recorded, not carried: 2.x keeps them as attributes
            if name in vars(self):
                setattr(self, name, constant(vars(self)[name]))

    def stores(self) -> tuple[dict[str, Any]]:
        return (self._memories,)

    def _hold_state(self) -> None:
        """Make all of the state constant."""
        self._memories.update({name: constant(value) for name, value in self._memories.items()})

    def _enter(self) -> None:
        """Make constant what an earlier step has left."""
        self._memories.update({name: self._entering(value) for name, value in self._memories.items()})

    def single_step_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_step(*self._memories.values())
        self._enter()
        entered = snapshot(self._memories)
        output = super().single_step_forward(*args, **kwargs)
        self._end_step(self._memories, entered)
        return output

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not len(x_seq):
            raise InputError(f"x_seq must be [T, N, ...] with T >= 1, got shape {list(x_seq.shape)}")
        if is_taken_apart() and not torch.is_grad_enabled():
            return super().multi_step_forward(
                x_seq, *args, **kwargs
            )  # as it counts, or is exported, unconverted
        if getattr(self, "store_v_seq", False):
            self.v_seq = None  # 2.x: each single step appends its potential
        each_step = zip(x_seq, *args) if FUNCTIONAL_FORM else ((x, *args) for x in x_seq)
        steps, records, told = [], [], self.told_steps
        try:
            for t, inputs in enumerate(each_step):
                self._tell_own_step(t, len(x_seq), told)
                steps.append(self.single_step_forward(*inputs, **kwargs))
                records.append(self._record())
        finally:
            self._tell_again(told)
        self._store(records)
        return _stacked(steps)

    def single_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        entering = self._entering(states)
        outputs, left = super().single_step_functional_forward(inputs, entering, **kwargs)
        self._leave([state for state, before in zip(left, entering) if state is not before])
        return outputs, left

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        if is_taken_apart() and not torch.is_grad_enabled():
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        steps, told = [], self.told_steps
        try:
            for t, step in enumerate(zip(*inputs)):
                self._tell_own_step(t, len(inputs[0]), told)
                outputs, states = self.single_step_functional_forward(step, states, **kwargs)
                steps.append(outputs)
        finally:
            self._tell_again(told)
        return _stacked(steps), states

    def _record(self) -> dict[str, Any]:
        """What the module was asked to keep of the step it just ran."""
        record: dict[str, Any] = {}
        if getattr(self, "store_v_seq", False):
            record["v_seq"] = self._memories["voltage_state" if "voltage_state" in self._memories else "v"]
        if getattr(self, "store_i_seq", False):
            record["i_seq"] = self._memories["current_state"]
        if getattr(self, "store_state_seqs", False):
            record["state_seqs"] = tuple(self._memories.values())
        return record

    def _store(self, records: list[dict[str, Any]]) -> None:
        for name in records[0]:
            values = [record[name] for record in records]
            setattr(self, name, list(_stacked(values)) if name == "state_seqs" else _stacked(values))


class MaskedStepwiseNode(StepwiseNode):
    """Dropout over time: its mask is drawn once a sequence and passes no gradient, so one call does for all steps."""

    def _begin_step(self, *state: Any) -> None:
        """Run again, it drops the same."""

    def multi_step_forward(self, x_seq: Tensor) -> Any:
        return super(StepwiseNode, self).multi_step_forward(x_seq)

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        return super(StepwiseNode, self).multi_step_functional_forward(inputs, states, **kwargs)


class ChargingNode(ChargeHeld):
    """A neuron with a ``forward`` of its own that begins each step with ``neuronal_charge``."""

    @property
    def multi_step(self) -> bool:
        return bool(cast(base.MemoryModule, self).step_mode == "m")


def _stacked(steps: list[Any]) -> Any:
    if isinstance(steps[0], Tensor):
        return torch.stack(steps)
    return type(steps[0])(map(torch.stack, zip(*steps)))


_KNOWN_FORWARDS = [base.MemoryModule] + [
    getattr(neuron, name) for name in ("MPBNLIFNode", "FlexSN") if hasattr(neuron, name)
]


_OWN_NAMES = frozenset(name for name, cls in vars(neuron).items() if isinstance(cls, type)) | {"MemoryModule"}

framework_neurons(base.MemoryModule, lambda module: bool(module._memories))


@register_adapter(base.MemoryModule)
def stepwise(module: nn.Module, adapter: type[SLTTNeuron] = StepwiseNode) -> type[SLTTNeuron]:
    """The generic adapter of a module.

    Raises:
        UnsupportedModuleError: If the module's state is out of the generic rule's reach.
    """
    cls: Any = type_before_parametrizations(module)
    if all(cls.forward is not known.forward for known in _KNOWN_FORWARDS):
        check_charges(cls, _OWN_NAMES)
        return adapter_subclass(ChargingNode, cls)
    if "s" not in cast(base.MemoryModule, module).supported_step_mode() or not _has_step(cls):
        raise UnsupportedModuleError(
            "runs whole sequences only (step mode 'm'); SLTT needs a step-by-step form, step mode 's'"
        )
    return adapter_subclass(adapter, cls)


@register_adapter(layer.Dropout)
def _dropout(module: nn.Module) -> type[SLTTNeuron]:
    known = type_before_parametrizations(module) in (layer.Dropout, layer.Dropout2d)
    return stepwise(module, MaskedStepwiseNode if known else StepwiseNode)


def _has_step(cls: type[nn.Module]) -> bool:
    """Whether a class says how to compute one step, not only inherits the framework's frame for it."""
    frames = (base.MemoryModule, neuron.BaseNode) if FUNCTIONAL_FORM else (base.MemoryModule,)
    return any(
        all(getattr(cls, name, None) is not getattr(frame, name, None) for frame in frames)
        for name in ("single_step_forward", "single_step_functional_forward")
    )
