"""What the benchmarks share: interleaved timing, the machine's name, CSV files."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name(device: str = "cpu") -> str:
    """What it runs on, as written into the results."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {torch.get_num_threads()} threads"


def interleaved_medians(
    runs: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def version_of(package: str) -> str:
    """The installed version of a package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def write_results(
    name: str, rows: Iterable[Mapping[str, Any]], device: str = "cpu", framework: str = "spikingjelly"
) -> None:
    """Write ``benchmarks/results/NAME.csv``, with device and versions in every row."""
    common = {
        "device": device_name(device),
        "torch": torch.__version__,
        framework: version_of(framework),
    }
    rows = [{**row, **common} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({key: value for key, value in row.items() if key not in common})
    print(f"-> {path}")
