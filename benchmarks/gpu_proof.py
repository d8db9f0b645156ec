"""Everything that needs a CUDA device, within a few minutes: tests, memcheck, kernels, and networks against the peers.

python benchmarks/gpu_proof.py                       everything, within 9 minutes
python benchmarks/gpu_proof.py --wheels FOLDER       with the wheels in a folder, where this Python lacks SpikingJelly
python benchmarks/gpu_proof.py --dry-run             on a CPU, small: every section and contender that it can run

The most valuable sections come first, each with a time limit of its own. Results are written as soon as they are there:
gpu_proof.csv says how each section ended, gpu_networks.csv has times and peak memory, gpu_launches.csv launches, and
neuron_kernel.csv bandwidth. benchmarks/write_tables.py brings the tables of the documentation up to date.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = {
    "pytest": "the tests and memcheck",
    "cupy": "our CUDA kernels through CuPy",
    "triton": "SpikingJelly's kernels, and compiled contenders",
    "spikingjelly": "the networks, and tests of whole networks",
    "snntorch": "snnTorch's neurons in the tests",
    "matplotlib": "the plot of the kernels",
}
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "--maxfail", "20"]
KERNELS = ["tests/gpu/test_kernels.py", "-k", "test_odd_sizes_variant and cuda"]


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a dry run.
        output: The folder of the results.
        environment: Variables for other processes.
    """

    device: str
    output: Path
    environment: dict[str, str]

    @property
    def dry(self) -> bool:
        """Whether this only shows that everything runs."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Outcome:
    """How a section ended: one line, and whether it succeeded."""

    text: str
    good: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the whole.

    Attributes:
        name: Its name.
        seconds: How long it may take.
        run: ``(options, seconds) -> `` its outcome.
    """

    name: str
    seconds: float
    run: Callable[[Options, float], Outcome]


def sections() -> Iterator[Section]:
    """The sections, the most valuable first. The networks that did not fit in have their turn at the end."""
    networks = Networks()
    yield Section("tests", 130, tests)
    yield Section("networks", 170, networks.run)
    yield Section("launches", 45, launches)
    yield Section("kernels", 60, bandwidth)
    yield Section("memcheck", 60, memcheck)
    yield Section("the rest of the networks", float("inf"), networks.run)


def tests(options: Options, seconds: float) -> Outcome:
    """Run tests/gpu on the device. A dry run only collects them."""
    chosen = ["tests/gpu", *(["--collect-only", "-q"] if options.dry else ["-k", "not host"])]
    return of_pytest(ended([sys.executable, *TESTS, *chosen], options, seconds))


def memcheck(options: Options, seconds: float) -> Outcome:
    """Run a part of the kernels' tests under compute-sanitizer; `make gpu-sanitizer` runs all of them."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        return Outcome("left out: compute-sanitizer is not on the PATH")
    if options.dry:
        return Outcome("left out: compute-sanitizer needs a CUDA device")
    command = [checker, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, *TESTS, *KERNELS]
    return of_pytest(ended(command, options, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def bandwidth(options: Options, seconds: float) -> Outcome:
    """Bytes per second of the fused neuron."""
    command = [
        sys.executable, "benchmarks/neuron_kernel.py", "--output", str(options.output),
        *(["--smoke"] if options.dry else []),
    ]  # fmt: skip
    done = ended(command, options, seconds)
    if done.code is None:
        return Outcome(f"cut short after {seconds:.0f} s: what was measured is written")
    return Outcome("done" if done.code == 0 else f"failed with {done.code}", done.code == 0)


class Networks:
    """Seconds and peak memory of whole networks, as many as there is time for. A second run goes on from there."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def run(self, options: Options, seconds: float) -> Outcome:
        """Measure the cells that have no row yet."""
        problem = without_networks(options)
        if problem is not None:
            return problem
        from peers import on_device

        cells, refused = on_device.cells(options.device, tiny=options.dry)
        if not self._rows:
            say_refused(refused)
        rest = cells[len(self._rows) :]
        measure_cells("gpu_networks", rest, self._rows, options, seconds)
        return Outcome(f"{len(self._rows)} of {len(cells)} measured")


def launches(options: Options, seconds: float) -> Outcome:
    """What the host launches on the device in one iteration."""
    if options.dry:
        return Outcome("left out: launches are those of a CUDA device")
    problem = without_networks(options)
    if problem is not None:
        return problem
    from peers import on_device

    cells = on_device.launch_cells(on_device.cells(options.device)[0])
    rows: list[dict[str, Any]] = []
    measure_cells("gpu_launches", cells, rows, options, seconds)
    return Outcome(f"{len(rows)} of {len(cells)} measured")


