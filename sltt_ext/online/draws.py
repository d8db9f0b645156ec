"""Random draws: which K of the T time steps SLTT-K back-propagates.

A step that is drawn with probability pi[t] counts K / (T pi[t]) times in the mean over the K drawn ones. So the expected
gradient is SLTT's, whatever the probabilities are::

    E[ 1/K sum_{t drawn} K / (T pi[t]) g[t] ]  =  1/T sum_t g[t]

- ``"random"``: K of T without replacement, pi[t] = K / T (Meng et al. 2023, Sec. 4.3).
- ``"stratified"``: one step of each K-th of the T steps, pi[t] = K / T as well. If the border of two strata falls within a
  step, this step is in both. The draw in the first stratum then changes the chances in the second, so that no step is drawn
  twice and all keep their probability (Deville, "Une nouvelle méthode de tirage à probabilités inégales", INSEE 1998).
- ``"early"``: as ``"random"``, but draws whose last step is early are up to twice as probable as draws that include step T - 1.
  So fewer steps have to be run. pi[t] falls with t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from math import comb
from typing import Any, Literal

import torch

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.capture import capturing
from sltt_ext.online.schedule import Schedule
from sltt_ext.online.snapshot import without_modes

__all__ = ["DRAWS", "Draws", "chances", "last_steps", "probabilities"]

Draws = Literal["random", "stratified", "early"]


def _random(k: int, time_steps: int, generator: torch.Generator | None) -> list[int]:
    return _numbers(torch.randperm, time_steps, generator)[:k]


def _stratified(k: int, time_steps: int, generator: torch.Generator | None) -> list[int]:
    drawn: list[int] = []
    for stratum, number in enumerate(_numbers(_UNIFORM, (k,), generator)):
        drawn.append(_picked(chances(stratum, k, time_steps, drawn), number))
    return drawn


def _early(k: int, time_steps: int, generator: torch.Generator | None) -> dict[int, float]:
    last = _picked(last_steps(k, time_steps), *_numbers(_UNIFORM, (1,), generator))
    drawn = [*_numbers(torch.randperm, last, generator)[: k - 1], last]
    each = probabilities(k, time_steps)
    return {t: float(Fraction(k, time_steps) / each[t]) for t in drawn}


DRAWS: dict[Draws, Callable[[int], Schedule]] = {
    "random": lambda k: partial(_random, k),
    "stratified": lambda k: partial(_stratified, k),
    "early": lambda k: partial(_early, k),
}
"""The schedule that draws K steps, by name. It raises `ConfigurationError` where a CUDA graph would freeze its draw."""


def chances(stratum: int, k: int, time_steps: int, drawn: list[int]) -> dict[int, Fraction]:
    """The chance of each step of a stratum, after those before it.

    Step t reaches from t K to (t + 1) K, and stratum i from i T to (i + 1) T.

    Args:
        stratum: Its number i.
        k: K, how many strata there are.
        time_steps: T.
        drawn: What was drawn in the strata before.

    Examples:
        >>> {t: str(chance) for t, chance in chances(1, 2, 3, [0]).items()}  # step 1 is in both strata
        {1: '1/2', 2: '1/2'}
        >>> {t: str(chance) for t, chance in chances(1, 2, 3, [1]).items()}
        {1: '0', 2: '1'}
    """
    start, stop = stratum * time_steps, (stratum + 1) * time_steps
    steps = range(start // k, -(-stop // k))
    first, *others = [min((t + 1) * k, stop) - max(t * k, start) for t in steps]
    before = start - steps[0] * k  # what the stratum before has of the first step
    chance = Fraction(0) if steps[0] in drawn else Fraction(first, time_steps - before)
    rest = [(1 - chance) * Fraction(other, time_steps - first) for other in others]
    return dict(zip(steps, [chance, *rest], strict=True))


@lru_cache
def last_steps(k: int, time_steps: int) -> Mapping[int, Fraction]:
    """The probability that ``"early"`` draws a step as its last one.

    Examples:
        >>> {t: str(probability) for t, probability in last_steps(1, 3).items()}
        {0: '4/9', 1: '1/3', 2: '2/9'}
    """
    tail = max(time_steps - k, 1)
    ways = {t: comb(t, k - 1) * Fraction(tail + time_steps - 1 - t, tail) for t in range(k - 1, time_steps)}
    return {t: number / sum(ways.values()) for t, number in ways.items()}


@lru_cache
def probabilities(k: int, time_steps: int) -> tuple[Fraction, ...]:
    """The probability of each step that ``"early"`` draws it: as the last one, or as one of the others before it."""
    last = last_steps(k, time_steps)
    return tuple(
        last.get(t, Fraction(0)) + sum(p * Fraction(k - 1, end) for end, p in last.items() if end > t)
        for t in range(time_steps)
    )


_POINTS = 2**53
_UNIFORM = partial(torch.randint, _POINTS)


def _picked(own: Mapping[int, Fraction], number: int) -> int:
    """The step at a number from 0 to 2^53, where each has a part of them as large as its chance."""
    point = Fraction(number, _POINTS)
    return next(t for t, up_to in zip(own, accumulate(own.values())) if point < up_to)


def _numbers(draw: Callable[..., torch.Tensor], what: Any, generator: torch.Generator | None) -> list[int]:
    if capturing():
        raise ConfigurationError(
            "a CUDA graph replays the steps that were drawn while it was captured, the same ones in every iteration: "
            "capture without k, or give a schedule= whose steps may be frozen"
        )
    device = "cpu" if generator is None else generator.device
    with without_modes():  # real numbers also where the network runs on fake tensors
        numbers: list[int] = draw(what, generator=generator, device=device).tolist()
    return numbers
