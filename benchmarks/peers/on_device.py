"""The contenders on a CUDA device: seconds, peak memory and launches of one training iteration each.

A *cell* is one contender on one network, batch and dtype. What a device cannot run is a row as well: out of memory, a
failure with its reason, or more time than the cell may have.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from spikingjelly.activation_based import neuron
from torch import nn

import sltt_ext
from peers.contenders import Contender, Steps, framework, peers
from peers.measurements import DTYPES, TIME_STEPS, Row, Run, draws
from peers.networks import (
    NF_RESNET34,
    SEW_RESNET18,
    SPIKFORMER,
    SPIKING_RESNET18,
    Network,
    Task,
    of_sltt_ext,
    of_spikingjelly,
    spikformer,
)
from sltt_ext.models.nf_resnet import BasicBlock, NFResNet

BATCHES = (128, 8, 512, 32)
PRECISIONS = ("bfloat16", "float32")
NETWORKS = (SPIKING_RESNET18, NF_RESNET34, SPIKFORMER, SEW_RESNET18)
"""All three from the most telling to the least: where time runs out, what is last is missing."""
WARM_UP = 5
SECONDS_TO_SPEND = 1.5
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cudaMemset")

Measure = Literal["time", "launches"]


@dataclass(frozen=True)
class Entrant:
    """A contender, and what it takes to run it on a device.

    Attributes:
        contender: Who.
        needs: What is missing here to run it, asked for the kind of device, ``"cuda"`` or ``"cpu"``; None: nothing.
        late: How much later than the others it has its turn.
        limit: Seconds that a cell of it may take.
        environment: Variables that have to be set before its process starts.
        captures: Memory is in use outside of iterations too, so that its peak is that of all it has done.
    """

    contender: Contender
    needs: Callable[[str], str | None] = lambda device: None
    late: int = 0
    limit: float = 40.0
    environment: Mapping[str, str] = field(default_factory=dict)
    captures: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.contender.name


@dataclass(frozen=True)
class Cell:
    """What is measured at a time.

    Attributes:
        network: Name of the network.
        batch: How many samples.
        dtype: ``"float32"``, or ``"bfloat16"`` under autocast.
        entrant: Name of the contender.
        measure: Time and memory, or launches.
        limit: Seconds that it may take.
        environment: See `Entrant`, as sorted pairs.
        device: The kind of device.
        tiny: The network is replaced by a small one, to show that the cell runs.
    """

    network: str
    batch: int
    dtype: str
    entrant: str
    measure: Measure = "time"
    limit: float = 40.0
    environment: tuple[tuple[str, str], ...] = ()
    device: str = "cuda"
    tiny: bool = False

    @property
    def key(self) -> Row:
        """What identifies its row."""
        return {"network": self.network, "batch": self.batch, "dtype": self.dtype, "contender": self.entrant}

    def row(self, status: str = "", **figures: Any) -> Row:
        """Its row: figures, or a ``status`` that says why there are none."""
        of_measure = {
            "time": ("pixels", "time_steps", "repeats", "milliseconds", "fastest_milliseconds", "peak_mb"),
            "launches": ("time_steps", "launches", "kernels"),
        }[self.measure]
        return {**self.key, **{name: figures.get(name, "") for name in of_measure}, "status": status}


class Trainer:
    """Iterations of `sltt_ext.OnlineTrainer` with the options of a user, one trainer for each network."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._selected: Steps = ()
        self._trainers: WeakKeyDictionary[nn.Module, sltt_ext.OnlineTrainer] = WeakKeyDictionary()

    def __call__(self, net: nn.Module, task: Task, selected: Steps) -> sltt_ext.OnlineResult:
        """One iteration."""
        self._selected = selected
        if net not in self._trainers:
            self._trainers[net] = self._trainer(net, task)
        return self._trainers[net].forward_backward(task.x, task.target)

    def has_captured(self, net: nn.Module) -> bool:
        """Whether iterations of a network run as CUDA graphs."""
        graphs = self._trainers[net]._graphs
        return graphs is not None and graphs.captured > 0

    def _trainer(self, net: nn.Module, task: Task) -> sltt_ext.OnlineTrainer:
        options = dict(self.options)
        if options.pop("k", None) is not None:
            options["schedule"] = lambda *_: self._selected
        if options.get("chunk") == "all":
            options["chunk"] = task.time_steps
        return sltt_ext.OnlineTrainer(
            net, nn.functional.cross_entropy, task.time_steps, time_dim=task.time_dim, **options
        )


