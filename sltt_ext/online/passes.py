"""The time loop: one pass through time, call by call, as in the paper (Meng et al. 2023, Sec. 4).

A *pass* shows the network T steps, from rest or from where the last pass ended. A *call* of the network takes one of them, or
several in a row. For each call the network runs, its loss is back-propagated if the call is selected, and its output is added
to the mean. Then its state becomes a constant, so that nothing of the call is kept.

Speed-ups stand around a pass and its calls. The result does not need any of them, and none changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.frames import Frames
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.schedule import runs
from sltt_ext.online.states import begin, detach, one_call

__all__ = ["Call", "CallSizes", "Objective", "Pass", "SpeedUp", "through_time"]


@dataclass(frozen=True)
class CallSizes:
    """How many steps share a call.

    Attributes:
        chunk: At most, of those that are back-propagated.
        group: At most, of those that are not.
        part: How many steps the user's own calls have: batch statistics are those of so many steps.
    """

    chunk: int
    group: int
    part: int


@dataclass(frozen=True)
class Call:
    """One call of the network: the time steps from ``start`` up to ``stop`` of a pass.

    Attributes:
        start: Its first step.
        stop: The step after its last one.
        parts: How many steps each of the user's own calls has that this one stands for.
        selected: Whether it is back-propagated.
        last: Whether it is the last one that is.
        frame: What the network is shown.
        differentiable: Whether it runs with a graph.
        keeps_graph: Whether a backward pass through that graph is to come.
    """

    start: int
    stop: int
    parts: tuple[int, ...]
    selected: bool
    last: bool
    frame: Any
    differentiable: bool
    keeps_graph: bool

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.stop - self.start


@dataclass(frozen=True)
class Pass:
    """One run through time.

    Attributes:
        net: The network.
        run: Calls it with a frame.
        neurons: All of it that carries state.
        multi_step: Whether it takes sequences ``[C, N, ...]`` rather than single steps ``[N, ...]``.
        source: Its input over time.
        stop: How many steps are run.
        selected: The steps that are back-propagated, in order.
        learns: Whether they are in this pass; one that only looks ahead sends the same calls.
        sizes: How many steps share a call.
        output: Outputs ``[C, N, ...]`` of C steps, from what the network returns; one, or several in a dict or tuple.
        from_rest: Whether states are reset first.
        differentiable: Whether the selected calls run with a graph, also where they are not back-propagated here.
        keeps_from: The step from which on these graphs are kept; the others are dropped.
        again: It has run before; only the selected calls up to there do again, unless it begins at rest.
        replaced: What is changed for it, and put back at its end.
    """

    net: nn.Module
    run: Callable[[Any], Any]
    neurons: Sequence[StatefulModule]
    multi_step: bool
    source: Frames
    stop: int
    selected: tuple[int, ...]
    learns: bool
    sizes: CallSizes
    output: Callable[[Any, int], Any]
    from_rest: bool = True
    differentiable: bool = False
    keeps_from: int | None = None
    again: bool = False
    replaced: Replacements = field(default_factory=Replacements)

    def keeps(self, start: int) -> bool:
        """Whether the graph of a call from ``start`` on is kept for later."""
        return self.keeps_from is not None and start >= self.keeps_from

    def calls(self) -> Iterator[Call]:
        """The calls, in order; each takes its frames when it is its turn."""
        sizes = self.sizes
        for start, stop, selected in runs(self.stop, self.selected, sizes.chunk, sizes.group):
            if self.again and not self.from_rest and (not selected or self.keeps(start)):
                self.source.take(start, stop)  # a stream gives its frames in order
                continue
            whole, rest = divmod(stop - start, sizes.part)
            parts = (*[sizes.part] * whole, *[rest] * bool(rest))
            learns = self.learns and selected
            last = learns and stop > self.selected[-1]
            graph = learns or (self.differentiable and selected)
            kept = learns or (graph and self.keeps(start))
            yield Call(start, stop, parts, learns, last, self.source.take(start, stop), graph, kept)


class SpeedUp:
    """Stands around a pass and around each of its calls; does nothing unless overridden."""

    def around_pass(self, one: Pass) -> AbstractContextManager[Any]:
        """Surround a pass."""
        return nullcontext()

    def around_call(self, call: Call) -> AbstractContextManager[Any]:
        """Surround a call, with its loss and backward."""
        return nullcontext()


@dataclass(frozen=True)
class Objective:
    """What is learned from a selected call.

    Attributes:
        loss: Its loss, of outputs ``[C, N, ...]``.
        back_propagate: Computes the gradients of a loss.
        after: Called when the call is over.
    """

    loss: Callable[[Any, Call], Tensor]
    back_propagate: Callable[[Tensor], None]
    after: Callable[[Call], None]


def through_time(
    one: Pass, objective: Objective | None, speed_ups: Sequence[SpeedUp], outputs: Outputs
) -> Tensor | None:
    """Run a pass.

    Args:
        one: The pass.
        objective: None where nothing is learned.
        speed_ups: From the outermost to the innermost.
        outputs: Where the outputs go, without their graphs.

    Returns:
        The sum of the losses, detached.
    """
    total = None
    with (
        one.replaced,
        one.replaced,
        _Contexts(one.replaced) as around_pass,
    ):  # entered twice, in case of an interrupt
        begin(one.neurons, one.replaced, one.from_rest)
        for speed_up in speed_ups:
            around_pass.enter_context(speed_up.around_pass(one))
        for call in one.calls():
            with _Contexts(one.replaced) as around_call:
                for speed_up in speed_ups:
                    around_call.enter_context(speed_up.around_call(call))
                around_call.enter_context(one_call(one.neurons, call.steps))
                with torch.set_grad_enabled(call.differentiable):
                    output_seq = one.output(one.run(call.frame), call.steps)
                if call.selected and objective is not None:
                    loss = objective.loss(output_seq, call)
                    objective.back_propagate(loss)
                    total = loss.detach() if total is None else total + loss.detach()
                    del loss
                outputs.add(output_seq)
                del output_seq
                detach(one.neurons)
            if call.selected and objective is not None:
                objective.after(call)
    return total


class _Contexts(ExitStack):
    """Closes what an interrupt has kept from ending together with the pass, and not whenever the exception is forgotten.

    Args:
        replaced: Whose end that is.
    """

    def __init__(self, replaced: Replacements) -> None:
        super().__init__()
        self._entered: list[Any] = []
        replaced.if_cut_short(self._close)

    def enter_context(self, context: AbstractContextManager[Any]) -> Any:
        """Enter a context that ends with this one."""
        self._entered.append(context)
        return super().enter_context(context)

    def __exit__(self, *details: Any) -> bool | None:
        super().__exit__(*details)
        self._entered.clear()
        return None

    def _close(self) -> None:
        while self._entered:
            generator = getattr(self._entered[-1], "gen", None)
            if generator is not None:
                generator.close()
            self._entered.pop()
