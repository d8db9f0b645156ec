"""IF, LIF and parametric LIF neurons through the fused operator, in both release lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sltt_ext.conversion import register_adapter
from sltt_ext.functional.inputs import broadcasts
from sltt_ext.functional.lif_operator import decay_of, lif_settings, reset, run_lif
from sltt_ext.kernels import check_backend
from sltt_ext.kernels.lif import LIF, LIFSettings
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, is_taken_apart
from sltt_ext.spikingjelly.stepwise import FUNCTIONAL_FORM, States, StepwiseNode, Tensors, stepwise
from sltt_ext.spikingjelly.surrogates import known_surrogate
from sltt_ext.surrogate import Surrogate

__all__ = ["FusedNode", "SLTTIFNode", "SLTTLIFNode", "SLTTParametricLIFNode"]


@dataclass(eq=False)
class _Charged:
    """In the place of ``v``: the charged potential of the last step, and the settings of that step."""

    h: Tensor
    settings: LIFSettings

    def settled(self) -> Tensor:
        """The membrane potential, after the reset that is due, with its gradient whatever the mode it is read in."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.h.requires_grad):
            return reset(self.h, self.settings)


class FusedNode(StepwiseNode):
    """A neuron that runs through the fused operator, and by the generic rule where that does not cover its settings.

    While it carries the charged potential, that stands in for ``v`` in SpikingJelly's dictionary, and afterwards until
    somebody reads the state. Whoever does finds ``v``: the reset that is due is applied first.
    """

    _surrogate_in_eval: ClassVar[bool] = True
    _carries_charged: bool = False
    _overwrites: bool = True

    def __getattr__(self, name: str) -> Any:
        if name == "v":
            self._settle()
        return super().__getattr__(name)

    def named_memories(self) -> Any:
        self._settle()
        return super().named_memories()

    def memories(self) -> Any:
        self._settle()
        return super().memories()

    def detach(self) -> None:
        self._hold_state()
        super().detach()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super()._apply(*args, **kwargs)

    def carry_charged(self, on: bool) -> None:
        self.__dict__.pop("_overwrites", None)
        if on and not self.through_time:
            self._carries_charged = True
            return
        self.__dict__.pop("_carries_charged", None)

    def settle_state(self) -> None:
        self._settle()

    def stores(self) -> tuple[dict[str, Any]]:
        if not self._carries_charged:
            self._settle()
        return super().stores()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._carries_charged:
            self._settle()
        return super().__reduce_ex__(protocol)

    def potential(self, output: Tensor) -> tuple[Tensor, float] | None:
        held = self._charged()
        if held is None or held.h.numel() != output.numel():
            return None
        h = held.h if held.h.dim() == output.dim() else held.h.unsqueeze(0)
        return (h, held.settings.v_threshold) if h.stride() == output.stride() else None

    def keep_charged(self) -> None:
        self._overwrites = False

    def state(self) -> Tensor | None:
        v = self._memories["v"]
        return v.h if isinstance(v, _Charged) else v if isinstance(v, Tensor) else None

    def rest_as(self, state: Tensor) -> None:
        self._memories["v"] = state.fill_(self.v_reset or 0.0)

    def _charged(self) -> _Charged | None:
        """What stands in for ``v``, if something does."""
        held = self._memories.get("v")
        return held if isinstance(held, _Charged) else None

    def _settle(self) -> None:
        """Apply the reset that is due."""
        if (held := self._charged()) is not None:
            self._memories["v"] = held.settled()

    def _hold_state(self) -> None:
        if (held := self._charged()) is None:
            super()._hold_state()
        else:
            self._memories["v"] = _Charged(held.h.detach(), held.settings)

    @classmethod
    def check_backend(cls, module: nn.Module, backend: str) -> None:
        check_backend(backend, LIF)

    def spikes(self, output: Tensor) -> tuple[Tensor, None] | None:
        return None if known_surrogate(self.surrogate_function) is None else (output, None)

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        surrogate = self._fused_surrogate(x)
        if surrogate is None or self.store_v_seq or self._keeps_state(1) or not self._covers_state(x.shape):
            self._settle()
            return super().single_step_forward(x, *args, **kwargs)
        return self._run_fused(x, surrogate, single_step=True)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        surrogate = self._fused_surrogate(x_seq)
        if self.store_v_seq and self.through_time:
            surrogate = None
        if surrogate is None or self._keeps_state(len(x_seq)) or not self._covers_state(x_seq.shape[1:]):
            self._settle()
            return super().multi_step_forward(x_seq, *args, **kwargs)
        if not self.store_v_seq:
            return self._run_fused(x_seq, surrogate, single_step=False)
        spikes, potentials = [], []
        for x in x_seq:
            spikes.append(self._run_fused(x, surrogate, single_step=True))
            potentials.append(self.v)
        self.v_seq = torch.stack(potentials)
        return torch.stack(spikes)

    def single_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        surrogate = self._fused_surrogate(inputs[0])
        if surrogate is None or (self._keeps(states[0]) and not self.through_time):
            return super().single_step_functional_forward(inputs, states, **kwargs)
        s, v = self._run(inputs[0], self._entering(states[0]), self._settings(surrogate), single_step=True)
        self._leave(v)
        return (s,), (v, *states[1:])

    def multi_step_functional_forward(
        self, inputs: Tensors, states: States, **kwargs: Any
    ) -> tuple[Tensors, States]:
        surrogate = self._fused_surrogate(inputs[0])
        steps = len(inputs[0])
        if surrogate is None or (self._keeps(states[0], steps) and not self.through_time):
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        v = self._entering(states[0], steps)
        s_seq, v = self._run(inputs[0], v, self._settings(surrogate), single_step=False)
        self._leave(v)
        return (s_seq,), (v, *states[1:])

    def _run_fused(self, x: Tensor, surrogate: Surrogate, single_step: bool) -> Tensor:
        carries = self._carries_charged and not torch.compiler.is_compiling()
        settings = self._settings(surrogate, charged=carries)
        held = self._charged()
        if held is not None and held.settings != settings:
            self._settle()
            held = None
        v = self._memories["v"] if held is None else held.h
        if FUNCTIONAL_FORM and isinstance(v, Tensor) and v.shape != (x.shape if single_step else x.shape[1:]):
            v = None  # as SpikingJelly 2.x does: a batch of another shape starts from rest
        if carries and held is None and isinstance(v, Tensor):
            settings = settings._replace(charged=False)  # this step starts after a reset
        self._begin_step(v)
        if settings.through_time:
            v = self._entering(v, 1 if single_step else len(x))
        s, v = self._run(x, v, settings, single_step)
        self._end_step(v)
        self._memories["v"] = _Charged(v, settings) if settings.charged else v
        return s

    def _run(
        self, x: Tensor, v: Tensor | float | None, settings: LIFSettings, single_step: bool
    ) -> tuple[Tensor, Tensor]:
        """Spikes and final potential for ``x`` ``[N, ...]`` (single-step) or ``[T, N, ...]``."""
        return run_lif(
            x, v, self._decay(x), settings, backend=self.sltt_backend, single_step=single_step, overwrites=torch.compiler.is_compiling() or self._overwrites
        )  # fmt: skip

    def _settings(self, surrogate: Surrogate, charged: bool = False) -> LIFSettings:
        """The settings of a neuron without a leak."""
        return lif_settings(
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            charged=charged,
            through_time=self.through_time,
            surrogate=surrogate,
        )

    def _decay(self, x: Tensor) -> Tensor | None:
        """The learnable decay, if the neuron has one."""
        return None

    def _fused_surrogate(self, x: Tensor) -> Surrogate | None:
        """The surrogate to run the fused operator with; None where the operator does not cover the settings."""
        if not (self.training or self._surrogate_in_eval):
            return None
        if not x.is_floating_point() or x.numel() == 0 or not self._covers_parameters() or is_taken_apart():
            return None
        return known_surrogate(self.surrogate_function)

    def _covers_parameters(self) -> bool:
        """Whether the neuron's parameters are the numbers that the operator takes: not learned, not one per channel."""
        v_reset = self.v_reset
        return _is_number(self.v_threshold) and (v_reset is None or _is_number(v_reset))

    def _keeps_state(self, steps: int) -> bool:
        """Whether the gradient goes on into the state of a call of so many steps, as it does not in the operator of a step."""
        held = self._charged()
        state = self._memories["v"] if held is None else held.h
        if self.through_time or not self._keeps(state, steps):
            return False
        self._begin_step(state)  # before another tensor takes its place
        return True

    def _covers_state(self, step: torch.Size) -> bool:
        """Whether a step of that shape can start from the state; in 0.0.0.0.14 a smaller one broadcasts."""
        v = self._memories["v"]
        if FUNCTIONAL_FORM or not isinstance(v, Tensor) or v.shape == step:
            return True
        return not broadcasts(v.shape, step)


