"""Check that one call of the network is as many time steps as the time loop says: neurons count, and the batch size is compared.

The time loop tells each call how many steps it has. A network may run other steps than these: it may have its own time loop,
reset its neurons in ``forward``, or take the batch for time. The first iteration and the first prediction are watched for
this. Afterwards only the steps of calls that stand for several are counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, listed, warn
from sltt_ext.forwards import Layer
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.silent import Silence
from sltt_ext.online.storages import storage_of

__all__ = ["CallsAround", "FirstCalls", "NeuronSteps"]

_RUNS = (
    "runs {} time steps in a call of {}: if forward loops or repeats x over time, make it run one step (the trainer "
    "does the rest), or use over_time(net, time_inside=) with the name of what holds the number of steps: an attribute 'T', or "
    "the argument 'x' if forward goes through all steps that x has; or use convert alone, and your own backward; if a step uses "
    "the neuron at several places, this is right"
)
_SINGLE = (
    "has step_mode 's' and is given [T, N, ...], and so takes time for the batch: set the step mode of the whole network, "
    "functional.set_step_mode(net, 'm')"
)
_RESET = (
    "is reset in the middle of a sequence: leave the reset out of forward, as the trainer resets before each sequence; if forward "
    "makes its states there, have it take and return them, and use sltt_ext.snntorch.Stateful(net)"
)
_RESTARTS = (
    "is given a state at rest in the middle of a sequence: if forward makes its states itself, have it take and return them, and use "
    "sltt_ext.snntorch.Stateful(net), or leave them to the neurons (init_hidden=True)"
)


_Left = dict[str, tuple["ReferenceType[Any]", bool]]


class FirstCalls:
    """What is said, once, of the first calls of a network.

    Attributes:
        runs: Whether the network runs: a call has begun, and nothing has been returned.
        batch: How many samples the network is called with, if all tensors that it is called with have the same number of them.
        other_batch: What is to be said of the batch of the output, if anything.
        silence: Which layers have not fired.
    """

    def __init__(self) -> None:
        self.silence = Silence()
        self.runs = False
        self.other_batch = ""
        self._watched: set[bool] = set()  # passes that learn, and others
        self._said: set[str] = set()
        self.batch: int | None = None
        self._axis = 0

    def watches(self, one: Pass) -> bool:
        """Whether a pass is the first of its kind."""
        return one.learns not in self._watched

    def watched(self, one: Pass) -> None:
        """A pass is over."""
        self._watched.add(one.learns)

    def says(self, found: dict[str, str]) -> None:
        """Warn of neurons, path -> what they do, that were not warned of."""
        new = {path: text for path, text in found.items() if path not in self._said}
        if new:
            self._said |= new.keys()
            warn(
                listed(
                    "the trainer calls the network for each time step, but a call does something else than that step:",
                    new,
                )
            )

    def shown(self, frame: Any, multi_step: bool) -> None:
        """Note the batch of what the network is called with, if all that is in it has the same."""
        self._axis = int(multi_step)
        leaves = [leaf for leaf in tree_leaves(frame) if isinstance(leaf, Tensor)]
        batches = {leaf.shape[self._axis] for leaf in leaves if leaf.dim() > self._axis}
        self.batch = batches.pop() if len(batches) == 1 else None

    def reading(self, output: Callable[[Any, int], Any], looks: bool = True) -> Callable[[Any, int], Any]:
        """``output`` of a pass, which looks at the batch, if it is known where that is, and at what is read."""

        def read(returned: Any, steps: int) -> Any:
            self.runs = False
            output_seq = output(returned, steps)
            self.silence.read(output_seq)
            if looks:
                self._look(output_seq)
            return output_seq

        return read

    def _look(self, output_seq: Any) -> None:
        """Note outputs ``[C, N, ...]`` of another batch, over which a loss may broadcast."""
        batch, self.batch = self.batch, None
        for leaf in tree_leaves(output_seq) if batch is not None else ():
            if leaf.dim() < 2 or leaf.shape[1] == batch:
                continue
            if leaf.shape[1] == 1 or (leaf.dim() > 3 and leaf.shape[2] == batch):
                self.other_batch = (
                    f"for a batch of {batch}, the output of one step has shape {list(leaf.shape[1:])}, with "
                    f"{leaf.shape[1]} in the place of the batch, and a loss may broadcast over it: does forward tell steps "
                    f"from samples by x.dim()? {_TAKES[self._axis]}"
                )


_TAKES = (
    "The trainer calls it with one step, [N, ...]",
    "The trainer calls it with sequences, [T, N, ...], here of one step",
)


class NeuronSteps(SpeedUp):
    """Counts the steps that each neuron runs in a call, and sees which have been reset.

    Args:
        tell: Called with the reason, where one call of several steps is not those steps one by one.
        first: What is said of first calls.
        counts: Whether steps are counted whatever pass it is.
    """

    def __init__(self, tell: Callable[[str], None], first: FirstCalls, counts: bool) -> None:
        self._tell = tell
        self._first = first
        self._counts = counts
        self._watches = False
        self._one: Pass | None = None
        self._paths: dict[nn.Module, str] = {}
        self._steps: dict[nn.Module, int] = {}  # of this call
        self._left: dict[nn.Module, _Left] = {}  # what neurons carried after the last call
        self._resets: list[nn.Module] = []  # of this call
        self._found: dict[str, str] = {}  # what else neurons do in this call
        self._given: dict[nn.Module, Any] = {}  # the states that they were given before
        self._call: Call | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand around the neurons."""
        self._one, self._watches = one, self._first.watches(one) and not one.again
        if not (self._watches or self._counts):
            yield
            return
        neurons = [module for module in eager_modules(one.net) if isinstance(module, SLTTNeuron)]
        self._paths = {module: path for path, module in one.net.named_modules()}
        for neuron in neurons:
            one.replaced.forward(neuron, Layer.STEPS, self._count)
        yield
        self._first.watched(one)

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Compare the neurons' steps with the call's.

        Raises:
            ConfigurationError: If they differ in a call that stands for several, or nothing is carried between two calls.
        """
        self._steps, self._resets, self._found, self._first.runs = {}, [], {}, True
        self._call = call
        if self._watches and self._one is not None:
            self._first.shown(call.frame, self._one.multi_step)
        yield
        for neuron, steps in self._steps.items():
            if steps == call.steps:
                continue
            reason = f"a {type(neuron).__name__} runs {steps} steps in a call of {call.steps}"
            if len(call.parts) > 1:
                raise ConfigurationError(
                    f"several steps share a call of the network, and {reason}: give chunk=1, and no k"
                )
            self._tell(reason)
        if self._watches:
            self._judge(call)
            self._left = {neuron: _state(neuron) for neuron in self._steps}

    def _judge(self, call: Call) -> None:
        """Say what is no step of the network."""
        assert self._one is not None
        found = {
            self._paths[neuron]: f"a {_name(neuron)} " + _RUNS.format(steps, call.steps)
            for neuron, steps in self._steps.items()
            if steps != call.steps and isinstance(neuron, SLTTNeuron) and neuron.fires
        }
        carried = sum(bool(self._left.get(neuron)) for neuron in self._steps)
        if self._resets and self._one.multi_step and len(self._resets) == carried:
            raise ConfigurationError(
                "the network resets its neurons in forward, and the trainer calls it for parts of a sequence, between which "
                "no state would be carried: leave the reset out, as the trainer resets before each sequence; or give all steps in "
                "one call, chunk=time_steps without k"
            )
        for neuron in self._resets:
            found.setdefault(self._paths[neuron], f"a {_name(neuron)} {_RESET}")
        found |= self._found
        if self._first.other_batch:
            found[""] = self._first.other_batch
        self._first.says(found)

    def _count(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._first.runs:  # in the loss, or again in the backward pass, by checkpointing
            return forward(*args, **kwargs)
        left = self._left.get(module)
        if self._watches and left and module not in self._steps and _is_reset(left, module.carried()):
            self._resets.append(module)
        if self._watches:
            self._look_at_arguments(module, args, kwargs)
        self._steps[module] = self._steps.get(module, 0) + (module.steps_of(*args) if args else 1)
        return forward(*args, **kwargs)

    def _look_at_arguments(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See that a neuron is given what its last step has left, and one step of it.

        Raises:
            ConfigurationError: If it is given what the network was called with, at a later step as well.
        """
        one, call, batch = self._one, self._call, self._first.batch
        assert one is not None
        assert call is not None
        path, carried = self._paths[module], module.carried()
        named = dict(zip(list(inspect.signature(module.original.forward).parameters)[1:], args)) | kwargs
        states = {
            name: value for name, value in named.items() if name in carried and isinstance(value, Tensor)
        }
        if states and (
            module in self._left or (call.steps > 1 and not one.multi_step and module in self._steps)
        ):
            shown = {storage_of(leaf) for leaf in tree_leaves(call.frame) if isinstance(leaf, Tensor)}
            if self._given[module] == _moment(states) and not shown.isdisjoint(
                map(storage_of, states.values())
            ):
                raise ConfigurationError(
                    f"{path!r} is given a state that the network was called with, the same one at every time step: "
                    "states that forward takes and returns have to go from step to step, so wrap the network, "
                    "sltt_ext.snntorch.Stateful(net), and call it with the input alone; or leave them to the neurons (init_hidden=True)"
                )
            left = [carried[name] for name in states]
            if (
                module not in self._steps
                and all(map(_is_rest, states.values()))
                and not all(map(_is_rest, left))
            ):
                self._found[path] = f"a {_name(module)} {_RESTARTS}"
        self._given[module] = _moment(states)
        takes_steps = one.multi_step and not module.multi_step and batch != call.steps
        if (
            takes_steps
            and args
            and isinstance(args[0], Tensor)
            and tuple(args[0].shape[:2]) == (call.steps, batch)
        ):
            self._found[path] = f"a {_name(module)} {_SINGLE}"


