"""A pass that runs without keeping its graphs, and gives its outputs one backward that runs the steps again.

Forward runs all T steps and keeps nothing but their outputs. Autograd sees one function of everything that the network
is given: its parameters, and those inputs that want a gradient::

    inputs, parameters -> [ T steps ] -> outputs -> any loss

Backward gets the gradient of the outputs and runs the selected steps again, one after the other, each with its graph,
from the state that it had. Stand-ins for inputs and parameters gather the gradients, and autograd takes the sum on. The
graph of the last selected step is kept instead, as one step's memory is needed anyway, and those of more of the last steps
where there is room.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from sltt_ext.errors import InputError, LossError, SLTTWarning
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.conditions import Conditions
from sltt_ext.online.frames import Frames
from sltt_ext.online.heads import Heads
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.packing import leave_saving_contexts
from sltt_ext.online.passes import Call, Objective, Pass, SpeedUp, through_time
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.online.stand_ins import StandIns, is_leaf, outer_tensors
from sltt_ext.online.states import keep_charged

__all__ = ["Found", "recorded"]

SpeedUps = Callable[[Pass, EvaluatedOnce | None], tuple[Sequence[SpeedUp], EvaluatedOnce]]
"""Those of a pass, and the one among them that evaluates once, which may be that of the first run."""

Source = Callable[[Sequence[Tensor]], Frames]
"""``tensors -> `` the network's input over time, with these in the place of the tensors in its arguments."""


class Found:
    """What recordings of one network have found out.

    Attributes:
        bytes: How much autograd has saved in a call, at most.
        compares: Whether outputs of the second run are still compared with those of the first.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.again = 0
        self.compares = True
        self.holding: WeakSet[_Graphs] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is alive in this process."""
        return {**vars(self), "holding": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, holding=WeakSet())

    def is_held(self) -> bool:
        """Whether a recording still keeps a graph for its backward pass."""
        return any(graphs.kept for graphs in self.holding)


def recorded(
    one: Pass,
    heads: Heads,
    inputs: Sequence[Tensor],
    source: Source,
    speed_ups: SpeedUps,
    wanting: Sequence[Tensor],
    found: Found,
) -> list[Tensor]:
    """Run a pass, such that its outputs can be back-propagated.

    Args:
        one: The pass; nothing is learned in it.
        heads: Its outputs.
        inputs: The tensors in the network's arguments.
        source: The input over time, of other tensors in their place.
        speed_ups: Those of a pass.
        wanting: The tensors, of the arguments and the network, that want a gradient; none where there is no backward.
        found: What was found out.

    Returns:
        The outputs, as autograd's function of ``wanting``.
    """
    versions = [_version(tensor) for tensor in inputs]
    opening = _Opening()
    stand_ins = None if one.keeps_from is None else StandIns(one.net, wanting, opening)
    if stand_ins is not None:
        one = replace(one, source=source([stand_ins.of(tensor) for tensor in inputs]))
    recording = _Recording(one, heads, stand_ins, source, speed_ups, found, opening)
    recording.run()
    outputs = heads.values()
    if not wanting:
        return outputs
    if [_version(tensor) for tensor in inputs] != versions:
        raise InputError(
            "the network changes its input in place, and the time steps run again in backward: have its forward compute out of "
            "place (x = x - mean, not x.sub_(mean))"
        )
    wanting = _still_there(one.net, inputs, wanting)
    others = [tensor for tensor in inputs if all(tensor is not one for one in wanting)]
    return list(_RunAgain.apply(recording, inputs, outputs, *others, *wanting))


