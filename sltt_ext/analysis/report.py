"""An analysis as one HTML file that needs nothing else, and as JSON beside it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltt_ext.analysis import plots
from sltt_ext.analysis.analyze import Analysis
from sltt_ext.analysis.operations import OperationCounts, plot_methods
from sltt_ext.files import write_text
from sltt_ext.optional import require

__all__ = ["FILES", "headline", "html_report", "save_report"]

FILES = ("report.html", "report.json")

Row = dict[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the report: text, figures by caption, and tables by name."""

    title: str
    text: str
    figures: list[tuple[str, Any]]
    tables: list[tuple[str, list[Row]]]


def save_report(analysis: Analysis, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into ``folder``, which is made if missing; returns their paths.

    Raises:
        MissingDependencyError: If jinja2 or matplotlib is not installed.
        WriteError: If a file cannot be written; the one before it stays.
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
    parts = (_similarity, _credit, _memory, _operations, _activity)
    sections = [part(analysis) for part in parts]
    inline = _InlineSVG()
    rendered: str = environment.from_string(template).render(
        title=f"What SLTT does to {analysis.about['network'].partition(',')[0]}",
        numbers=[{"value": value, "text": text} for value, text in headline(analysis)],
        notes=analysis.notes,
        about=[{"analysed": name, "": value} for name, value in analysis.about.items()],
        sections=[
            Section(s.title, s.text, [(caption, inline(figure)) for caption, figure in s.figures], s.tables)
            for s in sections
            if s is not None
        ],
    )
    return rendered


def headline(analysis: Analysis) -> list[tuple[str, str]]:
    """The numbers that matter most, each with what it is."""
    bptt, sltt, sltt_1 = analysis.operations
    steps = bptt.time_steps
    numbers = []
    if analysis.similarity is not None:
        overall = analysis.similarity.overall
        numbers += [
            (_number(overall.cosine), "cosine similarity of SLTT's gradient to BPTT's"),
            (_number(overall.norm_ratio), "norm of SLTT's gradient relative to BPTT's"),
        ]
    memory = analysis.memory.peak_bytes("sltt", steps) / analysis.memory.peak_bytes("bptt", steps)
    numbers.append((f"{memory:.0%}", f"of BPTT's memory at T = {steps}, parameters apart"))
    for counts in (sltt, sltt_1):
        share = _backward(counts) / max(_backward(bptt), 1)
        numbers.append((f"{share:.1%}", f"of BPTT's scalar multiplications in backward with {counts.method}"))
    return numbers


def _similarity(analysis: Analysis) -> Section | None:
    result = analysis.similarity
    if result is None:
        return None
    tables = [
        (
            name,
            [
                {
                    column: row.name or "(network)",
                    "cosine similarity": _spread(row.cosine, row.cosine_std, result.batches),
                    "norm ratio": _spread(row.norm_ratio, row.norm_ratio_std, result.batches),
                }
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
        rows = [
            {
                "time step": str(row.time_step),
                "cosine similarity": _spread(row.cosine, row.cosine_std, result.batches),
                "norm ratio": _spread(row.norm_ratio, row.norm_ratio_std, result.batches),
            }
            for row in over_time
        ]
        tables.append(("Loss of each time step", rows))
    text = (
        "SLTT drops the part of the gradient that goes back through time. 1 and 1: nothing was lost. "
        f"Mean{' and standard deviation' if result.batches > 1 else ''} over {result.batches} batch{'es' * (result.batches > 1)}."
    )
    figures = [("SLTT's gradient against BPTT's, by layer", result.plot())]
    if over_time:
        figures.append(("For the loss of each time step", result.plot_over_time()))
    return Section("Gradient similarity", text, figures, tables)


def _credit(analysis: Analysis) -> Section | None:
    result = analysis.credit
    if result is None:
        return None
    layers = list(dict.fromkeys(row.name for row in result.select("layer")))
    rows = [
        {
            "layer": row.name or "(network)",
            "window": str(row.window),
            "cosine similarity": _number(row.cosine),
            "norm ratio": _number(row.norm_ratio),
        }
        for row in sorted(result.select("layer"), key=lambda row: layers.index(row.name))
    ]
    figures = [("What a window keeps, and its memory", result.plot())]
    return Section("Temporal credit", result.advice(), figures, [("By layer and window", rows)])


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
        "One training iteration without the update: activations, states, and gradients, those of the parameters too. "
        + ("Counted with fake tensors." if result.fake else "Counted as it ran.")
    )
    figures = [("Peak over time steps", result.plot())]
    if result.layers:
        figures.append(("Kept for backward, by layer", result.plot_layers()))
    return Section("Memory", text, figures, [("Peaks", peaks), ("Kept for backward, by layer", kept)])


def _operations(analysis: Analysis) -> Section:
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
    bptt = analysis.operations[0]
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
    text = (
        "Scalar operations of one training iteration of the whole batch: matrix products, element-wise products and "
        "sums, batch norm, neurons. Temporal: from step to step. Not counted: pooling, the loss, the update."
    )
    figures = [
        ("By method", plot_methods(analysis.operations)),
        ("By layer", bptt.plot()),
    ]
    return Section("Operations", text, figures, [("Totals", totals), ("BPTT, by layer", by_layer)])


def _activity(analysis: Analysis) -> Section:
    rows = [
        {
            "layer": row.layer or "(network)",
            "neurons": f"{row.neurons:,}",
            "spikes per neuron and step": f"{row.rate:.4f}",
            "never fire": f"{row.dead:,} ({row.dead / row.neurons:.1%})",
            "fire at every step": f"{row.saturated:,} ({row.saturated / row.neurons:.1%})",
        }
        for row in analysis.activity.rows
    ]
    text = f"Over {analysis.activity.samples} samples and {analysis.activity.time_steps} time steps."
    return Section(
        "Firing rates", text, [("Mean firing rate", analysis.activity.plot())], [("By layer", rows)]
    )


class _InlineSVG:
    """Figures as SVG for one page: no identifier twice."""

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
