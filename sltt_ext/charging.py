"""Neurons held where a step begins: on entry of ``forward``, and at every further ``neuronal_charge`` inside of it.

The older neurons of SpikingJelly compute a step as ``neuronal_charge(x)``, ``neuronal_fire()`` and ``neuronal_reset(spike)``,
and loop over time in a ``forward`` of their own. What is carried when a step begins is a constant in it; what the step
computes of it is the class's own business. Nothing in here imports SpikingJelly: a class is taken for what it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron, constant, snapshot, tensors_in

__all__ = ["ChargeHeld", "EntryHeld", "check_charges", "follows", "place"]

RECORDED = ("v_seq", "spike_seq")
"""What a neuron keeps of a whole sequence for others to read: it enters no step."""


class EntryHeld(SLTTNeuron, nn.Module):
    """A module that runs one step a call: what it carries is constant when ``forward`` begins.

    Carried is what is registered with ``register_memory``, and every tensor that an earlier call has left in a plain
    attribute.
    """

    keeps_steps_apart = True

    @property
    def multi_step(self) -> bool:
        return False

    def reset_state(self) -> None:
        cast(Any, self).reset()

    def detach_state(self) -> None:
        memories, own = self._held_memories(), vars(self)
        memories.update({name: constant(value) for name, value in memories.items()})
        own.update({name: constant(value) for name, value in self._held_tensors() if _has_graph(value)})

    def stores(self) -> tuple[dict[str, Any]]:
        """The dictionary of states, for whoever puts a moment back."""
        return (self._held_memories(),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        steps, memories, left = self.steps_of(*args), self._held_memories(), self._sltt_left
        carried = [value for name, value in memories.items() if name not in RECORDED]
        self._begin_step(*tensors_in(carried))
        for name, value in memories.items():
            if name not in RECORDED:
                memories[name] = self._entering(value, steps)
        kept = {name: value for name, value in self._held_tensors() if id(value) in left}
        vars(self).update({name: self._entering(value, steps) for name, value in kept.items()})
        entered = snapshot([memories, dict(self._held_tensors())])
        output = self._held_forward(*args, **kwargs)
        self._end_step([memories, dict(self._held_tensors())], entered)
        return output

    def _held_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        return super().forward(*args, **kwargs)

    def _held_memories(self) -> dict[str, Any]:
        """SpikingJelly's dictionary of states; the oldest neurons have none, and keep plain attributes."""
        return cast(dict[str, Any], vars(self).get("_memories", {}))

    def _held_tensors(self) -> Iterator[tuple[str, Any]]:
        """Tensors in plain attributes."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))


class ChargeHeld(EntryHeld):
    """A neuron that begins a step with ``neuronal_charge``, however many of them its ``forward`` runs."""

    def _held_forward(self, *args: Any, **kwargs: Any) -> Any:
        own, told = vars(self), self.told_steps
        own["_sltt_call"] = self.steps_of(*args), told
        own["_sltt_charges"], own["_sltt_before"] = 0, {}
        own["_sltt_drives"], own["_sltt_charged"] = set(), set()
        own["_sltt_inputs"] = {tensor.grad_fn for tensor in tensors_in((args, kwargs))}
        device_backend = getattr(self, "backend", None)
        if device_backend == "cupy":  # its kernel runs all steps, with a gradient through time
            self.backend = "torch"
        try:
            output = super()._held_forward(*args, **kwargs)
            charges = own["_sltt_charges"]
        finally:
            if device_backend == "cupy":
                self.backend = device_backend
            self._tell_again(told)
            for name in ("call", "charges", "before", "drives", "charged", "inputs"):
                del own[f"_sltt_{name}"]
        if not (charges or self.through_time) and any(tensor.requires_grad for tensor in tensors_in(output)):
            raise ConfigurationError(
                f"the forward of {self.original.__name__} ran without neuronal_charge, but that is where its state is held "
                "constant: declare its step with sltt_ext.declare_neuron"
            )
        return output

    def neuronal_charge(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        if "_sltt_charges" in own:
            if own["_sltt_charges"]:
                self._begin_next_step(args)
            own["_sltt_charges"] += 1
            own["_sltt_before"] = {name: id(value) for name, value in self._held_tensors()}
            own["_sltt_drives"] |= set(map(place, tensors_in(args)))
        result = cast(Any, super()).neuronal_charge(*args, **kwargs)
        if "_sltt_charges" in own:
            own["_sltt_charged"] |= {place(state) for state in self._held_states()}
        return result

    def _begin_next_step(self, drive: Any) -> None:
        """Within one call, another step begins: through time, or with what the one before has left as a constant."""
        own = vars(self)
        if not self.through_time:
            self._hold_between_steps(drive)
        self._tell_own_step(own["_sltt_charges"], *own["_sltt_call"])

    def _hold_between_steps(self, drive: Any) -> None:
        """Within one call, what the step before has left is a constant, whoever else has told what.

        Raises:
            ConfigurationError: If the step has read it before it charges.
        """
        memories, own = self._held_memories(), vars(self)
        carried = [name for name in memories if name not in RECORDED]
        before = own["_sltt_before"]
        left = [name for name, value in self._held_tensors() if before.get(name) != id(value)]
        states = {place(state) for state in self._held_states()}
        earlier = (states | own["_sltt_charged"]) - own["_sltt_drives"]
        if any(follows(tensor, earlier, own["_sltt_inputs"]) for tensor in tensors_in(drive)):
            raise ConfigurationError(
                f"{self.original.__name__} reads a value of the previous step before it calls neuronal_charge, which is where it is "
                "held constant: read it in neuronal_charge, or declare its step with sltt_ext.declare_neuron"
            )
        memories.update({name: constant(memories[name]) for name in carried})
        own.update({name: constant(own[name]) for name in left})

    def _held_states(self) -> Iterator[Tensor]:
        """The tensors with a graph that the step has left so far."""
        own, before = vars(self), vars(self)["_sltt_before"]
        yield from tensors_in(
            [value for name, value in self._held_memories().items() if name not in RECORDED]
        )
        yield from (own[name] for name, value in self._held_tensors() if before.get(name) != id(value))


def place(tensor: Tensor) -> tuple[Any, int]:
    """Where in the graph a tensor comes from."""
    return tensor.grad_fn, tensor.output_nr


def follows(tensor: Tensor, earlier: Collection[tuple[Any, int]], inputs: Collection[Any]) -> bool:
    """Whether ``tensor`` was computed from one of the ``earlier`` places, this side of the ``inputs``."""
    seen, waiting = set(), [place(tensor)]
    while waiting:
        one = waiting.pop()
        if one[0] is None or one in seen or one[0] in inputs:
            continue
        if one in earlier:
            return True
        seen.add(one)
        waiting += one[0].next_functions
    return False


def check_charges(cls: type[nn.Module], known: Collection[str], through: Collection[str] = ()) -> None:
    """See that a class that computes a step in a ``forward`` of its own begins it with ``neuronal_charge``.

    Args:
        cls: The neuron's class.
        known: Names of a framework's own classes, which are not looked into.
        through: Methods of theirs that charge, if the class calls them instead.

    Raises:
        UnsupportedModuleError: If none of the methods written for it does.
    """
    own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    own = [base for base in own if base.__name__ not in known]
    if not any("forward" in vars(base) for base in own):
        return
    methods = [value for base in own for value in vars(base).values() if isinstance(value, FunctionType)]
    if not {name for method in methods for name in method.__code__.co_names} & {"neuronal_charge", *through}:
        raise UnsupportedModuleError(
            "overrides forward, so that its state cannot be held constant; begin each step with neuronal_charge, or "
            f"declare its step: sltt_ext.declare_neuron({cls.__name__}, ...)"
        )


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None