class _Recording:
    """One pass that runs, and all it takes to run its selected calls again.

    Args:
        one: The pass.
        heads: Its outputs.
        stand_ins: What the graphs that are kept start from, if there are any.
        source: Its input over time.
        speed_ups: Those of a pass.
        found: What was found out.
        opening: Lets gradients come to what the kept graphs start from.
    """

    def __init__(
        self,
        one: Pass,
        heads: Heads,
        stand_ins: StandIns | None,
        source: Source,
        speed_ups: SpeedUps,
        found: Found,
        opening: _Opening,
    ) -> None:
        self._pass = one
        self._heads = heads
        self._stand_ins = stand_ins
        self._source = source
        self._speed_ups = speed_ups
        self._opening = opening
        self._moments = _Moments()
        self._graphs = _Graphs(heads.outputs, found)
        self._once: EvaluatedOnce | None = None  # which holds what the kept graphs have read

    def run(self) -> None:
        """Run the pass."""
        standing_in = [] if self._stand_ins is None else [self._stand_ins]
        speed_ups, once = self._speed_ups(self._pass, None)
        if self._stand_ins is not None:
            self._once, once.guard = once, self._opening
        through_time(self._pass, None, (*standing_in, *speed_ups, self._moments, self._graphs), self._graphs)
        self._conditions = Conditions(self._pass.net)  # a wrapper hooks on in its first forward

    def gradients(
        self,
        inputs: Sequence[Tensor],
        wanting: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        once: bool,
    ) -> list[Tensor | None]:
        """Back-propagate the calls whose graphs were kept, and run the other selected ones again.

        Args:
            inputs: The tensors in the network's arguments.
            wanting: Those tensors, of the arguments and the network, that want a gradient now.
            gradients: Those of the outputs.
            once: Whether this is the last time.

        Returns:
            The gradients of ``wanting``.
        """
        stand_ins = self._stand_ins or StandIns(self._pass.net, wanting)
        stand_ins.forget_gradients()
        if self._once is not None:
            self._once.retains = not once

        def product(output_seq: Any, call: Call) -> Tensor:
            """A loss whose gradient, by the outputs of a call, is what was given."""
            parts = [
                (head_seq.to(gradient.dtype) * self._heads.share(gradient, call)).sum()
                for head_seq, gradient in zip(output_seq, gradients, strict=True)
                if gradient is not None and head_seq.requires_grad
            ]
            return sum(parts[1:], parts[0]) if parts else torch.zeros(())

        with torch.enable_grad(), self._opening:
            if self._graphs.kept:
                kept = [product(output_seq, call) for call, output_seq in self._graphs.kept]
                torch.autograd.backward([one for one in kept if one.requires_grad], retain_graph=not once)
                if once:
                    self._graphs.kept.clear()
            if any(not self._pass.keeps(t) for t in self._pass.selected):
                self._run_again(stand_ins, inputs, Objective(product, _back_propagate, lambda call: None))
            elif self._once is not None:
                self._once.finish()
        found = stand_ins.gradients(wanting)
        stand_ins.forget_gradients()  # which are autograd's from here on
        return found

    def _run_again(self, stand_ins: StandIns, inputs: Sequence[Tensor], objective: Objective) -> None:
        source = self._source([stand_ins.of(tensor) for tensor in inputs])
        one = replace(
            self._pass,
            source=source,
            learns=True,
            differentiable=False,
            from_rest=False,
            again=True,
            replaced=Replacements(),
        )
        with self._conditions.restored():
            speed_ups, _ = self._speed_ups(one, self._once)
            around = (stand_ins, _Again(self._moments), *speed_ups)
            before = stand_ins.sums() if self._graphs.compares else []
            through_time(one, objective, around, self._graphs.comparison())
            if before and any(map(torch.ne, before, stand_ins.sums())):
                raise LossError(
                    "the network writes to its own weights while it runs (weight.data, or in place under no_grad), and backward "
                    "runs its time steps again, with other weights: write to them outside of forward, or have a "
                    "parametrization compute them (torch.nn.utils.parametrize)"
                )


