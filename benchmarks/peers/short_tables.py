"""The small tables of docs/benchmarks.md: a few rows each, in plain words, from the results that have all of them."""

from __future__ import annotations

from collections.abc import Callable

from peers.markdown import results, table

MEMORY = {
    "BPTT, step by step": "BPTT, steps",
    "BPTT, all steps in one call": "BPTT, sequence",
    "SpikingJelly's SLTT, a loop": "SLTT, SpikingJelly",
    "rate-based backpropagation": "rate-based, sequence",
    "SLTT, `OnlineTrainer`": "SLTT, sltt_ext, plain",
    "SLTT, with `pack_spikes=True`": "SLTT, sltt_ext, pack_spikes",
    'SLTT, with `memory_budget="least"`': 'SLTT, sltt_ext, memory_budget="least"',
}
TIME = {
    "BPTT, step by step": "BPTT, steps",
    "BPTT, all steps in one call": "BPTT, sequence",
    "SpikingJelly's SLTT, a loop": "SLTT, SpikingJelly",
    "SLTT, one step a call, spikes as bits": "SLTT, sltt_ext, cache_invariant, pack_spikes",
    "SLTT, all steps in one call": "SLTT, sltt_ext, cache_invariant, chunk=T",
    "SLTT-1, all steps in one call": "SLTT-1, sltt_ext, cache_invariant, chunk=T",
    "SLTT-1, `full_output=False`": "SLTT-1, tail skipped, sltt_ext, cache_invariant, chunk=T",
}


def memory() -> str:
    """Peak memory of NF-ResNet-34 at the paper's size."""
    rows = {
        row["contender"]: row
        for row in results("peers_memory")
        if (row["network"], row["tensors"]) == ("NF-ResNet-34", "fake")
    }
    return table(
        ["", "peak memory", "relative to BPTT, step by step"],
        (
            [label, f"{float(rows[name]['peak_gib']):.1f} GiB", f"{float(rows[name]['to_bptt_steps']):.2f}"]
            for label, name in MEMORY.items()
            if name in rows
        ),
    )


def time() -> str:
    """Time and memory of an iteration of NF-ResNet-34."""
    rows = {row["contender"]: row for row in results("peers_nf_resnet_34") if row["dtype"] == "float32"}
    columns = ("seconds", "to_bptt_steps", "to_bptt_sequence", "peak_mb")
    return table(
        ["", "seconds", "relative to BPTT, step by step", "to BPTT in one call", "peak MB"],
        (
            [label, *(rows[name][column] for column in columns)]
            for label, name in TIME.items()
            if name in rows
        ),
    )


def neuron() -> str:
    """The neuron alone in float32, by surrogate and reset: times as fast as SpikingJelly's."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results("neuron"):
        if row["dtype"] == "float32":
            cells.setdefault((row["surrogate"], row["reset"]), {})[row["contender"]] = row["times_as_fast"]
    names = ("sltt_ext, steps", "sltt_ext, multi-step", "sltt_ext compiled, multi-step")
    return table(
        ["surrogate", "reset", "step by step", "whole sequence", "whole sequence, compiled"],
        ([*setting, *(found[name] for name in names)] for setting, found in cells.items()),
    )


TABLES: dict[str, Callable[[], str]] = {
    "short memory": memory,
    "short time": time,
    "short neuron": neuron,
}