class _FusedIF(FusedNode):
    _surrogate_in_eval = FUNCTIONAL_FORM  # 0.0.0.0.14 evaluates IF and LIF without a surrogate


class _FusedLIF(FusedNode):
    _surrogate_in_eval = FUNCTIONAL_FORM

    def _settings(self, surrogate: Surrogate, charged: bool = False) -> LIFSettings:
        return lif_settings(
            tau=self.tau,
            decay_input=self.decay_input,
            factored_leak=_factored_leak(self),
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            charged=charged,
            through_time=self.through_time,
            surrogate=surrogate,
        )

    def _covers_parameters(self) -> bool:
        return _is_number(self.tau) and super()._covers_parameters()


class _FusedOnlineLIF(_FusedLIF):
    """SpikingJelly's own ``SLTTLIFNode``, which has a surrogate in training only, and itself holds its state constant."""

    _surrogate_in_eval = False

    def _settings(self, surrogate: Surrogate, charged: bool = False) -> LIFSettings:
        return super()._settings(surrogate, charged)._replace(through_time=False)


class _FusedParametricLIF(FusedNode):
    def _settings(self, surrogate: Surrogate, charged: bool = False) -> LIFSettings:
        return lif_settings(
            decay_input=self.decay_input,
            factored_leak=_factored_leak(self),
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            charged=charged,
            through_time=self.through_time,
            surrogate=surrogate,
        )

    def _decay(self, x: Tensor) -> Tensor | None:
        return decay_of(self.w, x)

    def _covers_parameters(self) -> bool:
        return self.w.dim() == 0 and super()._covers_parameters()


