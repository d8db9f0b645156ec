"""Adapters for snnTorch's neurons.

`StepwiseNeuron` is right for any of them: what a step has left is constant on entry of the next one, whether the
caller passes it (``spk, mem = lif(cur, mem)``) or the module keeps it. `FusedLeaky` runs Leaky through the fused
operator, and steps aside for any setting that operator does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_map

from sltt_ext.conversion import register_adapter
from sltt_ext.errors import ConfigurationError, UnsupportedModuleError
from sltt_ext.functional.inputs import broadcasts
from sltt_ext.functional.leaky_operator import leaky_settings, run_leaky
from sltt_ext.kernels import check_backend
from sltt_ext.kernels.leaky import LEAKY, LeakySettings
from sltt_ext.neuron import (
    SLTTNeuron,
    adapter_subclass,
    constant,
    framework_neurons,
    is_taken_apart,
    snapshot,
    tensors_in,
)
from sltt_ext.snntorch.surrogates import known_surrogate

__all__ = ["FusedLeaky", "SLTTLeaky", "StepwiseNeuron"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class StepwiseNeuron(SLTTNeuron, snntorch.SpikingNeuron):
    """Any snnTorch neuron that steps through time, with SLTT's gradient.

    Carried state is every tensor that an earlier step has computed and that the module has kept, as a buffer or as an
    attribute, or is passed again.

    Attributes:
        sltt_time_steps: T while `MultiStep` runs the neuron: its input is then ``[T * N, ...]``.
    """

    sltt_time_steps: int | None = None
    _sltt_given: frozenset[str] = frozenset()

    @property
    def multi_step(self) -> bool:
        return False

    def steps_of(self, *args: Any) -> int:
        return self.sltt_time_steps or 1

    def carried(self) -> dict[str, Any]:
        return self._kept()

    def reset_state(self) -> None:
        self.reset_mem()

    def instead_of_rest(self) -> dict[str, Callable[..., Any]]:
        return {"reset_mem": self._state_as_at_rest}

    def _state_as_at_rest(self) -> Any:
        """The state that is carried, in the form in which ``reset_mem`` returns the one at rest."""
        kept = self._kept()
        at_rest = type(self).reset_mem(self)
        names = {id(value): name for name, value in self._kept().items()}
        self._keep(kept)
        return tree_map(lambda value: kept[names[id(value)]] if id(value) in names else value, at_rest)

    def detach_state(self) -> None:
        self._keep(
            {name: constant(value) for name, value in self._computed() if name not in self._sltt_given}
        )

    def _computed(self) -> list[tuple[str, Any]]:
        """Names and values of all that the module keeps and that is, or holds, a tensor with a graph behind it."""
        return [(name, value) for name, value in self._kept().items() if _has_graph(value)]

    def _kept(self) -> dict[str, Any]:
        """What the module keeps; among it, its state."""
        own = {name: value for name, value in vars(self).items() if name not in _OF_EVERY_MODULE}
        return {**self._buffers, **own}

    def _keep(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            (self._buffers if name in self._buffers else self.__dict__)[name] = value

    def forward(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        if self.sltt_time_steps is None:
            return self._step(input_, *self._entering(states), **self._entering(named_states))
        if any(state is not None for state in (*states, *named_states.values())):
            raise ConfigurationError(
                f"{self.original.__name__} is passed its state, and MultiStep runs a layer through all time steps "
                "before the next: leave the state to the neuron (init_hidden=True)"
            )
        return self._sequence(input_.unflatten(0, (self.sltt_time_steps, -1)))

    def _step(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One step."""
        if not any(isinstance(state, Tensor) for state in (*states, *named_states.values())):
            self._begin_step(*self._kept().values())
        self._keep({name: self._entering(value) for name, value in self._computed()})
        entered, given = snapshot(self._kept()), self._given()
        output = super().forward(input_, *states, **named_states)
        self._end_step(self._kept(), entered)
        self._leave(output)  # a state that is passed need not be kept
        self.__dict__["_sltt_given"] = frozenset(
            name for name, value in self._computed() if given.get(name) is value
        )
        return output

    def _given(self) -> dict[str, Any]:
        """What has a graph and is no state, such as a ``beta`` that the network computes before the step."""
        if torch.compiler.is_compiling():
            return {}
        return {
            name: value
            for name, value in self._computed()
            if not any(tensor.grad_fn is not None and self._has_left(tensor) for tensor in tensors_in(value))
        }

    def _sequence(self, x_seq: Tensor) -> Any:
        """All steps of ``x_seq`` ``[T, N, ...]``; returns what a step does, time folded into the batch."""
        steps, told = [], self.told_steps
        try:
            for t, x in enumerate(x_seq):
                self._tell_own_step(t, len(x_seq), told)
                steps.append(self._step(x))
        finally:
            self._tell_again(told)
        return tree_map(lambda *parts: torch.cat(parts), *steps)


