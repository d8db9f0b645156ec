"""How many time steps go through a multi-step network in one call.

Steps that are back-propagated share a call up to ``chunk``. Steps that are not need less memory, so more of them
share one: as many as fit into what a back-propagated call needs. How much calls need is measured in the first two
iterations that have them by `ActivationMeter`: from shapes alone, nothing waits for the device. The need grows by the same bytes
with every step: those that calls of one step more have added.

A layer that reads batch statistics or draws random numbers tells one call of C steps from C calls of one. Batch
norm runs step by step within such a call; a network with any other of them keeps to ``chunk``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.memory import ActivationMeter
from sltt_ext.stateless import is_batch_norm

__all__ = ["Grouping", "Sizes", "batch_norms_in_parts"]


@dataclass(frozen=True)
class Sizes:
    """How many steps share a call.

    Attributes:
        chunk: Of those that are back-propagated.
        group: Of those that are not.
    """

    chunk: int
    group: int


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

    Raises:
        ConfigurationError: If an option cannot work.
    """

    def __init__(self, chunk: int | str, memory_budget: int | str | None) -> None:
        if memory_budget is not None and chunk != "auto":
            raise ConfigurationError(
                "memory_budget goes with chunk='auto': leave it out, or say chunk='auto'"
            )
        self.chunk = chunk
        self.budget = _checked("0.8" if memory_budget is None else memory_budget)
        self._bytes: int | None = None  # of the budget, as of the first call that was measured
        self._needs: dict[bool, _Need] = {}
        self._elements = 0
        self._measuring = False
        self._meter: ActivationMeter | None = None

    def sizes(self, net: nn.Module, time_steps: int, elements: int, longest: Mapping[bool, int]) -> Sizes:
        """How many steps share a call in the iteration that begins.

        Args:
            net: A multi-step network.
            time_steps: T.
            elements: Size of one frame.
            longest: How many consecutive steps are back-propagated (True), and are not, at most.
        """
        chosen = self.chunk if isinstance(self.chunk, int) else 1
        selects = min(longest.values()) > 0
        useful = self.chunk == "auto" or selects
        self._measuring = False
        if self.chunk == "auto" and is_compiled(net):
            raise ConfigurationError(
                "chunk='auto' counts the memory of every operator, and torch.compile hides them: give chunk a number"
            )
        if not useful or _tells_calls_apart(net) or is_compiled(net):
            return Sizes(chosen, chosen)
        if elements > self._elements:
            self._elements, self._needs, self._bytes = elements, {}, None
        if True not in self._needs:
            self._measuring = longest[True] > 0
            return Sizes(chosen, chosen)
        if self.chunk == "auto":
            budget = self._allowed(net)
            chunk = self._size(True, chosen, budget, longest[True])
        else:
            budget, chunk = self._needs[True].of(chosen), chosen
        group = max(self._size(False, chosen, budget, longest[False]), chunk) if selects else chunk
        return Sizes(min(chunk, time_steps), min(group, time_steps))

    def _size(self, back_propagated: bool, chosen: int, budget: int, longest: int) -> int:
        """How many steps fit; what more than ``chosen`` need is measured with one more, where they would be tried."""
        need = self._needs.get(back_propagated)
        fitting = chosen if need is None else max(need.steps_within(budget), chosen)
        measuring = longest > 0 if need is None else need.steps <= chosen < min(fitting, longest)
        self._measuring |= measuring
        return min(fitting, chosen + 1) if measuring else fitting

    def parts(self, steps: int) -> tuple[int, ...]:
        """The calls that one call over ``steps`` steps stands for, as batch norm has to see them."""
        part = self.chunk if isinstance(self.chunk, int) else 1
        return (*[part] * (steps // part), *([steps % part] if steps % part else []))

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Surround the iteration for which `sizes` was asked."""
        if not self._measuring:
            yield
            return
        try:
            with ActivationMeter() as self._meter:
                yield
        finally:
            self._meter = None

    @contextmanager
    def call(self, back_propagated: bool, steps: int) -> Iterator[None]:
        """Surround one call of the network, with its backward."""
        meter = self._meter
        if meter is None:
            yield
            return
        before = meter.peak_bytes = meter.live_bytes
        yield
        known, need = self._needs.get(back_propagated), (steps, meter.peak_bytes, meter.peak_bytes - before)
        self._needs[back_propagated] = _Need(*need) if known is None else known.with_another(*need)

    def state_dict(self) -> dict[str, Any]:
        """What was measured: a resumed run has to send the same calls."""
        needs = {str(kind): astuple(need) for kind, need in self._needs.items()}
        return {"elements": self._elements, "needs": needs, "budget": (self.budget, self._bytes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was measured."""
        self._elements = state["elements"]
        budget, bytes_ = state["budget"]
        self._bytes = bytes_ if budget == self.budget else None
        self._needs = {
            kind: _Need(*state["needs"][str(kind)]) for kind in (True, False) if str(kind) in state["needs"]
        }

    def _allowed(self, net: nn.Module) -> int:
        """The budget in bytes. What else comes to use the device later changes no sizes: calls stay what they were."""
        if self._bytes is None:
            self._bytes, least = _in_bytes(self.budget, net), self._needs[True].of(1)
            if least > self._bytes:
                warnings.warn(
                    f"one time step needs {least / 2**20:.0f} MiB, more than memory_budget={self.budget!r} "
                    f"({self._bytes / 2**20:.0f} MiB): steps go through the network one by one; a smaller batch "
                    "needs less",
                    SLTTWarning,
                    stacklevel=2,
                )
        return self._bytes


def _tells_calls_apart(net: nn.Module) -> bool:
    """Whether one call of C steps is not C calls, batch norm apart."""
    for module in net.modules():
        if not module.training:
            continue
        if isinstance(module, (_DropoutNd, nn.RReLU)) and getattr(module, "p", 1) > 0:
            return True
        if isinstance(module, _NormBase) and not is_batch_norm(module):
            return True
    return False


@contextmanager
def batch_norms_in_parts(
    net: nn.Module, parts: Sequence[int], evaluated_once: Callable[[nn.Module, Tensor], bool]
) -> Iterator[None]:
    """Let batch norms in training take their statistics over parts of a call.

    Args:
        net: The network.
        parts: How many steps each part has.
        evaluated_once: Whether a norm of a tensor is time-invariant: it counts the parts by itself.
    """
    norms = [module for module in net.modules() if is_batch_norm(module) and module.training]
    own = [vars(norm).get("forward") for norm in norms]
    for norm in norms:
        vars(norm)["forward"] = partial(_in_parts, norm, norm.forward, parts, evaluated_once)
    try:
        yield
    finally:
        for norm, forward in zip(norms, own):
            del vars(norm)["forward"]
            if forward is not None:
                vars(norm)["forward"] = forward


def _in_parts(
    norm: nn.Module,
    forward: Callable[[Tensor], Tensor],
    parts: Sequence[int],
    evaluated_once: Callable[[nn.Module, Tensor], bool],
    x: Tensor,
) -> Tensor:
    """``forward`` of each part of ``x`` ``[C, N, ...]``, or ``[C * N, ...]`` where time is folded into the batch."""
    steps = sum(parts)
    if len(x) % steps or evaluated_once(norm, x):
        return forward(x)
    per_step = len(x) // steps
    return torch.cat([forward(part) for part in x.split([per_step * part for part in parts])])


def _checked(budget: int | str) -> int | str:
    if isinstance(budget, str):
        with suppress(ValueError):
            if 0 < float(budget) <= 1:
                return budget
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ConfigurationError(
        f"memory_budget must be a number of bytes, or a part of the device's memory as text, '0.8', got {budget!r}"
    )


def _in_bytes(budget: int | str, net: nn.Module) -> int:
    """The budget; a part of what is free on a CUDA device, and of all memory of the machine on the CPU."""
    if not isinstance(budget, str):
        return budget
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
