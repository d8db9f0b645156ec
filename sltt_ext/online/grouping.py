"""How many time steps go through a multi-step network in one call.

Steps that are back-propagated share a call up to ``chunk``. Steps that are not need less memory, so more of them
share one: as many as fit into what a back-propagated call needs. How much calls need is measured in the first two
iterations that have them by `ActivationMeter`: from shapes alone, nothing waits for the device. The need grows by the same bytes
with every step: those that calls of one step more have added.

A network for which one call of C steps is not C calls keeps to the calls that the user asked for (`watching`). Batch
norms take their statistics over those, however many steps share a call (`norms`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import nn

from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.gradient_hooks import has_gradient_hooks
from sltt_ext.online.memory import ActivationMeter
from sltt_ext.online.norms import untold_norm
from sltt_ext.online.options import SIZE
from sltt_ext.online.passes import Call, CallSizes, Pass, SpeedUp
from sltt_ext.online.watching import layers_tell_calls_apart

__all__ = ["Grouping", "Measuring", "in_bytes"]


@dataclass(frozen=True)
class _Need:
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
    def per_step(self) -> int:
        """What another step adds, at most where no call of fewer steps tells."""
        if self.fewer is None:
            return max(self.own // self.steps, 1)
        steps, peak = self.fewer
        return max((self.peak - peak) // (self.steps - steps), 1)

    def of(self, steps: int) -> int:
        return self.peak + (steps - self.steps) * self.per_step

    def steps_within(self, budget: int) -> int:
        return max(self.steps + (budget - self.peak) // self.per_step, 1)

    def with_another(self, steps: int, peak: int, own: int) -> _Need:
        """Together with what another call needed."""
        if steps > self.steps:
            return _Need(steps, peak, own, (self.steps, self.peak))
        if steps < self.steps:
            return self
        return replace(self, peak=max(self.peak, peak), own=min(self.own, own))


class Grouping:
    """The sizes of the calls: what the user chose, and what was measured.

    Args:
        chunk: Steps that are back-propagated in one call, or ``"auto"``: as many as fit into ``memory_budget``.
        memory_budget: Bytes for activations, states and gradients, or a part of the device's memory as text,
            ``"0.8"``. None is ``"0.8"`` where ``chunk`` is ``"auto"``.
        updates: Whether weights are updated after every call: how often must not depend on memory.

    Attributes:
        kept_apart: Why the network keeps to the user's own calls; None where nothing speaks against more steps in one.
    """

    def __init__(self, chunk: int | str, memory_budget: int | str | None, updates: bool = False) -> None:
        self.chunk = chunk
        self.budget = "0.8" if memory_budget is None else memory_budget
        self.kept_apart: str | None = None
        self._updates = updates
        self._told = False
        self._bytes: int | None = None  # of the budget, as of the first call that was measured
        self._needs: dict[bool, _Need] = {}
        self._elements = 0

    def sizes(
        self, net: nn.Module, time_steps: int, elements: int, longest: Mapping[bool, int]
    ) -> tuple[CallSizes, bool]:
        """How many steps share a call in the iteration that begins, and whether it has to be measured.

        Args:
            net: A multi-step network.
            time_steps: T.
            elements: Size of one frame.
            longest: How many consecutive steps are back-propagated (True), and are not, at most.
        """
        chosen = self.chunk if isinstance(self.chunk, int) else 1
        as_chosen = CallSizes(chosen, chosen, chosen)
        selects = min(longest.values()) > 0
        useful = self.chunk == "auto" or selects
        if self.chunk == "auto" and is_compiled(net):
            raise ConfigurationError(
                "chunk='auto' counts the memory of every operator, and torch.compile hides them: give chunk a number"
            )
        if not useful or is_compiled(net) or self._keeps_apart(net):
            return as_chosen, False
        if elements > self._elements:
            self._elements, self._needs, self._bytes = elements, {}, None
        if True not in self._needs:
            return as_chosen, longest[True] > 0
        if self.chunk == "auto":
            budget = self._allowed(net)
            chunk, measuring = self._size(True, chosen, budget, longest[True])
            if self._updates:
                chunk, measuring = chosen, False
        else:
            budget, chunk, measuring = self._needs[True].of(chosen), chosen, False
        group = chunk
        if selects:
            fitting, measuring_group = self._size(False, chosen, budget, longest[False])
            group = max(fitting, chunk)
            measuring |= measuring_group
        return CallSizes(min(chunk, time_steps), min(group, time_steps), chosen), measuring

    def _keeps_apart(self, net: nn.Module) -> bool:
        """Whether the network keeps to the user's own calls; who has asked for more is told why, once."""
        reason = self.kept_apart or layers_tell_calls_apart(net)
        if reason is None and (path := untold_norm(net)) is not None:
            reason = (
                f"nobody tells where the batch norm {path!r} has its time (if it reads [T * N, ...], the samples of the "
                f"first step first, say so with net.{path}.sltt_folds_time = True)"
            )
        if reason is None and self.chunk == "auto" and has_gradient_hooks(net):
            reason = "a hook on a gradient would run once for all of them"
        if reason is not None and self.chunk == "auto" and not self._told:
            self._told = True
            warnings.warn(
                f"chunk='auto' keeps to one step a call, since several steps in one call would not be those steps one by "
                f"one: {reason}",
                SLTTWarning,
                stacklevel=2,
            )
        return reason is not None

    def _size(self, back_propagated: bool, chosen: int, budget: int, longest: int) -> tuple[int, bool]:
        """How many steps fit, in whole calls of the user's own, and whether to measure: what two such calls need."""
        need = self._needs.get(back_propagated)
        fitting = chosen if need is None else max(need.steps_within(budget) // chosen * chosen, chosen)
        measuring = longest > 0 if need is None else need.steps <= chosen < min(fitting, longest)
        return min(fitting, 2 * chosen) if measuring else fitting, measuring

    def measured(self, call: Call, peak: int, own: int) -> None:
        """Take in the bytes that a call needed: at its peak, and of its own."""
        known, need = self._needs.get(call.selected), (call.steps, peak, own)
        self._needs[call.selected] = _Need(*need) if known is None else known.with_another(*need)

    def keep_apart(self, reason: str) -> None:
        """Keep to the user's own calls from now on."""
        self.kept_apart = self.kept_apart or reason

    def state_dict(self) -> dict[str, Any]:
        """What was measured: a resumed run has to send the same calls."""
        needs = {str(kind): astuple(need) for kind, need in self._needs.items()}
        return {
            "elements": self._elements,
            "needs": needs,
            "budget": (self.budget, self._bytes),
            "kept apart": self.kept_apart,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was measured."""
        self._elements = state["elements"]
        budget, bytes_ = state["budget"]
        self._bytes = bytes_ if budget == self.budget else None
        self._needs = {
            kind: _Need(*state["needs"][str(kind)]) for kind in (True, False) if str(kind) in state["needs"]
        }
        if "kept apart" not in state:  # of an earlier version, which did not watch the network: measure again
            self._needs = {}
            return
        self.kept_apart = state["kept apart"]

    def _allowed(self, net: nn.Module) -> int:
        """The budget in bytes. What else comes to use the device later changes no sizes: calls stay what they were."""
        if self._bytes is None:
            self._bytes, least = in_bytes(self.budget, net), self._needs[True].of(1)
            if least > self._bytes:
                warnings.warn(
                    f"one time step needs {least / 2**20:.0f} MiB, more than memory_budget={self.budget!r} "
                    f"({self._bytes / 2**20:.0f} MiB): steps go through the network one by one; a smaller batch "
                    "needs less",
                    SLTTWarning,
                    stacklevel=2,
                )
        return self._bytes


class Measuring(SpeedUp):
    """Measures the calls of one pass.

    Args:
        grouping: What learns of it.
    """

    def __init__(self, grouping: Grouping) -> None:
        self._grouping = grouping
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
        self._grouping.measured(call, meter.peak_bytes, meter.peak_bytes - self._before)
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
            f"how much memory there is on {device.type} cannot be told on this system: give memory_budget in bytes"
        )
    return int(float(budget) * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
