"""What is measured, and the rows of the results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import combinations, cycle
from typing import Any

import torch
from measure import until_decided
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peers.contenders import (
    FASTEST,
    LEANEST,
    PLAIN,
    TOGETHER,
    Contender,
    Online,
    Steps,
    contenders,
    leanest,
)
from peers.networks import HALF_AS_WIDE, LARGE, NF_RESNET34, Network, Task, of_size
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.analysis.timing import interleaved_medians

TIME_STEPS = 6
LENGTHS = (1, 2, 4, 8, 16, 32)
OVER_TIME = ("BPTT, steps", "BPTT, sequence", "SLTT, SpikingJelly", "rate-based, sequence")
TIMED = HALF_AS_WIDE
COUNTED = of_size(NF_RESNET34, 32, 96)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "BPTT, steps"

OnRun = Callable[[], Any]
Row = dict[str, Any]


@dataclass
class Run:
    """Training iterations of a contender, one at each call.

    Attributes:
        contender: Who runs.
        net: On which network.
        task: On which batch.
        selected: The steps that each iteration back-propagates.
        dtype: bfloat16 runs under autocast.
    """

    contender: Contender
    net: nn.Module
    task: Task
    selected: Iterator[Steps]
    dtype: torch.dtype = torch.float32

    def __call__(self) -> None:
        """Run one iteration; the gradients of the last are gone first."""
        self.net.zero_grad()
        lower = self.dtype != torch.float32
        with torch.autocast(self.task.x.device.type, self.dtype) if lower else nullcontext():
            self.contender.iterate(self.net, self.task, next(self.selected))


def draws(time_steps: int, k: int | None, repeats: int) -> list[Steps]:
    """Which steps SLTT-K back-propagates in each repetition: the same for all contenders, and fair.

    What an iteration costs grows with its last selected step. So the possible draws, sorted by it, are sampled at
    regular distances and then shuffled, with a seeded generator: six repetitions of SLTT-1 with T = 6 have every
    step once.
    """
    if k is None or k >= time_steps:
        return [tuple(range(time_steps))] * repeats
    generator = random.Random(0)
    possible = list(combinations(range(time_steps), k))
    generator.shuffle(possible)
    possible.sort(key=lambda steps: steps[-1])
    chosen = [possible[int((i + 0.5) * len(possible) / repeats)] for i in range(repeats)]
    generator.shuffle(chosen)
    return chosen


def prepared(
    task: Task, chosen: Iterable[Contender], repeats: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Run]:
    """One run for each contender; contenders that need the same network share it."""
    nets: dict[str, nn.Module] = {}
    runs = {}
    for contender in chosen:
        if contender.network not in nets:
            nets[contender.network] = contender.prepare(task)
        selected = cycle(draws(task.time_steps, contender.k, repeats))
        runs[contender.name] = Run(contender, nets[contender.network], task, selected, dtype)
    return runs


def shortlist(network: Network) -> list[Contender]:
    """All peers, and ours without speed-ups and with all of them."""
    ours = tuple(f"sltt_ext, {name}" for name in (PLAIN, *TOGETHER))
    return [
        contender
        for contender in contenders(network)
        if not (contender.k == 2 and contender.full_output)
        and (contender.by in ours or not contender.by.startswith("sltt_ext"))
    ]


def iterations(network: Network, dtype: str, repeats: int, on_run: OnRun) -> list[Row]:
    """Seconds and peak memory of one training iteration of each contender on ``network``."""
    runs = prepared(network.task(TIME_STEPS), _chosen(network, dtype), repeats, DTYPES[dtype])
    peaks = {name: _peak(run, on_run) for name, run in runs.items()}
    seconds = interleaved_medians(runs, repeats, on_run=on_run)
    return [
        {
            "network": network.name,
            "batch": network.batch,
            "pixels": network.frame[-1],
            "dtype": dtype,
            "contender": name,
            "time_steps": TIME_STEPS,
            "repeats": repeats,
            "seconds": round(seconds[name], 4),
            "to_bptt_steps": _ratio(seconds, name, BASELINE),
            "to_bptt_sequence": _ratio(seconds, name, "BPTT, sequence"),
            "to_spikingjelly": _ratio(seconds, name, f"{run.contender.method}, SpikingJelly"),
            "to_spikingjelly_same_tail": _ratio(seconds, name, f"{run.contender.what}, SpikingJelly"),
            "peak_mb": round(peaks[name] / 1e6, 1),
            "peak_to_bptt_steps": _ratio(peaks, name, BASELINE),
        }
        for name, run in runs.items()
    ]


def number_of_iterations(network: Network, dtype: str, repeats: int) -> int:
    """How often `iterations` calls ``on_run``."""
    return len(_chosen(network, dtype)) * (repeats + 2)


def _chosen(network: Network, dtype: str) -> list[Contender]:
    """Every speed-up alone on one network; elsewhere they are all off, or all on."""
    return contenders(network) if (network, dtype) == (NF_RESNET34, "float32") else shortlist(network)


def over_time(repeats: int, on_run: OnRun, lengths: Iterable[int] = LENGTHS) -> list[Row]:
    """Seconds and peak memory against T: seconds of a smaller network, memory by fake tensors."""
    rows = []
    for time_steps in lengths:
        with FakeTensorMode():
            counted = prepared(COUNTED.task(time_steps), _over_time())
            peaks = {name: _peak(run, on_run) for name, run in counted.items()}
        timed = prepared(TIMED.task(time_steps), _over_time(), repeats)
        seconds = interleaved_medians(timed, repeats, on_run=on_run)
        rows += [
            {
                "contender": name,
                "time_steps": time_steps,
                "repeats": repeats,
                "timed": TIMED.size,
                "seconds": round(seconds[name], 4),
                "counted": COUNTED.size,
                "peak_mb": round(peaks[name] / 1e6, 2),
            }
            for name in timed
        ]
    return rows


def _over_time() -> list[Contender]:
    """The peers, and ours at the least memory and at the most speed."""
    names = {*OVER_TIME, f"SLTT, sltt_ext, {LEANEST}", f"SLTT, sltt_ext, {FASTEST}"}
    names.add(f"SLTT-1, tail skipped, sltt_ext, {FASTEST}")
    return [contender for contender in contenders(TIMED) if contender.name in names]


def number_over_time(repeats: int, lengths: Iterable[int] = LENGTHS) -> int:
    """How often `over_time` calls ``on_run``."""
    return len(list(lengths)) * len(_over_time()) * (repeats + 2)


def memory(on_run: OnRun) -> list[Row]:
    """Peak memory at larger sizes: a real batch, and the paper's by fake tensors, which have shapes and no memory."""
    return [
        row
        for network, fake in MEMORY
        for row in _memory(network, FakeTensorMode() if fake else nullcontext(), fake, on_run)
    ]


