"""The speed-ups around a pass, in the only order that is right, each with what it depends on.

They are listed from the outermost to the innermost. A speed-up may rely on those further out being in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from sltt_ext.online.batch_counters import CountedAtEnd
from sltt_ext.online.blocks import CompiledBlocks, CompiledCode
from sltt_ext.online.counting import FirstCalls, NeuronSteps
from sltt_ext.online.distributed import Step, no_synchronisation
from sltt_ext.online.grouping import Grouping
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.norms import NormsInParts
from sltt_ext.online.outside import KeptTensors
from sltt_ext.online.packing import PackedSpikes
from sltt_ext.online.passes import Call, CallSizes, Pass, SpeedUp
from sltt_ext.online.silent import SilentLayers
from sltt_ext.online.states import carry_charged
from sltt_ext.online.watching import Watch
from sltt_ext.step_modes import Setting

__all__ = ["AutocastCache", "ChargedState", "InSequences", "Synchronisation", "speed_ups_of"]


class InSequences(SpeedUp):
    """A network of single steps is told that it takes sequences.

    Args:
        settings: What tells its modules.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = settings

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Tell them, until the end of the pass."""
        for module, name, value in self._settings:
            one.replaced.entry(vars(module), name, value)
        yield


class Synchronisation(SpeedUp):
    """Processes exchange their gradients in the last back-propagated call only.

    Args:
        step: What surrounds one call; see `sltt_ext.online.distributed`.
    """

    def __init__(self, step: Step) -> None:
        self._step = step

    def around_call(self, call: Call) -> AbstractContextManager[Any]:
        """Keep the processes from exchanging gradients, or let them."""
        return self._step(call.last)


class AutocastCache(SpeedUp):
    """Autocast keeps the weights that it has cast: those cast without gradients are constants (torch 2.6)."""

    def __init__(self) -> None:
        self._cast_without_gradients = True

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Have weights cast again in the first call with gradients after one without."""
        if call.differentiable and self._cast_without_gradients:
            torch.clear_autocast_cache()
        self._cast_without_gradients = not call.differentiable
        yield


class ChargedState(SpeedUp):
    """Neurons carry, from step to step, the tensor that their backward reads, and no other."""

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Let them."""
        carry_charged(one.neurons, one.replaced)
        yield


def speed_ups_of(
    sizes: CallSizes,
    *,
    tried: SpeedUp,
    first: FirstCalls,
    kept: KeptTensors,
    step: Step,
    grouping: Grouping,
    modules: InvariantModules,
    caches: bool,
    keeps_graphs: bool,
    packed: PackedSpikes,
    measuring: SpeedUp | None = None,
    stopwatch: SpeedUp | None = None,
    settings: Sequence[Setting] = (),
    once: EvaluatedOnce | None = None,
    charges: bool = True,
    code: CompiledCode | None = None,
) -> tuple[tuple[SpeedUp, ...], EvaluatedOnce]:
    """The speed-ups of one pass, and the one among them that evaluates once.

    Args:
        sizes: How many steps share a call.
        tried: Whether the network may be shown a sequence in parts.
        first: What is said of first calls.
        kept: Tensors that modules keep as plain attributes.
        step: What surrounds a call where several processes train.
        grouping: How many steps may share a call.
        modules: What is known of time-invariant modules.
        caches: Whether they are evaluated once.
        keeps_graphs: See `EvaluatedOnce`.
        packed: Saves spikes as bits.
        measuring: Measures the memory of calls, and the network is watched meanwhile.
        stopwatch: Measures their time.
        settings: What tells a network of single steps that it takes sequences.
        once: What the first run of the pass has evaluated once, if steps of it run again.
        charges: Whether neurons carry what their backward reads, which the next step writes over: not where several steps
            share a graph.
        code: What is compiled, if anything is.
    """
    once = once or EvaluatedOnce(modules, caches, keeps_graphs, packed.saving)
    shared = max(sizes.chunk, sizes.group) > sizes.part
    watching = [Watch(grouping.keep_apart)] if measuring else []
    return (
        *([InSequences(settings)] if settings else []),
        tried,
        kept,
        *([stopwatch] if stopwatch else []),
        *([] if step is no_synchronisation else [Synchronisation(step)]),
        AutocastCache(),
        CountedAtEnd(),
        *([measuring] if measuring else []),
        *([ChargedState()] if charges else []),
        *(
            [CompiledBlocks(code, once, waits=measuring is not None or stopwatch is not None)]
            if code is not None and code.on
            else []
        ),
        once,
        *([NormsInParts(once.evaluates)] if shared else []),
        *watching,
        NeuronSteps(grouping.keep_apart, first, counts=measuring is not None or shared),
        SilentLayers(first.silence),
        packed,
    ), once
