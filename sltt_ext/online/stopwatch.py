"""How long the calls of an iteration take: by the clock on the CPU, by events on a CUDA device, read once at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sltt_ext.online.capture import capturing
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["CallSeconds", "Stopwatch", "may_be_timed", "now"]

Kind = tuple[bool, bool]
"""Whether a pass learns, and whether a call of it has a graph."""

CallSeconds = dict[Kind, tuple[float, int]]
"""By kind of call, the seconds of all of them, and their steps."""


def now() -> float:
    """Seconds of the clock."""
    return time.perf_counter()


def may_be_timed(net: nn.Module) -> bool:
    """Whether seconds may decide: not where there are none, nor where the user wants the same numbers in every run."""
    fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    device = next((parameter.device.type for parameter in net.parameters()), "cpu")
    return not (
        fake or capturing() or torch.are_deterministic_algorithms_enabled() or device not in ("cpu", "cuda")
    )


class Stopwatch(SpeedUp):
    """Times the calls of the passes of one iteration, each with its loss and backward.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
        self._device = device if device.type == "cuda" else None
        self._learns = False
        self._calls: list[tuple[Kind, int, Any, Any]] = []

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Note what kind of pass it is."""
        self._learns = one.learns
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Note when it begins and ends."""
        start = self._mark()
        yield
        self._calls.append(((self._learns, call.differentiable), call.steps, start, self._mark()))

    def seconds(self) -> CallSeconds:
        """What was timed; waits for the device once."""
        if self._device is not None and self._calls:
            self._calls[-1][3].synchronize()
        found: CallSeconds = {}
        for kind, steps, start, end in self._calls:
            taken = end - start if self._device is None else start.elapsed_time(end) / 1000
            seconds, before = found.get(kind, (0.0, 0))
            found[kind] = seconds + taken, before + steps
        return found

    def _mark(self) -> Any:
        if self._device is None:
            return now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
