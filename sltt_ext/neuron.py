"""The interface every converted neuron satisfies, whatever framework it comes from.

SLTT keeps a neuron's forward pass and drops the temporal part of its gradient: the state that an earlier step has
left is a constant in time step t (Meng et al. 2023, Sec. 4.1). A neuron that goes *through time* keeps the whole gradient
within a call of the network, and what an earlier call has left is a constant. Any other state that enters, such as a
learned initial state, keeps its gradient. All that `sltt_ext.online` relies on is in `StatefulModule`; all that two adapters share is in
this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sltt_ext.errors import ConfigurationError

Temporal = Literal["step", "call"]


OLDEST_THAT_TRACES = (2, 12)
TRACES_NEURONS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST_THAT_TRACES
"""Whether `torch.compile` takes fused neurons apart into ordinary operators; with older releases they stay one operator each."""


def _stay() -> None:
    """Stands in for ``reset()`` in the middle of a sequence."""


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

    def instead_of_rest(self) -> dict[str, Callable[..., Any]]:
        """What stands in for its framework's own methods that put it to rest, by name, if a network calls them in the middle of a sequence.

        The state stays, and what the method returns of it is the state that is carried.
        """
        return {}

    def stores(self) -> Iterable[dict[str, Any]]:
        """Where it carries state, besides its buffers and plain attributes."""
        return ()


class Reclassed:
    """Mixin of a module whose class was exchanged, though it is no neuron."""

    def give_back_class(self) -> None:
        """Give the module the class it had before."""
        raise NotImplementedError


class SLTTNeuron(StatefulModule):
    """Mixin of every converted stateful module.

    An adapter is a subclass of both this class and the framework's own class, so that a neuron is
    converted in place by setting its ``__class__``.

    Attributes:
        original: The class the adapter stands in for.
        caveat: What a user has to know of SLTT's gradient through it; `convert` says it in a warning.
        sltt_backend: What its fused operator runs on.
        sltt_temporal: Where its carried state becomes a constant, on entry of each ``"step"`` or of each ``"call"``.
    """

    original: ClassVar[type[nn.Module]]
    caveat: ClassVar[str] = ""
    sltt_backend: str = "auto"
    sltt_temporal: Temporal = "step"
    _made_from: ClassVar[tuple[type[SLTTNeuron], type[nn.Module]] | None] = None
    _sltt_left: tuple[int, ...] = ()
    _sltt_steps: int | None = None
    _sltt_begun: int = 0
    _sltt_task: int = -1

    @property
    def fires(self) -> bool:
        """Whether it is a neuron: dropout, synapse filters and containers carry state, or take sequences, and are none."""
        return True

    @property
    def through_time(self) -> bool:
        """Whether the gradient goes back through time, within a call of the network."""
        return self.sltt_temporal == "call"

    def instead_of_rest(self) -> dict[str, Callable[..., Any]]:
        """Nothing in the place of its ``reset()``, if it has one."""
        return {"reset": _stay} if callable(getattr(self, "reset", None)) else {}

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

    def carried(self) -> dict[str, Any]:
        """What it keeps from step to step, by name, its state among it; as it is, for comparing."""
        return {name: value for store in self.stores() for name, value in store.items()}

    def carry_charged(self, on: bool) -> None:
        """Whether to carry, from step to step, the tensor that backward reads instead of one more.

        For the time loop: on after the reset, off at the end. The state is what it is at any time, also afterwards, to everyone
        who reads it; a neuron that carries nothing else than what backward reads has nothing to do.
        """

    def settle_state(self) -> None:
        """Have nothing stand in for the state any more: what comes next knows of none."""

    def potential(self, output: Any) -> tuple[Tensor, float] | None:
        """The potential ``h`` and the threshold of the spikes ``h >= threshold`` in what the module returned.

        Only where the module carries ``h`` anyway, laid out as the spikes are, until their backward pass.
        """
        return None

    def keep_charged(self) -> None:
        """Write over no tensor that is carried, from here on until `carry_charged` ends."""

    def state(self) -> Tensor | None:
        """The state, where it is one tensor that may be there from the first step on, as `rest_as` puts it."""
        return None

    def rest_as(self, state: Tensor) -> None:
        """Be at rest with ``state``, which is overwritten."""

    def tell_steps(self, steps: int | None) -> None:
        """Say that one call of the network begins, and of how many steps; None: that nobody says any more.

        Who says so makes the state constant after the call, by `detach_state`. What the neuron leaves within the call
        keeps its gradient until then: a neuron that runs twice in a step passes it on from one time to the other, as
        between two layers. Where nobody says so, or a call of the neuron has another number of steps than that of the
        network, it begins with another step. A neuron that goes through time needs no more than that somebody says so.
        """
        self.__dict__["_sltt_steps"] = steps
        if not torch.compiler.is_compiling():
            self.__dict__["_sltt_task"] = torch._C._current_graph_task_id()

    def begin_step(self) -> None:
        """Say that another step begins, within a call of the network that has several: earlier ones are over."""
        self.__dict__["_sltt_begun"] = self._sltt_begun + 1

    @property
    def told_steps(self) -> int | None:
        """What `tell_steps` has said last."""
        return self._sltt_steps

    def _entering(self, state: Any, steps: int = 1) -> Any:
        """``state`` as it enters a call of so many steps: constant where an earlier step has left it."""
        return _mapped(lambda tensor: tensor if self._keeps(tensor, steps) else tensor.detach(), state)

    def _keeps(self, state: Any, steps: int = 1) -> bool:
        """Whether the gradient goes on into the ``state`` that enters a call of the module of so many steps."""
        if not isinstance(state, Tensor) or not state.requires_grad or not torch.is_grad_enabled():
            return False
        told = self._sltt_steps
        if self.through_time and told is not None:
            return True
        if told == steps:  # what it has left in this very step, if the call of the network has several
            return not (self._sltt_begun and self._has_left(state, before=self._sltt_begun))
        return not self._has_left(state)

    def _tell_own_step(self, t: int, steps: int, told: int | None) -> None:
        """Say that step ``t`` of the module's own ``steps`` begins, which are all that it was ``told`` of, or others.

        Only the first may go on from what the module has left in the same call of the network. Through time, only the first
        may begin anew: where nobody has told of a call, this is one.
        """
        for neuron in self._neurons():
            if neuron.through_time:
                neuron.tell_steps(steps if t else told)
            else:
                neuron.tell_steps(1 if t == 0 and told == steps else None)

    def _tell_again(self, steps: int | None) -> None:
        for neuron in self._neurons():
            neuron.tell_steps(steps)

    def _neurons(self) -> list[SLTTNeuron]:
        """The module itself, and all converted modules in it."""
        return [module for module in cast(nn.Module, self).modules() if isinstance(module, SLTTNeuron)]

    def _has_left(self, state: Tensor, before: int | None = None) -> bool:
        """Whether the module itself has computed ``state``, or what it follows from, in an earlier call, or before a step."""
        if torch.compiler.is_compiling():
            return before is None  # a graph that is still traced cannot be asked
        seen, waiting = set(), [state.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            left = _notes(node).get(self._mark)
            if left is not None and (before is None or left < before):
                return True
            seen.add(node)
            if left is not None:
                continue
            waiting += [before for before, _ in node.next_functions]
        return False

    @property
    def _mark(self) -> tuple[str, int]:
        """In the graph, at what the module has left."""
        return "sltt_ext", id(self)

    def _leave(self, state: Any) -> None:
        """Mark ``state`` as what a step has left."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for tensor in tensors_in(state):
            if tensor.grad_fn is not None:
                _notes(tensor.grad_fn)[self._mark] = self._sltt_begun

    def _begin_step(self, *state: Any) -> None:
        """Before a step from ``state``, the tensors that the module carries.

        Raises:
            ConfigurationError: If the step is run again in a backward pass, by checkpointing, from the state that its
                first run has left behind. With the state restored, as SpikingJelly's memopt does, it may be.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() in (-1, self._sltt_task):
            return  # forward, or the time loop's own second run
        if any(id(tensor) in self._sltt_left for tensor in state):
            raise ConfigurationError(
                f"{self.original.__name__} runs again in the backward pass, where it would continue from its final "
                "state: keep neurons out of torch.utils.checkpoint (the trainer's pack_spikes=True saves memory, "
                "too, and SpikingJelly's memopt restores states)"
            )

    def _end_step(self, state: Any, entered: dict[int, tuple[Tensor, int]] | None = None) -> None:
        """After a step: which tensors of ``state`` it has left, in the place of those that ``entered`` (a `snapshot`)."""
        if torch.compiler.is_compiling():
            return
        left = [tensor for tensor in tensors_in(state) if not entered or _is_changed(tensor, entered)]
        self.__dict__["_sltt_left"] = tuple(map(id, left))
        self._leave(left)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deep-copy a class made at run time by what it was made from: it has no importable name."""
        reduced = super().__reduce_ex__(protocol)
        if self._made_from is None or isinstance(reduced, str):
            return reduced
        return (_new_instance, self._made_from, *reduced[2:])


