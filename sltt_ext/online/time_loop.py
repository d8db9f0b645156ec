"""A network over time as one function: T steps, outputs of all of them, and an ordinary backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.errors import SLTTWarning, listed
from sltt_ext.online.distributed import no_synchronisation
from sltt_ext.online.explanations import explaining_steps
from sltt_ext.online.grouping import Grouping
from sltt_ext.online.guards import Alone
from sltt_ext.online.heads import Heads, Returns, tensors_over_time
from sltt_ext.online.inputs import Arguments, TimeDims
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.network import neurons_of, whole_sequences
from sltt_ext.online.outside import KeptTensors, unknown_neurons
from sltt_ext.online.passes import CallSizes, Pass, SpeedUp
from sltt_ext.online.recording import recorded
from sltt_ext.online.schedule import Schedule, selected_steps
from sltt_ext.online.speed_ups import speed_ups_of
from sltt_ext.online.stand_ins import outer_tensors

__all__ = ["Settings", "TimeLoop"]


@dataclass(frozen=True)
class Settings:
    """How a network runs over time; see `sltt_ext.over_time`."""

    time_steps: int | None
    schedule: Schedule | None
    chunk: int
    time_dim: TimeDims
    returns: Returns
    carry: bool
    generator: torch.Generator | None
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
        self._unknown: dict[str, str] = {}

    def __reduce__(self) -> Any:
        """Copies and files have the settings; what was found out about the network is found out again."""
        return TimeLoop, (self.settings,)

    def run(
        self, net: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The network's output for a whole sequence.

        Args:
            net: The network.
            forward: Its forward for one call.
            args: The arguments of the sequence.
            kwargs: Its named ones.
        """
        settings = self.settings
        self._say_what_is_unknown(net)
        neurons, multi_step = neurons_of(net, settings.chunk)
        arguments = Arguments(net, args, kwargs, settings.time_dim)
        time_steps = arguments.time_steps(settings.time_steps)
        whole = whole_sequences(neurons, time_steps, settings.chunk, settings.schedule is not None)
        part = time_steps if whole else settings.chunk
        wanting = self._wanting(net, arguments)
        learns = bool(wanting)
        steps = self._steps(time_steps) if learns else ()
        read = partial(tensors_over_time, multi_step=multi_step)
        heads = Heads(settings.returns, time_steps, len(steps), read)
        source = partial(arguments.frames, keeps_axis=multi_step, repeats=multi_step)
        one = Pass(
            net,
            forward if arguments.single else lambda frame: forward(*frame[0], **frame[1]),
            neurons,
            multi_step,
            source(arguments.tensors),
            time_steps,
            steps,
            False,
            CallSizes(part, part, part),
            heads.of_call,
            from_rest=not settings.carry,
            differentiable=learns,
        )
        with explaining_steps(
            net, _first(arguments.tensors), time_steps, _axis(settings.time_dim), multi_step
        ):
            outputs = recorded(one, heads, arguments.tensors, source, self._speed_ups, wanting)
        return heads.rebuild(outputs)

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
        return selected_steps(self.settings.schedule, time_steps, self.settings.generator)

    def _speed_ups(self, one: Pass) -> Sequence[SpeedUp]:
        settings = self.settings
        speed_ups, _ = speed_ups_of(
            one.sizes, kept=self._kept, step=no_synchronisation, grouping=Grouping(one.sizes.chunk, None), measuring=False,
            modules=self._modules, caches=settings.cache_invariant and not torch.is_inference_mode_enabled(),
            keeps_graphs=True, packs=settings.pack_spikes,
        )  # fmt: skip
        return Alone(), *speed_ups

    def _say_what_is_unknown(self, net: nn.Module) -> None:
        """Warn, once, of neurons that are neither reset nor made constant."""
        unknown = unknown_neurons(net)
        if unknown.keys() - self._unknown.keys():
            message = "neurons carry their state on from batch to batch, as the time loop does not know them:"
            warnings.warn(listed(message, unknown), SLTTWarning, stacklevel=5)
        self._unknown |= unknown


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _axis(time_dim: TimeDims) -> int | None:
    return time_dim if isinstance(time_dim, int) else None
