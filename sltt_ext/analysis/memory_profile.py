"""Where the memory of a training iteration goes: by layer, by method, and over the number of time steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.analysis import plots
from sltt_ext.analysis.memory import peak_activation_bytes
from sltt_ext.analysis.modules import running_module, without_multi_step
from sltt_ext.analysis.restoring import restoring
from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.methods import GradientTrainer, check_time_steps, method_named
from sltt_ext.online.memory import LiveStorages
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = ["LayerMemory", "MemoryProfile", "PeakMemory", "memory_profile"]


@dataclass(frozen=True)
class PeakMemory:
    """The peak of one training iteration.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"``.
        time_steps: T.
        peak_bytes: The most bytes in use at the same time: activations, states and gradients (also those of the
            parameters). The parameters and the network's input do not count.
    """

    method: str
    time_steps: int
    peak_bytes: int


@dataclass(frozen=True)
class LayerMemory:
    """What one module keeps for backward at the moment when the network keeps most.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"`` or ``"SLTT-K"``.
        time_steps: T.
        layer: Path of the module whose forward saved it; empty for what the network's own forward and the loss save.
        saved_bytes: Bytes of the tensors saved for backward. Each storage counts once, for the module that saved it first.
            Parameters, buffers and the network's input do not count.
    """

    method: str
    time_steps: int
    layer: str
    saved_bytes: int


@dataclass(frozen=True)
class MemoryProfile:
    """What `memory_profile` measured.

    Attributes:
        rows: The peak for each method and T.
        layers: What each layer keeps, for each method and T.
        fake: Whether the memory was counted with fake tensors.
    """

    rows: tuple[PeakMemory, ...]
    layers: tuple[LayerMemory, ...]
    fake: bool

    def peak_bytes(self, method: str, time_steps: int) -> int:
        """The peak of one method at one T."""
        name = method_named(method).name
        return next(r.peak_bytes for r in self.rows if (r.method, r.time_steps) == (name, time_steps))

    def to_dataframe(self) -> Any:
        """The peaks as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])

    def layers_to_dataframe(self) -> Any:
        """What each layer keeps, as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.layers])

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: the peak against T, one line for each method."""
        methods = dict.fromkeys(row.method for row in self.rows)
        own = {method: [row for row in self.rows if row.method == method] for method in methods}
        return plots.lines(
            {method: [row.time_steps for row in rows] for method, rows in own.items()},
            {method: [row.peak_bytes / 1e6 for row in rows] for method, rows in own.items()},
            xlabel="time steps T",
            ylabel="peak memory (MB)",
            from_zero=True,
        )

    def plot_layers(self) -> Any:
        """A ``matplotlib.figure.Figure``: what each layer keeps at the largest T, one bar for each method."""
        longest = max(row.time_steps for row in self.layers)
        kept = {
            (row.method, row.layer): row.saved_bytes / 1e6 for row in self.layers if row.time_steps == longest
        }
        layers = list(dict.fromkeys(layer for _, layer in kept))
        return plots.bars(
            [layer or "(network, loss)" for layer in layers],
            {
                method: [kept.get((method, layer), 0.0) for layer in layers]
                for method in dict.fromkeys(method for method, _ in kept)
            },
            xlabel=f"kept for backward at T = {longest} (MB)",
        )


