"""sltt_ext against BPTT, SpikingJelly's SLTT and rate-based backpropagation: time and memory.

python benchmarks/against_peers.py                        everything
python benchmarks/against_peers.py --only VGG-11          one network, or one of the two other parts: "over time", memory
python benchmarks/against_peers.py --repeats 2            a quick look

Writes one file for each part to benchmarks/results, and the plots. benchmarks/write_tables.py then brings the
tables of the documentation up to date.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measure
import torch
from peers import measurements
from peers.contenders import ALL_SPEED_UPS, SPEED_UPS
from peers.measurements import DTYPES, Row
from peers.networks import Network, networks
from peers.tables import TABLES
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn


@dataclass(frozen=True)
class Part:
    """A part of the benchmark: its results' file and their tables, how many runs it has, and what measures it."""

    file: str
    tables: tuple[str, ...]
    runs: int
    measure: Callable[[Callable[[], object]], list[Row]]


def of_network(network: Network, repeats: int) -> Part:
    # float32 of the first network is what claims are judged by: their medians are to be steady
    times = {"float32": 4, "bfloat16": 2} if network is networks()[0] else dict.fromkeys(DTYPES, 1)
    each = {name: (times[name] * repeats + 1) // 2 for name in DTYPES}

    def both(on_run: Callable[[], object]) -> list[Row]:
        return [row for name in DTYPES for row in measurements.iterations(network, name, each[name], on_run)]

    runs = sum(measurements.number_of_iterations(network, name, each[name]) for name in DTYPES)
    return Part(file_of(network), tuple(f"{network.name}, {name}" for name in DTYPES), runs, both)


def file_of(network: Network) -> str:
    return "peers_" + network.name.lower().replace(" ", "_").replace("-", "_")


def parts(repeats: int) -> dict[str, Part]:
    lengths = max(1, repeats // 3)
    return {network.name: of_network(network, repeats) for network in networks()} | {
        "over time": Part(
            "peers_over_time",
            ("memory over time", "seconds over time"),
            measurements.number_over_time(lengths),
            partial(measurements.over_time, lengths),
        ),
        "memory": Part("peers_memory", ("memory",), measurements.number_of_peaks(), measurements.memory),
    }


def left_out() -> Iterator[str]:
    """What this installation lacks."""
    if len(networks()) < 4:
        yield "Spikformer, memopt and SLTTLIFNode (LIFNode and detach_net instead): they need SpikingJelly 2.0"
    for name in ALL_SPEED_UPS:
        if name not in SPEED_UPS:
            yield f"sltt_ext, {name}: not in this version, or not on this machine"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6, help="six have every draw of SLTT-1 alike")
    parser.add_argument("--only", choices=list(parts(1)), action="append")
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    measure.RESULTS = chosen.output
    console = Console()
    for what in left_out():
        console.print(f"left out: {what}")
    for name, part in parts(chosen.repeats).items():
        if chosen.only is not None and name not in chosen.only:
            continue
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
            bar = progress.add_task(name, total=part.runs)
            rows = part.measure(partial(progress.advance, bar))
        measure.write_results(part.file, rows, show=False)
        for table in part.tables:
            console.print(f"{table}\n\n{TABLES[table]()}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="spikingjelly")
    main()
