"""Check that one call of the network is as many time steps as the time loop says: neurons count, and the batch size is compared.

The time loop tells each call how many steps it has. A network may run other steps than these: it may have its own time loop,
reset its neurons in ``forward``, or take the batch for time. The first iteration and the first prediction are watched for
this. Afterwards only the steps of calls that stand for several are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, SLTTWarning, listed
from sltt_ext.forwards import Layer
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.silent import Silence

__all__ = ["FirstCalls", "NeuronSteps"]

_RUNS = (
    "runs {} time steps in a call of {}: if forward loops or repeats x over time, make it run one step (the trainer "
    "does the rest), or use over_time(time_inside=) or convert alone, and your own backward; if a step uses the neuron at several places, this is "
    "right"
)
_RESET = "is reset in the middle of a sequence: leave the reset out of forward, as the trainer resets before each sequence"


_Left = dict[str, tuple["ReferenceType[Any]", bool]]


class FirstCalls:
    """What is said, once, of the first calls of a network.

    Attributes:
        runs: Whether the network runs: a call has begun, and nothing has been returned.
        other_batch: What is to be said of the batch of the output, if anything.
        silence: Which layers have not fired.
    """

    def __init__(self) -> None:
        self.silence = Silence()
        self.runs = False
        self.other_batch = ""
        self._watched: set[bool] = set()  # passes that learn, and others
        self._said: set[str] = set()
        self._batch: int | None = None
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
            warnings.warn(
                listed(
                    "the trainer calls the network for each time step, but a call does something else than that step:",
                    new,
                ),
                SLTTWarning,
                stacklevel=2,
            )

    def shown(self, frame: Any, multi_step: bool) -> None:
        """Note the batch of what the network is called with, if all that is in it has the same."""
        self._axis = int(multi_step)
        leaves = [leaf for leaf in tree_leaves(frame) if isinstance(leaf, Tensor)]
        batches = {leaf.shape[self._axis] for leaf in leaves if leaf.dim() > self._axis}
        self._batch = batches.pop() if len(batches) == 1 else None

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
        batch, self._batch = self._batch, None
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
        self._steps, self._resets, self._first.runs = {}, [], True
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
        if self._first.other_batch:
            found[""] = self._first.other_batch
        self._first.says(found)

    def _count(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._first.runs:  # in the loss, or again in the backward pass, by checkpointing
            return forward(*args, **kwargs)
        left = self._left.get(module)
        if self._watches and left and module not in self._steps and _is_reset(left, module.carried()):
            self._resets.append(module)
        self._steps[module] = self._steps.get(module, 0) + (module.steps_of(*args) if args else 1)
        return forward(*args, **kwargs)


def _name(neuron: Any) -> str:
    return str(neuron.original.__name__)


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
