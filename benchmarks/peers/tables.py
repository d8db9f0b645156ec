"""The tables of README.md and of pages of the documentation, rendered from the results."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from peers import front_page, short_tables
from peers.accuracy_tables import ACCURACY_TABLES
from peers.claims import CLAIMS, Claim
from peers.markdown import Rows, figure, results, spread, table

PAGES = ("README.md", "docs/benchmarks.md", "docs/measurements.md", "docs/fit.md", "docs/reproduce.md")
MARKED = re.compile(r"(<!-- table: ([\w, .-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with every marked table as the results have it now.

    Raises:
        KeyError: If a marker names a table that does not exist.
    """
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", page)


def as_measured(name: str, columns: dict[str, str]) -> str:
    """Columns of a file, under other headings: heading -> column."""
    return table(columns, ([row[column] for column in columns.values()] for row in results(name)))


COLUMNS = {
    "seconds": "seconds",
    "relative to BPTT, steps": "to_bptt_steps",
    "to BPTT, sequence": "to_bptt_sequence",
    "to SpikingJelly, same K": "to_spikingjelly",
    "same K and tail": "to_spikingjelly_same_tail",
    "peak MB": "peak_mb",
    "peak relative to BPTT, steps": "peak_to_bptt_steps",
}


def iterations(name: str, dtype: str) -> str:
    """One network in one precision: the contenders that ran in both."""
    rows = results(name)
    shared = {row["contender"] for row in rows if row["dtype"] == "bfloat16"}
    return table(
        ["contender", *COLUMNS],
        (
            [row["contender"], *(row[column] for column in COLUMNS.values())]
            for row in rows
            if row["dtype"] == dtype and row["contender"] in shared
        ),
    )


METHODS = ("SLTT", "SLTT-2", "SLTT-2, tail skipped", "SLTT-1", "SLTT-1, tail skipped")


def speed_ups() -> str:
    """NF-ResNet-34 in float32: seconds of every set of speed-ups, relative to none, and peak memory."""
    rows = {
        row["contender"]: row
        for row in results("peers_nf_resnet_34")
        if row["dtype"] == "float32" and ", sltt_ext, " in row["contender"]
    }
    names = dict.fromkeys(name.split(", sltt_ext, ")[1] for name in rows)

    def cell(method: str, name: str) -> str:
        row, plain = (rows.get(f"{method}, sltt_ext, {which}") for which in (name, "plain"))
        if row is None or plain is None:
            return ""
        return f"{row['seconds']} ({float(row['seconds']) / float(plain['seconds']):.2f})"

    return table(
        ["speed-ups", *(f"{method}: seconds" for method in METHODS), "SLTT: peak MB", "SLTT-1: peak MB"],
        (
            [
                name,
                *(cell(method, name) for method in METHODS),
                *(rows[f"{method}, sltt_ext, {name}"]["peak_mb"] for method in ("SLTT", "SLTT-1")),
            ]
            for name in names
        ),
    )


def over_time(column: str) -> str:
    """One figure of every contender, a row for each T."""
    rows = results("peers_over_time")
    cells = {(row["contender"], row["time_steps"]): row[column] for row in rows}
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lengths = dict.fromkeys(row["time_steps"] for row in rows)
    return table(["T", *names], ([length, *(cells[name, length] for name in names)] for length in lengths))


def memory() -> str:
    """Peak memory at larger sizes, a column for each."""
    rows = results("peers_memory")
    cells = {
        (
            row["contender"],
            _size(row),
        ): f"{row['peak_gib']} ({row['to_bptt_steps']}; {row['to_spikingjelly']})"
        for row in rows
    }
    sizes = list(dict.fromkeys(map(_size, rows)))
    names = dict.fromkeys(row["contender"] for row in rows)
    return table(
        ["contender", *sizes], ([name, *(cells.get((name, size), "") for size in sizes)] for name in names)
    )


def _size(row: dict[str, str]) -> str:
    return f"{row['network']}, {row['batch']} of {row['pixels']} px, {row['tensors']} tensors"


def claims() -> str:
    """What had to be shown, and what was reached."""
    return table(["", "target", "reached", "with"], map(_claim, CLAIMS))


def _claim(claim: Claim) -> list[str]:
    best = claim.figure(results(claim.file))
    if best is None:
        return [claim.text, claim.target, "not measured yet", ""]
    value, name = best
    return [claim.text, claim.target, f"{value:.3g}{'' if claim.holds(value) else ' (missed)'}", name]


def memory_tasks() -> str:
    """Tasks that need memory, a row for each: accuracy over the seeds by every method, and memory relative to BPTT."""
    runs: dict[tuple[str, ...], dict[str, Rows]] = {}
    for row in results("memory_tasks"):
        task = row["task"], row["neuron"], row["time_steps"]
        runs.setdefault(task, {}).setdefault(row["method"], []).append(row)

    def cell(method: str, by_method: dict[str, Rows]) -> str:
        percent = [100 * float(row["test_accuracy"]) for row in by_method[method]]
        peak, bptt = (float(by_method[name][0]["peak_activation_kb"]) for name in (method, "BPTT"))
        size = f"{method.removeprefix('window ')} steps: " if method.startswith("window") else ""
        memory = "" if method == "BPTT" else f"; {peak / bptt:.2f}"
        return f"{size}{spread(percent, 1)}{memory}"

    return table(
        ["task", "neuron", "T", "BPTT", "SLTT", "smaller window", "larger window"],
        ([*task, *(cell(method, by_method) for method in by_method)] for task, by_method in runs.items()),
    )


