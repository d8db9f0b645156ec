"""All measurements of one network at once: what `sltt analyze` runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sltt_ext
from sltt_ext.analysis.activity import FiringRates, firing_rates
from sltt_ext.analysis.credit import TemporalCredit, doublings, temporal_credit
from sltt_ext.analysis.draws import DrawnSteps, drawn_steps
from sltt_ext.analysis.memory_profile import MemoryProfile, memory_profile
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.analysis.operations import OperationCounts, operation_counts
from sltt_ext.analysis.restoring import restoring
from sltt_ext.analysis.similarity import GradientSimilarity, gradient_similarity
from sltt_ext.analysis.timing import Benchmark, benchmark, device_name
from sltt_ext.analysis.verdict import recommended_k
from sltt_ext.errors import ConfigurationError, InputError, SLTTError, is_out_of_memory, one_line
from sltt_ext.methods import Method, check_time_steps
from sltt_ext.online.objective import LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output

__all__ = ["METHODS", "Analysis", "analyze", "available_bytes", "check_runs"]

METHODS = ("bptt", "sltt", "sltt-1")
_SHARE_OF_FREE_MEMORY = 0.8
_REPEATS = 5


@dataclass(frozen=True)
class Analysis:
    """What `analyze` measured.

    Attributes:
        about: What was analysed, how and on what, by name.
        notes: What a reader of the numbers has to know.
        similarity: Gradient similarity; None if BPTT does not fit into memory.
        credit: How much of BPTT's gradient windows keep, for the first batch; None if BPTT does not fit.
        draws: How much of SLTT's gradient K drawn steps keep; None if no steps can be drawn.
        timing: Seconds of an iteration of BPTT, SLTT and SLTT-K; None if BPTT does not fit.
        operations: Operation counts of every method.
        memory: Peak memory over T, and by layer.
        activity: Firing rates and dead neurons.
    """

    about: dict[str, str]
    notes: tuple[str, ...]
    similarity: GradientSimilarity | None
    credit: TemporalCredit | None
    draws: DrawnSteps | None
    timing: Benchmark | None
    operations: tuple[OperationCounts, ...]
    memory: MemoryProfile
    activity: FiringRates

    def to_json(self) -> dict[str, Any]:
        """Everything in JSON's types, with None for NaN."""
        return {
            "about": self.about,
            "notes": list(self.notes),
            "gradient_similarity": _jsonable(self.similarity),
            "temporal_credit": _jsonable(self.credit),
            "drawn_steps": self.draws
            and {
                "spread": _jsonable(self.draws.spread),
                "cosines": [self.draws.cosine(k) for k in range(1, self.draws.time_steps + 1)],
            },
            "timing": _jsonable(self.timing),
            "operations": _jsonable(self.operations),
            "memory": _jsonable(self.memory),
            "activity": _jsonable(self.activity),
        }


def analyze(
    net: nn.Module,
    x: Tensor,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    more_batches: Iterable[tuple[Any, Any]] = (),
    per_step: bool = True,
    max_memory: int | None = None,
    time_dim: TimeDim | None = None,
    output: Output = None,
    notes: Iterable[str] = (),
    on_progress: Callable[[str], Any] = lambda name: None,
) -> Analysis:
    """Measure gradient similarity, temporal credit, drawn steps, time, memory, operations and activity of one network.

    Afterwards the network is as before. BPTT needs the memory of T steps, which is counted beforehand with fake tensors. If
    this is more than ``max_memory``, the batches are cut to fewer samples until they fit. If even one sample does not fit, the
    comparisons of gradients are left out. ``notes`` says so.

    Args:
        net: A network that `convert` knows, converted or not.
        x: One batch ``[N, ...]``, or with ``time_dim`` a sequence.
        target: Its target, a tensor ``[N, ...]``.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T.
        more_batches: Further ``(x, target)``, for the mean and spread of the gradient similarity.
        per_step: Also compare the gradients of each step's loss.
        max_memory: Bytes that BPTT may take; default: 80 % of what is free on the device.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.
        notes: What else a reader has to know. It is put in front of the notes of the analysis.
        on_progress: Called with the name of each part before it starts.

    Raises:
        InputError: If the network rejects ``x``.
        ConversionError: If it has no neuron, or has neurons that SLTT cannot train.
    """
    check_time_steps(time_steps)
    net = without_multi_step(net)
    on_progress("one run")
    check_runs(net, x, time_steps, time_dim, output)
    batches = [(x, target), *more_batches]
    limit = available_bytes(x.device) if max_memory is None else max_memory
    on_progress("memory beforehand")
    samples, needed, found = _samples_that_fit(net, x, time_steps, time_dim, output, limit)
    notes = [*notes, *found]
    fits = needed is None or needed <= limit
    if samples < x.shape[_batch_dim(time_dim)]:
        batches = [_fewer(batch, samples, time_dim) for batch in batches]
    x, target = batches[0]
    on_progress("firing rates")
    activity = firing_rates(net, x, time_steps, time_dim=time_dim, output=output)
    on_progress("operations")
    counts = [operation_counts(net, x, m, time_steps, time_dim=time_dim, output=output) for m in METHODS]
    on_progress("memory")
    lengths = doublings(time_steps)
    memory = memory_profile(net, x, METHODS[:2], lengths, fake=not fits, time_dim=time_dim, output=output)
    on_progress("gradient similarity")
    similarity, credit, draws, timing = None, None, None, None
    if fits:
        similarity = gradient_similarity(
            net, x, target, loss_fn, time_steps,
            more_batches=batches[1:], per_step=per_step, time_dim=time_dim, output=output,
        )  # fmt: skip
        if similarity.output_difference > 1e-3:
            notes.append(
                f"Two runs of the network differ by up to {similarity.output_difference:.2g} in their output, although their "
                "input is the same. The two gradients therefore belong to different spikes."
            )
        on_progress("temporal credit")
        credit = temporal_credit(net, x, target, loss_fn, time_steps, time_dim=time_dim, output=output)
    on_progress("drawn steps")
    with suppress(ConfigurationError):  # no steps can be drawn if a module takes its whole sequence
        draws = drawn_steps(net, x, target, loss_fn, time_steps, time_dim=time_dim, output=output)
    if counts[0].assumed:
        notes.append(
            f"No operation formula is known for the neurons {', '.join(counts[0].assumed)}: they are counted as LIF "
            "neurons with soft reset."
        )
    about = _about(net, x, time_steps, len(batches))
    analysis = Analysis(about, tuple(notes), similarity, credit, draws, None, tuple(counts), memory, activity)
    on_progress("time")
    if fits:
        k = recommended_k(analysis)
        methods = [*METHODS[:2], *([] if k is None else [f"sltt-{k}"])]
        timing = benchmark(
            net,
            x,
            target,
            loss_fn,
            time_steps,
            methods=methods,
            repeats=_REPEATS,
            time_dim=time_dim,
            output=output,
        )
    return replace(analysis, timing=timing)


