"""An analysis as one self-contained HTML file, and as JSON beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sltt_ext.analysis import plots
from sltt_ext.analysis.analyze import Analysis
from sltt_ext.analysis.operations import OperationCounts, plot_methods
from sltt_ext.analysis.similarity import Alignment
from sltt_ext.analysis.verdict import cautions, memory, seconds, take, verdict
from sltt_ext.files import write_text
from sltt_ext.optional import require

__all__ = ["FILES", "headline", "html_report", "save_report"]

FILES = ("report.html", "report.json")

MOST_LAYERS = 14  # in a figure; the tables have all layers
Row = dict[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the report: text, two figures by caption, and a folded part with tables by name and more figures."""

    title: str
    text: str
    figures: list[tuple[str, Any]]
    tables: list[tuple[str, list[Row]]]
    more: list[tuple[str, Any]] = field(default_factory=list)


def save_report(analysis: Analysis, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into ``folder``, which is made if missing; returns their paths.

    Raises:
        MissingDependencyError: If jinja2 or matplotlib is not installed.
        WriteError: If a file cannot be written. An older file of that name stays.
    """
    html = html_report(analysis)
    page, numbers = (folder / name for name in FILES)
    write_text(page, html)
    write_text(numbers, json.dumps(analysis.to_json(), indent=1, allow_nan=False))
    return page, numbers


def html_report(analysis: Analysis) -> str:
    """The report as one HTML page: figures inline, no script, no other file."""
    jinja2 = require("jinja2", extra="analysis")
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    sections = [part(analysis) for part in (_gradient, _memory, _work)]
    inline = _InlineSVG()
    rendered: str = environment.from_string(template).render(
        title=f"SLTT on {analysis.about['network'].partition(',')[0]}",
        answer=verdict(analysis),
        cautions=cautions(analysis),
        numbers=[{"value": value, "text": text} for value, text in headline(analysis)],
        notes=analysis.notes,
        about=analysis.about,
        sections=[
            replace(
                section,
                figures=[(caption, inline(figure)) for caption, figure in _of_one_height(section.figures)],
                more=[(caption, inline(figure)) for caption, figure in _of_one_height(section.more)],
            )
            for section in sections
        ],
    )
    return rendered


def headline(analysis: Analysis) -> list[tuple[str, str]]:
    """The numbers that matter most, each with its meaning."""
    bptt, sltt, _ = analysis.operations
    numbers = []
    if analysis.similarity is not None:
        numbers.append(
            (
                _number(analysis.similarity.overall.cosine),
                "of the direction of BPTT's gradient (cosine similarity)",
            )
        )
    numbers.append(
        (f"{memory(analysis):.0%}", f"of BPTT's memory at T = {bptt.time_steps}, without the parameters")
    )
    time = seconds(analysis, "SLTT")
    if time is not None and analysis.timing is not None:
        numbers.append(
            (f"{time:.0%}", f"of BPTT's time ({analysis.timing.rows[0].seconds:.2g} s for an iteration)")
        )
    else:
        share = _backward(sltt) / max(_backward(bptt), 1)
        numbers.append((f"{share:.0%}", "of BPTT's multiplications in backward"))
    numbers.append((take(analysis), "is what to use on these numbers"))
    return numbers


def _gradient(analysis: Analysis) -> Section:
    result, credit, draws = analysis.similarity, analysis.credit, analysis.draws
    title = "Will it hurt? The gradient against BPTT's"
    more = [] if draws is None else [("What K drawn steps keep of SLTT's gradient, on average", draws.plot())]
    if result is None or credit is None:
        return Section(title, "BPTT does not fit into memory, so nothing could be compared.", [], [], more)
    text = (
        "SLTT drops the part of the gradient that goes back through time. If cosine similarity and norm ratio are 1, nothing was lost. "
        f"Mean{' and standard deviation' if result.batches > 1 else ''} over {result.batches} batch{'es' * (result.batches > 1)}. "
        + credit.advice()
    )
    measured = [row for row in result.select("layer") if not math.isnan(row.cosine)]
    shown = _in_order(measured, lambda row: min(row.cosine, row.norm_ratio))
    figures = [
        (_caption("By layer", "that keep least", shown, measured), replace(result, rows=tuple(shown)).plot()),
        ("By window: the gradient through C steps", credit.plot()),
    ]
    tables = [
        (
            name,
            [
                {column: row.name or "(network)", **_alignment(row, result.batches)}
                for row in result.select(level)
            ],
        )
        for name, level, column in (
            ("By layer", "layer", "layer"),
            ("By parameter", "parameter", "parameter"),
        )
    ]
    over_time = result.select("network", per_step=True)
    if over_time:
        rows = [{"time step": str(row.time_step), **_alignment(row, result.batches)} for row in over_time]
        tables.append(("Loss of each time step", rows))
        more.insert(0, ("For the loss of each time step", result.plot_over_time()))
    layers = list(dict.fromkeys(row.name for row in credit.select("layer")))
    windows = [
        {
            "layer": row.name or "(network)",
            "window": str(row.window),
            "cosine similarity": _number(row.cosine),
            "norm ratio": _number(row.norm_ratio),
        }
        for row in sorted(credit.select("layer"), key=lambda row: layers.index(row.name))
    ]
    tables.append(("By layer and window", windows))
    return Section(title, text, figures, tables, more)


def _alignment(row: Alignment, batches: int) -> Row:
    return {
        "cosine similarity": _spread(row.cosine, row.cosine_std, batches),
        "norm ratio": _spread(row.norm_ratio, row.norm_ratio_std, batches),
    }


def _memory(analysis: Analysis) -> Section:
    result = analysis.memory
    peaks = [
        {
            "T": str(row.time_steps),
            "method": row.method,
            "peak memory (MB)": f"{row.peak_bytes / 1e6:,.2f}",
        }
        for row in result.rows
    ]
    kept = [
        {
            "layer": row.layer or "(network, loss)",
            "method": row.method,
            "T": str(row.time_steps),
            "kept (MB)": f"{row.saved_bytes / 1e6:,.3f}",
        }
        for row in result.layers
        if row.time_steps == max(r.time_steps for r in result.rows)
    ]
    text = (
        "One training iteration without the update: activations, states and gradients (also those of the parameters). "
        + ("Counted with fake tensors." if result.fake else "Counted as it ran.")
    )
    figures = [("Peak over time steps", result.plot())]
    if result.layers:
        longest = [row for row in result.layers if row.time_steps == max(r.time_steps for r in result.layers)]
        most = {row.layer: 0 for row in longest}
        for row in longest:
            most[row.layer] = max(most[row.layer], row.saved_bytes)
        shown = _in_order(list(most), lambda layer: -most[layer])
        part = replace(result, layers=tuple(row for row in longest if row.layer in shown))
        figures.append(
            (_caption("Kept for backward, by layer", "that keep most", shown, most), part.plot_layers())
        )
    return Section(
        "What does it save? Memory", text, figures, [("Peaks", peaks), ("Kept for backward, by layer", kept)]
    )


def _work(analysis: Analysis) -> Section:
    bptt = analysis.operations[0]
    totals = [
        {
            "method": counts.method,
            "phase": phase,
            "part": domain,
            "multiplications": f"{counts.total(phase, domain).multiplications:,}",
            "additions": f"{counts.total(phase, domain).additions:,}",
        }
        for counts in analysis.operations
        for phase in ("forward", "backward")
        for domain in ("spatial", "temporal")
    ]
    by_layer = [
        {
            "layer": row.layer or "(network)",
            "class": row.kind,
            "phase": row.phase,
            "part": row.domain,
            "multiplications": f"{row.multiplications:,}",
            "additions": f"{row.additions:,}",
        }
        for row in bptt.rows
    ]
    rates = [
        {
            "layer": row.layer or "(network)",
            "neurons": f"{row.neurons:,}",
            "spikes per neuron and step": f"{row.rate:.4f}",
            "never fire": f"{row.dead:,} ({row.dead / row.neurons:.1%})",
            "fire at every step": f"{row.saturated:,} ({row.saturated / row.neurons:.1%})",
        }
        for row in analysis.activity.rows
    ]
    times = [
        {"method": row.method, "seconds": f"{row.seconds:.4f}", "fastest - slowest": f"{row.fastest_seconds:.4f} - {row.slowest_seconds:.4f}",
         "relative": f"{row.relative_seconds:.2f}"}
        for row in (() if analysis.timing is None else analysis.timing.rows)
    ]  # fmt: skip
    samples = analysis.activity.samples
    text = (
        "Scalar multiplications of one training iteration of the whole batch. Temporal ones lead from step to step. Pooling, the loss and the "
        f"update are not counted. Firing rates are those of {samples} sample{'s' * (samples != 1)} and {bptt.time_steps} time steps."
    )
    activity = analysis.activity
    shown = _in_order(list(activity.rows), lambda row: row.rate)
    figures = [
        ("Operations", plot_methods(analysis.operations)),
        (
            _caption("Firing rates", "that fire least", shown, activity.rows),
            replace(activity, rows=tuple(shown)).plot(),
        ),
    ]
    tables = [
        ("Firing rates by layer", rates),
        ("Seconds of an iteration", times),
        ("Operations", totals),
        ("BPTT's operations by layer", by_layer),
    ]
    return Section(
        "What runs? Operations and spikes",
        text,
        figures,
        [(name, rows) for name, rows in tables if rows],
        [("BPTT's operations by layer", bptt.plot())],
    )


Item = TypeVar("Item")


def _in_order(items: Sequence[Item], key: Callable[[Item], float]) -> list[Item]:
    """The items with the smallest keys, as many as a figure has room for, in their order."""
    chosen = sorted(range(len(items)), key=lambda place: key(items[place]))[:MOST_LAYERS]
    return [items[place] for place in sorted(chosen)]


def _caption(what: str, which: str, shown: Sized, items: Sized) -> str:
    return what if len(shown) == len(items) else f"{what}: the {len(shown)} of {len(items)} {which}"


def _of_one_height(figures: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Figures that stand side by side."""
    height = max((figure.get_figheight() for _, figure in figures), default=0.0)
    for _, figure in figures:
        figure.set_figheight(height)
    return figures


class _InlineSVG:
    """Figures as SVG for one page, on which each identifier has to be unique."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, figure: Any) -> Any:
        self._count += 1
        prefix = f"figure{self._count}-"
        svg = re.sub(r"<metadata>.*?</metadata>", "", plots.as_svg(figure), flags=re.DOTALL)
        for before in ('id="', 'href="#', "url(#"):
            svg = svg.replace(before, before + prefix)
        return require("markupsafe", extra="analysis").Markup(svg)


def _backward(counts: OperationCounts) -> int:
    return counts.total("backward").multiplications


def _number(value: float) -> str:
    return "no gradient" if math.isnan(value) else f"{value:.4f}"


def _spread(value: float, spread: float, batches: int) -> str:
    return _number(value) + (f" ± {spread:.4f}" if batches > 1 and not math.isnan(value) else "")