def measure_cells(
    file: str, cells: Sequence[Any], rows: list[dict[str, Any]], options: Options, seconds: float
) -> None:
    """Measure cells and add their rows. The file is written again after each."""
    import measure
    from peers import on_device, workers

    measure.RESULTS = options.output
    end = time.monotonic() + seconds
    for cell, row in workers.rows_of(cells, on_device.measured, lambda: end - time.monotonic()):
        rows.append(row)
        figures = [f"{row[name]} {name}" for name in ("milliseconds", "peak_mb", "launches") if row.get(name)]
        print("  ", *cell.key.values(), "|", row["status"] or ", ".join(figures), flush=True)
        measure.write_results(file, rows, options.device, show=False, say=False)


def without_networks(options: Options) -> Outcome | None:
    """Why no networks can be measured; None if they can."""
    command = [sys.executable, "-c", "import spikingjelly.activation_based.neuron"]
    done = subprocess.run(
        command, env=options.environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode == 0:
        return None
    return Outcome(
        f"left out: SpikingJelly cannot be imported ({done.stderr.strip().splitlines()[-1]})", False
    )


def say_refused(refused: dict[str, str]) -> None:
    for name, reason in refused.items():
        print(f"   left out: {name}: {reason}", flush=True)


@dataclass(frozen=True)
class Ended:
    """A finished process: its exit code (None if it was stopped), and its last line."""

    code: int | None
    last_line: str


def ended(command: list[str], options: Options, seconds: float, **variables: str) -> Ended:
    """Run a command, with all its children, for at most a number of seconds. Its output is shown as it comes."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**options.environment, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    cut = _Alarm(process, seconds)
    last = ""
    assert process.stdout is not None
    with cut:
        for line in process.stdout:
            print(f"   {line.rstrip()}"[:300], flush=True)
            last = line.strip() or last
        process.wait()
    return Ended(None if cut.rang else process.returncode, last)


class _Alarm:
    """Kills a process and its children after a time."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        import threading

        self.rang = False
        self._process = process
        self._timer = threading.Timer(max(seconds, 0), self._ring)

    def _ring(self) -> None:
        self.rang = True
        os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def of_pytest(done: Ended) -> Outcome:
    """What pytest says in its last line."""
    if done.code is None:
        return Outcome(f"cut short: {done.last_line}")
    return Outcome(done.last_line, done.code == 0)


def with_wheels(folder: Path, target: Path) -> None:
    """Install all wheels of a folder into another one. What they need has to be in the folder, or installed already."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"there is no wheel in {folder}")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), *wheels], check=True)


def missing() -> list[str]:
    """What this Python lacks, and what cannot be shown without it."""
    return [
        f"{name} is missing, so without: {what}"
        for name, what in NEEDED.items()
        if importlib.util.find_spec(name) is None
    ]


def run_all(options: Options, seconds: float, chosen: Sequence[Section]) -> list[dict[str, Any]]:
    """Run the sections within a number of seconds, and write how each ended."""
    import measure

    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for section in chosen:
        start = time.monotonic()
        limit = min(section.seconds, end - start)
        print(f"{section.name} (at most {max(limit, 0):.0f} s)", flush=True)
        outcome = section.run(options, limit) if limit > 1 else Outcome("left out: no time is left")
        taken = time.monotonic() - start
        print(f"   -> {outcome.text}", flush=True)
        rows.append({"section": section.name, "outcome": outcome.text, "good": outcome.good, "seconds": round(taken, 1)})  # fmt: skip
        measure.RESULTS = options.output
        measure.write_results("gpu_proof", rows, options.device, show=False, say=False)
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks")
    parser.add_argument("--output", type=Path, help="folder of the results; benchmarks/results by default")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; its figures mean nothing")
    return parser.parse_args()


def main() -> None:
    start = time.monotonic()
    asked = arguments()
    if asked.dry_run and asked.output is not None and asked.output.resolve() == RESULTS:
        raise SystemExit("--dry-run does not write to benchmarks/results: its figures mean nothing")
    with tempfile.TemporaryDirectory() as folder:
        site, scratch = Path(folder, "site"), Path(folder, "results")
        added = [str(ROOT), str(ROOT / "benchmarks")]
        if asked.wheels is not None:
            with_wheels(asked.wheels, site)
            added.append(str(site))
        sys.path[:0] = added
        os.environ["PYTHONPATH"] = os.pathsep.join([*added, *filter(None, [os.environ.get("PYTHONPATH")])])
        output = asked.output or (scratch if asked.dry_run else RESULTS)
        output.mkdir(exist_ok=True, parents=True)
        print(*missing(), sep="\n", flush=True)
        import torch

        device = "cpu" if asked.dry_run else "cuda"
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here; --dry-run shows on a CPU that everything runs")
        left = 60 * asked.minutes - (time.monotonic() - start)
        rows = run_all(Options(device, output, dict(os.environ)), left, list(sections()))
        if output == RESULTS:
            import write_tables

            write_tables.pages()
    bad = [f"{row['section']}: {row['outcome']}" for row in rows if not row["good"]]
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