def entrants(network: Network) -> list[Entrant]:
    """Everyone who takes part on a device."""
    by_name = {contender.name: contender for contender in peers(network)}
    sequence = by_name["BPTT, sequence"]
    return [
        Entrant(by_name["BPTT, steps"]),
        Entrant(sequence),
        Entrant(by_name["SLTT, SpikingJelly"]),
        ours("by default"),
        ours("graphed", needs=graphs, captures=True, graph=True),
        ours("leanest", chunk=1, pack_spikes=True),
        ours("by default", k=1, full_output=False),
        ours("graphed", k=1, full_output=False, needs=graphs, captures=True, graph=True),
        Entrant(
            replace(sequence, by="sequence, compiled", network="compiled", prepare=compiled_sequence),
            late=2, limit=120,
        ),
        ours("compiled", prepare=compiled_ours, late=2, limit=120, **how_to_compile()),
        Entrant(
            replace(sequence, by="sequence, no kernels"), kernels, late=3,
            environment={f"SJ_{name}_CUDA_IMPLEMENTATION": "torch" for name in ("IF", "LIF")},
        ),
    ]  # fmt: skip


def ours(
    by: str,
    prepare: Callable[[Task], nn.Module] | None = None,
    needs: Callable[[str], str | None] = lambda device: None,
    late: int = 0,
    limit: float = 40.0,
    captures: bool = False,
    **options: Any,
) -> Entrant:
    """The trainer with these options, on a multi-step network, which is what SpikingJelly's users have on a device."""
    k, full = options.get("k"), options.get("full_output", True)
    method = "SLTT" if k is None else f"SLTT-{k}"
    contender = Contender(
        method, f"sltt_ext, {by}", by, prepare or converted, Trainer(**options), k=k, full_output=full
    )
    return Entrant(contender, needs, late, limit, captures=captures)


def converted(task: Task) -> nn.Module:
    return sltt_ext.convert(task.network.build(step_mode="m"))


def compiled_sequence(task: Task) -> nn.Module:
    return _compiled(framework(neuron.LIFNode, "m", task), task)


def compiled_ours(task: Task) -> nn.Module:
    net = converted(task)
    return net if has_option("compile") else _compiled(net, task)


def _compiled(net: nn.Module, task: Task) -> nn.Module:
    net.compile(backend="inductor" if task.x.is_cuda else "eager")  # a dry run is to end soon
    return net


def how_to_compile() -> dict[str, Any]:
    """Options of the trainer: it compiles by itself, or takes a compiled network, whose calls have to be of one length."""
    return {"compile": True} if has_option("compile") else {"chunk": "all"}


def has_option(name: str) -> bool:
    """Whether this version's trainer has an option."""
    return name in inspect.signature(sltt_ext.OnlineTrainer).parameters


def graphs(device: str) -> str | None:
    if not has_option("graph"):
        return "OnlineTrainer has no graph= in this version"
    return None if device == "cuda" else "CUDA graphs need a CUDA device"


def kernels(device: str) -> str | None:
    return (
        None
        if device == "cuda"
        else "SpikingJelly has kernels for CUDA devices only: there is nothing to leave out"
    )


def cells(device: str = "cuda", tiny: bool = False) -> tuple[list[Cell], dict[str, str]]:
    """The cells of time and memory, from the most telling to the least; and who cannot run here, with the reason."""
    refused: dict[str, str] = {}
    ranked: list[tuple[int, int, Cell]] = []
    group = 0
    for place, network in enumerate(NETWORKS):
        for batch_rank, batch in enumerate((2,) if tiny else BATCHES):
            for dtype_rank, dtype in enumerate(PRECISIONS):
                group += 1
                for entrant in entrants(network):
                    reason = entrant.needs(device)
                    if reason is not None:
                        refused[entrant.name] = reason
                        continue
                    cell = Cell(
                        network.name, batch, dtype, entrant.name, "time", entrant.limit,
                        tuple(sorted(entrant.environment.items())), device, tiny,
                    )  # fmt: skip
                    if tiny and _skipped_when_tiny(entrant, place, dtype):
                        continue
                    rank = batch_rank + dtype_rank + entrant.late + (place == len(NETWORKS) - 1)
                    ranked.append((rank, group, cell))
    return [cell for _, _, cell in sorted(ranked, key=lambda item: item[:2])], refused


def _skipped_when_tiny(entrant: Entrant, place: int, dtype: str) -> bool:
    """A dry run has to show that each contender runs, not each cell: it compiles once, and has one network in bfloat16."""
    return (dtype == "bfloat16" and (place != 1 or entrant.late > 0)) or (entrant.late > 0 and place != 1)


def launch_cells(chosen: Sequence[Cell]) -> list[Cell]:
    """The cells of launches: once for each network and contender, as they do not depend on the batch."""
    smallest = min((cell.batch for cell in chosen), default=0)
    return [
        replace(cell, measure="launches")
        for cell in chosen
        if cell.batch == smallest and cell.dtype == "float32" and not cell.environment
    ]


