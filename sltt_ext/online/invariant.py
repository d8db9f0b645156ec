"""What does not depend on time is evaluated once an iteration, not once a step.

A module is time-invariant where it is stateless and every tensor it is called with is the network's static
input or the output of another time-invariant module: the stem of a network that is shown one image, and every
weight parametrisation (``torch.nn.utils.parametrize``), which is called with nothing at all.

Its output is cut from the graph. What the steps read is a leaf, where their gradients add up; the last
back-propagated step reads the graph itself, behind a gate::

    first step                           steps                      last step
    x -> stem -> gate, leaf      leaf -> step t -> loss[t]     gate -> step T -> loss[T] -> backward
                                                               gate's backward: gradient of step T + what the leaf has gathered

So one backward pass ends the iteration, autograd orders the invariant modules in it, and wrappers that synchronise
gradients see all of them. The gradient is the sum over the steps, as before, added up at the invariant output and
not at the parameters. The graph lives from the first step to the last back-propagated one, where the peak is in any
case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from sltt_ext.errors import LossError
from sltt_ext.neuron import state_dtype
from sltt_ext.online.compiled import eager_modules
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


class _Value:
    """A tensor that is the same at every step.

    Args:
        evaluate: Computes it, with its graph behind a gate to this value.
        versions: Of the parameters it follows from.
        is_sequence: Whether it has an axis of time, of length 1, over which the steps read it repeated.
        counted: The running statistics that every step counts in, of a batch norm in training.

    Attributes:
        graph: The tensor with its graph, until that has been back-propagated.
        leaf: The tensor, cut from its graph; gathers the steps' gradients.
    """

    def __init__(
        self,
        evaluate: Callable[[_Value], Tensor],
        versions: tuple[int, ...] = (),
        is_sequence: bool = False,
        counted: _Statistics | None = None,
    ) -> None:
        self._evaluate = evaluate
        self.versions = versions
        self.is_sequence = is_sequence
        self.counted = counted
        self.graph: Tensor | None = None
        self.leaf: Tensor | None = None
        self._gradient: Tensor | None = None
        self._version = 0

    def tensor(self, with_graph: bool) -> Tensor:
        """What the steps read: the graph in the last one, the leaf in all others."""
        if self.graph is None and (with_graph or self.leaf is None):
            self.gather()
            self.leaf = None  # the same numbers come with the graph
            self.graph = self._evaluate(self)
        if self.leaf is None:
            assert self.graph is not None
            self.leaf = self.graph.detach().requires_grad_(self.graph.requires_grad)
            self._version = self.leaf._version
        if self.leaf._version != self._version:
            raise LossError(
                "a network changes in place what a module returned whose input does not change over time: use "
                "cache_invariant=False"
            )
        return self.graph if with_graph and self.graph is not None else self.leaf

    def gather(self) -> None:
        """Take the gradients from the leaf, where autograd has added them up; sums of half precision in float32."""
        if self.leaf is None or self.leaf.grad is None:
            return
        if self._gradient is None:
            self._gradient = self.leaf.grad.to(state_dtype(self.leaf.dtype))
        else:
            self._gradient += self.leaf.grad
        self.leaf.grad = None

    def gathered(self) -> Tensor | None:
        """The steps' gradients, which are the caller's from then on."""
        self.gather()
        gradient, self._gradient = self._gradient, None
        return gradient

    def end_of_call(self, keep_graph: bool) -> None:
        """In half precision no more than one call's gradients add up in the leaf."""
        if self.leaf is not None and self.leaf.dtype != state_dtype(self.leaf.dtype):
            self.gather()
        if not keep_graph:
            self.graph = None

    def is_waiting(self) -> bool:
        """Whether there are gradients that have not been back-propagated."""
        return self._gradient is not None or (self.leaf is not None and self.leaf.grad is not None)


