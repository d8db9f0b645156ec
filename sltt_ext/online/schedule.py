"""Which time steps are back-propagated, and how the steps are grouped into calls of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.capture import capturing
from sltt_ext.online.snapshot import without_modes

__all__ = ["Schedule", "longest_runs", "random_steps", "runs", "selected_steps"]

Schedule = Callable[[int, torch.Generator | None], Iterable[int]]


def random_steps(k: int, window: int = 1) -> Schedule:
    """SLTT-K's schedule: ``k`` of the time steps, drawn without replacement (Meng et al. 2023, Sec. 4.3).

    With a ``window`` of more steps, ``k`` of the windows that the time steps are cut into.

    Raises:
        ConfigurationError: When a draw would be captured in a CUDA graph, which freezes it.
    """
    return partial(_drawn, k, window)


def _drawn(k: int, window: int, time_steps: int, generator: torch.Generator | None) -> list[int]:
    if capturing():
        raise ConfigurationError(
            "a CUDA graph replays the steps that were drawn while it was captured, the same ones in every iteration: "
            "capture without k, or give a schedule= whose steps may be frozen"
        )
    device = "cpu" if generator is None else generator.device
    with without_modes():  # real numbers also where the network runs on fake tensors
        windows = -(-time_steps // window)
        drawn: list[int] = torch.randperm(windows, generator=generator, device=device)[:k].tolist()
    return [t for one in drawn for t in range(one * window, min((one + 1) * window, time_steps))]


def selected_steps(schedule: Schedule, time_steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
    """The steps ``schedule`` selects, in order.

    Raises:
        ConfigurationError: If it selects no step, one step twice, or one outside ``0..time_steps - 1``.
    """
    drawn = [int(t) for t in schedule(time_steps, generator)]
    steps = tuple(sorted(set(drawn)))
    if not steps or len(steps) != len(drawn) or steps[0] < 0 or steps[-1] >= time_steps:
        raise ConfigurationError(
            f"schedule must select one or more different steps from 0 to {time_steps - 1}, got {drawn}"
        )
    return steps


def runs(time_steps: int, selected: Iterable[int], chunk: int, group: int) -> Iterator[tuple[int, int, bool]]:
    """Split ``0..time_steps`` into runs ``(start, stop, back-propagated)``.

    Those that are back-propagated have at most ``chunk`` steps, the others at most ``group``.

    >>> list(runs(7, [2, 3, 4], chunk=2, group=3))
    [(0, 2, False), (2, 4, True), (4, 5, True), (5, 7, False)]
    """
    chosen = set(selected)
    start = 0
    while start < time_steps:
        longest = chunk if start in chosen else group
        stop = start + 1
        while stop < min(start + longest, time_steps) and (stop in chosen) == (start in chosen):
            stop += 1
        yield start, stop, start in chosen
        start = stop


def longest_runs(time_steps: int, selected: Iterable[int]) -> dict[bool, int]:
    """How many consecutive steps of ``0..time_steps`` are back-propagated (True), and are not, at most.

    >>> longest_runs(7, [2, 3, 4])
    {False: 2, True: 3}
    """
    longest = {False: 0, True: 0}
    for start, stop, kind in runs(time_steps, selected, time_steps, time_steps):
        longest[kind] = max(longest[kind], stop - start)
    return longest
