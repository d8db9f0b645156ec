"""Adapters for snnTorch's neurons.

`StepwiseNeuron` is right for any of them: it makes the carried state constant on entry of every
step, whether the caller passes it (``spk, mem = lif(cur, mem)``) or the module keeps it. `FusedLeaky`
runs Leaky through the fused operator, and steps aside for any setting that operator does not cover.
"""

from __future__ import annotations

from typing import Any

import snntorch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sltt_ext import functional
from sltt_ext.conversion import register_adapter
from sltt_ext.errors import ConfigurationError, UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, constant
from sltt_ext.snntorch.surrogates import known_surrogate
from sltt_ext.surrogate import Surrogate

__all__ = ["FusedLeaky", "SLTTLeaky", "StepwiseNeuron"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class StepwiseNeuron(SLTTNeuron, snntorch.SpikingNeuron):
    """Any snnTorch neuron that steps through time, with SLTT's gradient.

    Carried state is every further argument of ``forward``, and every tensor that an earlier step has
    computed and the module has kept, as a buffer or as an attribute.

    Attributes:
        sltt_time_steps: T while `MultiStep` runs the neuron: its input is then ``[T * N, ...]``.
    """

    sltt_time_steps: int | None = None

    @property
    def multi_step(self) -> bool:
        return False

    def steps_of(self, *args: Any) -> int:
        return self.sltt_time_steps or 1

    def reset_state(self) -> None:
        self.reset_mem()

    def detach_state(self) -> None:
        self._buffers.update({name: constant(self._buffers[name]) for name in _computed(self._buffers)})
        own = {name: value for name, value in vars(self).items() if name not in _OF_EVERY_MODULE}
        self.__dict__.update({name: constant(own[name]) for name in _computed(own)})

    def forward(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        if self.sltt_time_steps is None:
            return self._step(input_, *constant(states), **constant(named_states))
        if any(state is not None for state in (*states, *named_states.values())):
            raise ConfigurationError(
                f"{self.original.__name__} is passed its state, and MultiStep runs a layer through all time steps "
                "before the next: leave the state to the neuron (init_hidden=True)"
            )
        return self._sequence(input_.unflatten(0, (self.sltt_time_steps, -1)))

    def _step(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One step; what is passed as state is constant."""
        if not any(isinstance(state, Tensor) for state in (*states, *named_states.values())):
            self._begin_step(*self._tensors())
        self.detach_state()
        entering = set(map(id, self._tensors()))
        output = super().forward(input_, *states, **named_states)
        self._end_step(*(tensor for tensor in self._tensors() if id(tensor) not in entering))
        return output

    def _tensors(self) -> list[Any]:
        """What the module keeps; among it, its state."""
        return [*self._buffers.values(), *vars(self).values()]

    def _sequence(self, x_seq: Tensor) -> Any:
        """All steps of ``x_seq`` ``[T, N, ...]``; returns what a step does, time folded into the batch."""
        steps = [self._step(x) for x in x_seq]
        return tree_map(lambda *parts: torch.cat(parts), *steps)


class FusedLeaky(StepwiseNeuron):
    """Leaky neurons through the fused operator."""

    def spikes(self, output: Any) -> tuple[Tensor, Tensor] | None:
        factor = self.graded_spikes_factor
        if known_surrogate(self.spike_grad) is None or factor.numel() != 1:
            return None
        return output[0] if isinstance(output, tuple) else output, factor

    def _step(self, input_: Tensor, mem: Tensor | None = None) -> Any:  # type: ignore[override]
        settings = self._fused_settings(input_)
        if settings is None or (self.init_hidden and mem is not None):
            return super()._step(input_, mem)
        mem = self._entering(input_, mem)
        spk, self.mem = functional.multi_step_leaky(input_, mem, single_step=True, **settings)
        self._end_step(self.mem)
        return self._returned(spk * self.graded_spikes_factor, self.mem)

    def _sequence(self, x_seq: Tensor) -> Any:
        settings = self._fused_settings(x_seq[0])
        if settings is None:
            return super()._sequence(x_seq)
        mem = self._entering(x_seq[0], None)
        returns_mem = self.output or not self.init_hidden
        spk_seq, mem = functional.multi_step_leaky(x_seq, mem, return_mem_seq=returns_mem, **settings)
        self.mem = mem[-1].clone() if returns_mem else mem
        self._end_step(self.mem)
        return self._returned((spk_seq * self.graded_spikes_factor).flatten(0, 1), mem.flatten(0, 1))

    def _entering(self, x: Tensor, mem: Tensor | None) -> Tensor | None:
        """The state a step starts with; as in snnTorch, a batch of another shape starts from 0."""
        if mem is None:
            mem = self.mem
            self._begin_step(mem)
        return mem if mem.shape == x.shape else None

    def _returned(self, spk: Tensor, mem: Tensor) -> Any:
        return spk if self.init_hidden and not self.output else (spk, mem)

    def _fused_settings(self, x: Tensor) -> dict[str, Any] | None:
        """What to run the fused operator with; None where it does not cover the settings."""
        surrogate = self._covered_surrogate(x)
        reset_mechanism = _RESET_MECHANISMS.get(getattr(self.state_function, "__func__", None))
        if surrogate is None or reset_mechanism != self.reset_mechanism:
            return None
        return {
            "beta": self.beta,
            "threshold": self.threshold,
            "reset_mechanism": reset_mechanism,
            "reset_delay": self.reset_delay,
            "surrogate": surrogate,
            "backend": self.sltt_backend,
        }

    def _covered_surrogate(self, x: Tensor) -> Surrogate | None:
        if self.inhibition or self.state_quant or x.numel() == 0:
            return None
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return None  # in float64 snnTorch mixes precisions
        for parameter in (self.beta, self.threshold):
            if parameter.dim() and (
                parameter.dtype == torch.float64 or not _broadcasts(parameter.shape, x.shape)
            ):
                return None
        return known_surrogate(self.spike_grad)


class SLTTLeaky(FusedLeaky, snntorch.Leaky):
    """snnTorch's ``Leaky`` with SLTT's gradient; same arguments."""

    original = snntorch.Leaky


_RESET_MECHANISMS = {
    snntorch.Leaky._base_sub: "subtract",
    snntorch.Leaky._base_zero: "zero",
    snntorch.Leaky._base_int: "none",
}

_DYNAMICS = [
    "forward",
    "fire",
    "mem_reset",
    "_base_state_function",
    "_base_sub",
    "_base_zero",
    "_base_int",
]


@register_adapter(snntorch.Leaky)
def _fused_or_stepwise(module: nn.Module) -> type[SLTTNeuron]:
    cls = type(module)
    if cls is snntorch.Leaky:
        return SLTTLeaky
    own = {name for name in _DYNAMICS if getattr(cls, name) is not getattr(snntorch.Leaky, name)}
    return _stepwise(module) if own else adapter_subclass(FusedLeaky, cls)


@register_adapter(snntorch.SpikingNeuron)
def _stepwise(module: nn.Module) -> type[SLTTNeuron]:
    if not hasattr(module, "reset_mem"):
        raise UnsupportedModuleError(
            "has no reset_mem(), so that its state cannot be reset between sequences; define it, as snnTorch's "
            "own neurons do"
        )
    return adapter_subclass(StepwiseNeuron, type(module))


def _computed(values: dict[str, Any]) -> list[str]:
    """Names of the values that are, or hold, a tensor with a graph behind it."""
    return [name for name, value in values.items() if _has_graph(value)]


def _has_graph(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if isinstance(value, dict):
        return any(map(_has_graph, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_has_graph, value))


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a tensor of ``shape`` broadcasts to ``whole``."""
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole)))