def on_device(network: str, dtype: str) -> str:
    """One network in one precision on a device: a row for each contender, a column for each batch."""
    rows = [row for row in results("gpu_networks") if (row["network"], row["dtype"]) == (network, dtype)]
    cells = {(row["contender"], row["batch"]): row for row in rows}
    batches = sorted({row["batch"] for row in rows}, key=int)
    names = dict.fromkeys(row["contender"] for row in rows)

    def cell(name: str, batch: str) -> str:
        row, peer = cells.get((name, batch)), cells.get(("BPTT, sequence", batch))
        if row is None or row["status"]:
            return "" if row is None else row["status"]
        figures = []
        for column, unit in (("milliseconds", "ms"), ("peak_mb", "MB")):
            ratio = f" ({float(row[column]) / float(peer[column]):.2f})" if peer and peer[column] else ""
            figures.append(f"{row[column]} {unit}{ratio}")
        return "; ".join(figures)

    return table(
        ["contender", *(f"batch {batch}" for batch in batches)],
        ([name, *(cell(name, batch) for batch in batches)] for name in names),
    )


def launches() -> str:
    """What the host launches in one iteration on a device, and how many kernels then run; a column for each network."""
    rows = results("gpu_launches")
    cells = {
        (row["contender"], row["network"]): row["status"] or f"{row['launches']} ({row['kernels']})"
        for row in rows
    }
    networks = dict.fromkeys(row["network"] for row in rows)
    names = dict.fromkeys(row["contender"] for row in rows)
    return table(
        ["contender", *networks],
        ([name, *(cells.get((name, network), "") for network in networks)] for name in names),
    )


TABLES: dict[str, Callable[[], str]] = {
    "claims": claims,
    "front": front_page.table_of_methods,
    **short_tables.TABLES,
    "peers.png": partial(figure, "peers.png", "peers_nf_resnet_34", "Time and memory relative to BPTT"),
    "peers_over_time.png": partial(
        figure, "peers_over_time.png", "peers_over_time", "Seconds and memory over time steps"
    ),
    **{
        f"{network}, {dtype}": partial(iterations, f"peers_{file}", dtype)
        for network, file in {
            "NF-ResNet-34": "nf_resnet_34",
            "pre-activation ResNet-18": "pre_activation_resnet_18",
            "VGG-11": "vgg_11",
            "Spikformer": "spikformer",
        }.items()
        for dtype in ("float32", "bfloat16")
    },
    "device": partial(
        as_measured, "gpu_proof", {"section": "section", "outcome": "outcome", "seconds": "seconds"}
    ),
    "device, launches": launches,
    **{
        f"device, {network}, {dtype}": partial(on_device, network, dtype)
        for network in ("spiking ResNet-18", "NF-ResNet-34", "Spikformer", "SEW ResNet-18")
        for dtype in ("float32", "bfloat16")
    },
    "speed-ups": speed_ups,
    "memory over time": partial(over_time, "peak_mb"),
    "seconds over time": partial(over_time, "seconds"),
    "memory": memory,
    "memory tasks": memory_tasks,
    **ACCURACY_TABLES,
    "digits": partial(
        as_measured,
        "digits",
        {
            "method": "method",
            "test accuracy": "mean_test_accuracy",
            "lowest of 3": "lowest_test_accuracy",
            "seconds per epoch": "seconds_per_epoch",
            "relative to BPTT": "time_relative_to_bptt",
            "peak activation MB": "peak_activation_mb",
        },
    ),
    "neuron": partial(
        as_measured,
        "neuron",
        {
            "dtype": "dtype",
            "surrogate": "surrogate",
            "reset": "reset",
            "contender": "contender",
            "ms": "milliseconds",
            "times as fast": "times_as_fast",
        },
    ),
    "through_time": partial(
        as_measured,
        "through_time",
        {
            "framework": "framework",
            "neuron": "neuron",
            "reset": "reset",
            "contender": "contender",
            "ms": "milliseconds",
            "relative to the framework's": "ratio",
            "saved bytes per byte of input": "saved_bytes_per_input_byte",
        },
    ),
    "conversion": partial(as_measured, "conversion", {"operation": "operation", "ms": "median_ms"}),
    "tutorials": partial(
        as_measured,
        "tutorials",
        {
            "network": "network",
            "method": "contender",
            "seconds": "seconds",
            "times as fast as BPTT": "times_as_fast_as_bptt",
            "peak activation MB": "peak_activation_mb",
        },
    ),
    "launches": partial(
        as_measured,
        "launches",
        {
            "network": "network",
            "method": "method",
            "launches": "launches",
            "neurons": "neurons",
            "convolutions, linear layers": "layers",
            "batch norms": "norms",
            "sums": "sums",
            "others": "others",
        },
    ),
    "blocks": partial(
        as_measured,
        "blocks",
        {
            "network": "network",
            "contender": "contender",
            "peak GiB": "peak_gib",
            "relative to BPTT, steps": "to_bptt_steps",
        },
    ),
    "planner": partial(
        as_measured,
        "planner",
        {
            "network": "network",
            "contender": "contender",
            "plan": "plan",
            "seconds": "seconds",
            "relative to BPTT, steps": "to_bptt_steps",
            "to BPTT, sequence": "to_bptt_sequence",
            "peak, to BPTT, steps": "peak_to_bptt_steps",
        },
    ),
    "compiled": partial(
        as_measured,
        "compiled",
        {
            "contender": "contender",
            "seconds": "seconds",
            "relative to compiled BPTT": "of_compiled_bptt",
            "with its layout kept": "of_layout_kept",
            "seconds to compile": "compile_s",
        },
    ),
    "trainer": partial(
        as_measured,
        "trainer_overhead",
        {
            "network": "network",
            "loop, ms": "loop_cpu_ms",
            "trainer, ms": "trainer_cpu_ms",
            "ratio": "median_ratio",
            "its quartiles": "ratio_quartiles",
        },
    ),
}
"""Name in the page's marker -> what renders it."""