MEMORY = ((COUNTED, False), *((network, True) for network in LARGE))


def number_of_peaks() -> int:
    """How often `memory` calls ``on_run``."""
    return sum(len(_counted(network, fake)) for network, fake in MEMORY)


def _counted(network: Network, fake: bool) -> list[Contender]:
    """SLTT of each kind; of the deeper networks, with no speed-ups and with all.

    memopt looks at its input's values to see which are spikes, and fake tensors have none.
    """
    short = network in LARGE[1:]
    found = shortlist(network) if short else contenders(network)
    return [*(c for c in found if c.k is None and not (fake and c.by == "memopt")), leanest()]


def _memory(network: Network, tensors: AbstractContextManager[Any], fake: bool, on_run: OnRun) -> list[Row]:
    peaks = {}
    with tensors:
        task = network.task(TIME_STEPS)
        for contender in _counted(network, fake):
            (run,) = prepared(task, [contender]).values()
            peaks[contender.name] = _peak(run, on_run)
    return [
        {
            "network": network.name,
            "batch": network.batch,
            "pixels": network.frame[-1],
            "tensors": "fake" if fake else "real",
            "contender": name,
            "time_steps": TIME_STEPS,
            "peak_gib": round(peak / 2**30, 3),
            "to_bptt_steps": _ratio(peaks, name, BASELINE),
            "to_spikingjelly": _ratio(peaks, name, "SLTT, SpikingJelly"),
        }
        for name, peak in peaks.items()
    ]


def _peak(run: Run, on_run: OnRun) -> int:
    """Peak of an iteration; sltt_ext's trainer learns in its first ones what it may evaluate once, and share."""
    iterate = run.contender.iterate
    if isinstance(iterate, Online):
        for _ in range(1 if run.contender.k is None else 3):
            run()
        until_decided(lambda: iterate.is_decided(run.net), run)
    peak = peak_activation_bytes(run, run.net)
    on_run()
    return peak


def _ratio(values: dict[str, Any], name: str, baseline: str) -> Any:
    """Relative to the baseline, or nothing where there is none."""
    return round(values[name] / values[baseline], 3) if baseline in values else ""