class _Graphs(SpeedUp, Outputs):
    """Graphs of calls that run again are dropped; what autograd saves for them is counted. The others are kept.

    Calls that run again have a graph the first time, too: so they compute the same.

    Args:
        outputs: Where the outputs go.
        found: What was found out.

    Attributes:
        kept: Calls whose graphs are kept, with their outputs.
    """

    def __init__(self, outputs: Outputs, found: Found) -> None:
        self.kept: list[tuple[Call, Any]] = []
        self._outputs = outputs
        self._found = found
        self._neurons: Sequence[StatefulModule] = ()
        self._call: Call | None = None
        self._first_run: list[list[Tensor]] = []
        self._weights: set[int] = set()
        self._saved = _Saved(self._weights)

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """See what is saved anyway."""
        one.replaced.if_cut_short(lambda: leave_saving_contexts(self._saved.is_asked))
        self._neurons = one.neurons
        self._weights = {_storage(parameter) for parameter in one.net.parameters()}
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Drop what autograd saves, or keep it."""
        self._call = call
        if call.keeps_graph:
            keep_charged(self._neurons)
        dropping: AbstractContextManager[Any] = nullcontext()
        saved = self._saved = _Saved(self._weights)
        if call.differentiable and not call.keeps_graph:
            dropping = saved_tensors_hooks(saved.drop, _refuse)
        with dropping:
            yield
        self._found.bytes = max(self._found.bytes, saved.bytes)

    def add(self, output_seq: Any) -> None:
        """Take in the outputs of the call."""
        call = self._call
        assert call is not None
        if call.keeps_graph:
            self.kept.append((call, output_seq))
            self._found.holding.add(self)
        elif call.differentiable and self._found.compares:
            self._first_run.append([head_seq.detach() for head_seq in output_seq])
        self._outputs.add(output_seq)

    @property
    def compares(self) -> bool:
        """Whether the second run is still compared with the first."""
        return self._found.compares

    def comparison(self) -> Outputs:
        """Where the outputs of the second run go."""
        first_run, self._first_run = self._first_run, []
        self._found.again += 1
        self._found.compares = False
        return _Compared(first_run)


class _Saved:
    """What autograd would save in a call.

    Args:
        weights: Memory that does not count.
    """

    def __init__(self, weights: set[int]) -> None:
        self.bytes = 0
        self._seen = set(weights)
        self._asked = False

    def is_asked(self) -> bool:
        """Whether a tensor was dropped since it was asked last."""
        asked, self._asked = self._asked, False
        return asked

    def drop(self, tensor: Tensor) -> None:
        """Count a tensor, and let it go."""
        self._asked = True
        storage = _storage(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self.bytes += tensor.untyped_storage().nbytes() if storage else tensor.numel() * tensor.itemsize


class _Opening:
    """A hook that asks whether gradients may come to what the kept graphs start from: only through the outputs of the network."""

    def __init__(self) -> None:
        self._is_open = False

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *details: Any) -> None:
        self._is_open = False

    def __call__(self, gradient: Tensor) -> None:
        """See a gradient come.

        Raises:
            LossError: If it comes past the outputs.
        """
        if not self._is_open:
            _refuse()


def _refuse(dropped: None = None) -> Tensor:
    raise LossError(
        "the loss follows from a tensor that the network left on the side while it ran over time (a forward hook or an "
        "attribute has gathered it), whose graph is not kept: return it as a part of the output, in a dict or tuple, or use "
        "an OnlineTrainer with a loss of each step (loss_on='step')"
    )


class _Compared(Outputs):
    """The outputs of a second run, which have to be those of the first.

    Args:
        first_run: Those.
    """

    def __init__(self, first_run: Sequence[Sequence[Tensor]]) -> None:
        self._first_run = iter(first_run)

    def add(self, output_seq: Any) -> None:
        """Compare the outputs of the next call."""
        for first, second in zip(next(self._first_run, ()), output_seq):
            if isinstance(first, FakeTensor) or first.shape != second.shape:
                continue
            tolerance = 1e-3 * float(first.abs().nan_to_num(0.0, 0.0, 0.0).max()) if first.numel() else 0.0
            if not torch.allclose(first, second.detach(), atol=tolerance, rtol=0.0, equal_nan=True):
                warnings.warn(
                    "the network computes something else when its time steps run again in backward, so that the gradient is "
                    "that of other outputs: have it draw from torch's, NumPy's or Python's own generators, and leave nothing "
                    "in places that are not the network's own",
                    SLTTWarning,
                    stacklevel=2,
                )
                self._first_run = iter(())
                return


class _Moments(SpeedUp):
    """What the network held before each call that runs again, unless the call before it does."""

    def __init__(self) -> None:
        self._net: Any = None
        self._next = -1
        self._before: dict[int, Snapshot] = {}

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """See which network it is."""
        self._net = one.net
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Take a snapshot where one is needed."""
        if call.differentiable and not call.keeps_graph:
            if call.start != self._next:
                self._before[call.start] = Snapshot(self._net, but_given=True)
            self._next = call.stop
        yield

    def written(self) -> set[int]:
        """The tensors that going back writes to."""
        return {tensor for before in self._before.values() for tensor in before.tensors}

    def return_to(self, call: Call) -> None:
        """Have the network hold what it held before a call, if it does not after the one before."""
        if call.start in self._before:
            self._before[call.start].restore()


