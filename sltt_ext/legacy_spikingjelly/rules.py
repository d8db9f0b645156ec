"""Which adapter each class of `spikingjelly.clock_driven` gets, by its name: installed, or copied into a code base."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from sltt_ext.charging import EntryHeld, check_charges
from sltt_ext.conversion import register_adapter
from sltt_ext.errors import UnsupportedModuleError
from sltt_ext.legacy_spikingjelly.fused import FusedNode, LegacyNode, is_fused
from sltt_ext.legacy_spikingjelly.names import LAYERS, NEURONS, base_of, takes_sequences
from sltt_ext.neuron import SLTTNeuron, adapter_subclass, framework_neurons
from sltt_ext.sequences import Container, RecurrentCell, WholeSequence
from sltt_ext.time_invariant import register_folding, register_time_invariant

__all__: list[str] = []


class Layer(EntryHeld):
    """A layer that carries a state from step to step: a filter, or a container that feeds its output back."""

    @property
    def fires(self) -> bool:
        return False


class Masked(Layer):
    """Dropout over time: its mask is drawn once a sequence, and passes no gradient."""

    @property
    def multi_step(self) -> bool:
        return takes_sequences(self)

    def _begin_step(self, *state: Any) -> None:
        """Run again, it drops the same."""


@register_adapter("BaseNode", "MemoryModule")
def _stateful(module: nn.Module) -> type[SLTTNeuron] | None:
    cls: Any = type(module)
    memory_module = base_of(cls, "MemoryModule")
    if memory_module is not None and hasattr(memory_module, "register_memory"):
        framework_neurons(memory_module, lambda module: bool(vars(module).get("_memories")))
    if hasattr(cls, "neuronal_charge"):
        return _neuron(module)
    if memory_module is None or not hasattr(memory_module, "register_memory"):
        return None  # a class of the same name, of something else
    known = next((base for base in cls.__mro__ if base.__name__ in LAYERS and "forward" in vars(base)), None)
    if known is None or cls.forward is not known.forward:
        raise UnsupportedModuleError(
            "has its own forward, which may run one step or many; if it runs one, declare that and the state it carries: "
            f"sltt_ext.declare_neuron({cls.__name__}, state=('...',))"
        )
    if getattr(module, "invariant", False):
        raise UnsupportedModuleError(
            "with invariant=True it carries its weights over time as state, which SLTT would hold constant; use "
            "invariant=False, or Dropout, which keeps its mask over time"
        )
    return adapter_subclass(Masked if hasattr(cls, "create_mask") else Layer, cls)


def _neuron(module: nn.Module) -> type[SLTTNeuron]:
    if getattr(module, "backend", None) == "lava":
        raise UnsupportedModuleError(
            "runs whole sequences in Lava's kernels, with a gradient through time; use backend='torch'"
        )
    if is_fused(module):
        return adapter_subclass(FusedNode, type(module))
    check_charges(type(module), NEURONS, through=("forward", "single_step_forward", "multi_step_forward"))
    return adapter_subclass(LegacyNode, type(module))


@register_adapter("MultiStepContainer")
def _container(module: nn.Module) -> type[SLTTNeuron] | None:
    return adapter_subclass(Container, type(module)) if isinstance(module, nn.Sequential) else None


@register_adapter("SeqToANNContainer")
def _folding(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential):
        register_folding(type(module))
        register_time_invariant(type(module))


@register_adapter("SpikingRNNCellBase")
def _cell(module: nn.Module) -> type[SLTTNeuron] | None:
    return adapter_subclass(RecurrentCell, type(module)) if hasattr(module, "weight_hh") else None


@register_adapter("SpikingRNNBase")
def _recurrent_network(module: nn.Module) -> type[SLTTNeuron] | None:
    return adapter_subclass(WholeSequence, type(module)) if hasattr(module, "base_cell") else None


@register_adapter("MultiStepTemporalWiseAttention")
def _attention(module: nn.Module) -> NoReturn:
    raise UnsupportedModuleError("attends over all time steps at once; remove it or train with BPTT")
