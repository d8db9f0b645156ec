"""How close SLTT's gradient is to that of back-propagation through time (Meng et al. 2023, Sec. 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.analysis import plots
from sltt_ext.analysis.modules import without_multi_step
from sltt_ext.analysis.restoring import restoring
from sltt_ext.conversion import convert
from sltt_ext.errors import ConfigurationError, InputError
from sltt_ext.methods import GradientTrainer, Method, check_time_steps
from sltt_ext.online.objective import Backward, LossFn
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = [
    "Alignment",
    "GradientSimilarity",
    "check_repeatable",
    "compare",
    "gradient_similarity",
    "gradients_by",
]

_SLTT_TO_BPTT = "SLTT to BPTT (1 = the same)"


@dataclass(frozen=True)
class Alignment:
    """How one gradient compares with another: mean and spread over batches.

    Attributes:
        level: ``"network"``, ``"layer"`` or ``"parameter"``.
        name: Path of the module or parameter; empty for the whole network.
        time_step: The step whose loss has this gradient; None for the whole loss.
        cosine: Cosine similarity of SLTT's gradient and BPTT's, from -1 to 1. NaN if both are zero, 0 if one is.
        cosine_std: Its standard deviation over the batches.
        norm_ratio: Norm of SLTT's gradient over the norm of BPTT's.
        norm_ratio_std: Its standard deviation over the batches.
    """

    level: str
    name: str
    time_step: int | None
    cosine: float
    cosine_std: float
    norm_ratio: float
    norm_ratio_std: float


@dataclass(frozen=True)
class GradientSimilarity:
    """What `gradient_similarity` measured.

    Attributes:
        rows: One for the network, each layer and each parameter; with ``per_step``, each again for every time step.
        time_steps: T.
        batches: The number of batches.
        output_difference: The largest difference between the time-mean outputs of the two runs. It should be 0 or nearly 0. A
            larger value means that the network does not compute the same result twice.
    """

    rows: tuple[Alignment, ...]
    time_steps: int
    batches: int
    output_difference: float

    def select(self, level: str, per_step: bool = False) -> list[Alignment]:
        """The rows of a level, for the whole loss or for the loss of each step."""
        return [row for row in self.rows if row.level == level and (row.time_step is not None) == per_step]

    @property
    def overall(self) -> Alignment:
        """All parameters together, whole loss."""
        return self.select("network")[0]

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: cosine similarity and norm ratio of each layer."""
        rows = [row for row in self.select("layer") if not math.isnan(row.cosine)]
        spreads = {
            "cosine similarity": [row.cosine_std for row in rows],
            "norm ratio": [row.norm_ratio_std for row in rows],
        }
        return plots.bars(
            [row.name or "(network)" for row in rows],
            {
                "cosine similarity": [row.cosine for row in rows],
                "norm ratio": [row.norm_ratio for row in rows],
            },
            xlabel=_SLTT_TO_BPTT,
            spreads=spreads if self.batches > 1 else None,
            reference=1,
        )

    def plot_over_time(self) -> Any:
        """A ``matplotlib.figure.Figure``: cosine similarity and norm ratio for the loss of each step.

        Raises:
            ConfigurationError: If the steps were not measured.
        """
        rows = self.select("network", per_step=True)
        if not rows:
            raise ConfigurationError("the steps were not measured: gradient_similarity(..., per_step=True)")
        values = {
            "cosine similarity": [row.cosine for row in rows],
            "norm ratio": [row.norm_ratio for row in rows],
        }
        times = dict.fromkeys(values, range(self.time_steps))
        return plots.lines(times, values, xlabel="time step t of the loss", ylabel=_SLTT_TO_BPTT)


