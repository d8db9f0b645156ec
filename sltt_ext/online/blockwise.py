"""An iteration that goes through a network block by block, not step by step: all T steps of a block, then the next block.

In the forward pass, a block runs its T steps from rest without a graph. Its T outputs are kept, as bits if they are spikes
(`borders`), but none of its states. The last block takes the loss of each step and back-propagates it. Then the blocks run
again, from the last to the first. Each step has its graph, starts from the same state, and gets the gradient that the block
after it has left::

    forward                                        backward
    x -> block 1, T steps -> bits                  block 3, step t -> loss[t] -> gradient[t] at its border
         block 2, T steps -> bits                  block 2, step t <- gradient[t], -> gradient[t] at its border
                                                   block 1, step t <- gradient[t]

Going step by step keeps the graph of one step of all blocks, and the states of all neurons with 32 bits each. Going block by
block keeps those of one block, T gradients at one border, and T bits for each number at every border. The gradient is the
same sum over the steps, which is SLTT's. A block runs once more than step by step. The state from which a step starts is a
constant in both.

The gradients at a border may be kept for some of the steps at a time. The steps are then divided into ``parts``, from the
last to the first, and each part runs the blocks anew up to its last step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sltt_ext.neuron import StatefulModule
from sltt_ext.online.borders import Border, Samples, levels
from sltt_ext.online.chain import Block
from sltt_ext.online.counting import FirstCalls
from sltt_ext.online.distributed import no_synchronisation
from sltt_ext.online.frames import Frames
from sltt_ext.online.grouping import Grouping
from sltt_ext.online.guards import Alone
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.kept_graphs import Compared
from sltt_ext.online.outputs import Outputs
from sltt_ext.online.outside import KeptTensors
from sltt_ext.online.packing import PackedSpikes
from sltt_ext.online.passes import Call, Objective, Pass, SpeedUp, through_time
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.online.speed_ups import speed_ups_of
from sltt_ext.online.stand_ins import outer_tensors
from sltt_ext.online.states import reset

__all__ = ["BlockKnowledge", "Blockwise"]


@dataclass
class BlockKnowledge:
    """What is found out about one block, from one iteration to the next."""

    kept: KeptTensors = field(default_factory=KeptTensors)
    first: FirstCalls = field(default_factory=FirstCalls)


@dataclass(frozen=True)
class Blockwise:
    """How an iteration goes through blocks.

    Attributes:
        blocks: The blocks, in order.
        known: What is known of each.
        one: The pass through the whole network that this is done for.
        source: Makes its input over time; once for each time that the first block runs.
        wants_input_gradient: Whether the input wants a gradient.
        samples: In which parts of the batch each block runs; only None where all samples run together.
        static: Whether the first block's value may be the same at every step.
        parts: In how many parts of the steps the gradients at a border are kept.
        compares: Whether what a block returns when it runs again is compared with the first time.
        modules: What is known of time-invariant modules.
        caches: Whether they are evaluated once.
        packs: Whether spikes are saved as bits.
        grouping: Who is told that steps may not share a call.
        tried: A trial of the whole network in its first call.
    """

    blocks: Sequence[Block]
    known: Sequence[BlockKnowledge]
    one: Pass
    source: Callable[[], Frames]
    wants_input_gradient: bool
    samples: Sequence[Sequence[Samples | None]]
    static: bool
    parts: int
    compares: bool
    modules: InvariantModules
    caches: bool
    packs: bool
    grouping: Grouping
    tried: SpeedUp

    def run(self, objective: Objective, guards: Sequence[SpeedUp], outputs: Outputs) -> Tensor | None:
        """Accumulate the gradients of one iteration.

        Args:
            objective: The loss of the last block's outputs.
            guards: What stands around the calls that have a loss.
            outputs: Where the network's outputs go.

        Returns:
            The sum of the losses, detached.
        """
        borders = self._borders()
        runs = [
            _OneBlock(self, i, block, known, borders[i], borders[i + 1])
            for i, (block, known) in enumerate(zip(self.blocks, self.known, strict=True))
        ]
        *before, last = runs
        for run in before:
            run.forward()
        total = None
        guards = [_ToTheEnd(guard) for guard in guards]
        for number, part in enumerate(reversed(self._parts())):
            own = last.learn(
                part, objective, guards, outputs if number == 0 else _Nowhere(), again=number > 0
            )
            total = own if total is None else _sum(total, own)
            for run in reversed(before):
                if not run.exit.wants_gradient:
                    break
                run.learn_again(part, is_last=number == self.parts - 1)
        return total

    def _borders(self) -> list[Any]:
        """The borders in front of each block and behind it; None around the network."""
        wants = self.wants_input_gradient
        borders: list[Any] = [None]
        for block in self.blocks[:-1]:
            wants = wants or bool(outer_tensors(block))
            name = block.exit.meta.get("path", block.exit.name)
            borders.append(
                Border(name, partial(levels, block.exit), wants, self.static and len(borders) == 1)
            )
        return [*borders, None]

    def _parts(self) -> list[tuple[int, ...]]:
        """The selected steps, in so many parts."""
        steps, parts = self.one.selected, self.parts
        edges = [len(steps) * number // parts for number in range(parts + 1)]
        return [steps[start:stop] for start, stop in itertools.pairwise(edges)]


class _OneBlock:
    """All that one block does in an iteration."""

    def __init__(
        self,
        whole: Blockwise,
        number: int,
        block: Block,
        known: BlockKnowledge,
        entry: Border | None,
        exit: Border | None,
    ) -> None:
        self.exit: Any = exit
        self._entry = entry
        self._whole, self._number, self._block, self._known = whole, number, block, known
        self._samples = whole.samples[number]
        self._moment = _Moment()
        self._token = torch.zeros((), requires_grad=True)

    def forward(self) -> None:
        """Run all steps without a graph."""
        where = _Where()
        tried = [_ForWhole(self._whole.tried, self._whole.one)] if self._number == 0 else []
        for samples in self._samples:

            def keep(returned: Any, steps: int, samples: Samples | None = samples) -> None:
                self._known.first.runs = False
                self.exit.put(where.start, returned, samples)

            one = self._pass(keep, learns=False, samples=samples)
            self._through(one, None, (where, *tried), _Nowhere())
        if self.exit.is_static:
            self.exit.gather()

    def learn(
        self,
        part: tuple[int, ...],
        objective: Objective,
        guards: Sequence[SpeedUp],
        outputs: Outputs,
        again: bool,
    ) -> Tensor | None:
        """Run the steps of the last block with their losses, and back-propagate a part of them."""
        where, whole = _Where(), self._whole.one
        read = self._known.first.reading(whole.output, looks=self._number == 0)
        one = self._pass(read, learns=True, selected=part, again=again)
        return self._through(one, objective, (where, *guards), outputs)

    def learn_again(self, part: tuple[int, ...], is_last: bool) -> None:
        """Run the steps again, up to the last one of a part, and back-propagate those of the part."""
        where, static = _Where(), self.exit.gathers
        if static and not is_last:
            return  # its gradients are still added up
        for samples in self._samples:
            self._learn_again(part, where, static, samples)
        if is_last:
            self.exit.forget()

    def _learn_again(
        self, part: tuple[int, ...], where: _Where, static: bool, samples: Samples | None
    ) -> None:
        compares = self._whole.compares and not static and samples is None
        compared = Compared([self.exit.value(start)] for start in self.exit.starts()) if compares else None

        def read(returned: Tensor, steps: int) -> Tensor:
            self._known.first.runs = False
            if compared is not None:
                compared.add([returned])
            gradient = self.exit.gradient(where.start, samples) if where.selected else None
            if gradient is None or not returned.requires_grad:
                return torch.zeros(())
            given: Tensor = _Given.apply(returned, [gradient])
            return given

        # what is the same at every step is so at the first, and all gradients are there
        one = self._pass(read, learns=True, selected=(0,) if static else part, again=True, samples=samples)
        nothing = Objective(lambda given, call: given, _back_propagate, lambda call: None)
        self._through(one, nothing, (where,), _Nowhere())

    def _pass(
        self,
        read: Callable[[Any, int], Any],
        learns: bool,
        selected: tuple[int, ...] | None = None,
        again: bool = False,
        samples: Samples | None = None,
    ) -> Pass:
        whole = self._whole.one
        selected = whole.selected if selected is None else selected
        runs_again = not learns and self.exit.wants_gradient
        goes_on = (
            samples is not None and samples.stop < samples.batch
        )  # with other samples of the same values
        frees = not (runs_again or self._whole.compares or goes_on)
        kept_from = selected[0] if learns else 0  # for the parts before
        entry, block = self._entry, self._block

        def enter(start: int) -> Any:
            assert entry is not None
            return block(entry.enter(start, self._token, frees and start >= kept_from, self._fired, samples))

        return replace(
            whole,
            net=block,
            run=block if entry is None else enter,
            neurons=[module for module in block.modules() if isinstance(module, StatefulModule)],
            source=self._whole.source() if entry is None else Frames(lambda start, stop: start),
            stop=selected[-1] + 1 if again else whole.stop,
            selected=selected,
            learns=learns,
            output=read,
            again=again,
            replaced=type(whole.replaced)(),
        )

    def _through(
        self, one: Pass, objective: Objective | None, around: Sequence[SpeedUp], outputs: Outputs
    ) -> Tensor | None:
        whole, known = self._whole, self._known
        self._packed = PackedSpikes(whole.packs)
        speed_ups, _ = speed_ups_of(
            one.sizes, tried=SpeedUp(), first=known.first, kept=known.kept, step=no_synchronisation,
            grouping=whole.grouping, modules=whole.modules, caches=whole.caches, keeps_graphs=True,
            packed=self._packed,
        )  # fmt: skip
        total = through_time(one, objective, (Alone(), *around, *speed_ups, self._moment), outputs)
        reset(one.neurons)
        return total

    def _fired(self, spikes: Tensor, factor: Tensor | None) -> None:
        self._packed.fired(spikes, factor)


class _Moment(SpeedUp):
    """What a block holds and draws when it begins; when it runs again, it begins so, and leaves no trace."""

    def __init__(self) -> None:
        self._before: Snapshot | None = None

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Remember, or go back."""
        if not one.again:
            self._before = Snapshot(one.net)
        elif self._before is not None:
            one.replaced.at_end(Snapshot(one.net).restore)
            self._before.restore()
        yield


