"""The interface every converted neuron satisfies, whatever framework it comes from.

SLTT keeps a neuron's forward pass and drops the temporal part of its gradient: the state that
enters time step t is a constant (Meng et al. 2023, Sec. 4.1). All that `sltt_ext.online` relies on
is in `StatefulModule`; all that two adapters share is in this file.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError


class StatefulModule:
    """What the time loop knows of a module that carries state, or of a network in which modules do.

    Attributes:
        whole_sequence: The module needs all T steps in one call; it cannot be given them in parts.
        keeps_steps_apart: Norms inside of the module read one step at a time, however many steps a call has.
    """

    whole_sequence: bool = False
    keeps_steps_apart: bool = False

    @property
    def multi_step(self) -> bool:
        """Whether the module takes whole sequences ``[T, N, ...]`` rather than one step ``[N, ...]``."""
        raise NotImplementedError

    def reset_state(self) -> None:
        """Forget the carried state: the next step is the first of a new sequence."""
        raise NotImplementedError

    def detach_state(self) -> None:
        """Make the carried state a constant, and so let go of the graph that computed it."""
        raise NotImplementedError


class SLTTNeuron(StatefulModule):
    """Mixin of every converted stateful module.

    An adapter is a subclass of both this class and the framework's own class, so that a neuron is
    converted in place by setting its ``__class__``.

    Attributes:
        original: The class the adapter stands in for.
        caveat: What a user has to know of SLTT's gradient through it; `convert` says it in a warning.
        sltt_backend: What its fused operator runs on.
    """

    original: ClassVar[type[nn.Module]]
    caveat: ClassVar[str] = ""
    sltt_backend: str = "auto"
    _made_from: ClassVar[tuple[type[SLTTNeuron], type[nn.Module]] | None] = None
    _sltt_left: tuple[int, ...] = ()

    @property
    def fires(self) -> bool:
        """Whether it is a neuron: dropout, synapse filters and containers carry state, or take sequences, and are none."""
        return True

    @classmethod
    def check_backend(cls, module: nn.Module, backend: str) -> None:
        """Nothing if ``backend`` runs ``module``, once it is converted; what runs by the generic rule needs none.

        Raises:
            BackendError: If a fused operator would run it, and the backend does not.
        """

    def spikes(self, output: Any) -> tuple[Tensor, Tensor | None] | None:
        """Spikes in what the module returned, and what one spike counts (None: 1); None where it may hold other numbers."""
        return None

    def steps_of(self, *args: Any) -> int:
        """How many time steps the module runs when it is called with ``args``."""
        return len(args[0]) if self.multi_step else 1

    def carry_charged(self, on: bool) -> None:
        """Whether to carry, from step to step, the tensor that backward reads instead of one more.

        For the time loop: on after the reset, off at the end. The state is what it is at any time, to everyone
        who reads it; a neuron that carries nothing else than what backward reads has nothing to do.
        """

    def _begin_step(self, *state: Any) -> None:
        """Before a step from ``state``, the tensors that the module carries.

        Raises:
            ConfigurationError: If the step is run again in a backward pass, by checkpointing, from the state that its
                first run has left behind. With the state restored, as SpikingJelly's memopt does, it may be.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        if any(id(tensor) in self._sltt_left for tensor in state):
            raise ConfigurationError(
                f"{self.original.__name__} runs again in the backward pass, where it would go on from the state it has "
                "ended with: keep neurons out of torch.utils.checkpoint (the trainer's pack_spikes=True saves memory, "
                "too, and SpikingJelly's memopt restores states)"
            )

    def _end_step(self, *state: Any) -> None:
        """After a step: the tensors that it has left in the place of those that entered."""
        if not torch.compiler.is_compiling():
            self.__dict__["_sltt_left"] = tuple(id(tensor) for tensor in state if isinstance(tensor, Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deep-copy a class made at run time by what it was made from: it has no importable name."""
        reduced = super().__reduce_ex__(protocol)
        if self._made_from is None or isinstance(reduced, str):
            return reduced
        return (_new_instance, self._made_from, *reduced[2:])


_MADE: dict[tuple[type[SLTTNeuron], type[nn.Module]], type[SLTTNeuron]] = {}


def adapter_subclass(adapter: type[SLTTNeuron], original: type[nn.Module]) -> type[SLTTNeuron]:
    """The class of a converted ``original``, made once from the rules in ``adapter``."""
    rules = (adapter, original)
    if rules not in _MADE:
        namespace = {
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "original": original,
            "_made_from": rules,
        }
        _MADE[rules] = type(f"SLTT{original.__name__}", rules, namespace)
    return _MADE[rules]


def _new_instance(adapter: type[SLTTNeuron], original: type[nn.Module]) -> SLTTNeuron:
    cls = adapter_subclass(adapter, original)
    return cls.__new__(cls)


def constant(state: Any) -> Any:
    """A carried state as a constant for the gradient, also inside tuples, lists and dicts."""
    if isinstance(state, Tensor):
        return state.detach() if state.requires_grad else state
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(constant, state))
    if isinstance(state, (tuple, list)):
        return type(state)(map(constant, state))
    if isinstance(state, dict):
        return {key: constant(value) for key, value in state.items()}
    return state


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype membrane potentials are computed and kept in: float32 for half-precision inputs."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