def small(network: Network) -> Network:
    """A network of the same kind, for a dry run."""
    make = {
        SPIKING_RESNET18.name: of_spikingjelly("spiking_resnet", "SpikingResNet", layers=[1, 1, 1, 1]),
        SEW_RESNET18.name: of_spikingjelly("sew_resnet", "SEWResNet", layers=[1, 1, 1, 1], cnf="ADD"),
        NF_RESNET34.name: of_sltt_ext(
            lambda classes, neuron: NFResNet(BasicBlock, [1, 1, 1, 1], classes, neuron=neuron, width=8)
        ),
        SPIKFORMER.name: partial(spikformer, embed_dims=32, num_heads=4, depths=1),
    }[network.name]
    return replace(network, make=make, frame=(network.frame[0], 32, 32))


def measured(cell: Cell) -> Row:
    """The row of a cell, whatever comes of it."""
    try:
        return {"time": _time_and_memory, "launches": _launches}[cell.measure](cell)
    except torch.OutOfMemoryError:
        return cell.row("out of memory")
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return cell.row(f"failed: {type(error).__name__}: {text[0][:200]}")
    finally:
        gc.collect()
        torch._dynamo.reset()
        if cell.device == "cuda":
            torch.cuda.empty_cache()


def _prepared(cell: Cell) -> tuple[Entrant, Run]:
    """Iterations of the contender, none of which has run yet."""
    network = next(network for network in NETWORKS if network.name == cell.network)
    entrant = next(entrant for entrant in entrants(network) if entrant.name == cell.entrant)
    network = replace(small(network) if cell.tiny else network, batch=cell.batch)
    task = network.task(2 if cell.tiny else TIME_STEPS).to(cell.device)
    net = entrant.contender.prepare(task).to(cell.device)
    selected = cycle(draws(task.time_steps, entrant.contender.k, task.time_steps))
    return entrant, Run(entrant.contender, net, task, selected, DTYPES[cell.dtype])


def _time_and_memory(cell: Cell) -> Row:
    entrant, run = _prepared(cell)
    device = _Device(cell.device)
    started = device.allocated()
    for _ in range(_warm_up(cell, entrant)):
        run()
    if not entrant.captures:
        run.net.zero_grad()
        started = device.allocated()
    seconds = list(_seconds(run, device, 1 if cell.tiny else None))
    peak = device.peak() - started
    _check_captured(entrant, run)
    return cell.row(
        pixels=run.task.network.frame[-1],
        time_steps=run.task.time_steps,
        repeats=len(seconds),
        milliseconds=round(1e3 * statistics.median(seconds), 3),
        fastest_milliseconds=round(1e3 * min(seconds), 3),
        peak_mb=round(peak / 1e6, 1) if cell.device == "cuda" else "",
    )


def _warm_up(cell: Cell, entrant: Entrant) -> int:
    """How many iterations are not timed; what is captured for each draw has to have seen each of them often enough."""
    if cell.tiny:
        return 1
    if not entrant.captures:
        return WARM_UP
    return 3 * WARM_UP if entrant.contender.k is None else 6 * TIME_STEPS


def _check_captured(entrant: Entrant, run: Run) -> None:
    if entrant.captures and not entrant.contender.iterate.has_captured(run.net):  # type: ignore[attr-defined]
        raise RuntimeError("no iteration was captured")


def _seconds(run: Run, device: _Device, repeats: int | None) -> Iterator[float]:
    """Seconds of iterations: as many as fit into a while, and all draws of SLTT-K equally often."""
    rounds = run.task.time_steps
    spent, done = 0.0, 0
    while done < (repeats or 1) * rounds or (repeats is None and spent < SECONDS_TO_SPEND):
        for _ in range(rounds):
            device.synchronize()
            start = time.perf_counter()
            run()
            device.synchronize()
            yield (taken := time.perf_counter() - start)
            spent, done = spent + taken, done + 1


def _launches(cell: Cell) -> Row:
    """What the host hands to the device in one iteration, and what the device then runs, as the profiler sees them."""
    entrant, run = _prepared(cell)
    for _ in range(_warm_up(cell, entrant)):
        run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    _check_captured(entrant, run)
    events = profile.events()
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = [event for event in events if event.name.startswith(LAUNCHES)]
    return cell.row(time_steps=run.task.time_steps, launches=len(launches), kernels=len(on_device))


class _Device:
    """The clock and the memory of a device; a CPU has nothing to wait for, and its memory is not counted."""

    def __init__(self, kind: str) -> None:
        self._cuda = kind == "cuda"

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes in use; the peak is counted from here on."""
        if not self._cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else 0