def _factored_leak(node: Any) -> bool:
    """Whether the leak is ``v (1 - 1 / tau)``, as 0.0.0.0.14 has it, and not ``v - v / tau``: they round differently."""
    return not FUNCTIONAL_FORM and not node.decay_input and not node.v_reset


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


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
_RULES = {cls.original: cls.__bases__[0] for cls in _EXPLICIT.values()}
if hasattr(neuron, "SLTTLIFNode"):
    _RULES = {neuron.SLTTLIFNode: _FusedOnlineLIF, **_RULES}

_DYNAMICS = [
    "apply_hard_reset",
    "apply_soft_reset",
    "forward",
    "jit_hard_reset",
    "jit_soft_reset",
    "materialize_states",
    "multi_step_forward",
    "multi_step_functional_forward",
    "neuronal_charge",
    "neuronal_fire",
    "neuronal_reset",
    "single_step_forward",
    "single_step_functional_forward",
    "v_float_to_tensor",
]


@register_adapter(*_RULES)
def _fused_or_stepwise(module: nn.Module) -> type[SLTTNeuron]:
    cls = type_before_parametrizations(module)
    known_surrogate(getattr(module, "surrogate_function", None))  # made here, not while a step is compiled
    if cls in _EXPLICIT:
        return _EXPLICIT[cls]
    for original, rules in _RULES.items():
        if isinstance(module, original) and _same_dynamics(cls, original):
            return adapter_subclass(rules, cls)
    return stepwise(module)


def _same_dynamics(cls: type[nn.Module], original: type[nn.Module]) -> bool:
    """Whether a subclass changes nothing of how the neuron computes (only its defaults, say)."""
    return all(getattr(cls, name, None) is getattr(original, name, None) for name in _DYNAMICS)