def check_runs(
    net: nn.Module, x: Tensor, time_steps: int, time_dim: TimeDim | None = None, output: Output = None
) -> Tensor:
    """The time-mean output of ``net`` for ``x``, without gradients.

    Raises:
        InputError: If the network rejects ``x``.
    """
    with restoring(net):
        trainer = Method("sltt", cache_invariant=False).trainer(
            net, lambda output, target: output.sum(), time_steps, time_dim=time_dim, output=output
        )
        try:
            return trainer.predict(x)
        except Exception as error:  # the network's own code may raise anything
            if isinstance(error, SLTTError) or is_out_of_memory(error):
                raise
            raise InputError(
                f"the network rejects an input of shape {list(x.shape)} ({_axes(time_dim)}): {one_line(error)}"
            ) from error


def _axes(time_dim: TimeDim | None) -> str:
    if time_dim is None:
        return "the batch comes first; a sequence needs time_dim=, or --time-dim, for its axis of time"
    return "time comes first, then the batch" if time_dim == 0 else "the batch comes first, then time"


def available_bytes(device: torch.device) -> int:
    """80 % of the memory that is free on a device."""
    if device.type == "cuda":
        return int(_SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0])
    information = Path("/proc/meminfo")
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(_SHARE_OF_FREE_MEMORY * 1024 * int(line.split()[1]))
    return int(_SHARE_OF_FREE_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _samples_that_fit(
    net: nn.Module, x: Tensor, time_steps: int, time_dim: TimeDim | None, output: Output, limit: int
) -> tuple[int, float | None, list[str]]:
    """How many samples BPTT can run with, the bytes it needs for them (None: unknown), and notes about it."""
    asked = samples = x.shape[_batch_dim(time_dim)]
    first: float | None = None
    while True:
        try:
            part = _fewer((x, x), samples, time_dim)[0]
            needed = _bptt_bytes(net, part, time_steps, time_dim, output)
        except SLTTError:
            raise
        except Exception as error:  # fake tensors refuse operators that depend on data
            return samples, None, [f"BPTT's memory could not be counted beforehand ({one_line(error, 200)})."]
        first = needed if first is None else first
        if needed <= limit or samples == 1:
            break
        samples //= 2
    if first <= limit:
        return samples, needed, []
    asks = f"BPTT at T = {time_steps} with {asked} samples would take {first / 1e9:.2f} GB, and {limit / 1e9:.2f} GB are allowed"
    if needed > limit:
        left_out = f"{asks}. One sample alone would take {needed / 1e9:.2f} GB: the gradient similarity and the temporal credit are left out, and "
        return 1, needed, [left_out + "memory is counted with fake tensors."]
    return samples, needed, [f"{asks}: every batch was cut to {samples} samples."]


def _bptt_bytes(
    net: nn.Module, x: Tensor, time_steps: int, time_dim: TimeDim | None, output: Output
) -> float:
    """BPTT's peak, found from the peaks of a few steps, as it grows by the same amount with every step."""
    lengths = sorted({min(steps, time_steps) for steps in (1, 2, 3)})
    profile = memory_profile(net, x, "bptt", lengths, fake=True, time_dim=time_dim, output=output)
    peaks = [row.peak_bytes for row in profile.rows]
    growth = peaks[-1] - peaks[-2] if len(peaks) > 1 else 0
    return peaks[-1] + (time_steps - lengths[-1]) * growth


def _batch_dim(time_dim: TimeDim | None) -> int:
    return 1 if time_dim == 0 else 0


def _fewer(batch: tuple[Any, Any], samples: int, time_dim: TimeDim | None) -> tuple[Any, Any]:
    x, target = batch
    target = target[:samples] if isinstance(target, Tensor) and target.dim() else target
    return x.narrow(_batch_dim(time_dim), 0, samples), target


def _about(net: nn.Module, x: Tensor, time_steps: int, batches: int) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {
        "network": f"{type(net).__name__}, {parameters:,} parameters",
        "input": f"{list(x.shape)}, {batches} batch{'es' * (batches != 1)}",
        "time steps": str(time_steps),
        "mode": "training" if net.training else "evaluation",
        "device": device_name(str(x.device)),
        "versions": f"sltt-ext {sltt_ext.__version__}, PyTorch {torch.__version__}",
    }


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _jsonable(asdict(value))
    if isinstance(value, dict):
        return {key: _jsonable(element) for key, element in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