class FusedLeaky(StepwiseNeuron):
    """Leaky neurons through the fused operator."""

    mem: Tensor
    _sltt_fused: bool = False

    @classmethod
    def check_backend(cls, module: nn.Module, backend: str) -> None:
        if _settings(module) is not None:
            check_backend(backend, LEAKY)

    def detach_state(self) -> None:
        self.mem = constant(self.mem)

    def state(self) -> Tensor | None:
        return self.mem

    def rest_as(self, state: Tensor) -> None:
        self.mem = state.zero_()

    def spikes(self, output: Any) -> tuple[Tensor, Tensor] | None:
        factor = self.graded_spikes_factor
        if not self._sltt_fused or factor.numel() != 1:
            return None
        # a copy: the factor may be learned, and what is said of these spikes has to stay true
        return output[0] if isinstance(output, tuple) else output, factor.detach().clone()

    def _step(self, input_: Tensor, mem: Tensor | None = None) -> Any:  # type: ignore[override]
        passed_twice = self.init_hidden and mem is not None  # which snnTorch refuses
        settings = None if passed_twice else self._fused_settings(input_)
        if settings is None or self._keeps_past(settings, self.mem if mem is None else mem):
            return super()._step(input_, mem)
        mem = self._entering(self._mem_before(input_, mem))
        spk, self.mem = self._run_fused(input_, mem, settings, single_step=True)
        self._end_step(self.mem)
        return self._returned(spk * self.graded_spikes_factor, self.mem)

    def _sequence(self, x_seq: Tensor) -> Any:
        settings = self._fused_settings(x_seq[0])
        if settings is None or self._keeps_past(settings, self.mem, len(x_seq)):
            return super()._sequence(x_seq)
        mem = self._entering(self._mem_before(x_seq[0], None), len(x_seq))
        returns_mem = self.output or not self.init_hidden
        spk_seq, mem = self._run_fused(x_seq, mem, settings, return_mem_seq=returns_mem)
        self.mem = mem[-1].clone() if returns_mem else mem
        self._end_step(self.mem)
        return self._returned((spk_seq * self.graded_spikes_factor).flatten(0, 1), mem.flatten(0, 1))

    def _run_fused(
        self,
        x: Tensor,
        mem: Tensor | None,
        settings: LeakySettings,
        *,
        return_mem_seq: bool = False,
        single_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Spikes, before they are graded, and membrane potentials."""
        return run_leaky(
            x, mem, self.beta, self.threshold, settings, return_mem_seq=return_mem_seq, backend=self.sltt_backend,
            single_step=single_step,
        )  # fmt: skip

    def _keeps_past(self, settings: LeakySettings, mem: Any, steps: int = 1) -> bool:
        """Whether the gradient goes on into the potential of a call of so many steps, as it does not in the operator."""
        return not settings.through_time and self._keeps(mem, steps)

    def _mem_before(self, x: Tensor, mem: Tensor | None) -> Tensor | None:
        """The state a step starts with; as in snnTorch, a batch of another shape starts from 0."""
        if mem is None:
            mem = self.mem
            self._begin_step(mem)
        return mem if mem.shape == x.shape else None

    def _returned(self, spk: Tensor, mem: Tensor) -> Any:
        return spk if self.init_hidden and not self.output else (spk, mem)

    def _fused_settings(self, x: Tensor) -> LeakySettings | None:
        """What to run the fused operator with; None where it does not cover the settings."""
        settings = _settings(self) if self._covers_input(x) and not is_taken_apart() else None
        if settings is not None and self.through_time:
            settings = settings._replace(through_time=True)
        self.__dict__["_sltt_fused"] = settings is not None
        return settings

    def _covers_input(self, x: Tensor) -> bool:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.numel() == 0:
            return False  # in float64 snnTorch mixes precisions
        return all(
            not parameter.dim() or (parameter.dtype != torch.float64 and broadcasts(parameter.shape, x.shape))
            for parameter in (self.beta, self.threshold)
        )


class SLTTLeaky(FusedLeaky, snntorch.Leaky):
    """snnTorch's ``Leaky`` with SLTT's gradient; same arguments."""

    original = snntorch.Leaky


_RESET_MECHANISMS = {
    snntorch.Leaky._base_sub: "subtract",
    snntorch.Leaky._base_zero: "zero",
    snntorch.Leaky._base_int: "none",
}


def _settings(neuron: Any) -> LeakySettings | None:
    """The settings of a Leaky neuron; None where the fused operator does not cover them, whatever the input."""
    if neuron.inhibition or neuron.state_quant or (surrogate := known_surrogate(neuron.spike_grad)) is None:
        return None
    reset_mechanism = _RESET_MECHANISMS.get(getattr(neuron.state_function, "__func__", None))
    if reset_mechanism is None or reset_mechanism != neuron.reset_mechanism:
        return None
    return leaky_settings(
        reset_mechanism=reset_mechanism, reset_delay=neuron.reset_delay, surrogate=surrogate
    )


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
    cls = type_before_parametrizations(module)
    if cls is snntorch.Leaky:
        return SLTTLeaky
    own = {name for name in _DYNAMICS if getattr(cls, name) is not getattr(snntorch.Leaky, name)}
    return _stepwise(module) if own else adapter_subclass(FusedLeaky, cls)


framework_neurons(snntorch.SpikingNeuron, lambda module: hasattr(module, "reset_mem"))


@register_adapter(snntorch.SpikingNeuron)
def _stepwise(module: nn.Module) -> type[SLTTNeuron]:
    if not hasattr(module, "reset_mem"):
        raise UnsupportedModuleError(
            "has no reset_mem(), so that its state cannot be reset between sequences; define it, as snnTorch's "
            "own neurons do"
        )
    return adapter_subclass(StepwiseNeuron, type_before_parametrizations(module))


def _has_graph(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if isinstance(value, dict):
        return any(map(_has_graph, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_has_graph, value))
