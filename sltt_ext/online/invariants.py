"""Evaluate what does not depend on time once an iteration, not once a step.

A tensor does not depend on time if it is the network's static input, or if a time-invariant module makes it from such
tensors: the stem of a network that is shown one image, and every weight parametrisation
(``torch.nn.utils.parametrize``), which is called with nothing at all.

A module is first watched for one pass through time, in which every step evaluates it as ever. From then on it is
evaluated once a pass, if it has returned the same numbers at all steps, from the same weights, if nobody has changed
its output in place, and if each step's gradient has come through it at most once.

Its output is then cut from the graph. Each step reads its own tensor, which is computed from one leaf. The gradients of the
steps add up in the leaf. After the last back-propagated step, the module itself is back-propagated from the leaf::

    first step              steps                         last step
    x -> stem -> leaf       leaf -> step t -> loss[t]     leaf -> step T -> loss[T] -> backward -> leaf -> stem's backward

The gradient is the sum over the steps, as before, but it is added up at the invariant output and not at the parameters. The
backward of a parametrisation runs as soon as the last step's backward has reached its weight, so that what it saved is freed
before the next layer's turn. The backward of a stem runs after the step, in reverse order of evaluation.

If graphs of steps are kept for a later backward pass, the tensors that they have read and their leaf are kept, too. Steps that
run again in that backward pass read the same tensors, and `EvaluatedOnce.finish` ends it.

Wrappers that synchronise gradients free the weights after each layer, and send its gradient before that of the next layer.
With them no graph is kept: the last step evaluates the module once more, behind a gate that adds what the leaf has gathered::

    last step
    x -> stem -> gate -> step T -> loss[T] -> backward -> gate, gradient of step T + what the leaf has gathered -> stem
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sltt_ext.errors import LossError
from sltt_ext.forwards import Layer, has_own_forward
from sltt_ext.online.capture import capturing
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.gradient_hooks import gradient_hooks
from sltt_ext.online.invariant_tensors import (
    BatchStatistics,
    HandedOut,
    InvariantTensor,
    Reads,
    StaticInput,
    spread,
)
from sltt_ext.online.invariant_trials import InvariantModules, Trial
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.time_invariant import Time, is_counting_batch_norm, is_time_invariant, time_after

__all__ = ["EvaluatedOnce"]

Saving = Callable[[], AbstractContextManager[Any]]


class _Asked(NamedTuple):
    """What a module is asked for.

    Attributes:
        key: The same for what is the same at every step.
        inputs: The invariant tensors behind its arguments.
        reads: What it reads besides.
        time: Where its output has its time.
        counts: Whether each step counts in its running statistics.
        differentiable: Whether its output needs a graph.
    """

    key: tuple[int | bool, ...]
    inputs: list[Any]
    reads: Reads
    time: Time
    counts: bool
    differentiable: bool


class EvaluatedOnce(SpeedUp):
    """Evaluates the time-invariant modules of one pass once.

    Args:
        modules: What is known of them.
        enabled: False evaluates every module at every step.
        keeps_graphs: False evaluates each module twice, the second time in the last back-propagated step: where its
            backward has to come between those of the modules around it, since a wrapper frees and sends weights then.
        saving: Context for what an evaluation saves: a network's own hooks (checkpointing, say) are for its steps.

    Attributes:
        retains: Whether another backward pass is to come.
        guard: Called with each gradient that comes to what was evaluated once, where graphs are kept.
    """

    def __init__(self, modules: InvariantModules, enabled: bool, keeps_graphs: bool, saving: Saving) -> None:
        self._modules = modules
        self._enabled = enabled and not modules.off
        self._keeps_graphs = keeps_graphs
        self._saving = saving
        self._tensors: dict[Any, InvariantTensor] = {}
        self._trials: dict[Any, Trial] = {}
        self._handed_out: dict[int, HandedOut] = {}
        self._static: StaticInput | None = None
        self._call: Call | None = None
        self._differentiable = self._gates = self._evaluating = False
        self._learns = True
        self.retains = False
        self.guard: Callable[[Tensor], None] | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand in for the forward of every module that may be time-invariant."""
        static = one.source.static
        usable = static is not None and not (
            static.is_inference() or gradient_hooks(static)
        )  # see Reads.usable
        if static is not None and usable and self._static is None:
            self._static = StaticInput(static, one.multi_step)
        waits = one.keeps_from is not None and not one.again
        self._learns, self._differentiable = one.learns, one.learns or waits
        (one.replaced.if_cut_short if waits or self.retains else one.replaced.at_end)(self._close)
        for module in eager_modules(one.net) if self._enabled else ():
            if self._may_be_invariant(module) and not has_own_forward(module):
                one.replaced.forward(module, Layer.ONCE, self._forward)
        yield
        if not waits:
            self._finish()
        self._judge_pass()

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Hand the static input out, and see what the call does with what it is given."""
        self._call = call
        self._gates = call.last and not self._keeps_graphs
        if self._enabled and self._static is not None and self._static.is_unchanged():
            self._hand_out(call.frame, self._static)
        try:
            yield
            for trial in self._trials.values():
                trial.end_of_call()
            if any(entry.passed_on and entry.is_hooked() for entry in self._handed_out.values()):
                raise LossError(
                    "a network asks for the gradient of a tensor that does not depend on time (register_hook, retain_grad) "
                    "after another layer has read that tensor: use cache_invariant=False"
                )
            if call.last:
                self._finish()
        finally:
            self._handed_out, self._gates, self._call = {}, False, None
            for tensor in self._tensors.values():
                tensor.end_of_call(call.last)

    def evaluates(self, module: nn.Module, x: Tensor) -> bool:
        """Whether ``module`` is evaluated once for ``x``."""
        return id(x) in self._handed_out and self._is_proven(module) and self._may_be_invariant(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is known to be the same at every step, wherever it is."""
        return self._enabled and self._modules.are_proven(module, False) and self._may_be_invariant(module)

    def stand_in(self, one: Pass, module: nn.Module) -> None:
        """Stand in for the forward of ``module``, also inside of what is compiled: somebody calls it from outside."""
        one.replaced.forward(module, Layer.ONCE, self._forward)

    @property
    def in_use(self) -> bool:
        """Whether a step has read something that was evaluated once."""
        return bool(self._tensors)

    def read(self) -> set[int]:
        """The ids of all tensors that what was evaluated once has read."""
        return {tensor for one in self._tensors.values() if one.reads for tensor in one.reads.ids}

    def _is_proven(self, module: nn.Module) -> bool:
        return self._modules.are_proven(module, self._differentiable)

    def _may_be_invariant(self, module: nn.Module) -> bool:
        return module not in self._modules.refused and (
            is_time_invariant(module) or is_counting_batch_norm(module)
        )

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward(*args, **kwargs)`` of ``module``, or its output of an earlier step."""
        asked = None if kwargs or self._call is None else self._asked(module, args)
        if asked is None:
            return forward(*args, **kwargs)
        if self._is_proven(module):
            return self._once(module, forward, args, asked)
        return self._watched(module, forward, args, asked)

    def _asked(self, module: nn.Module, args: tuple[Any, ...]) -> _Asked | None:
        """What ``module`` is asked for; None where it may return something else at another step."""
        if isinstance(module, ParametrizationList):
            inputs: list[Any] | None = []
        else:
            inputs = self._inputs(args) if args and not self._evaluating else None
        if inputs is None or module in self._modules.refused or torch.is_inference_mode_enabled():
            return None
        time, counts = _time_of(module, args, inputs), is_counting_batch_norm(module)
        reads = Reads(module, counts)
        if time is None or not reads.usable:
            return None
        assert self._call is not None
        wanted = torch.is_grad_enabled() or not self._call.selected
        key = (id(module), *map(id, inputs), wanted)
        return _Asked(key, inputs, reads, time, counts, self._differentiable and wanted)

    def _inputs(self, args: tuple[Any, ...]) -> list[Any] | None:
        """The invariant tensors behind a module's arguments; None where one of them may differ from step to step."""
        inputs = []
        for argument in args:
            entry = self._handed_out.get(id(argument))
            if entry is None or not entry.is_unchanged():
                return None
            inputs.append(entry.value)
        return inputs

    def _once(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], asked: _Asked
    ) -> Any:
        """A tensor of this call's own that follows from what the first step has evaluated."""
        tensor = self._tensors.get(asked.key)
        if tensor is not None and tensor.reads is not None and not asked.reads.are_as_they_were(tensor.reads):
            if not asked.reads.are_the_same_tensors(tensor.reads):
                return forward(*args)  # other weights, for this call
            if tensor.is_waiting():
                raise LossError(
                    f"a network changes the weights of {type(module).__name__} in place, between steps that are "
                    "back-propagated: use cache_invariant=False"
                )
            tensor = None
        for argument in args:
            self._handed_out[id(argument)].passed_on = True
        if tensor is None:
            evaluate, counted = self._evaluation(module, forward, asked, asked.differentiable)
            tensor = InvariantTensor(
                evaluate, self._keeps_graphs, asked.reads, asked.time, counted, self.guard
            )
        self._tensors[asked.key] = tensor  # in order of evaluation
        return self._read(tensor, early=isinstance(module, ParametrizationList) and not self._evaluating)

    def _read(self, tensor: InvariantTensor, early: bool) -> Tensor:
        """A tensor of this call's own that follows from ``tensor``."""
        call = self._call
        assert call is not None
        leaf = tensor.gated() if self._gates else tensor.leaf()
        if call.last and early:
            tensor.back_propagate_early()
        if tensor.counted is not None:
            tensor.counted.count(call.parts)
        output = leaf if self._evaluating else spread(leaf, tensor.time, call.steps)
        if call.selected and not torch.is_grad_enabled():
            output = output.detach()  # an autograd function's forward takes what it returns for its own
        self._hand_out(output, tensor)
        return output

    def _watched(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], asked: _Asked
    ) -> Any:
        """What ``forward`` returns, compared with what it has returned at the other steps of this pass."""
        assert self._call is not None
        if self._evaluating or capturing():  # where nothing can be compared
            return forward(*args)
        trial = self._trials.get(asked.key)
        if trial is None:
            evaluate, _ = self._evaluation(module, forward, asked, differentiable=False)
            trial = Trial(module, self._modules, asked.reads, asked.time, evaluate)
            self._trials[asked.key] = trial
        output = forward(*args)
        if trial.watch(output, asked.reads, self._call.steps):
            self._hand_out(output, trial)
        return output

    def _evaluation(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        asked: _Asked,
        differentiable: bool,
    ) -> tuple[Callable[[], Tensor], BatchStatistics | None]:
        """A function that evaluates ``module`` for one step; without a graph where the network wants none."""
        statistics = BatchStatistics(module) if asked.counts else None

        def evaluate() -> Tensor:
            before, self._evaluating = self._evaluating, True
            try:
                with torch.set_grad_enabled(differentiable), self._saving():
                    gates = self._gates and differentiable
                    given = [tensor.gated() if gates else tensor.leaf() for tensor in asked.inputs]
                    if statistics is not None:
                        return statistics.normalise(given[0], asked.time)
                    output: Tensor = forward(*given)
            finally:
                self._evaluating = before
            return output if differentiable else output.detach()

        return evaluate, statistics

    def _hand_out(self, tensor: Any, value: InvariantTensor | Trial) -> None:
        if isinstance(tensor, Tensor):
            self._handed_out[id(tensor)] = HandedOut(tensor, value)

    def finish(self) -> None:
        """Back-propagate what the graphs that were kept have left, where no step runs again."""
        try:
            self._finish()
        finally:
            if not self.retains:
                self._close()

    def _judge_pass(self) -> None:
        for trial in self._trials.values():
            # a pass that runs again may have one step, which the first run has compared with the others
            if trial.has_passed(self._learns and self._modules.are_proven(trial.module, False)):
                self._modules.prove(trial.module, self._learns)

    def _finish(self) -> None:
        """Back-propagate what leaves still hold, in reverse order of evaluation."""
        self._gates = False
        while waiting := [tensor for tensor in self._tensors.values() if tensor.is_waiting()]:
            waiting[-1].back_propagate(self.retains)

    def _close(self) -> None:
        """Free everything."""
        for tensor in self._tensors.values():
            tensor.end_of_call(last=True)
        self._tensors, self._trials, self._static = {}, {}, None


def _time_of(module: nn.Module, args: Sequence[Tensor], inputs: Sequence[Any]) -> Time | None:
    """Where the output of ``module`` has its time; None where nobody can tell."""
    times = {entry.time for entry in inputs}
    if not times:
        return Time.NONE
    return time_after(module, args[0], times.pop()) if len(times) == 1 else None
