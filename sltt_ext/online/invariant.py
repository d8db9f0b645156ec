"""What does not depend on time is evaluated once an iteration, not once a step.

A module is time-invariant where it is stateless and every tensor it is called with is the network's static
input or the output of another time-invariant module: the stem of a network that is shown one image, and every
weight parametrisation (``torch.nn.utils.parametrize``), which is called with nothing at all.

Its output is cut from the graph. What the steps read is a leaf, where their gradients add up; when the last
back-propagated step is done with it, so is the graph::

    first step              steps                         last step
    x -> stem -> leaf       leaf -> step t -> loss[t]     leaf -> step T -> loss[T] -> backward -> leaf -> stem's backward

The gradient is the sum over the steps, as before, added up at the invariant output and not at the parameters. A
parametrisation's backward runs as soon as the last step's has reached its weight, so that what it saved is free before
the next layer's turn; that of a stem after the step, in reverse order of evaluation.

Wrappers that synchronise gradients free the weights behind each layer, and send its gradient before the next one's. There
no graph is kept: the last step evaluates the module once more, behind a gate that adds what the leaf has gathered::

    last step
    x -> stem -> gate -> step T -> loss[T] -> backward -> gate, gradient of step T + what the leaf has gathered -> stem
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sltt_ext.errors import LossError
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.invariant_values import Known, Static, Statistics, Value
from sltt_ext.online.packing import Packing
from sltt_ext.stateless import is_counting_batch_norm, is_stateless

__all__ = ["InvariantPass", "Invariants"]


class Invariants:
    """The time-invariant modules of a network, as they turn out to be used.

    A module's output is handed to several steps only after one step has been seen to leave it as it is. That
    step gets a copy, so that it may do with it what it likes; a module whose output was changed in place is
    evaluated at every step from then on.
    """

    def __init__(self) -> None:
        self.trusted: WeakSet[nn.Module] = WeakSet()
        self.changed: WeakSet[nn.Module] = WeakSet()  # and those that return no tensor

    @contextmanager
    def evaluated_once(
        self,
        net: nn.Module,
        static: Tensor | None,
        multi_step: bool,
        *,
        differentiable: bool,
        enabled: bool,
        keeps_graphs: bool = True,
    ) -> Iterator[InvariantPass]:
        """Surround one pass through time.

        Args:
            net: The network.
            static: What it is shown at every step ``[N, ...]``; None where the input changes.
            multi_step: Whether the network takes sequences.
            differentiable: Whether steps of the pass are back-propagated.
            enabled: False evaluates every module at every step.
            keeps_graphs: False evaluates each module twice, the second time in the last back-propagated step:
                where its backward has to come between those of the modules around it, since a wrapper frees
                and sends weights then.
        """
        if not enabled or (static is not None and static.is_inference()):
            static = None  # an inference tensor does not count its changes
        invariant_pass = InvariantPass(self, static, multi_step, differentiable, keeps_graphs)
        patched = []
        try:
            for module in eager_modules(net) if enabled else ():
                if "forward" not in vars(module) and module not in self.changed and _is_candidate(module):
                    vars(module)["forward"] = partial(invariant_pass.forward, module, module.forward)
                    patched.append(module)
            yield invariant_pass
            invariant_pass.finish()
        finally:
            for module in patched:
                del vars(module)["forward"]
            invariant_pass.close()


class InvariantPass:
    """One pass through time; made by `Invariants.evaluated_once`.

    Attributes:
        saving: Context for what an evaluation saves: a network's own hooks (checkpointing, say) are for its steps.
    """

    def __init__(
        self,
        invariants: Invariants,
        static: Tensor | None,
        multi_step: bool,
        differentiable: bool,
        keeps_graphs: bool,
    ) -> None:
        self._invariants = invariants
        self._keeps_graphs = keeps_graphs
        self._multi_step = multi_step
        self._differentiable = differentiable
        self._values: dict[Any, Value] = {}
        self._static = None if static is None else Static(static, multi_step)
        self._parts: Sequence[int] = (1,)
        self._steps = 1
        self._selected = self._last = self._gates = self._evaluating = False
        self._known: dict[int, Known] = {}
        self._tried: list[tuple[nn.Module, Tensor]] = []
        self.saving: Callable[[], AbstractContextManager[Any]] = Packing().saving

    @contextmanager
    def call(self, frames: Any, parts: Sequence[int], selected: bool, last: bool) -> Iterator[None]:
        """Surround forward and backward of one call of the network.

        Args:
            frames: Its input.
            parts: How many time steps it takes, in the parts that batch norms count as calls.
            selected: Whether it is back-propagated.
            last: Whether it is the last one that is back-propagated.
        """
        self._parts, self._steps = parts, sum(parts)
        self._selected, self._last = selected, last
        self._gates = last and not self._keeps_graphs
        if self._static is not None and self._static.is_unchanged():
            self._know(frames, self._static)
        try:
            yield
            self._judge()
            if last:
                self.finish()
        finally:
            self._tried, self._known, self._gates = [], {}, False
            for value in self._values.values():
                value.end_of_call(last)

    def _judge(self) -> None:
        """Tell apart the modules whose outputs stayed as they were, and those whose copies were changed."""
        changed = [module for module, copy in self._tried if copy._version]
        self._invariants.changed.update(changed)
        self._invariants.trusted.update(module for module, _ in self._tried if module not in changed)
        if changed:  # from now on they are evaluated anew, and so is what follows from them
            self.finish()
            self.close()

    def forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward(*args, **kwargs)`` of ``module``, or its output of an earlier step."""
        is_parametrisation = isinstance(module, ParametrizationList)
        if kwargs or (self._evaluating and not is_parametrisation) or not (args or is_parametrisation):
            return forward(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # a part that the network runs so
            return forward(*args)
        known = [self._known.get(id(argument)) for argument in args]
        values = [entry.value for entry in known if entry is not None and entry.is_unchanged()]
        if len(values) < len(args) or module in self._invariants.changed:
            return forward(*args)
        versions = tuple(tensor._version for tensor in module.parameters())
        differentiable = self._differentiable and (torch.is_grad_enabled() or not self._selected)
        key = (id(module), *map(id, values), differentiable)
        value = self._values.get(key)
        if value is not None and value.versions != versions:
            if value.is_waiting():
                raise LossError(
                    f"a network changes the weights of {type(module).__name__} in place, in between steps that are "
                    "back-propagated: use cache_invariant=False"
                )
            value = None
        if value is None:
            value = self._value(module, forward, values, versions, differentiable)
        try:
            tensor = value.gated() if self._gates else value.leaf()
        except _NoTensorError:
            self._invariants.changed.add(module)
            return forward(*args)
        self._values[key] = value  # in order of evaluation
        if self._last and not (values or self._evaluating):
            value.back_propagate_early()
        if value.counted is not None:
            value.counted.count(self._parts)
        return self._handed_out(tensor, value, None if is_parametrisation else module)

    def has(self, module: nn.Module, x: Tensor) -> bool:
        """Whether ``module`` is evaluated once for ``x``."""
        return id(x) in self._known and _is_candidate(module) and module not in self._invariants.changed

    def finish(self) -> None:
        """Back-propagate what leaves still hold, in reverse order of evaluation."""
        self._gates = False
        while waiting := [value for value in self._values.values() if value.is_waiting()]:
            waiting[-1].back_propagate()

    def close(self) -> None:
        """Free everything."""
        for value in self._values.values():
            value.end_of_call(last=True)
        self._values.clear()

    def _know(self, tensor: Any, value: Value) -> None:
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = Known(tensor, value)

    def _value(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        values: list[Value],
        versions: tuple[int, ...],
        differentiable: bool,
    ) -> Value:
        """The value of a module's output, that follows from ``values``; without a graph where the network wants none."""
        statistics = Statistics(module) if is_counting_batch_norm(module) else None

        def evaluate() -> Tensor:
            before, self._evaluating = self._evaluating, True
            try:
                with torch.set_grad_enabled(differentiable), self.saving():
                    inputs = [value.gated() if self._gates else value.leaf() for value in values]
                    if statistics is not None:
                        return statistics.normalise(inputs[0], self._multi_step)
                    output = forward(*inputs)
            finally:
                self._evaluating = before
            if not isinstance(output, Tensor):
                raise _NoTensorError
            return output if differentiable else output.detach()

        return Value(evaluate, self._keeps_graphs, versions, _time_of(module, values), statistics)

    def _handed_out(self, tensor: Tensor, value: Value, module: nn.Module | None) -> Tensor:
        if self._steps > 1 and not self._evaluating:
            if value.time == "axis":
                tensor = tensor.expand(self._steps, *tensor.shape[1:])
            elif value.time == "batch":
                tensor = torch.cat([tensor] * self._steps)  # which keeps the layout
        if self._selected and not torch.is_grad_enabled():
            tensor = tensor.detach()  # an autograd function's forward takes what it returns for its own
        if module is not None and module not in self._invariants.trusted:
            tensor = tensor.clone()
            self._tried.append((module, tensor))
        self._know(tensor, value)
        return tensor


class _NoTensorError(Exception):
    """A module returned something else."""


def _time_of(module: nn.Module, values: Sequence[Value]) -> str | None:
    """`Value.time` of what ``module`` makes of ``values``."""
    times = {value.time for value in values}
    if "axis" in times:
        return "batch" if getattr(module, "sltt_folds_time", False) else "axis"
    return "batch" if "batch" in times else None


def _is_candidate(module: nn.Module) -> bool:
    return is_stateless(module) or is_counting_batch_norm(module)
