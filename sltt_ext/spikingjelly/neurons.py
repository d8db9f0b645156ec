"""Adapters for SpikingJelly's neurons.

:class:`StepwiseNode` is right for any neuron: it makes the carried state constant on entry of every
step and runs a sequence step by step. :class:`FusedNode` runs IF, LIF and parametric LIF through the
fused operator, and steps aside for any setting that operator does not cover.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from spikingjelly.activation_based import base, neuron
from torch import Tensor, nn

from sltt_ext import functional
from sltt_ext.conversion import register_adapter
from sltt_ext.errors import UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, constant
from sltt_ext.spikingjelly.surrogates import known_surrogate
from sltt_ext.surrogate import Surrogate

__all__ = ["FusedNode", "SLTTIFNode", "SLTTLIFNode", "SLTTParametricLIFNode", "StepwiseNode"]

States = tuple[Any, ...]
Tensors = tuple[Tensor, ...]


class StepwiseNode(SLTTNeuron, base.MemoryModule):
    """Any stateful SpikingJelly module, with SLTT's gradient.

    Carried state is what the module registers with ``register_memory``, as SpikingJelly's own
    ``reset_net`` and ``detach_net`` have it.
    """

    @property
    def multi_step(self) -> bool:
        return bool(self.step_mode == "m")

    def reset_state(self) -> None:
        self.reset()

    def detach_state(self) -> None:
        self._memories.update({name: constant(value) for name, value in self._memories.items()})

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.detach_state()
        return super().single_step_forward(x, *args, **kwargs)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "store_v_seq", False):
            self.v_seq = None  # each single step appends its potential
        steps = [self.single_step_forward(*inputs, **kwargs) for inputs in zip(x_seq, *args)]
        if isinstance(steps[0], Tensor):
            return torch.stack(steps)
        return type(steps[0])(map(torch.stack, zip(*steps)))

    def single_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        return super().single_step_functional_forward(inputs, constant(states), **kwargs)

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        return base.MemoryModule.multi_step_functional_forward(self, inputs, states, **kwargs)


class FusedNode(StepwiseNode):
    """IF, LIF and parametric LIF neurons through the fused operator."""

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        surrogate = self._fused_surrogate(x)
        if surrogate is None:
            return super().single_step_forward(x, *args, **kwargs)
        return self._run_fused(x, surrogate, single_step=True)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        surrogate = self._fused_surrogate(x_seq)
        if surrogate is None:
            return super().multi_step_forward(x_seq, *args, **kwargs)
        self.v_seq = None
        return self._run_fused(x_seq, surrogate, single_step=False)

    def single_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        surrogate = self._fused_surrogate(inputs[0])
        if surrogate is None:
            return super().single_step_functional_forward(inputs, states, **kwargs)
        s, v = self._fused(inputs[0], states[0], surrogate, single_step=True)
        return (s,), (v, *states[1:])

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        surrogate = self._fused_surrogate(inputs[0])
        if surrogate is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        s_seq, v = self._fused(inputs[0], states[0], surrogate, single_step=False)
        return (s_seq,), (v, *states[1:])

    def _run_fused(self, x: Tensor, surrogate: Surrogate, single_step: bool) -> Tensor:
        v = self._memories["v"]
        if isinstance(v, Tensor) and v.shape != (x.shape if single_step else x.shape[1:]):
            v = None  # as SpikingJelly does: a batch of another shape starts from rest
        s, self._memories["v"] = self._fused(x, v, surrogate, single_step)
        return s

    def _fused(
        self, x: Tensor, v: Tensor | float | None, surrogate: Surrogate, single_step: bool
    ) -> tuple[Tensor, Tensor]:
        """Spikes and final potential for ``x`` ``[N, ...]`` (single-step) or ``[T, N, ...]``."""
        raise NotImplementedError

    def _fused_surrogate(self, x: Tensor) -> Surrogate | None:
        """The surrogate to run the fused operator with; None where the operator does not cover the settings."""
        if self.store_v_seq or not x.is_floating_point() or x.numel() == 0:
            return None
        if not isinstance(self.v_threshold, (int, float)) or isinstance(self.v_reset, Tensor):
            return None
        return known_surrogate(self.surrogate_function)

    def _settings(self, surrogate: Surrogate, single_step: bool) -> dict[str, Any]:
        return {
            "surrogate": surrogate,
            "single_step": single_step,
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "detach_reset": self.detach_reset,
            "backend": self.sltt_backend,
        }


class _FusedIF(FusedNode):
    def _fused(
        self, x: Tensor, v: Tensor | float | None, surrogate: Surrogate, single_step: bool
    ) -> tuple[Tensor, Tensor]:
        return functional.multi_step_if(x, v, **self._settings(surrogate, single_step))


class _FusedLIF(FusedNode):
    def _fused(
        self, x: Tensor, v: Tensor | float | None, surrogate: Surrogate, single_step: bool
    ) -> tuple[Tensor, Tensor]:
        settings = self._settings(surrogate, single_step)
        return functional.multi_step_lif(x, v, tau=self.tau, decay_input=self.decay_input, **settings)


class _FusedParametricLIF(FusedNode):
    def _fused(
        self, x: Tensor, v: Tensor | float | None, surrogate: Surrogate, single_step: bool
    ) -> tuple[Tensor, Tensor]:
        settings = self._settings(surrogate, single_step)
        return functional.multi_step_plif(x, self.w, v, decay_input=self.decay_input, **settings)


class SLTTIFNode(_FusedIF, neuron.IFNode):
    """SpikingJelly's ``IFNode`` with SLTT's gradient; same arguments."""

    original = neuron.IFNode


class SLTTLIFNode(_FusedLIF, neuron.LIFNode):
    """SpikingJelly's ``LIFNode`` with SLTT's gradient; same arguments."""

    original = neuron.LIFNode


class SLTTParametricLIFNode(_FusedParametricLIF, neuron.ParametricLIFNode):
    """SpikingJelly's ``ParametricLIFNode`` with SLTT's gradient; same arguments."""

    original = neuron.ParametricLIFNode


_EXPLICIT = {cls.original: cls for cls in (SLTTIFNode, SLTTLIFNode, SLTTParametricLIFNode)}

_DYNAMICS = [
    "forward",
    "materialize_states",
    "multi_step_forward",
    "multi_step_functional_forward",
    "single_step_forward",
    "single_step_functional_forward",
]


@register_adapter(neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)
def _fused_or_stepwise(module: nn.Module) -> type[SLTTNeuron]:
    cls = type(module)
    if cls in _EXPLICIT:
        return _EXPLICIT[cls]
    for original, explicit in _EXPLICIT.items():
        if isinstance(module, original) and _same_dynamics(cls, original):
            return adapter_subclass(explicit.__bases__[0], cls)
    return _stepwise(module)


@register_adapter(base.MemoryModule)
def _stepwise(module: nn.Module) -> type[SLTTNeuron]:
    cls = type(module)
    if cls.forward is not base.MemoryModule.forward:
        raise UnsupportedModuleError(
            "overrides forward, past which its state cannot be held constant; compute the step in "
            "single_step_forward or single_step_functional_forward instead"
        )
    if "s" not in cast(base.MemoryModule, module).supported_step_mode() or not _has_step(cls):
        raise UnsupportedModuleError(
            "runs whole sequences only (step mode 'm'); SLTT needs a step-by-step form, step mode 's'"
        )
    return adapter_subclass(StepwiseNode, cls)


def _has_step(cls: type[nn.Module]) -> bool:
    """Whether a class says how to compute one step, not only inherits the framework's frame for it."""
    frames = (base.MemoryModule, neuron.BaseNode)
    return any(
        all(getattr(cls, name) is not getattr(frame, name) for frame in frames)
        for name in ("single_step_forward", "single_step_functional_forward")
    )


def _same_dynamics(cls: type[nn.Module], original: type[nn.Module]) -> bool:
    """Whether a subclass changes nothing of how the neuron computes (only its defaults, say)."""
    return all(getattr(cls, name, None) is getattr(original, name, None) for name in _DYNAMICS)