class CallsAround:
    """Sees calls that look like the user's own loop over time, around a network that runs over time already."""

    def __init__(self) -> None:
        self._calls = self._alike = 0
        self._offsets: set[Any] = set()  # of these inputs, in their storage
        self._last: Callable[[], Tensor | None] = lambda: None
        self._since: tuple[Any, ...] = ()

    def look(self, net: nn.Module, x: Tensor | None, time_steps: int, backwards: int) -> None:
        """Warn, once, of T calls in a row with the same input, or with one step after the other of a sequence.

        Args:
            net: The network.
            x: What it is called with.
            time_steps: T.
            backwards: How many backward passes there were so far.
        """
        self._calls += 1
        if self._calls > 4 * time_steps or time_steps < 3 or x is None or x.is_inference():
            return
        base = x._base
        whole, is_step = x, False
        if base is not None and tuple(base.shape) == (time_steps, *x.shape):
            whole, is_step = base, True
        weights = sum(weight._version for weight in net.parameters())
        since = (whole._version, is_step, backwards, weights)
        if self._last() is not whole or self._since != since:
            self._alike, self._offsets = 0, set()
        self._last, self._since = ref(whole), since
        self._alike += 1
        self._offsets.add(x.storage_offset())
        if self._alike == time_steps and len(self._offsets) in (1, time_steps):
            self._calls = 4 * time_steps  # said once
            is_step = len(self._offsets) > 1
            given = f"the {time_steps} steps of a sequence" if is_step else "the same input"
            warn(
                f"the network was called {time_steps} times in a row with {given}, and runs over {time_steps} time steps in each of these "
                f"calls: if this is your own loop over time, call the network once instead{', with time_dim=0' * is_step}; or use "
                "sltt_ext.convert alone, and keep the loop"
            )