def gradient_similarity(
    net: nn.Module,
    x: Any,
    target: Any,
    loss_fn: LossFn,
    time_steps: int,
    *,
    more_batches: Iterable[tuple[Any, Any]] = (),
    per_step: bool = False,
    time_dim: TimeDim | None = None,
    target_time_dim: TimeDim | None = None,
    output: Output = None,
) -> GradientSimilarity:
    """Cosine similarity and norm ratio of SLTT's gradient and BPTT's, for the same loss and spikes.

    With SLTT's gradient ``a`` and BPTT's gradient ``b``: ``cos = <a, b> / (|a| |b|)``, ``ratio = |a| / |b|``. Both are given for
    every parameter, every layer (the parameters of one module) and all parameters together.

    Afterwards the network, its gradients, state, buffers and torch's random streams are as before. A multi-step network gets
    all T steps in one call with both methods, so that batch norm sees the same statistics.

    Args:
        net: A network that `convert` knows, converted or not, on any device.
        x: One batch, as `OnlineTrainer` takes it: ``[N, ...]``, or with ``time_dim`` a sequence, or a list of frames.
        target: Its target.
        loss_fn: ``(output of one step, target) -> scalar``; the loss is its mean over the T steps.
        time_steps: T.
        more_batches: Further ``(x, target)``, for mean and spread.
        per_step: Also compare, for every step t, the gradients of the loss of step t alone. SLTT's gradient stays in the step,
            BPTT's goes back through all steps before it. This costs T backward passes through time.
        time_dim: As in `OnlineTrainer`, like the two that follow.
        target_time_dim: The time axis of the target.
        output: What the loss reads of the network's return value.

    Raises:
        ConversionError: If the network has no neuron, or has neurons that SLTT cannot train.
        InputError, LossError, ConfigurationError: As `OnlineTrainer`.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = torch.nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(tau=1.1), layer.Linear(8, 2))
        >>> x, target = torch.rand(5, 4), torch.randint(2, (5,))
        >>> similarity = gradient_similarity(net, x, target, torch.nn.functional.cross_entropy, time_steps=4)
        >>> 0.9 < similarity.overall.cosine <= 1.0
        True
    """
    check_time_steps(time_steps)
    net = without_multi_step(net)
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    divisor = time_steps if per_step else None

    def run(method: Method, batch: tuple[Any, Any]) -> tuple[list[list[Tensor]], Any]:
        trainer_of = partial(
            _trainer,
            method,
            net,
            time_steps,
            time_dim=time_dim,
            target_time_dim=target_time_dim,
            output=output,
        )
        return gradients_by(net, trainer_of, loss_fn, batch, divisor)

    measured: dict[tuple[str, str, int | None], list[tuple[float, float]]] = {}
    batches, difference = 0, 0.0
    for batch in chain([(x, target)], more_batches):
        check_repeatable(batch[0])
        sltt, sltt_output = run(Method("sltt", chunk="all", cache_invariant=False), batch)
        bptt, bptt_output = run(Method("bptt"), batch)
        for mine, other in zip(tree_leaves(sltt_output), tree_leaves(bptt_output), strict=True):
            difference = max(difference, (mine - other).abs().max().item())
        for key, alignment in compare(names, sltt, bptt, per_step):
            measured.setdefault(key, []).append(alignment)
        batches += 1
    rows = tuple(_row(key, values) for key, values in measured.items())
    return GradientSimilarity(rows, time_steps, batches, difference)


def _trainer(
    method: Method,
    net: nn.Module,
    time_steps: int,
    loss_fn: LossFn,
    backward: Backward,
    **reading: Any,
) -> GradientTrainer:
    if not method.is_bptt:
        convert(net, temporal="step")  # however the user has converted it
    return method.trainer(net, loss_fn, time_steps, backward=backward, **reading)


def check_repeatable(x: Any) -> None:
    """Raise an InputError if ``x`` can be read only once."""
    if isinstance(x, Iterator):
        raise InputError(
            "every batch goes through the network several times: give a tensor or a list, not an iterator"
        )


