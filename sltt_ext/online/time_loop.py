"""A network over time as one function: T steps, outputs of all of them, and an ordinary backward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt_ext.errors import InputError, SLTTWarning, listed
from sltt_ext.online import options
from sltt_ext.online.counting import FirstCalls
from sltt_ext.online.distributed import no_synchronisation
from sltt_ext.online.explanations import explaining_steps
from sltt_ext.online.grouping import Grouping, in_bytes
from sltt_ext.online.guards import Alone
from sltt_ext.online.heads import Heads, Returns, tensors_over_time
from sltt_ext.online.inputs import Arguments, TimeDims
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.mixing import PartsTried
from sltt_ext.online.network import neurons_of, whole_sequences
from sltt_ext.online.norms import norms_over_time
from sltt_ext.online.outside import KeptTensors, unknown_neurons
from sltt_ext.online.passes import CallSizes, Pass, SpeedUp
from sltt_ext.online.recording import Found, recorded
from sltt_ext.online.schedule import Schedule, runs, selected_steps
from sltt_ext.online.sequence_norms import NormsOfSequence, statistics_over_time
from sltt_ext.online.speed_ups import speed_ups_of
from sltt_ext.online.stand_ins import outer_tensors
from sltt_ext.online.time_inside import StepsInside, TimeInside

__all__ = ["Forward", "Norms", "Settings", "TimeLoop"]

Forward = Callable[..., Any]
Norms = Literal["step", "sequence"]


@dataclass(frozen=True)
class Settings:
    """How a network runs over time; see `sltt_ext.over_time`."""

    time_steps: int | None
    k: int | None
    schedule: Schedule | None
    chunk: int
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
        self._tried = PartsTried(lambda reason: None)
        self._first = FirstCalls()
        self._unknown: dict[str, str] = {}
        self._told = False

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
        self._say_what_is_unknown(net)
        neurons, multi_step = neurons_of(net, 1 if inside else settings.chunk)
        kwargs, lengths = _without_lengths(net, kwargs)
        arguments = Arguments(net, args, kwargs, settings.time_dim)
        time_steps = arguments.time_steps(settings.time_steps)
        whole = whole_sequences(neurons, time_steps, settings.chunk, settings.schedule is not None)
        part = time_steps if whole else min(settings.chunk, time_steps)
        of_sequence = settings.norms == "sequence" and part < time_steps and bool(norms_over_time(net))
        if multi_step and part < time_steps and settings.norms == "step":
            self._say_what_norms_see(net, part)
        source = partial(
            arguments.frames,
            keeps_axis=multi_step or inside is not None,
            repeats=multi_step and inside is None,
        )

        def call_of(net: nn.Module) -> Callable[[Any], Any]:
            forward = forward_of(net)
            return forward if arguments.single else lambda frame: forward(*frame[0], **frame[1])

        if inside is not None:
            double = source([_double(tensor) for tensor in arguments.tensors])
            inside.compare(net, time_steps, lambda net, start, stop: call_of(net)(double.take(start, stop)))
        wanting = self._wanting(net, arguments)
        steps = self._steps(time_steps) if wanting else ()
        returns = self._returns()
        heads = Heads(
            returns,
            time_steps,
            max(len(steps), 1),
            inside.tensors if inside else partial(tensors_over_time, multi_step=multi_step),
            weights=_weights(lengths, time_steps, returns),
        )
        found = self._found.setdefault(_kind(net, arguments.tensors), Found())
        one = Pass(
            net, call_of(net), neurons, multi_step, source(arguments.tensors), time_steps, steps, False,
            CallSizes(part, part, part), self._first.reading(heads.of_call), from_rest=not settings.carry, differentiable=bool(wanting),
            keeps_from=self._keeps_from(net, steps, time_steps, part, found),
        )  # fmt: skip
        with explaining_steps(
            net, _first(arguments.tensors), time_steps, _axis(settings.time_dim), multi_step
        ):
            around = self._around(net)
            if of_sequence:
                looking = replace(one, source=source(arguments.tensors))
                around = (*around, NormsOfSequence(statistics_over_time(looking, (*around, self._kept))))
            speed_ups = partial(self._speed_ups, around)
            outputs = recorded(one, heads, arguments.tensors, source, speed_ups, wanting, found)
        if inside and settings.returns is None:
            outputs = [inside.returned(output, head) for head, output in enumerate(outputs)]
        return heads.rebuild(outputs)

    def _returns(self) -> Returns:
        """What the caller gets: where time is inside, as the network gives it unless something else was said."""
        inside = self.settings.time_inside
        if self.settings.returns is not None:
            return self.settings.returns
        return "mean" if inside is None or inside.averages else "sequence"

    def _keeps_from(
        self, net: nn.Module, steps: tuple[int, ...], time_steps: int, part: int, found: Found
    ) -> int | None:
        """The step from which on graphs are kept: as many of the last ones as there is room for."""
        if self.settings.memory_budget is None or not steps or not found.bytes:
            return None
        if self._room is None:
            self._room = in_bytes(self.settings.memory_budget, net)
        calls = [start for start, _, selected in runs(time_steps, steps, part, part) if selected]
        kept = min(self._room // found.bytes, len(calls))
        return calls[-kept] if kept else None

    def _wanting(self, net: nn.Module, arguments: Arguments) -> list[Tensor]:
        """What a backward pass gives a gradient to."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return []
        inputs = [tensor for tensor in arguments.tensors if tensor.requires_grad]
        return list({id(tensor): tensor for tensor in (*inputs, *outer_tensors(net))}.values())

    def _steps(self, time_steps: int) -> tuple[int, ...]:
        """The steps to back-propagate."""
        if self.settings.schedule is None:
            return tuple(range(time_steps))
        if self.settings.k is not None:
            options.count("k", self.settings.k, at_most=time_steps)
        return selected_steps(self.settings.schedule, time_steps, self.settings.generator)

    def _around(self, net: nn.Module) -> tuple[SpeedUp, ...]:
        """What a pass through the network cannot be without."""
        inside = self.settings.time_inside
        return (Alone(),) if inside is None else (Alone(), StepsInside(inside, net))

    def _speed_ups(self, around: Sequence[SpeedUp], one: Pass) -> Sequence[SpeedUp]:
        settings = self.settings
        speed_ups, _ = speed_ups_of(
            one.sizes, tried=SpeedUp() if settings.time_inside else self._tried, first=self._first, kept=self._kept, step=no_synchronisation, grouping=Grouping(one.sizes.chunk, None), measuring=False,
            modules=self._modules, caches=settings.cache_invariant and not torch.is_inference_mode_enabled(),
            keeps_graphs=True, packs=settings.pack_spikes, charges=one.again or one.keeps_from is None,
        )  # fmt: skip
        return *around, *speed_ups

    def _say_what_norms_see(self, net: nn.Module, part: int) -> None:
        """Warn, once, of norms whose statistics are of fewer steps than the network had in one call."""
        norms = norms_over_time(net) if net.training and not self._told else {}
        if norms:
            self._told = True
            message = (
                f"batch norms take their statistics over {part} step{'s' * (part > 1)} at a time, and not over all T steps at once, "
                "as in a call with the whole sequence (norms='sequence' keeps the statistics, with one more pass without a graph; "
                "chunk=T the gradient through them, too, with the memory of T steps):"
            )
            warnings.warn(listed(message, norms), SLTTWarning, stacklevel=5)

    def _say_what_is_unknown(self, net: nn.Module) -> None:
        """Warn, once, of neurons that are neither reset nor made constant."""
        unknown = unknown_neurons(net)
        if unknown.keys() - self._unknown.keys():
            message = "neurons carry their state on from batch to batch, as the time loop does not know them:"
            warnings.warn(listed(message, unknown), SLTTWarning, stacklevel=5)
        self._unknown |= unknown


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
            "lengths= weighs the mean over time, and returns='sequence' gives all steps: weigh them in the loss"
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


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _kind(net: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """Calls that need the same memory."""
    return net.training, *((tensor.shape, tensor.dtype) for tensor in tensors)


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _axis(time_dim: TimeDims) -> int | None:
    return time_dim if isinstance(time_dim, int) else None