def _name(neuron: Any) -> str:
    return str(neuron.original.__name__)


def _moment(states: dict[str, Tensor]) -> dict[str, Any]:
    """Which numbers states are."""
    return {
        name: (storage_of(state), state.storage_offset(), state._version) for name, state in states.items()
    }


def _state(neuron: Any) -> _Left:
    """What a neuron carries: each of it by name, and whether it is a tensor. It is not kept alive."""
    state = {name: value for name, value in neuron.carried().items() if not _is_rest_number(value)}
    return {
        name: (ref(value), isinstance(value, Tensor))
        for name, value in state.items()
        if not isinstance(value, (tuple, list, dict))
    }


def _is_reset(left: _Left, found: dict[str, Any]) -> bool:
    """Whether all that was ``left`` and is not there any more is at rest."""
    changed = [
        value
        for name, (before, is_tensor) in left.items()
        # what stands in for a tensor becomes one where somebody reads it
        if (value := found.get(name)) is not before() and (is_tensor or not isinstance(value, Tensor))
    ]
    return bool(changed) and all(map(_is_rest, changed))


def _is_rest(value: Any) -> bool:
    """Whether a state is what a reset makes of it: no tensor any more, or nothing but zeros."""
    if isinstance(value, Tensor):
        return not value.numel() or (type(value) is Tensor and not bool(value.any()))
    return _is_rest_number(value)


def _is_rest_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str))
