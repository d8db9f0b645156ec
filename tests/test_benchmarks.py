import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernel_benchmark_runs(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "neuron_kernel.py"),
        "--smoke",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "neuron_kernel.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {"forward", "backward", "evaluation"}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert "sltt_ext torch" in {row["contender"] for row in rows}
    assert all(float(row["microseconds"]) > 0 for row in rows)
