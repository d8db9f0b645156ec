"""A network over time as one function: T steps, the outputs of all of them, and an ordinary backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, InputError, SLTTError, listed, warn
from sltt_ext.online import options
from sltt_ext.online.counting import CallsAround, FirstCalls
from sltt_ext.online.distributed import (
    Sharded,
    by_autograd,
    common_generator,
    is_distributed,
    is_sharded,
    keep_states_apart,
    no_synchronisation,
    replica,
)
from sltt_ext.online.explanations import explaining_steps
from sltt_ext.online.frames import Frames
from sltt_ext.online.grouping import Grouping, in_bytes
from sltt_ext.online.guards import Alone
from sltt_ext.online.heads import Heads, Read, Returns, tensors_over_time
from sltt_ext.online.inputs import Arguments, TimeDims
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.invariants import EvaluatedOnce
from sltt_ext.online.kept_graphs import Found
from sltt_ext.online.mixing import PartsTried
from sltt_ext.online.network import goes_through_time, neurons_of, whole_sequences
from sltt_ext.online.norms import norms_over_time
from sltt_ext.online.output_axes import OutputAxes
from sltt_ext.online.outside import KeptTensors, UnknownNeurons
from sltt_ext.online.packing import PackedSpikes
from sltt_ext.online.passes import CallSizes, Pass, SpeedUp
from sltt_ext.online.recording import recorded
from sltt_ext.online.schedule import Schedule, runs, selected_steps, steps_of_a_draw
from sltt_ext.online.sequence_norms import NormsOfSequence, statistics_over_time
from sltt_ext.online.speed_ups import speed_ups_of
from sltt_ext.online.stand_ins import is_leaf, outer_tensors
from sltt_ext.online.time_inside import StepsInside, TimeInside
from sltt_ext.online.windows import each_frame, each_step, read_each

__all__ = ["Forward", "Norms", "Settings", "TimeLoop"]

_SAMPLES = 4  # of a comparison

Forward = Callable[..., Any]
Norms = Literal["step", "sequence"]


@dataclass(frozen=True)
class Settings:
    """How a network runs over time; see `sltt_ext.over_time`.

    Attributes:
        window: Through how many steps the gradient goes back; None where each step begins with a constant state.
    """

    time_steps: int | None
    k: int | None
    schedule: Schedule | None
    chunk: int
    window: int | None
    norms: Norms
    time_dim: TimeDims
    time_inside: TimeInside | None
    returns: Returns | None
    carry: bool
    generator: torch.Generator | None
    memory_budget: int | str | None
    pack_spikes: bool
    cache_invariant: bool


class TimeLoop:
    """Runs a network over time, sequence by sequence.

    Args:
        settings: How.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._modules = InvariantModules()
        self._kept = KeptTensors()
        self._found: dict[Any, Found] = {}
        self._room: int | None = None
        self._common: torch.Generator | None = None
        self._tried = PartsTried(lambda reason: None)
        self._first = FirstCalls()
        self._around_it = CallsAround()
        self._unknown = UnknownNeurons("the time loop")
        self._told: set[str] = set()

    def __reduce__(self) -> Any:
        """Copies and files have the settings; what was found out about the network is found out again."""
        return TimeLoop, (self.settings,)

    def run(
        self,
        net: nn.Module,
        forward_of: Callable[[nn.Module], Forward],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The network's output for a whole sequence.

        Args:
            net: The network.
            forward_of: ``net -> `` its forward for one call.
            args: The arguments of the sequence.
            kwargs: Its named ones.
        """
        settings, inside = self.settings, self.settings.time_inside
        if (ddp := replica(net)) is not None:
            keep_states_apart(ddp)
        self._unknown.say(net)
        if goes_through_time(net.modules()) != (settings.window is not None):
            raise ConfigurationError(
                "the network was converted with another temporal= after over_time: call over_time again"
            )
        neurons, multi_step = neurons_of(net, 1 if inside else settings.chunk)
        kwargs, lengths = _without_lengths(net, kwargs)
        arguments = Arguments(net, args, kwargs, settings.time_dim)
        time_steps = arguments.time_steps(settings.time_steps)
        whole = whole_sequences(neurons, time_steps, settings.chunk, settings.schedule is not None)
        part = time_steps if whole else min(settings.chunk, time_steps)
        windows = part > 1 and not (multi_step or inside)
        of_sequence = settings.norms == "sequence" and part < time_steps and bool(norms_over_time(net))
        if multi_step and part < time_steps and settings.norms == "step":
            self._say_what_norms_see(net, part)

        def source(tensors: Sequence[Tensor]) -> Frames:
            given = arguments.frames(
                tensors, keeps_axis=multi_step or inside is not None, repeats=multi_step and inside is None
            )
            return each_frame(given) if windows else given

        def call_of(net: nn.Module) -> Callable[[Any], Any]:
            forward = forward_of(net)
            run = forward if arguments.single else lambda frame: forward(*frame[0], **frame[1])
            return each_step(neurons, run) if windows else run

        if inside is not None:
            inside.check_unchanged(net)
            self._compare(net, inside, arguments, time_steps, call_of)
        wanting = self._wanting(net, arguments)
        counts = self._steps(net, time_steps) if wanting else {}
        steps = tuple(counts)
        axes = None
        if inside is not None:
            axes = inside.outputs(net)
            self._check_each_step(axes, part, counts, lengths)
        returns = self._returns(axes)
        read: Read = axes.tensors if axes else partial(tensors_over_time, multi_step=multi_step)
        heads = Heads(
            returns,
            time_steps,
            counts,
            self._divisor(steps, time_steps),
            read_each(read) if windows else read,
            weights=_weights(lengths, time_steps, returns),
        )
        found = self._found.setdefault(_kind(net, arguments.tensors), Found())
        if wanting and inside is None and not settings.carry:
            self._around_it.look(net, _first(arguments.tensors), time_steps, found.backwards)
        one = Pass(
            net, call_of(net), neurons, multi_step, source(arguments.tensors), time_steps, steps, False,
            CallSizes(part, part, part), self._first.reading(heads.of_call, looks=inside is None), from_rest=not settings.carry, differentiable=bool(wanting),
            keeps_from=self._keeps_from(net, steps, time_steps, part, found),
        )  # fmt: skip
        with explaining_steps(
            net, _first(arguments.tensors), time_steps, _axis(settings.time_dim), multi_step
        ):
            norms: tuple[SpeedUp, ...] = ()
            if of_sequence:
                looking = replace(one, source=source(arguments.tensors))
                norms = (NormsOfSequence(statistics_over_time(looking, (*self._around(net), self._kept))),)
            speed_ups = partial(self._speed_ups, net, norms, windows)
            outputs = recorded(one, heads, arguments.tensors, source, speed_ups, wanting, found)
        if axes and settings.returns is None:
            outputs = [axes.returned(output, head) for head, output in enumerate(outputs)]
        elif inside is None and settings.time_dim is None:
            self._say_where_time_may_be(arguments, time_steps, outputs, returns)
        return heads.rebuild(outputs)

    def _compare(
        self,
        net: nn.Module,
        inside: TimeInside,
        arguments: Arguments,
        time_steps: int,
        call_of: Callable[[nn.Module], Callable[[Any], Any]],
    ) -> None:
        """See that a network with its time inside can run step by step; one step alone does not tell where its time is.

        A few samples are enough, unless the network takes no other number of them.
        """
        told = time_steps > 1 or (self.settings.returns is None and not inside.arguments)
        tensors = arguments.tensors if told else arguments.twice()

        def shown(
            samples: int | None,
        ) -> Callable[[Callable[[Tensor], Tensor]], Callable[[nn.Module, int, int], Any]]:
            given = tensors if samples is None else arguments.some(tensors, samples)

            def of(convert: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, int, int], Any]:
                frames = arguments.frames([convert(one) for one in given], keeps_axis=True, repeats=False)
                return lambda net, start, stop: call_of(net)(frames.take(start, stop))

            return of

        steps = time_steps if told else 2
        try:
            inside.compare(net, steps, shown(_SAMPLES))
        except SLTTError:
            raise
        except Exception:  # in earnest, it says so for all samples
            inside.compare(net, steps, shown(None))

    def _check_each_step(
        self, axes: OutputAxes, part: int, counts: dict[int, float], lengths: Tensor | None
    ) -> None:
        """See that steps can be told from one another, if somebody asks for that."""
        asked = {
            "returns='sequence'": self.settings.returns == "sequence",
            "a schedule in which steps count differently": len(set(counts.values())) > 1,
            "lengths=": lengths is not None,
        }
        for name, is_asked in asked.items():
            if is_asked:
                axes.check_each_step(part, name)

    def _returns(self, axes: OutputAxes | None) -> Returns:
        """What the caller gets: where time is inside, as the network gives it unless something else was said."""
        if self.settings.returns is not None:
            return self.settings.returns
        return "mean" if axes is None or axes.averages else "sequence"

    def _keeps_from(
        self, net: nn.Module, steps: tuple[int, ...], time_steps: int, part: int, found: Found
    ) -> int | None:
        """The step from which on graphs are kept: the last one, or as many of the last ones as there is room for.

        The graph of the last one is what a step needs anyway. Where an earlier sequence still has one, none is kept.
        """
        if not steps or is_sharded(net):
            return None  # graphs do not keep what is sharded again
        calls = [start for start, _, selected in runs(time_steps, steps, part, part) if selected]
        if self.settings.memory_budget is None:
            return None if found.is_held() or not found.again else calls[-1]
        if self._room is None:
            self._room = in_bytes(self.settings.memory_budget, net)
        kept = min(self._room // found.bytes, len(calls)) if found.bytes else 0
        return calls[-kept] if kept else None

    def _wanting(self, net: nn.Module, arguments: Arguments) -> list[Tensor]:
        """What a backward pass gives a gradient to."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return []
        inputs = [tensor for tensor in arguments.tensors if tensor.requires_grad]
        held = [tensor for tensor in outer_tensors(net) if is_leaf(tensor) or not self._kept.has_left(tensor)]
        return list({id(tensor): tensor for tensor in (*inputs, *by_autograd(net, held))}.values())

    def _steps(self, net: nn.Module, time_steps: int) -> dict[int, float]:
        """The steps to back-propagate, the same in all processes that train the network together; how many times each counts."""
        if self.settings.schedule is None:
            return dict.fromkeys(range(time_steps), 1.0)
        if self.settings.k is not None:
            options.selected(self.settings.k, time_steps, self.settings.window or 1)
        if self._common is None and (is_distributed(net) or replica(net) is not None):
            self._common = common_generator(net, self.settings.generator)
        return selected_steps(self.settings.schedule, time_steps, self._common or self.settings.generator)

    def _divisor(self, steps: tuple[int, ...], time_steps: int) -> float:
        """What the sum over the back-propagated steps is divided by."""
        if self.settings.k is None or not steps:
            return max(len(steps), 1)
        return steps_of_a_draw(steps, time_steps, self.settings.window or 1)

    def _around(self, net: nn.Module) -> tuple[SpeedUp, ...]:
        """What a pass through the network cannot be without."""
        inside = self.settings.time_inside
        return (
            Alone(),
            *([Sharded(net)] if is_sharded(net) else []),
            *([] if inside is None else [StepsInside(inside, net)]),
        )

    def _speed_ups(
        self, net: nn.Module, norms: Sequence[SpeedUp], windows: bool, one: Pass, once: EvaluatedOnce | None
    ) -> tuple[Sequence[SpeedUp], EvaluatedOnce]:
        settings = self.settings
        speed_ups, once = speed_ups_of(
            one.sizes, tried=SpeedUp() if settings.time_inside else self._tried, first=self._first, kept=self._kept, step=no_synchronisation, grouping=Grouping(),
            modules=self._modules, caches=settings.cache_invariant and not (windows or torch.is_inference_mode_enabled()),
            keeps_graphs=not is_sharded(net), packed=PackedSpikes(settings.pack_spikes), once=once, charges=not windows,
        )  # fmt: skip
        return (*self._around(net), *norms, *speed_ups), once

    def _say_where_time_may_be(
        self, arguments: Arguments, time_steps: int, outputs: Sequence[Tensor], returns: Returns
    ) -> None:
        """Warn, in the first call, of an input that looks like a sequence and is taken for a batch of T samples."""
        x = _first(arguments.tensors)
        is_first = "time" not in self._told
        self._told.add("time")
        if not is_first or x is None or x.dim() < 3 or x.shape[0] != time_steps or time_steps == 1:
            return
        shapes = [output.shape[returns == "sequence" :] for output in outputs]
        if all(len(shape) > 2 and shape[:2] == x.shape[:2] for shape in shapes):
            warn(
                f"x {list(x.shape)} is taken for a batch of {time_steps} samples, each shown for {time_steps} time steps. If its first axis is "
                "time, say time_dim=0 instead of time_steps; and returns='sequence' if you need the output of each step"
            )

    def _say_what_norms_see(self, net: nn.Module, part: int) -> None:
        """Warn, once, of norms whose statistics are of fewer steps than the network had in one call."""
        norms = norms_over_time(net) if net.training and "norms" not in self._told else {}
        if norms:
            self._told.add("norms")
            message = (
                f"batch norms take their statistics over {part} step{'s' * (part > 1)} at a time, and not over all T steps at once, "
                "as in a call with the whole sequence. norms='sequence' keeps the statistics of all steps, with one more pass "
                "without a graph; chunk=T keeps the gradient through them, too, with the memory of T steps:"
            )
            warn(listed(message, norms))


def _without_lengths(net: nn.Module, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The named arguments without ``lengths``, unless it is the network's own, and that."""
    if "lengths" not in kwargs or "lengths" in inspect.signature(net.forward).parameters:
        return kwargs, None
    others = {name: value for name, value in kwargs.items() if name != "lengths"}
    return others, torch.as_tensor(kwargs["lengths"])


def _weights(lengths: Tensor | None, time_steps: int, returns: Returns) -> Tensor | None:
    """What each step of each sample counts in the mean over the sample's own steps, ``[T, N]``.

    Raises:
        InputError: If the lengths are no numbers of steps, one for each sample.
    """
    if lengths is None:
        return None
    if returns == "sequence":
        raise InputError(
            "lengths= weighs the mean over time, but returns='sequence' gives all steps: weigh them in the loss"
        )
    if (
        lengths.dim() != 1
        or lengths.is_floating_point()
        or not bool(((lengths > 0) & (lengths <= time_steps)).all())
    ):
        raise InputError(
            f"lengths must be one number of steps for each sample [N], from 1 to {time_steps}, got {lengths.tolist()}"
        )
    counted = torch.arange(time_steps, device=lengths.device).unsqueeze(1) < lengths
    return counted / lengths


def _kind(net: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """Calls that need the same memory."""
    return net.training, *((tensor.shape, tensor.dtype) for tensor in tensors)


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _axis(time_dim: TimeDims) -> int | None:
    return time_dim if isinstance(time_dim, int) else None