class _Gate(torch.autograd.Function):
    """Identity; backward adds what the leaf has gathered."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: _Value) -> Tensor:
        ctx.value = value
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gathered = ctx.value.gathered()
        return gradient if gathered is None else gathered.add_(gradient).to(gradient.dtype), None


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
        self._values: dict[Any, _Value] = {}
        self._static = None if static is None else _Static(static, multi_step)
        self._parts: Sequence[int] = (1,)
        self._steps = 1
        self._selected = self._last = self._evaluating = False
        self._known: dict[int, tuple[Tensor, _Value, int]] = {}
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
        if self._static is not None and self._static.is_unchanged():
            self._know(frames, self._static)
        try:
            yield
            self._judge()
        finally:
            self._tried, self._known = [], {}
            for value in self._values.values():
                value.end_of_call(keep_graph=self._keeps_graphs and not last)

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
        values = [entry[1] for entry in known if entry is not None and entry[0]._version == entry[2]]
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
            value.graph = None
            value = None
        if value is None:
            value = self._values[key] = self._value(module, forward, values, versions, differentiable)
        try:
            tensor = value.tensor(with_graph=self._last or self._evaluating)
        except _NoTensorError:
            del self._values[key]
            self._invariants.changed.add(module)
            return forward(*args)
        if value.counted is not None:
            value.counted.count(self._parts)
        return self._handed_out(tensor, value, None if is_parametrisation else module)

    def has(self, module: nn.Module, x: Tensor) -> bool:
        """Whether ``module`` is evaluated once for ``x``."""
        return id(x) in self._known and _is_candidate(module) and module not in self._invariants.changed

    def finish(self) -> None:
        """Back-propagate what the last step did not read: the gradients that leaves still hold."""
        waiting = [value for value in self._values.values() if value.is_waiting()]
        if not waiting:
            return
        self._last = True
        try:
            graphs = [value.tensor(with_graph=True) for value in waiting]
            torch.autograd.backward(graphs, [torch.zeros_like(graph) for graph in graphs])
        finally:
            self.close()

    def close(self) -> None:
        """Free everything."""
        for value in self._values.values():
            value.graph = None  # which holds the value
        self._values.clear()

    def _know(self, tensor: Any, value: _Value) -> None:
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = (tensor, value, tensor._version)

    def _value(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        values: list[_Value],
        versions: tuple[int, ...],
        differentiable: bool,
    ) -> _Value:
        """The value of a module's output, that follows from ``values``; without a graph where the network wants none."""
        statistics = _Statistics(module) if is_counting_batch_norm(module) else None

        def evaluate(value: _Value) -> Tensor:
            before, self._evaluating = self._evaluating, True
            try:
                with torch.set_grad_enabled(differentiable), self.saving():
                    inputs = [value.tensor(with_graph=True) for value in values]
                    if statistics is not None:
                        output = statistics.normalise(inputs[0], self._multi_step)
                    else:
                        output = forward(*inputs)
                    if not isinstance(output, Tensor):
                        raise _NoTensorError
                    if differentiable and output.requires_grad:
                        gated: Tensor = _Gate.apply(output, value)
                        return gated
                    return output.detach()
            finally:
                self._evaluating = before

        return _Value(evaluate, versions, self._multi_step and bool(values), statistics)

    def _handed_out(self, tensor: Tensor, value: _Value, module: nn.Module | None) -> Tensor:
        if value.is_sequence and not self._evaluating and self._steps > 1:
            tensor = tensor.expand(self._steps, *tensor.shape[1:])
        if module is not None and module not in self._invariants.trusted:
            tensor = tensor.clone()
            self._tried.append((module, tensor))
        self._know(tensor, value)
        return tensor


class _NoTensorError(Exception):
    """A module returned something else."""


class _Static(_Value):
    """The network's input, itself."""

    def __init__(self, x: Tensor, multi_step: bool) -> None:
        super().__init__(lambda _: x, is_sequence=multi_step)
        self._x = x.unsqueeze(0) if multi_step else x
        self._first_version = x._version

    def is_unchanged(self) -> bool:
        """Whether it still is what it was."""
        return self._x._version == self._first_version

    def tensor(self, with_graph: bool) -> Tensor:
        """The input, in every step."""
        return self._x


class _Statistics:
    """A batch norm in training, evaluated once: each step counts in its running statistics, as if it had been computed."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._numbers = 0

    def normalise(self, x: Tensor, multi_step: bool) -> Tensor:
        """The normalised ``x``, ``[1, N, ...]`` where the network takes sequences."""
        module, x = self._module, x[0] if multi_step else x
        self._numbers = x.numel() // x.shape[1]
        like = state_dtype(x.dtype) if module.running_mean is None else module.running_mean.dtype
        self._mean, self._variance = torch.zeros(2, x.shape[1], dtype=like, device=x.device)
        output = F.batch_norm(
            x, self._mean, self._variance, module.weight, module.bias, True, 1.0, module.eps
        )
        return output.unsqueeze(0) if multi_step else output

    @torch.no_grad()
    def count(self, parts: Sequence[int]) -> None:
        """Update the running statistics as one call for each part does, over so many equal steps."""
        module = self._module
        if module.running_mean is None:
            return
        biased = (self._numbers - 1) / self._numbers
        mean, variance = module.running_mean.data, module.running_var.data  # unseen by autograd, as in torch
        for steps in parts:
            numbers = steps * self._numbers
            unbiased = biased * numbers / (numbers - 1)
            mean.mul_(1 - module.momentum).add_(self._mean, alpha=module.momentum)
            variance.mul_(1 - module.momentum).add_(self._variance, alpha=module.momentum * unbiased)
        module.num_batches_tracked.add_(len(parts))


def _is_candidate(module: nn.Module) -> bool:
    return is_stateless(module) or is_counting_batch_norm(module)
