"""How much of the gradient through time a window of C steps keeps, and with how much memory.

C = 1 is SLTT, C = T is BPTT. The compared gradients belong to the same spikes. A network that takes single steps is called in
windows, as in training. A network that takes sequences gets all T steps in one call, so that batch norm sees the same
statistics whatever the window is. Its neurons cut the gradient at the end of each window.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from sltt_ext.analysis import plots
from sltt_ext.analysis.memory import peak_activation_bytes
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.analysis.restoring import restoring
from sltt_ext.analysis.similarity import check_repeatable, compare, gradients_by
from sltt_ext.conversion import convert
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.forwards import Layer, Replacements
from sltt_ext.methods import Method, check_time_steps
from sltt_ext.neuron import StatefulModule
from sltt_ext.online import OnlineTrainer
from sltt_ext.online.network import goes_through_time
from sltt_ext.online.objective import LossFn
from sltt_ext.online.options import TimeDim, count
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = ["Credit", "TemporalCredit", "doublings", "temporal_credit"]


@dataclass(frozen=True)
class Credit:
    """How the gradient of one window compares with BPTT's.

    Attributes:
        window: C, the steps that the gradient goes back through.
        through: Path of the only part of the network that goes through time; empty if all of it does.
        level: ``"network"`` or ``"layer"``.
        name: Path of the module whose parameters are compared; empty for the whole network.
        cosine: Cosine similarity of the gradient and BPTT's. NaN if both are zero, 0 if one is.
        norm_ratio: Norm of the gradient over the norm of BPTT's.
        peak_bytes: The most bytes in use at the same time during an iteration of the whole network with ``chunk=C``, counted
            as in `memory_profile`.
    """

    window: int
    through: str
    level: str
    name: str
    cosine: float
    norm_ratio: float
    peak_bytes: int


@dataclass(frozen=True)
class TemporalCredit:
    """What `temporal_credit` measured.

    Attributes:
        rows: One for the network and one for each layer, for each part that goes through time and each window.
        time_steps: T.
        bptt_peak_bytes: The peak of an iteration of BPTT with the framework's own neurons.
    """

    rows: tuple[Credit, ...]
    time_steps: int
    bptt_peak_bytes: int

    def select(self, level: str, through: str = "") -> list[Credit]:
        """The rows of a level, by growing window."""
        return [row for row in self.rows if (row.level, row.through) == (level, through)]

    def smallest(self, cosine: float = 0.99, through: str = "") -> Credit | None:
        """The row of the network with the smallest window whose cosine similarity is at least ``cosine``; None if there is none."""
        return next((row for row in self.select("network", through) if row.cosine >= cosine), None)

    def advice(self, cosine: float = 0.99) -> str:
        """One sentence: which window has at least this cosine similarity, and how much memory it needs."""
        row = self.smallest(cosine)
        if row is None or row.window == self.time_steps > 1:
            return (
                f"No measured window shorter than all {self.time_steps} time steps keeps {cosine:g} of the direction of "
                "BPTT's gradient."
            )
        sltt = ", which is SLTT," if row.window == 1 else ""
        return (
            f"Windows of {row.window} of the {self.time_steps} time steps{sltt} keep {row.cosine:.4f} of the direction of "
            f"BPTT's gradient at {self.memory_ratio(row):.2f} of its memory."
        )

    def memory_ratio(self, row: Credit) -> float:
        """The peak memory of a row relative to BPTT's."""
        return row.peak_bytes / self.bptt_peak_bytes

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: cosine similarity, norm ratio and memory of the network against the window."""
        rows = self.select("network")
        values = {
            "cosine similarity": [row.cosine for row in rows],
            "norm ratio": [row.norm_ratio for row in rows],
            "peak memory": [self.memory_ratio(row) for row in rows],
        }
        windows = {label: [row.window for row in rows] for label in values}
        return plots.lines(
            windows, values, xlabel="window C (time steps)", ylabel="relative to BPTT", from_zero=True
        )


def temporal_credit(
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    windows: int | Sequence[int] | None = None,
    through: str | Sequence[str] = (),
    time_dim: TimeDim | None = None,
    target_time_dim: TimeDim | None = None,
    output: Output = None,
) -> TemporalCredit:
    """How much of BPTT's gradient is kept if it goes back through C steps: ``convert(temporal="call")``, ``chunk=C``.

    With the gradient ``a`` of a window and BPTT's gradient ``b``: ``cos = <a, b> / (|a| |b|)``, ``ratio = |a| / |b|``. Both are
    given for every layer (the parameters of one module) and for all parameters together. C = 1 is SLTT, C = T is BPTT. If a
    window does not divide T, the last one is shorter.

    Afterwards the network, its gradients, state, buffers and torch's random streams are as before.

    Args:
        net: A network that `convert` knows, converted or not, on any device with memory for BPTT.
        x: One batch, as `OnlineTrainer` takes it: ``[N, ...]``, or with ``time_dim`` a sequence, or a list of frames.
        target: Its target.
        loss_fn: ``(output of one step, target) -> scalar``; the loss is its mean over the T steps.
        time_steps: T.
        windows: The C to measure. Default: 1, 2, 4, ... and T, or only T if a module takes its whole sequence.
        through: Paths of parts of the network, such as ``"layer4"``. For each, also measure the gradient if only this part
            goes through time and all others go step by step.
        time_dim: As in `OnlineTrainer`, like the two that follow.
        target_time_dim: The time axis of the target.
        output: What the loss reads of the network's return value.

    Raises:
        ConfigurationError: If a window is not from 1 to T, or is too short for a module that takes its whole sequence, or if
            the network has no part with a path in ``through``.
        ConversionError: If the network, or a part in ``through``, has no neuron, or has neurons that SLTT cannot train.
        InputError, LossError: As `OnlineTrainer`.

    Examples:
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(tau=2.0), layer.Linear(8, 2))
        >>> x, target = torch.rand(5, 4), torch.randint(2, (5,))
        >>> credit = temporal_credit(net, x, target, nn.functional.cross_entropy, time_steps=6)
        >>> tuple(row.window for row in credit.select("network"))
        (1, 2, 4, 6)
        >>> round(credit.select("network")[-1].cosine, 4)
        1.0
    """
    check_time_steps(time_steps)
    check_repeatable(x)
    net = without_multi_step(net)
    paths = ("", *([through] if isinstance(through, str) else through))
    _check_paths(net, paths)
    lengths = _lengths(net, windows, time_steps)
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    reading: dict[str, Any] = {"time_dim": time_dim, "target_time_dim": target_time_dim, "output": output}

    def by_bptt(loss_fn: LossFn, backward: Any = None) -> Any:
        return Method("bptt").trainer(net, loss_fn, time_steps, backward=backward, **reading)

    def by_windows(chunk: int, loss_fn: LossFn, backward: Any = None) -> OnlineTrainer:
        return OnlineTrainer(
            net,
            loss_fn,
            time_steps,
            chunk=chunk,
            backward=backward,
            cache_invariant=False,
            pack_spikes=False,
            **reading,
        )

    def peak(trainer_of: Callable[[LossFn], Any]) -> int:
        trainer = trainer_of(loss_fn)
        return peak_activation_bytes(lambda: trainer.forward_backward(x, target))

    bptt, _ = gradients_by(net, by_bptt, loss_fn, (x, target))
    with restoring(net):
        bptt_peak = peak(by_bptt)
    rows = []
    for path in paths:
        for window in lengths:
            with _through_time(net, path, window), _cut_every(window, net, time_steps) as chunk:
                kept, _ = gradients_by(net, partial(by_windows, chunk), loss_fn, (x, target))
            with _through_time(net, path, window):
                size = peak(partial(by_windows, window))
            rows += [
                Credit(window, path, level, name, *alignment, size)
                for (level, name, _), alignment in compare(names, kept, bptt)
                if level != "parameter"
            ]
    return TemporalCredit(tuple(rows), time_steps, bptt_peak)


def doublings(time_steps: int) -> list[int]:
    """1, 2, 4, ... up to T, and T."""
    return sorted({2**i for i in range(time_steps.bit_length())} | {time_steps})


@contextmanager
def _through_time(net: nn.Module, path: str, window: int) -> Iterator[None]:
    """Make one part of the network go through time, and the others step by step; the end of the block undoes this."""
    with restoring(net), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "chunk=", SLTTWarning
        )  # the warning that the last window is shorter
        if path:
            convert(net, temporal="step")
        # windows of one step are SLTT, for which neurons keep less
        convert(net.get_submodule(path), temporal="step" if window == 1 else "call")
        yield


@contextmanager
def _cut_every(window: int, net: nn.Module, time_steps: int) -> Iterator[int]:
    """Cut the gradient between windows; yields how many steps a call of the network needs for that."""
    stateful = _stateful(net)
    if not any(module.multi_step for module in stateful):
        yield window
        return
    with Replacements() as replaced:
        for module in stateful:
            takes_parts = module.multi_step and module.keeps_steps_apart and not module.whole_sequence
            if takes_parts and goes_through_time(cast(nn.Module, module).modules()):
                replaced.forward(cast(nn.Module, module), Layer.PARTS, partial(_in_windows, window))
        yield time_steps


def _in_windows(window: int, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``module`` once for each window of a sequence; its carried state is a constant between windows."""
    carriers = _stateful(module)
    recorded = [name for name in ("v_seq", "i_seq") if getattr(module, f"store_{name}", False)]
    outputs, records = [], []
    for start in range(0, len(tree_leaves(args)[0]), window):
        for carrier in carriers if start else ():
            carrier.detach_state()
        part = tree_map(lambda seq, start=start: seq[start : start + window], args)
        outputs.append(forward(*part, **kwargs))
        records.append([getattr(module, name) for name in recorded])
    for name, parts in zip(recorded, zip(*records)):
        setattr(module, name, torch.cat(parts))
    return tree_map(lambda *parts: torch.cat(parts), *outputs)


def _stateful(net: nn.Module) -> list[StatefulModule]:
    return [module for module in net.modules() if isinstance(module, StatefulModule)]


def _lengths(net: nn.Module, windows: int | Sequence[int] | None, time_steps: int) -> list[int]:
    """The windows to measure, from the shortest to the longest."""
    if windows is None:
        with _through_time(net, "", time_steps):
            whole = any(module.whole_sequence for module in _stateful(net))
        return [time_steps] if whole else doublings(time_steps)
    given = windows if isinstance(windows, Sequence) else [windows]
    if not given:
        raise ConfigurationError("temporal_credit needs at least one window")
    return sorted({count("windows", window, at_most=time_steps) for window in given})


def _check_paths(net: nn.Module, paths: Sequence[str]) -> None:
    known = dict(net.named_modules())
    for path in paths:
        if path not in known:
            raise ConfigurationError(
                f"through={path!r} is not a part of the network: give a path of net.named_modules()"
            )
