"""Differences between methods over the same seeds, with Student's interval for their mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import t

Rows = list[dict[str, str]]


class Interval(NamedTuple):
    """The mean of some differences, and how far its 95 % interval reaches to each side."""

    mean: float
    half: float

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """Both, rounded."""
        return (
            f"{round(self.mean, digits) + 0.0:+.{digits}f} ± {self.half:.{digits}f}"  # 0.0: no negative zero
        )

    @property
    def holds_zero(self) -> bool:
        """Whether the mean difference may be zero."""
        return abs(self.mean) <= self.half


def interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval for the mean of independent, normal differences, of which there are two at least."""
    n = len(differences)
    quantile = float(t.ppf((1 + level) / 2, n - 1))
    return Interval(statistics.mean(differences), quantile * statistics.stdev(differences) / n**0.5)


@dataclass(frozen=True)
class Paired:
    """A method beside another one, the baseline, with the same seeds.

    Attributes:
        accuracies: The method's, in percent.
        differences: To the baseline's of the same seed, in points.
    """

    accuracies: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean accuracy of the method."""
        return statistics.mean(self.accuracies)

    @property
    def baseline_mean(self) -> float:
        """The mean accuracy of the baseline, over the same seeds."""
        return self.mean - statistics.mean(self.differences)

    @property
    def interval(self) -> Interval | None:
        """The interval of the mean difference; None where there is one seed."""
        return interval(self.differences) if len(self.differences) > 1 else None


def paired(
    rows: Rows, baseline: str = "BPTT", column: str = "test_accuracy", factor: float = 100
) -> dict[str, Paired]:
    """By method, in the order of the rows: its runs with the seeds of the baseline. ``factor`` makes percent of fractions."""
    percent: dict[str, dict[str, float]] = {}
    for row in rows:
        percent.setdefault(row["method"], {})[row["seed"]] = factor * float(row[column])
    reference = percent.get(baseline, {})
    return {
        method: Paired(
            tuple(value for seed, value in by_seed.items() if seed in reference),
            tuple(value - reference[seed] for seed, value in by_seed.items() if seed in reference),
        )
        for method, by_seed in percent.items()
    }
