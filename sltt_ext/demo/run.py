"""Runs the demo and shows what came out: a live progress bar, a table, a plot, and files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sltt_ext.data import load_digits
from sltt_ext.demo.training import (
    METHODS,
    DemoSettings,
    MethodResult,
    Training,
    batches_per_epoch,
    peak_bytes,
    seconds_needed,
)
from sltt_ext.files import replaced, write_csv, writing
from sltt_ext.optional import require, require_all
from sltt_ext.progress import Lines

__all__ = ["FILES", "run_demo"]

FILES = ("results.csv", "epochs.csv", "memory.csv", "demo.png")
MEGABYTE = 1e6
COLORS = {"BPTT": "#000000", "SLTT": "#0072B2", "SLTT-2": "#E69F00", "SLTT-1": "#009E73"}
MARKERS = {"BPTT": "s", "SLTT": "o", "SLTT-2": "^", "SLTT-1": "v"}


def run_demo(settings: DemoSettings, output: Path, console: Any = None) -> dict[str, MethodResult]:
    """Train the demo's network with every method, print the table, and save table and plot.

    The methods take turns epoch by epoch, so that whatever else the machine does slows all alike.

    Args:
        settings: What all methods share.
        output: Folder for ``results.csv``, ``epochs.csv``, ``memory.csv`` and ``demo.png``; made if
            missing.
        console: A ``rich.console.Console``; default is one on standard output.

    Returns:
        Method name -> result.

    Raises:
        MissingDependencyError: If SpikingJelly, scikit-learn, matplotlib or rich is not installed.
    """
    require_all(("spikingjelly", "sklearn", "matplotlib", "rich"), extra="demo")
    progress_bars = require("rich.progress", extra="demo")
    console = console or require("rich.console", extra="demo").Console()
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    data = load_digits().to(settings.device)
    console.print(
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images of handwritten digits, "
        f"T = {settings.time_steps}, {settings.epochs} epochs, seed {settings.seed}, on {settings.device}"
    )
    console.print(
        f"This takes {_in_words(seconds_needed(settings, data))} here. sltt demo --quick is a short one."
    )
    lines = None if console.is_terminal else Lines(console, at_once=True)  # a file shows no bars
    trainings = {name: Training(method, settings, data) for name, method in METHODS.items()}
    columns = (
        progress_bars.TextColumn("{task.description:8}"),
        progress_bars.BarColumn(),
        progress_bars.MofNCompleteColumn(),
        progress_bars.TextColumn("{task.fields[note]}"),
        progress_bars.TimeElapsedColumn(),
    )
    with progress_bars.Progress(*columns, console=console) as progress:
        total = settings.epochs * batches_per_epoch(settings, data)
        tasks = {method: progress.add_task(method, total=total, note="") for method in METHODS}
        memory = progress.add_task("memory", total=len(METHODS), note="")
        for epoch in range(settings.epochs):
            for number, (method, training) in enumerate(trainings.items()):
                training.epoch(partial(progress.advance, tasks[method]))
                note = f"test accuracy {training.result.accuracy[-1]:.1%}"
                progress.update(tasks[method], note=note)
                if lines is not None:
                    done = epoch * len(METHODS) + number + 1
                    lines(f"{method}, epoch {epoch + 1}: {note}", done, settings.epochs * len(METHODS))
        lengths = sorted({*settings.memory_time_steps, settings.time_steps})
        for method, training in trainings.items():
            training.result.peak_bytes = peak_bytes(METHODS[method], settings, data, lengths)
            progress.advance(memory)
    results = {method: training.result for method, training in trainings.items()}
    rows = summary(results, settings)
    console.print(_table(rows))
    _save(results, rows, output)
    _plot(results, settings, output / "demo.png")
    console.print(conclusion(rows, settings), highlight=False)
    console.print(f"The picture: {output / 'demo.png'}", highlight=False, soft_wrap=True)
    console.print(
        "Left, accuracy over training time: a curve further left is faster. Right, memory over the number of time steps T: BPTT's "
        f"grows with T, SLTT's does not. The numbers: {output / 'results.csv'}, epochs.csv and memory.csv.",
        highlight=False,
    )
    return results


def summary(results: dict[str, MethodResult], settings: DemoSettings) -> list[dict[str, Any]]:
    """One row a method: accuracy, seconds per epoch and peak activation MB, also relative to BPTT."""
    bptt = results["BPTT"]
    steps = settings.time_steps
    return [
        {
            "method": method,
            "test_accuracy": result.accuracy[-1],
            "seconds_per_epoch": result.seconds_per_epoch,
            "peak_activation_mb": result.peak_bytes[steps] / MEGABYTE,
            "accuracy_ratio": result.accuracy[-1] / bptt.accuracy[-1],
            "time_ratio": result.seconds_per_epoch / bptt.seconds_per_epoch,
            "memory_ratio": result.peak_bytes[steps] / bptt.peak_bytes[steps],
        }
        for method, result in results.items()
    ]


def conclusion(rows: list[dict[str, Any]], settings: DemoSettings) -> str:
    """What came out, in words."""
    sltt = next(row for row in rows if row["method"] == "SLTT")
    bptt = next(row for row in rows if row["method"] == "BPTT")
    return (
        f"At T = {settings.time_steps}, SLTT took {sltt['memory_ratio']:.0%} of BPTT's memory and {sltt['time_ratio']:.0%} of its time, and "
        f"classified {sltt['test_accuracy']:.1%} of the test images correctly (BPTT: {bptt['test_accuracy']:.1%})."
    )


def _in_words(seconds: float) -> str:
    if seconds < 50:
        return f"about {max(10 * round(seconds / 10), 10)} seconds"
    minutes = max(round(seconds / 60), 1)
    return f"about {minutes} minute{'s' * (minutes != 1)}"


def _table(rows: list[dict[str, Any]]) -> Any:
    table = require("rich.table", extra="demo").Table(title="In brackets: relative to BPTT")
    table.add_column("method")
    for heading in ("test accuracy", "seconds per epoch", "peak activation MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['test_accuracy']:.1%} ({row['accuracy_ratio']:.3f})",
            f"{row['seconds_per_epoch']:.2f} ({row['time_ratio']:.2f})",
            f"{row['peak_activation_mb']:.1f} ({row['memory_ratio']:.2f})",
        )
    return table


def _save(results: dict[str, MethodResult], rows: list[dict[str, Any]], output: Path) -> None:
    write_csv(output / "results.csv", rows)
    write_csv(
        output / "epochs.csv",
        [
            {"method": method, "epoch": epoch, "test_accuracy": accuracy, "seconds": seconds}
            for method, result in results.items()
            for epoch, (accuracy, seconds) in enumerate(zip(result.accuracy, result.seconds), 1)
        ],
    )
    write_csv(
        output / "memory.csv",
        [
            {"method": method, "time_steps": steps, "peak_activation_bytes": peak}
            for method, result in results.items()
            for steps, peak in result.peak_bytes.items()
        ],
    )


def _plot(results: dict[str, MethodResult], settings: DemoSettings, path: Path) -> None:
    figure_class = require("matplotlib.figure", extra="demo").Figure
    figure = figure_class(figsize=(10, 4), layout="constrained", dpi=150)
    accuracy_axes, memory_axes = figure.subplots(1, 2)
    for method, result in results.items():
        style = {"label": method, "color": COLORS[method], "marker": MARKERS[method], "markersize": 5}
        elapsed = [sum(result.seconds[: epoch + 1]) for epoch in range(len(result.seconds))]
        accuracy_axes.plot(elapsed, [100 * accuracy for accuracy in result.accuracy], **style)
        peaks = [peak / MEGABYTE for peak in result.peak_bytes.values()]
        memory_axes.plot(list(result.peak_bytes), peaks, **style)
    accuracy_axes.set(xlabel="training time (s)", ylabel="test accuracy (%)", ylim=(None, 100))
    accuracy_axes.set_title("Accuracy over training time")
    memory_axes.set(xlabel="time steps T", ylabel="peak activation memory (MB)", xscale="log", yscale="log")
    lengths = list(results["BPTT"].peak_bytes)
    memory_axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    memory_axes.minorticks_off()
    memory_axes.yaxis.set_major_formatter("{x:g}")
    memory_axes.set_title(f"Memory of one iteration, batch of {settings.batch_size}")
    for axes in (accuracy_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    with replaced(path) as file:
        figure.savefig(file, format=path.suffix[1:])
