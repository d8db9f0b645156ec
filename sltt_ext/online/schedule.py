"""Which time steps are back-propagated, and how the steps are grouped into calls of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import inf, nan
from numbers import Real
from typing import Any

import torch

from sltt_ext.errors import ConfigurationError

__all__ = ["Schedule", "in_windows", "longest_runs", "runs", "selected_steps", "steps_of_a_draw"]

Schedule = Callable[[int, torch.Generator | None], Iterable[int] | Mapping[int, float]]
"""``(time_steps, generator) -> `` the steps to back-propagate, or ``{step: how many times its loss counts}``."""


def in_windows(schedule: Schedule, window: int) -> Schedule:
    """A schedule of windows of so many steps, from one of single steps; the last window may be shorter."""
    return schedule if window == 1 else partial(_steps_of_windows, schedule, window)


def _steps_of_windows(
    schedule: Schedule, window: int, time_steps: int, generator: torch.Generator | None
) -> dict[int, float]:
    selected = selected_steps(schedule, -(-time_steps // window), generator)
    return {
        t: count
        for one, count in selected.items()
        for t in range(one * window, min((one + 1) * window, time_steps))
    }


def steps_of_a_draw(selected: Iterable[int], time_steps: int, window: int) -> float:
    """How many steps so many windows have on average, drawn from all with equal chances.

    The mean over the drawn steps is divided by it: were it by their own number, steps of a shorter last window would count more.

    Examples:
        >>> steps_of_a_draw([4, 5], time_steps=6, window=4)
        3.0
    """
    return len({t // window for t in selected}) * time_steps / -(-time_steps // window)


def selected_steps(
    schedule: Schedule, time_steps: int, generator: torch.Generator | None
) -> dict[int, float]:
    """The steps that ``schedule`` selects, in order, and how many times each counts.

    Raises:
        ConfigurationError: If it selects no step, one step twice, one outside ``0..time_steps - 1``, or one that
            counts some other than a positive number of times.
    """
    selection = schedule(time_steps, generator)
    drawn = [int(t) for t in selection]
    steps = sorted(set(drawn))
    if not steps or len(steps) != len(drawn) or steps[0] < 0 or steps[-1] >= time_steps:
        raise ConfigurationError(
            f"schedule must select one or more different steps from 0 to {time_steps - 1}, got {drawn}"
        )
    if not isinstance(selection, Mapping):
        return dict.fromkeys(steps, 1.0)
    counts = dict(zip(drawn, map(_count, selection.values())))
    return {t: counts[t] for t in steps}


def _count(value: Any) -> float:
    number = float(value) if isinstance(value, Real) else nan
    if not 0 < number < inf:
        raise ConfigurationError(f"schedule must count each step a positive number of times, got {value!r}")
    return number


def runs(time_steps: int, selected: Iterable[int], chunk: int, group: int) -> Iterator[tuple[int, int, bool]]:
    """Split ``0..time_steps`` into runs ``(start, stop, back-propagated)``.

    Those that are back-propagated have at most ``chunk`` steps, the others at most ``group``.

    Examples:
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

    Examples:
        >>> longest_runs(7, [2, 3, 4])
        {False: 2, True: 3}
    """
    longest = {False: 0, True: 0}
    for start, stop, kind in runs(time_steps, selected, time_steps, time_steps):
        longest[kind] = max(longest[kind], stop - start)
    return longest
