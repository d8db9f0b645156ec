"""IF, LIF and parametric LIF neurons of `spikingjelly.clock_driven` through the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.charging import ChargeHeld
from sltt_ext.errors import ConfigurationError
from sltt_ext.functional.inputs import broadcasts
from sltt_ext.functional.lif_operator import decay_of, lif_settings, run_lif
from sltt_ext.kernels import check_backend
from sltt_ext.kernels.lif import LIF, LIFSettings
from sltt_ext.legacy_spikingjelly.comparison import computes_as_fused
from sltt_ext.legacy_spikingjelly.names import NEURONS, kind_of, takes_sequences
from sltt_ext.legacy_spikingjelly.surrogates import known_surrogate

__all__ = ["FusedNode", "LegacyNode", "is_fused"]


class LegacyNode(ChargeHeld):
    """Any neuron that begins a step with ``neuronal_charge``."""

    @property
    def multi_step(self) -> bool:
        return takes_sequences(self)


class FusedNode(LegacyNode):
    """A neuron that runs through the fused operator, and by the generic rule where that does not cover its settings."""

    v: Any
    v_seq: Any
    _sltt_without_v_seq: bool = False

    @classmethod
    def check_backend(cls, module: nn.Module, backend: str) -> None:
        check_backend(backend, LIF)

    def __getattr__(self, name: str) -> Any:
        if name == "v_seq" and self._sltt_without_v_seq:
            raise ConfigurationError(
                f"{self.original.__name__} did not keep v_seq, which would cost a tensor for each step: set its attribute "
                "store_v_seq = True before the call"
            )
        return super().__getattr__(name)

    def spikes(self, output: Any) -> tuple[Tensor, None] | None:
        """All that it returns, as long as it is one of the three: what a changed copy fires may be anything."""
        return None if fused_settings(self) is None or not isinstance(output, Tensor) else (output, None)

    def reset_state(self) -> None:
        vars(self).pop("_sltt_without_v_seq", None)
        super().reset_state()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_sltt_without_v_seq", None)
        settings, sequence = None if args or kwargs else fused_settings(self), self.multi_step
        if settings is not None and self.through_time:
            keeps_potentials = sequence and len(x) > 1 and getattr(self, "store_v_seq", False)
            settings = None if keeps_potentials else settings._replace(through_time=True)
        if settings is None or not self._covers(x, sequence):
            return super().forward(x, *args, **kwargs)
        if not sequence:
            return self._run_fused(x, settings, single_step=True)
        if len(x) > 1 and getattr(self, "store_v_seq", False):
            spikes, potentials = [], []
            for step in x:
                spikes.append(self._run_fused(step, settings, single_step=True))
                potentials.append(self.v)
            self.v_seq = torch.stack(potentials)
            return torch.stack(spikes)
        s_seq = self._run_fused(x, settings, single_step=False)
        self.v_seq = self.v.unsqueeze(0) if len(x) == 1 else None
        if len(x) > 1:
            vars(self)["_sltt_without_v_seq"] = True
        return s_seq

    def _run_fused(self, x: Tensor, settings: LIFSettings, single_step: bool) -> Tensor:
        v = self.v
        self._begin_step(v)
        if settings.through_time:
            v = self._entering(v, 1 if single_step else len(x))
        decay = decay_of(self.w, x) if "w" in self._parameters else None
        s, v = run_lif(x, v, decay, settings, backend=self.sltt_backend, single_step=single_step)
        self._end_step(v)
        self.v = v
        return s

    def _covers(self, x: Tensor, sequence: bool) -> bool:
        """Whether the operator runs that input from the state that there is."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0 or x.dim() < 1 + sequence:
            return False
        v, step = self.v, x.shape[1:] if sequence else x.shape
        if not isinstance(v, Tensor):
            return True
        if not self.through_time and self._keeps(v, len(x) if sequence else 1):
            return False
        return v.shape == step or not broadcasts(v.shape, step)


def fused_settings(node: Any) -> LIFSettings | None:
    """The settings that the operator needs to compute what a neuron does; None where it does something else."""
    v_threshold, v_reset = node.v_threshold, node.v_reset
    surrogate = known_surrogate(node.surrogate_function)
    kind = kind_of(type(node))
    tau = node.tau if kind == "LIFNode" else None
    numbers = (v_threshold, 0.0 if v_reset is None else v_reset, 1.0 if tau is None else tau)
    if surrogate is None or not all(isinstance(number, (int, float)) for number in numbers):
        return None
    decay_input = kind != "IFNode" and bool(node.decay_input)
    settings = lif_settings(
        tau=tau, decay_input=decay_input, factored_leak=kind != "IFNode" and not decay_input and not v_reset,
        v_threshold=v_threshold, v_reset=v_reset, detach_reset=bool(node.detach_reset), surrogate=surrogate,
    )  # fmt: skip
    original = getattr(node, "original", type(node))
    return settings if computes_as_fused(node, original, settings) else None


def is_fused(module: Any) -> bool:
    """Whether a neuron, as it is, is one of the three: in the methods that it has, and in the numbers they compute."""
    cls = type(module)
    steps = ("forward", "neuronal_charge", "neuronal_fire", "neuronal_reset")
    if "_memories_rv" not in vars(module) or kind_of(cls) is None:
        return False
    if not all(_is_defined_by_name(cls, method) for method in steps):
        return False
    settings = fused_settings(module)
    facts = tuple(
        (name, value) for name, value in vars(module).items() if isinstance(value, (int, float, str))
    )
    return settings is not None and computes_as_fused(module, cls, settings, facts)


def _is_defined_by_name(cls: type[nn.Module], method: str) -> bool:
    """Whether a method is of a class with a name of SpikingJelly's, and not of one that was derived from it."""
    owner = next(base for base in cls.__mro__ if method in vars(base))
    return owner.__name__ in NEURONS
