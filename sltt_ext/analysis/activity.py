"""How often neurons fire, and which ones never do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.analysis import plots
from sltt_ext.analysis.modules import neurons_of, without_multi_step
from sltt_ext.analysis.restoring import restoring
from sltt_ext.errors import InputError
from sltt_ext.methods import Method, check_time_steps
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.options import TimeDim
from sltt_ext.online.outputs import Output
from sltt_ext.optional import require

__all__ = ["DeadNeurons", "FiringRates", "LayerActivity", "dead_neurons", "firing_rates"]


@dataclass(frozen=True)
class LayerActivity:
    """The activity of one layer of neurons over a batch and all time steps.

    Attributes:
        layer: Path of the neurons' module.
        neurons: How many neurons it has.
        rate: Mean spikes per neuron and time step, from 0 to 1.
        dead: How many of the neurons never fire.
        saturated: How many fire at every step for every sample.
    """

    layer: str
    neurons: int
    rate: float
    dead: int
    saturated: int


@dataclass(frozen=True)
class FiringRates:
    """What `firing_rates` measured.

    Attributes:
        rows: One for each layer of neurons, in the order in which they run.
        time_steps: T.
        samples: Size of the batch.
    """

    rows: tuple[LayerActivity, ...]
    time_steps: int
    samples: int

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return require("pandas", extra="analysis").DataFrame([asdict(row) for row in self.rows])

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: mean firing rate of each layer."""
        names = [row.layer or "(network)" for row in self.rows]
        return plots.bars(
            names, {"rate": [row.rate for row in self.rows]}, xlabel="spikes per neuron and time step"
        )


@dataclass(frozen=True)
class DeadNeurons:
    """What `dead_neurons` found.

    Attributes:
        masks: Path of the neurons' module -> bool tensor with the shape of one sample, True where a neuron
            never fires.
    """

    masks: dict[str, Tensor]

    def to_dataframe(self) -> Any:
        """Number and share of dead neurons by layer as a ``pandas.DataFrame``."""
        rows = [
            {"layer": layer, "neurons": mask.numel(), "dead": int(mask.sum()), "share": share}
            for (layer, mask), share in zip(self.masks.items(), self.shares().values())
        ]
        return require("pandas", extra="analysis").DataFrame(rows)

    def shares(self) -> dict[str, float]:
        """The share of dead neurons in each layer, from 0 to 1."""
        return {layer: mask.double().mean().item() for layer, mask in self.masks.items()}

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: share of dead neurons in each layer."""
        shares = self.shares()
        percent = {"dead": [100 * share for share in shares.values()]}
        names = [layer or "(network)" for layer in shares]
        return plots.bars(names, percent, xlabel="neurons that never fire (%)", limits=(0, 100))


def firing_rates(
    net: nn.Module, x: Any, time_steps: int, *, time_dim: TimeDim | None = None, output: Output = None
) -> FiringRates:
    """Mean firing rate of every layer of neurons over a batch, and how many neurons never or always fire.

    The network runs from rest, without gradients, and stays in its mode (training or evaluation). Afterwards it is as
    before. Any output of a neuron other than 0 is a spike.

    Args:
        net: A network that `convert` knows, converted or not.
        x: One batch, as `OnlineTrainer` takes it.
        time_steps: T.
        time_dim: As in `OnlineTrainer`.
        output: Which part of the network's return value is its output, as in `OnlineTrainer`.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> net = torch.nn.Sequential(neuron.IFNode())
        >>> firing_rates(net, torch.tensor([[0.0, 0.5, 1.0]]), time_steps=4).rows[0]
        LayerActivity(layer='0', neurons=3, rate=0.5, dead=1, saturated=1)
    """
    spikes = _spikes(net, x, time_steps, time_dim, output)
    rows = []
    for layer, (counts, samples) in spikes.items():
        most = samples * time_steps
        dead, saturated = int((counts == 0).sum()), int((counts == most).sum())
        rate = counts.sum().item() / (counts.numel() * most)
        rows.append(LayerActivity(layer, counts.numel(), rate, dead, saturated))
    return FiringRates(tuple(rows), time_steps, max(samples for _, samples in spikes.values()))


def dead_neurons(
    net: nn.Module, x: Any, time_steps: int, *, time_dim: TimeDim | None = None, output: Output = None
) -> DeadNeurons:
    """Which neurons never fire, for any sample of a batch at any step. The arguments are those of `firing_rates`.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> net = torch.nn.Sequential(neuron.IFNode())
        >>> dead_neurons(net, torch.tensor([[0.0, 0.5, 1.0]]), time_steps=4).masks["0"]
        tensor([ True, False, False])
    """
    spikes = _spikes(net, x, time_steps, time_dim, output)
    return DeadNeurons({layer: counts == 0 for layer, (counts, _) in spikes.items()})


def _spikes(
    net: nn.Module, x: Any, time_steps: int, time_dim: TimeDim | None, output: Output
) -> dict[str, tuple[Tensor, int]]:
    """Path -> how often each neuron fires over batch and time, and the size of the batch."""
    check_time_steps(time_steps)
    net = without_multi_step(net)
    with restoring(net):
        trainer = Method("sltt", cache_invariant=False).trainer(
            net, lambda output, target: output.sum(), time_steps, time_dim=time_dim, output=output
        )
        with _counting(net) as spikes:
            trainer.predict(x)
    if not spikes:
        raise InputError("no neuron ran: the network's forward does not call them")
    return spikes


@contextmanager
def _counting(net: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    spikes: dict[str, tuple[Tensor, int]] = {}

    def hook(path: str, module: SLTTNeuron, returned: Any) -> None:
        out = next((leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)), None)
        leading = 2 if module.multi_step else 1
        if out is None or out.dim() < leading:
            return
        fired = (out.detach() != 0).sum(tuple(range(leading)))
        before = spikes.get(path)
        if before is not None and before[0].shape != fired.shape:
            raise InputError(
                f"{path} runs on inputs of different shapes, {list(before[0].shape)} and {list(fired.shape)} per "
                "sample: give every layer neurons of its own"
            )
        counts = fired if before is None else before[0] + fired
        spikes[path] = (counts, out.shape[leading - 1])

    def hook_of(path: str) -> Any:
        return lambda module, args, returned: hook(path, module, returned)

    handles = [module.register_forward_hook(hook_of(path)) for path, module in neurons_of(net).items()]
    try:
        with torch.no_grad():
            yield spikes
    finally:
        for handle in handles:
            handle.remove()