class _Where(SpeedUp):
    """The call that runs."""

    start = 0
    selected = False

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Remember it."""
        self.start, self.selected = call.start, call.selected
        yield


class _ToTheEnd(SpeedUp):
    """A guard to which no call is the last: more is to be back-propagated after each."""

    def __init__(self, guard: SpeedUp) -> None:
        self._guard = guard

    def around_pass(self, one: Pass) -> Any:
        return self._guard.around_pass(one)

    def around_call(self, call: Call) -> Any:
        return self._guard.around_call(replace(call, last=False))


class _ForWhole(SpeedUp):
    """What is to know of the pass through the whole network."""

    def __init__(self, speed_up: SpeedUp, whole: Pass) -> None:
        self._speed_up, self._one = speed_up, whole

    def around_pass(self, one: Pass) -> Any:
        return self._speed_up.around_pass(self._one)

    def around_call(self, call: Call) -> Any:
        return self._speed_up.around_call(call)


class _Nowhere(Outputs):
    """Outputs that were taken elsewhere."""

    def add(self, output_seq: Any) -> None:
        """Leave them."""


class _Given(torch.autograd.Function):
    """A number whose gradient, by a tensor, is what was given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient.pop(), None


def _back_propagate(given: Tensor) -> None:
    if given.requires_grad:
        given.backward()


def _sum(total: Tensor, other: Tensor | None) -> Tensor:
    return total if other is None else total + other
