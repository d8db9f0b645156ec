"""A pass that runs without keeping its graphs, and gives its outputs one backward that runs the steps again.

Forward runs all T steps and keeps nothing but their outputs. Autograd sees one function of everything that the network
is given: its parameters, and those inputs that want a gradient::

    inputs, parameters -> [ T steps ] -> outputs -> any loss

Backward gets the gradient of the outputs and runs the selected steps again, one after the other, each with its graph,
from the state that it had. Stand-ins for inputs and parameters gather the gradients, and autograd takes the sum on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sltt_ext.errors import InputError, LossError
from sltt_ext.online.conditions import Conditions
from sltt_ext.online.frames import Frames
from sltt_ext.online.heads import Heads
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.passes import Call, Objective, Pass, SpeedUp, through_time
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.online.stand_ins import StandIns, outer_tensors

__all__ = ["Recording", "recorded"]

SpeedUps = Callable[[Pass], Sequence[SpeedUp]]
Source = Callable[[Sequence[Tensor]], Frames]
"""``tensors -> `` the network's input over time, with these in the place of the tensors in its arguments."""


class _GraphsDropped(SpeedUp):
    """Calls that run again later run with a graph, so that they compute the same, and keep nothing for it."""

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Drop what autograd saves."""
        if not call.differentiable:
            yield
            return
        with saved_tensors_hooks(_drop, _refuse):
            yield


def _drop(tensor: Tensor) -> None:
    return None


def _refuse(dropped: None) -> Tensor:
    raise LossError(
        "the loss follows from a tensor that the network left on the side while it ran over time (a forward hook or an "
        "attribute has gathered it), whose graph is not kept: return it as a part of the output, in a dict or tuple, or use "
        "an OnlineTrainer with a loss of each step (loss_on='step')"
    )


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
        if call.differentiable:
            if call.start != self._next:
                self._before[call.start] = Snapshot(self._net)
            self._next = call.stop
        yield

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
        now = Snapshot(one.net)
        try:
            yield
        finally:
            now.restore()

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Go back to the moment of the first run."""
        self._moments.return_to(call)
        yield


def recorded(
    one: Pass,
    heads: Heads,
    inputs: Sequence[Tensor],
    source: Source,
    speed_ups: SpeedUps,
    wanting: Sequence[Tensor],
) -> list[Tensor]:
    """Run a pass, such that its outputs can be back-propagated.

    Args:
        one: The pass; nothing is learned in it.
        heads: Its outputs.
        inputs: The tensors in the network's arguments.
        source: The input over time, of other tensors in their place.
        speed_ups: Those of a pass.
        wanting: The tensors, of the arguments and the network, that want a gradient; none where there is no backward.

    Returns:
        The outputs, as autograd's function of ``wanting``.
    """
    moments = _Moments()
    again = Recording(one, heads, moments, source, speed_ups)
    versions = [_version(tensor) for tensor in inputs]
    through_time(one, None, (*speed_ups(one), moments, _GraphsDropped()), heads.outputs)
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
    return list(_RunAgain.apply(again, inputs, len(outputs), *outputs, *others, *wanting))


class Recording:
    """One pass that has run, and all it takes to run its selected calls again.

    Args:
        one: The pass.
        heads: Its outputs.
        moments: What the network holds before the calls that run again.
        source: Its input over time.
        speed_ups: Those of a pass.
    """

    def __init__(
        self, one: Pass, heads: Heads, moments: _Moments, source: Source, speed_ups: SpeedUps
    ) -> None:
        self._pass = one
        self._heads = heads
        self._moments = moments
        self._conditions = Conditions(one.net)
        self._source = source
        self._speed_ups = speed_ups

    def gradients(
        self, inputs: Sequence[Tensor], wanting: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Run the selected calls again.

        Args:
            inputs: The tensors in the network's arguments.
            wanting: Those tensors, of the arguments and the network, that want a gradient now.
            gradients: Those of the outputs.

        Returns:
            The gradients of ``wanting``.
        """
        stand_ins = StandIns(self._pass.net, wanting)
        source = self._source([stand_ins.of(tensor) for tensor in inputs])
        one = replace(
            self._pass, source=source, learns=True, differentiable=False, from_rest=False, again=True
        )

        def product(output_seq: Any, call: Call) -> Tensor:
            """A loss whose gradient, by the outputs of a call, is what was given."""
            parts = [
                (head_seq.to(gradient.dtype) * self._heads.share(gradient, call)).sum()
                for head_seq, gradient in zip(output_seq, gradients, strict=True)
                if gradient is not None and head_seq.requires_grad
            ]
            return sum(parts[1:], parts[0]) if parts else torch.zeros(())

        with torch.enable_grad(), stand_ins.in_place(), self._conditions.restored():
            objective = Objective(product, _back_propagate, lambda call: None)
            through_time(one, objective, (*self._speed_ups(one), _Again(self._moments)), _Nowhere())
        return stand_ins.gradients(wanting)


def _back_propagate(product: Tensor) -> None:
    if product.requires_grad:
        product.backward()


class _Nowhere(Outputs):
    def add(self, output_seq: Any) -> None:
        """They are known."""


class _RunAgain(torch.autograd.Function):
    """The outputs of a recording; backward runs it again."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, inputs: Sequence[Tensor], number: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, read = tensors[:number], tensors[number:]
        ctx.recording, ctx.number = recording, number
        ctx.places = [next(i for i, tensor in enumerate(read) if tensor is one) for one in inputs]
        ctx.save_for_backward(*read)  # by which autograd sees that they stay as they are
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(one for one in outputs if not one.is_floating_point()))
        return tuple(one.view_as(one) for one in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise LossError(
                "create_graph=True asks for the gradient of a gradient, and the time steps are run again without it: use "
                "torch's own loop over time for such a loss"
            )
        read = _unchanged(ctx)
        wanted = ctx.needs_input_grad[3 + ctx.number :]
        wanting = [tensor for tensor, wants in zip(read, wanted) if wants]
        found = iter(ctx.recording.gradients([read[place] for place in ctx.places], wanting, gradients))
        return *([None] * (3 + ctx.number)), *(next(found) if wants else None for wants in wanted)


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
    if all(tensor.is_leaf or id(tensor) in given for tensor in wanting):
        return wanting
    held = {*given, *map(id, outer_tensors(net))}
    return [tensor for tensor in wanting if tensor.is_leaf or id(tensor) in held]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