CarriesState = Callable[[Any], bool]
_CARRIES_STATE: dict[type[nn.Module], CarriesState] = {}


def framework_neurons(cls: type[nn.Module], carries_state: CarriesState) -> None:
    """Say which modules of a framework carry state: unless they are converted, the time loop does not know it."""
    _CARRIES_STATE[cls] = carries_state


def is_unconverted(module: nn.Module) -> bool:
    """Whether a module carries state as a framework's neurons do, and is not converted."""
    if isinstance(module, SLTTNeuron):
        return False
    return any(isinstance(module, cls) and carries(module) for cls, carries in _CARRIES_STATE.items())


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
    return _mapped(Tensor.detach, state)


def _notes(node: torch.autograd.graph.Node) -> dict[Any, Any]:
    """What a node of a graph carries for whoever reads it."""
    return cast(dict[Any, Any], node.metadata)


def _mapped(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """``state`` with ``function`` of each tensor in it that requires a gradient."""
    if isinstance(state, Tensor):
        return function(state) if state.requires_grad else state
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_mapped(function, value) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(_mapped(function, value) for value in state)
    if isinstance(state, dict):
        return {key: _mapped(function, value) for key, value in state.items()}
    return state


def tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in a state, also inside tuples, lists and dicts."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, list, dict)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


def snapshot(state: Any) -> dict[int, tuple[Tensor, int]]:
    """The tensors in a state, and how often each has been changed in place; held, so that no later one has its id."""
    if torch.compiler.is_compiling():
        return {}
    return {id(tensor): (tensor, _version(tensor)) for tensor in tensors_in(state)}


def _is_changed(tensor: Tensor, entered: dict[int, tuple[Tensor, int]]) -> bool:
    return id(tensor) not in entered or entered[id(tensor)][1] != _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_taken_apart() -> bool:
    """Whether a step is taken apart by what knows a framework's own operators, and not the fused ones.

    That is an export to ONNX, `torch.func`, or a counter of SpikingJelly's.
    """
    if torch.onnx.is_in_onnx_export():
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(
        type(mode).__module__.startswith("spikingjelly.") for mode in _get_current_dispatch_mode_stack()
    )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype membrane potentials are computed and kept in: float32 for half-precision inputs."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
