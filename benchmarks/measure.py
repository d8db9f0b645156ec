"""What the benchmarks share: CSV files with device and versions."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sltt_ext.analysis.timing import device_name

RESULTS = Path(__file__).parent / "results"


def version_of(package: str) -> str:
    """The installed version of a package; empty if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def until_decided(is_decided: Callable[[], bool], run: Callable[[], object], at_most: int = 60) -> None:
    """Run iterations until a trainer's plan is decided."""
    for _ in range(at_most):
        if is_decided():
            return
        run()


def write_results(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    device: str = "cpu",
    framework: str = "spikingjelly",
    show: bool = True,
    say: bool = True,
) -> None:
    """Write ``benchmarks/results/NAME.csv``, with device and versions in every row. ``show`` prints the rows, ``say`` the path."""
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
    for row in rows if show else ():
        print({key: value for key, value in row.items() if key not in common})
    if say:
        print(f"-> {path}")