def memory_profile(
    net: nn.Module,
    x: Any,
    method: str | Sequence[str] = ("bptt", "sltt"),
    time_steps: Sequence[int] = (1, 2, 4, 8),
    *,
    fake: bool = False,
    time_dim: TimeDim | None = None,
    output: Output = None,
) -> MemoryProfile:
    """Peak memory of one training iteration for each T, and what every layer keeps for backward.

    Gradients of parameters count. With single steps, BPTT sums them over time while activations are freed, and SLTT keeps them
    in ``.grad`` from the first step on. So neither method is favoured. The loss is the mean of the output, which needs nearly
    no memory. Afterwards the network is as before.

    Args:
        net: A network that `convert` knows, converted or not, on the CPU or a CUDA device.
        x: One batch ``[N, ...]``, shown at every step. With ``time_dim``, a sequence of at least the largest T steps, which is
            cut to each T. With ``fake``, it may also be a shape, as a tuple.
        method: ``"bptt"``, ``"sltt"``, ``"sltt-2"``, ..., or several.
        time_steps: The numbers of steps T to measure.
        fake: Count with fake tensors, which have shapes but no memory. Use it for sizes that do not fit.
        time_dim: As in `OnlineTrainer`.
        output: What the loss reads of the network's return value, as in `OnlineTrainer`.

    Raises:
        ConfigurationError: If a method does not exist, or there is no T.
        InputError: If ``x`` has too few steps, or is neither a tensor nor (with ``fake``) a shape.

    Examples:
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 2))
        >>> profile = memory_profile(net, (16, 4), time_steps=(1, 8), fake=True)
        >>> profile.peak_bytes("bptt", 8) > 4 * profile.peak_bytes("sltt", 8)
        True
    """
    methods = [method_named(name) for name in ([method] if isinstance(method, str) else method)]
    if not time_steps or not methods:
        raise ConfigurationError("memory_profile needs at least one method and one number of time steps")
    for steps in time_steps:
        check_time_steps(steps)
    net = without_multi_step(net)
    peaks, layers = [], []
    for steps in time_steps:
        x_steps = _first_steps(_as_tensor(x, fake, net), steps, time_dim)
        for chosen in methods:
            with restoring(net), _fake_tensors(net, x_steps) if fake else nullcontext(x_steps) as shown:
                trainer = chosen.for_at_most(steps).trainer(
                    net, lambda output, _: output.mean(), steps, time_dim=time_dim, output=output
                )
                peak, saved = _measure(trainer, shown)
            peaks.append(PeakMemory(chosen.name, steps, peak))
            layers += [LayerMemory(chosen.name, steps, path, size) for path, size in saved.items()]
    return MemoryProfile(tuple(peaks), tuple(layers), fake)


def _measure(trainer: GradientTrainer, x: Tensor) -> tuple[int, dict[str, int]]:
    """Peak of an iteration, and the bytes that each layer keeps when the network keeps most."""
    with _saved_by_layer(trainer.net, x) as saved:
        peak = peak_activation_bytes(lambda: trainer.forward_backward(x, None))
    return peak, saved.most


@contextmanager
def _fake_tensors(net: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Put fake parameters and buffers into ``net``; yields a fake ``x``. The caller has to take them out again."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)  # type: ignore[assignment]
    with mode:
        yield mode.from_tensor(x)


class _SavedBytes:
    """Bytes saved for backward by layer: those in use now, and those in use when the sum was largest."""

    def __init__(self, owned: set[int]) -> None:
        self.most: dict[str, int] = {}
        self._owned = owned
        self._storages = LiveStorages()

    def add(self, layer: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._owned or storage in self._storages:
            return
        self._storages.add(storage, layer)
        if self._storages.bytes() > sum(self.most.values()):
            self.most = {path: held for path, held in self._storages.by_owner().items() if held}


@contextmanager
def _saved_by_layer(net: nn.Module, x: Tensor) -> Iterator[_SavedBytes]:
    storages = [tensor.untyped_storage() for tensor in [x, *net.parameters(), *net.buffers()]]
    saved = _SavedBytes({id(storage) for storage in storages})

    def pack(tensor: Tensor) -> Tensor:
        saved.add(running() or "", tensor)
        return tensor

    with running_module(net) as running, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def _as_tensor(x: Any, fake: bool, net: nn.Module) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if fake and isinstance(x, (tuple, list)) and all(isinstance(size, int) for size in x):
        like = next(net.parameters(), torch.empty(0))
        return torch.empty((), dtype=like.dtype, device=like.device).expand(tuple(x))
    raise InputError(
        f"x must be a tensor, or with fake=True a shape such as (8, 3, 64, 64), got {type(x).__name__}"
    )


def _first_steps(x: Tensor, time_steps: int, time_dim: TimeDim | None) -> Tensor:
    if time_dim is None:
        return x
    if time_dim not in (0, 1) or x.dim() <= time_dim or x.shape[time_dim] < time_steps:
        raise InputError(
            f"x of shape {list(x.shape)} has fewer than {time_steps} steps along time_dim={time_dim}"
        )
    return x.narrow(time_dim, 0, time_steps)