def gradients_by(
    net: nn.Module,
    trainer_of: Callable[[LossFn, Backward], GradientTrainer],
    loss_fn: LossFn,
    batch: tuple[Any, Any],
    divisor: int | None = None,
) -> tuple[list[list[Tensor]], Any]:
    """The gradients that a trainer computes for one batch, and the time-mean output. The network does not change.

    Every call begins with the same buffers and random numbers.

    Args:
        net: The network.
        trainer_of: Makes the trainer.
        loss_fn: ``(output of one step, target) -> scalar``.
        batch: ``(x, target)``.
        divisor: T gives the gradients of each step's loss, divided by T; None gives those of the mean of all.

    Returns:
        The gradients for each step's loss or for the mean, with a tensor for each trained parameter; and the output.
    """
    with restoring(net):
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        gradients = _Gradients(parameters, loss_fn, divisor)
        result = trainer_of(gradients.loss_fn, gradients.backward).forward_backward(*batch)
        return gradients.parts, result.output


class _Gradients:
    """Takes the gradients when a trainer back-propagates, without ``.grad`` and the hooks on it.

    Attributes:
        parts: The gradient of every step's loss, or the one of their mean: a tensor for each parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], loss_fn: LossFn, divisor: int | None) -> None:
        self.parts: list[list[Tensor]] = []
        self._parameters = parameters
        self._loss_fn = loss_fn
        self._divisor = divisor
        self._losses: list[Tensor] = []

    def loss_fn(self, output: Tensor, target: Any) -> Tensor:
        loss = self._loss_fn(output, target)
        if self._divisor is not None:
            self._losses.append(loss)
        return loss

    def backward(self, total: Tensor) -> None:
        if self._divisor is None:
            part = self._gradient(total, retain=False)
            self.parts = [[a + b for a, b in zip(self.parts[0], part)]] if self.parts else [part]
            return
        for left in range(len(self._losses), 0, -1):
            loss = self._losses.pop(0) / self._divisor
            self.parts.append(self._gradient(loss, retain=left > 1))

    def _gradient(self, loss: Tensor, retain: bool) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, self._parameters, retain_graph=retain, allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self._parameters, gradients)
        ]


def compare(
    names: list[str], sltt: list[list[Tensor]], bptt: list[list[Tensor]], per_step: bool = False
) -> Iterator[tuple[tuple[str, str, int | None], tuple[float, float]]]:
    """Cosine and norm ratio by level, name and time step."""
    pairs: list[tuple[int | None, list[Tensor], list[Tensor]]] = [(None, _sum(sltt), _sum(bptt))]
    if per_step:
        pairs += [(t, a, b) for t, (a, b) in enumerate(zip(sltt, bptt, strict=True))]
    for time_step, ours, theirs in pairs:
        products: dict[tuple[str, str], Tensor] = {}
        for name, a, b in zip(names, ours, theirs, strict=True):
            own = _products(a, b)
            for key in (("network", ""), ("layer", name.rpartition(".")[0]), ("parameter", name)):
                products[key] = products[key] + own if key in products else own
        order = {"network": 0, "layer": 1, "parameter": 2}
        for level, name in sorted(products, key=lambda key: order[key[0]]):
            yield (level, name, time_step), _alignment(*products[level, name].tolist())


def _sum(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``[a.a, a.b, b.b]`` in double precision."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return torch.stack([a @ a, a @ b, b @ b]).cpu()


def _alignment(aa: float, ab: float, bb: float) -> tuple[float, float]:
    if aa == 0 and bb == 0:
        return math.nan, math.nan
    if aa == 0 or bb == 0:
        return 0.0, 0.0 if aa == 0 else math.inf
    return ab / math.sqrt(aa) / math.sqrt(bb), math.sqrt(aa) / math.sqrt(bb)


def _row(key: tuple[str, str, int | None], values: list[tuple[float, float]]) -> Alignment:
    (cosine, cosine_std), (ratio, ratio_std) = (_mean_and_spread(column) for column in zip(*values))
    return Alignment(*key, cosine, cosine_std, ratio, ratio_std)


def _mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (fmean(finite), pstdev(finite)) if finite else (math.nan, math.nan)