class _Again(SpeedUp):
    """The calls of a second run start from what they started from in the first, and leave no trace."""

    def __init__(self, moments: _Moments) -> None:
        self._moments = moments

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Put everything back at the end."""
        one.replaced.at_end(Snapshot(one.net, written=self._moments.written()).restore)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Go back to the moment of the first run."""
        self._moments.return_to(call)
        yield


def _back_propagate(product: Tensor) -> None:
    if product.requires_grad:
        product.backward()


_BEFORE_TENSORS = 3  # arguments of the function below


class _RunAgain(torch.autograd.Function):
    """The outputs of a recording; backward runs it again."""

    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *read: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.places = [next(i for i, tensor in enumerate(read) if tensor is one) for one in inputs]
        ctx.save_for_backward(*read)  # by which autograd sees that they stay as they are
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(one for one in outputs if not (one.is_floating_point() or one.is_complex()))
        )
        return tuple(
            outputs
        )  # in a list until here: they are no views, which a loss could not change in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise LossError(
                "create_graph=True asks for the gradient of a gradient, and the time steps are run again without it: use "
                "torch's own loop over time for such a loss"
            )
        read = _unchanged(ctx)
        wanted = ctx.needs_input_grad[_BEFORE_TENSORS:]
        wanting = [tensor for tensor, wants in zip(read, wanted) if wants]
        inputs = [read[place] for place in ctx.places]
        once = not torch._C._autograd._get_current_graph_task_keep_graph()
        found = iter(ctx.recording.gradients(inputs, wanting, gradients, once))
        return *([None] * _BEFORE_TENSORS), *(next(found) if wants else None for wants in wanted)


def _unchanged(ctx: Any) -> Sequence[Tensor]:
    """The tensors that the network has read.

    Raises:
        LossError: If they are no longer what they were, or backward has run before.
    """
    try:
        saved: Sequence[Tensor] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise LossError(
                "an input or a weight was changed in place between forward and backward, which runs the time steps again: call "
                "backward() before optimizer.step(), and leave the input as it is"
            ) from error
        if "second time" in str(error):
            raise LossError(
                "backward() has run through this output before: say retain_graph=True the first time, or call the network again"
            ) from error
        raise
    return saved


def _still_there(net: nn.Module, inputs: Sequence[Tensor], wanting: Sequence[Tensor]) -> Sequence[Tensor]:
    """Without what the network held, and has computed anew itself, such as a weight of which a hook makes another."""
    given = set(map(id, inputs))
    if all(is_leaf(tensor) or id(tensor) in given for tensor in wanting):
        return wanting
    held = {*given, *map(id, outer_tensors(net))}
    return [tensor for tensor in wanting if is_leaf(tensor) or id(tensor) in held]


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's memory; 0 where it has none of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor of other tensors
        return 0


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
