"""The demo with three seeds: accuracy, time and memory of BPTT, SLTT, SLTT-2 and SLTT-1."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path

from measure import write_results

from sltt_ext.demo import DemoSettings, run_demo

SEEDS = (0, 1, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_demo(DemoSettings(seed=seed), Path(folder)) for seed in SEEDS]
    time_steps = DemoSettings().time_steps
    baseline = [run["BPTT"].seconds_per_epoch for run in runs]
    rows = []
    for method in runs[0]:
        accuracy = [run[method].accuracy[-1] for run in runs]
        seconds = [run[method].seconds_per_epoch for run in runs]
        rows.append(
            {
                "method": method,
                "seeds": len(SEEDS),
                "mean_test_accuracy": round(statistics.mean(accuracy), 4),
                "lowest_test_accuracy": round(min(accuracy), 4),
                "seconds_per_epoch": round(statistics.median(seconds), 3),
                "time_relative_to_bptt": round(
                    statistics.median(own / bptt for own, bptt in zip(seconds, baseline)), 3
                ),
                "peak_activation_mb": round(runs[0][method].peak_bytes[time_steps] / 1e6, 2),
            }
        )
    write_results("digits", rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
