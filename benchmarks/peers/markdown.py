"""Results as they are read, and as Markdown shows them."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable

import measure

Rows = list[dict[str, str]]

MISSING = "Not measured yet.\n"


def results(name: str) -> Rows:
    """The rows of a results' file; none where there is no file yet."""
    path = measure.RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, or a word that there are no rows yet."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return MISSING
    head = list(header)
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines]) + "\n"


def spread(percent: Iterable[float], digits: int = 2) -> str:
    """Mean, and lowest and highest."""
    values = list(percent)
    mean, lowest, highest = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return f"{mean} ({lowest}-{highest})"


def figure(path: str, name: str, text: str) -> str:
    """A plot, once its results are there."""
    return f"![{text}]({path})\n" if results(name) else MISSING
