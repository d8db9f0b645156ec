"""Figures of plain numbers: legible in print and on a phone, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from sltt_ext.optional import require

__all__ = ["as_svg", "bars", "lines", "stacked_bars"]

WIDTH = 4.5  # inches: a phone's width shows the text at nearly its size
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"  # Okabe and Ito
COLORS = (ORANGE, BLUE, GREEN, PURPLE, SKY)
MARKERS = ("s", "o", "^", "v", "D")
HATCHES = ("", "///", "...", "xx", "\\\\")
LINES = ("-", "--", ":", "-.")
FROM_WORDS = 1e4  # numbers are written with k, M, G
MOST_MARKS = 12  # more marks would overlap
_INK = "#010203"  # stands for the page's own text colour in an inline SVG


def lines(
    x: Mapping[str, Sequence[float]],
    y: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    from_zero: bool = False,
) -> Any:
    """A ``matplotlib.figure.Figure`` with one line for each label.

    Args:
        x: Label -> the places of its points, integers. The axis has marks there if they are few.
        y: Label -> the values of its points.
        xlabel: What ``x`` is.
        ylabel: What ``y`` is.
        from_zero: The axis of ``y`` starts at zero.
    """
    figure = _figure(3.2)
    axes = figure.subplots()
    for index, label in enumerate(y):
        axes.plot(x[label], y[label], label=label, color=COLORS[index % 5], marker=MARKERS[index % 5],
                  linestyle=LINES[index % 4])  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if from_zero:
        # The margin above the points is then a part of the whole axis, even where all of them are equal.
        axes.update_datalim([(axes.dataLim.x0, 0)])
        axes.autoscale_view()
        axes.set_ylim(0, None)
    marked = sorted({place for places in x.values() for place in places})
    if len(marked) <= MOST_MARKS:
        axes.set_xticks(marked)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    spreads: Mapping[str, Sequence[float]] | None = None,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Any:
    """A ``matplotlib.figure.Figure`` with rows of horizontal bars, the first row on top, with one bar for each label.

    Args:
        names: The names of the rows.
        values: Label -> the length of its bar in each row.
        xlabel: What the values are.
        spreads: Label -> the spread of its values, drawn at the ends of the bars.
        reference: Where to draw a line through all rows.
        limits: Ends of the axis of values; None fits the bars.
    """
    several = len(values) > 1
    figure = _figure(
        _height(len(names), per_row=0.12 * len(values) + 0.04 if several else 0.24, legend=several)
    )
    axes = figure.subplots()
    height = 0.8 / len(values)
    for index, (label, column) in enumerate(values.items()):
        places = [place + (index - (len(values) - 1) / 2) * height for place in range(len(names))]
        axes.barh(places, column, height, label=label, color=COLORS[index % 5] if several else BLUE,
                  xerr=spreads[label] if spreads else None, ecolor="0.5", hatch=HATCHES[index % 5],
                  edgecolor="white", linewidth=0)  # fmt: skip
    if reference is not None:
        axes.axvline(reference, color="0.5", linewidth=0.8)
    axes.set(xlabel=xlabel, xlim=limits)
    _finish_rows(axes, names, legend=several)
    return figure


def stacked_bars(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], *, xlabel: str, title: str = ""
) -> Any:
    """A ``matplotlib.figure.Figure`` with one horizontal bar for each name, made of one piece for each part."""
    figure = _figure(_height(len(names), per_row=0.24, legend=True))
    axes = figure.subplots()
    left = [0.0] * len(names)
    for index, (label, column) in enumerate(parts.items()):
        axes.barh(range(len(names)), column, 0.7, left=left, label=label, hatch=HATCHES[index % 5],
                  color=(SKY, PURPLE, BLUE, ORANGE, GREEN)[index % 5], edgecolor="white", linewidth=0)  # fmt: skip
        left = [start + value for start, value in zip(left, column)]
    axes.set(xlabel=xlabel, title=title)
    if max(left, default=0.0) >= FROM_WORDS:
        axes.xaxis.set_major_formatter(require("matplotlib.ticker", extra="analysis").EngFormatter(sep=" "))
    _finish_rows(axes, names, legend=True)
    return figure


def as_svg(figure: Any) -> str:
    """The figure as an SVG element without background, its text and axes in the colour of the page's text."""
    matplotlib = require("matplotlib", extra="analysis")
    for axes in figure.axes:
        _recolour(axes)
    for legend in figure.legends:
        _recolour_legend(legend)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sltt-ext"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _recolour(axes: Any) -> None:
    axes.tick_params(colors=_INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(_INK)
    if axes.get_legend() is not None:
        _recolour_legend(axes.get_legend())


def _recolour_legend(legend: Any) -> None:
    legend.get_frame().set_facecolor("none")
    for text in legend.get_texts():
        text.set_color(_INK)


def _figure(height: float) -> Any:
    matplotlib_figure = require("matplotlib.figure", extra="analysis")
    return matplotlib_figure.Figure(figsize=(WIDTH, height), layout="constrained", dpi=150)


def _height(rows: int, per_row: float, legend: bool) -> float:
    return 0.8 + (0.8 if legend else 0.3) + per_row * rows


def _finish_rows(axes: Any, names: Sequence[str], legend: bool) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= 30 else 8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    if legend:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
