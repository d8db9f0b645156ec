"""How many time steps go through a network in one call: how much memory calls need, and whether several steps may share one.

Steps that are back-propagated share a call up to ``chunk``. The other steps need less memory, so more of them share a call:
as many as fit into the memory of a back-propagated call. `ActivationMeter` measures in a few iterations how much calls need.
It uses only shapes, so nothing waits for the device. Each further step in a call adds the same number
of bytes, which is measured, too.

For some networks, one call of C steps differs from C calls. They keep to the calls that the user asked for (`watching`). Batch
norms take their statistics over those calls, however many steps share a call (`norms`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from sltt_ext.errors import ConfigurationError, warn
from sltt_ext.online.gradient_hooks import has_gradient_hooks
from sltt_ext.online.memory import ActivationMeter
from sltt_ext.online.norms import untold_norm
from sltt_ext.online.options import SIZE
from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.watching import layers_tell_calls_apart

__all__ = ["CallBytes", "Grouping", "Measuring", "Need", "in_bytes"]


@dataclass(frozen=True)
class CallBytes:
    """What one call needed.

    Attributes:
        selected: Whether it was back-propagated.
        steps: How many steps it had.
        peak: Bytes at its peak, with all that lived on from the calls before it.
        own: Bytes that the call itself added.
    """

    selected: bool
    steps: int
    peak: int
    own: int


@dataclass(frozen=True)
class Need:
    """Bytes that live at the same time during a call, with all that lives on from the calls before it.

    Attributes:
        steps: How many steps the call has.
        peak: Bytes at its peak, the most of any call of so many steps.
        own: Bytes that the call itself adds, the least of any.
        fewer: Steps and bytes of a call of fewer steps, if one was measured before.
    """

    steps: int
    peak: int
    own: int
    fewer: tuple[int, int] | None = None

    @property
    def shortest(self) -> tuple[int, int]:
        """Steps and bytes of the shortest call that was measured."""
        return self.fewer or (self.steps, self.peak)

    @property
    def per_step(self) -> int:
        """What another step adds, at most where no call of fewer steps tells."""
        if self.fewer is None:
            return max(self.own // self.steps, 1)
        steps, peak = self.fewer
        return max((self.peak - peak) // (self.steps - steps), 1)

    def of(self, steps: int) -> int:
        """What a call of so many steps needs."""
        return self.peak + (steps - self.steps) * self.per_step

    def steps_within(self, budget: int) -> int:
        """How many steps a call of so many bytes has; at least one."""
        return max(self.steps + (budget - self.peak) // self.per_step, 1)

    def with_another(self, steps: int, peak: int, own: int) -> Need:
        """Together with what another call needed."""
        if steps > self.steps:
            return Need(steps, peak, own, (self.steps, self.peak))
        if steps < self.steps:
            return self
        return replace(self, peak=max(self.peak, peak), own=min(self.own, own))

    def scaled(self, factor: float) -> Need:
        """The same for inputs that are so many times as large."""
        fewer = None if self.fewer is None else (self.fewer[0], int(self.fewer[1] * factor))
        return Need(self.steps, int(self.peak * factor), int(self.own * factor), fewer)


class Grouping:
    """Whether several of the user's own calls may be one.

    Args:
        asked: Whether the user has asked for it: who has is told why not.

    Attributes:
        kept_apart: Why the network keeps to the user's own calls; None where nothing speaks against more steps in one.
    """

    def __init__(self, asked: bool = False) -> None:
        self.kept_apart: str | None = None
        self._asked = asked

    def keep_apart(self, reason: str) -> None:
        """Keep to the user's own calls from now on."""
        self.kept_apart = self.kept_apart or reason

    def keeps_apart(self, net: nn.Module, back_propagated: bool, quietly: bool = False) -> bool:
        """Whether the network keeps to the user's own calls; who has asked for more is told why, once.

        Args:
            net: A network that takes sequences.
            back_propagated: Whether steps that are back-propagated were to share a call.
            quietly: Tell nobody.
        """
        reason = layers_tell_calls_apart(net) or self.kept_apart
        if reason is None and (path := untold_norm(net)) is not None:
            reason = (
                f"it is not known where the batch norm {path!r} has its time (if it reads [T * N, ...], the samples of the "
                f"first step first, set net.{path}.sltt_folds_time = True)"
            )
        if reason is None and back_propagated and has_gradient_hooks(net):
            reason = "a hook on a gradient would run once for all of them"
        if reason is not None and self._asked and not quietly:
            self._asked = False
            warn(
                f"chunk='auto' keeps to one step a call, since several steps in one call would give another result than one "
                f"by one: {reason}"
            )
        return reason is not None


class Measuring(SpeedUp):
    """Measures the calls of one pass.

    Args:
        found: What each call needed goes here.
    """

    def __init__(self, found: list[CallBytes]) -> None:
        self._found = found
        self._meter = ActivationMeter()
        self._before = 0

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Count the bytes that live in it."""
        with self._meter:
            yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Count the bytes that a call adds, and those at its peak."""
        yield
        meter = self._meter
        self._found.append(
            CallBytes(call.selected, call.steps, meter.peak_bytes, meter.peak_bytes - self._before)
        )
        self._before = meter.peak_bytes = meter.live_bytes


def in_bytes(budget: int | str, net: nn.Module) -> int:
    """The budget; a part of what is free on a CUDA device, and of all memory of the machine on the CPU."""
    if not isinstance(budget, str):
        return budget
    if (size := SIZE.fullmatch(budget)) is not None:
        return int(float(size[1]) * 1024 ** (1 + "KMGT".index(size[2])))
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(float(budget) * (free + cached))
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        raise ConfigurationError(
            f"the amount of memory on {device.type} cannot be found out on this system: give memory_budget in bytes"
        )
    return int(float(budget) * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
