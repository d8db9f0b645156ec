"""An analysis in a few sentences: whether SLTT suits the network, what it saves, which K to take, and what to check."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sltt_ext.analysis.analyze import Analysis
    from sltt_ext.analysis.credit import Credit, TemporalCredit

__all__ = ["cautions", "verdict"]

KEPT = 0.9
"""With a smaller cosine similarity, SLTT's gradient is no longer close to BPTT's."""
KEPT_BY_WINDOW = 0.95
KEPT_BY_DRAWS = 0.9
WORTH = 0.95
"""K steps that take more of SLTT's time are not worth the difference."""
LEAST = 0.7
"""A layer is named if it keeps less of its own gradient, in direction or in norm."""


def verdict(analysis: Analysis) -> list[str]:
    """The answer, in one sentence or two."""
    saved = _saved(analysis)
    if analysis.similarity is None:
        return [f"SLTT takes {saved}. BPTT does not fit into memory, so the gradients could not be compared."]
    cosine = analysis.similarity.overall.cosine
    if math.isnan(cosine):
        return ["Both gradients are zero: SLTT cannot be judged before the network learns."]
    if cosine < KEPT:
        return [
            f"SLTT keeps only {number(cosine)} of the gradient's direction, at {saved}.",
            _window(analysis),
        ]
    return [
        f"SLTT keeps {number(cosine)} of the gradient's direction, at {saved}.",
        *_slower(analysis),
        *_k(analysis),
    ]


def cautions(analysis: Analysis) -> list[str]:
    """What the answer does not show."""
    found = []
    if analysis.similarity is not None:
        layers = [row for row in analysis.similarity.select("layer") if not math.isnan(row.cosine)]
        least = min(layers, key=lambda row: min(row.cosine, row.norm_ratio), default=None)
        if least is not None and min(least.cosine, least.norm_ratio) < LEAST:
            found.append(
                f"The layer {least.name or '(network)'} keeps least: {number(least.cosine)} of the direction of its own gradient, at "
                f"{number(least.norm_ratio)} of the norm."
            )
    silent = [row.layer or "(network)" for row in analysis.activity.rows if row.dead == row.neurons]
    if silent:
        samples = analysis.activity.samples
        found.append(
            f"No neuron has fired in the layer{'s' * (len(silent) != 1)} {', '.join(silent)}, with {samples} sample{'s' * (samples != 1)}: the layers "
            "behind get no spikes from there. Try a smaller threshold, a batch norm in front, or a larger input."
        )
    return found


def take(analysis: Analysis) -> str:
    """What to use, in a word or two."""
    if analysis.similarity is not None and not analysis.similarity.overall.cosine >= KEPT:
        credit = analysis.credit
        row = _smallest_window(credit)
        return (
            "BPTT"
            if row is None or row.window == analysis.activity.time_steps
            else f"windows of {row.window}"
        )
    k = recommended_k(analysis)
    return "SLTT" if k is None else f"K = {k}"


def recommended_k(analysis: Analysis) -> int | None:
    """The smallest K that keeps enough of SLTT's direction; None if it needs all steps, saves no time, or is not known."""
    draws = analysis.draws
    if draws is None or draws.smallest(KEPT_BY_DRAWS) == draws.time_steps:
        return None
    k = draws.smallest(KEPT_BY_DRAWS)
    some, every = seconds(analysis, f"SLTT-{k}"), seconds(analysis, "SLTT")
    return None if some is not None and every is not None and some > WORTH * every else k


def number(value: float) -> str:
    """Three digits, rounded down so that a smaller number never reads as 1."""
    return f"{math.floor(1000 * value + 1e-9) / 1000:g}"


def memory(analysis: Analysis) -> float:
    """SLTT's peak memory relative to BPTT's."""
    steps = analysis.activity.time_steps
    return analysis.memory.peak_bytes("sltt", steps) / analysis.memory.peak_bytes("bptt", steps)


def seconds(analysis: Analysis, method: str) -> float | None:
    """The time of an iteration of a method, relative to BPTT's; None if it was not measured."""
    rows = () if analysis.timing is None else analysis.timing.rows
    return next((row.relative_seconds for row in rows if row.method == method), None)


def _smallest_window(credit: TemporalCredit | None) -> Credit | None:
    """The smallest window, of two steps or more, that keeps enough."""
    rows = () if credit is None else credit.select("network")
    return next((row for row in rows if row.window > 1 and row.cosine >= KEPT_BY_WINDOW), None)


def _saved(analysis: Analysis) -> str:
    time = seconds(analysis, "SLTT")
    return f"{memory(analysis):.0%} of BPTT's memory" + (
        "" if time is None else f" and {time:.0%} of its time"
    )


def _slower(analysis: Analysis) -> list[str]:
    time = seconds(analysis, "SLTT")
    if time is None or time <= 1:
        return []
    return [
        "With one step in a call, it takes longer than BPTT here, as is usual for small networks and batches: use it for its memory. "
        "sltt plan times faster plans."
    ]


def _k(analysis: Analysis) -> list[str]:
    k, draws = recommended_k(analysis), analysis.draws
    if draws is None:
        return []
    if k is None and draws.smallest(KEPT_BY_DRAWS) < draws.time_steps:
        return ["Back-propagate all steps: fewer of them save no time here."]
    if k is None:
        return ["Back-propagate all steps: with fewer, the gradient would be too different."]
    time = seconds(analysis, f"SLTT-{k}")
    return [
        f"Take K = {k} to save time: {k} of {draws.time_steps} steps keep {number(draws.cosine(k))} of SLTT's direction"
        + ("." if time is None else f", at {time:.0%} of BPTT's time.")
    ]


def _window(analysis: Analysis) -> str:
    credit = analysis.credit
    row = _smallest_window(credit)
    if credit is None or row is None or row.window == credit.time_steps:
        return (
            f"No shorter window keeps {KEPT_BY_WINDOW:g}. Only training shows what this costs in accuracy: compare both before "
            "you choose SLTT."
        )
    return (
        f"Take windows of {row.window} steps, convert(net, temporal='call') and chunk={row.window}: they keep {number(row.cosine)}, at "
        f"{credit.memory_ratio(row):.0%} of the memory."
    )
