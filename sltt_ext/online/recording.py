"""A pass that runs without keeping its graphs, and gives its outputs one backward that runs the steps again.

Forward runs all T steps and keeps only their outputs. Autograd sees one function of everything that the network is given: its
parameters, and the inputs that require a gradient::

    inputs, parameters -> [ T steps ] -> outputs -> any loss

Backward gets the gradient of the outputs and runs the selected steps again, one after the other, each with its graph, from
the state that it had. Stand-ins for inputs and parameters gather the gradients, and autograd passes their sum on. The graph
of the last selected step is kept instead, because the memory of one step is needed anyway. If there is room, the graphs of
more of the last steps are kept, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.errors import InputError, LossError
from sltt_ext.forwards import Replacements
from sltt_ext.online.conditions import Conditions
from sltt_ext.online.frames import Frames
from sltt_ext.online.heads import Heads
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.kept_graphs import Found, Graphs, Opening
from sltt_ext.online.moments import Again, Moments
from sltt_ext.online.one_backward import RunAgain
from sltt_ext.online.passes import Call, Objective, Pass, SpeedUp, through_time
from sltt_ext.online.stand_ins import StandIns, is_leaf, outer_tensors

__all__ = ["recorded"]

SpeedUps = Callable[[Pass, EvaluatedOnce | None], tuple[Sequence[SpeedUp], EvaluatedOnce]]
"""Those of a pass, and the one among them that evaluates once, which may be that of the first run."""

Source = Callable[[Sequence[Tensor]], Frames]
"""``tensors -> `` the network's input over time, with these in the place of the tensors in its arguments."""


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
    opening = Opening()
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
            "the network changes its input in place, and the time steps run again in backward: make its forward compute out of "
            "place (x = x - mean, not x.sub_(mean))"
        )
    wanting = _still_there(one.net, inputs, wanting)
    others = [tensor for tensor in inputs if all(tensor is not one for one in wanting)]
    return list(RunAgain.apply(recording, inputs, outputs, *others, *wanting))


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
        opening: Opening,
    ) -> None:
        self._pass = one
        self._heads = heads
        self._stand_ins = stand_ins
        self._source = source
        self._speed_ups = speed_ups
        self._opening = opening
        self._moments = Moments()
        self._graphs = Graphs(heads.outputs, found)
        self._found = found
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
        self._found.backwards += 1
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
            around = (stand_ins, Again(self._moments), *speed_ups)
            before = stand_ins.sums() if self._graphs.compares else []
            through_time(one, objective, around, self._graphs.comparison())
            if before and any(map(torch.ne, before, stand_ins.sums())):
                raise LossError(
                    "the network writes to its own weights while it runs (weight.data, or in place under no_grad), and backward "
                    "runs its time steps again, with other weights: write to them outside of forward, or let a "
                    "parametrization compute them (torch.nn.utils.parametrize)"
                )


def _back_propagate(product: Tensor) -> None:
    if product.requires_grad:
        product.backward()


def _still_there(net: nn.Module, inputs: Sequence[Tensor], wanting: Sequence[Tensor]) -> Sequence[Tensor]:
    """Without what the network held, and has computed anew itself, such as a weight of which a hook makes another."""
    given = set(map(id, inputs))
    if all(is_leaf(tensor) or id(tensor) in given for tensor in wanting):
        return wanting
    held = {*given, *map(id, outer_tensors(net))}
    return [tensor for tensor in wanting if is_leaf(tensor) or id(tensor) in held]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
