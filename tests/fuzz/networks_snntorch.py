"""snnTorch's layers and neurons for `fuzz.networks`, and how its neurons' state is reset and cut."""

import warnings
from collections.abc import Callable
from typing import Any

import snntorch
import torch
from fuzz.description import Case
from fuzz.networks import BATCH_NORM, CLASSES, Builder, Carried, Shape
from fuzz.own_modules import Computed
from snntorch import surrogate
from torch import Tensor, nn

NEURONS: dict[str, Callable[..., nn.Module]] = {
    "": lambda shape, **kept: snntorch.Leaky(beta=0.8, **kept),
    "to zero": lambda shape, **kept: snntorch.Leaky(beta=0.7, reset_mechanism="zero", threshold=0.6, **kept),
    "no reset": lambda shape, **kept: snntorch.Leaky(beta=0.5, reset_mechanism="none", **kept),
    "at once": lambda shape, **kept: snntorch.Leaky(beta=0.8, reset_delay=False, **kept),
    "learned": lambda shape, **kept: snntorch.Leaky(beta=0.8, learn_beta=True, learn_threshold=True, **kept),
    "graded": lambda shape, **kept: snntorch.Leaky(beta=0.8, graded_spikes_factor=0.7, **kept),
    "graded, learned": lambda shape, **kept: snntorch.Leaky(
        beta=0.8, graded_spikes_factor=0.7, learn_graded_spikes_factor=True, **kept
    ),
    "fast sigmoid": lambda shape, **kept: snntorch.Leaky(
        beta=0.8, spike_grad=surrogate.fast_sigmoid(slope=5), **kept
    ),
    "own surrogate": lambda shape, **kept: snntorch.Leaky(
        beta=0.8, spike_grad=surrogate.custom_surrogate(lambda u, g, s: g / (1 + u * u)), **kept
    ),
    "synaptic": lambda shape, **kept: snntorch.Synaptic(alpha=0.7, beta=0.6, learn_alpha=True, **kept),
    "lapicque": lambda shape, **kept: snntorch.Lapicque(beta=0.8, **kept),
}
ONLY_DENSE: dict[str, Callable[..., nn.Module]] = {
    "inhibition": lambda shape, **kept: snntorch.Leaky(beta=0.8, inhibition=True, **kept),
    "inhibition, graded": lambda shape, **kept: snntorch.Leaky(
        beta=0.8, inhibition=True, graded_spikes_factor=0.5, **kept
    ),
}
ONLY_HIDDEN: dict[str, Callable[..., nn.Module]] = {
    "alpha": lambda shape, **kept: snntorch.Alpha(alpha=0.8, beta=0.6, learn_beta=True, **kept),
}


class LearnedStart(snntorch.Leaky):
    """Starts from a potential that is learned."""

    def __init__(self, beta: float, **kept: Any) -> None:
        super().__init__(beta=beta, **kept)
        self.start = nn.Parameter(torch.tensor(0.5))

    def reset_mem(self) -> Tensor:
        self.mem = torch.zeros(0)
        return self.mem

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        if mem is not None:
            return super().forward(x, mem)
        if self.mem.shape != x.shape:
            self.mem = self.start + torch.zeros_like(x)
        return super().forward(x)


COMPUTING: dict[str, Callable[..., nn.Module]] = {
    "computed beta": lambda shape, **kept: Computed(snntorch.Leaky(beta=0.8, **kept), "beta"),
    "computed threshold": lambda shape, **kept: Computed(snntorch.Leaky(beta=0.8, **kept), "threshold"),
    "computed beta, generic": lambda shape, **kept: Computed(snntorch.Lapicque(beta=0.8, **kept), "beta"),
    "computed alpha": lambda shape, **kept: Computed(snntorch.Synaptic(alpha=0.7, beta=0.6, **kept), "alpha"),
    "learned start": lambda shape, **kept: LearnedStart(beta=0.8, **kept),
}
RECURRENT: dict[str, Callable[..., nn.Module]] = {
    "": lambda shape, **kept: snntorch.RLeaky(beta=0.7, linear_features=shape[0], **kept),
    "one to one": lambda shape, **kept: snntorch.RLeaky(beta=0.7, all_to_all=False, V=0.5, **kept),
    "synaptic": lambda shape, **kept: snntorch.RSynaptic(
        alpha=0.6, beta=0.7, linear_features=shape[0], **kept
    ),
}
POTENTIALS = ("mem", "syn", "spk", "syn_exc", "syn_inh")


class NormsOfSteps(nn.Module):
    """``BatchNormTT``: in a multi-step network the list is the layer, in a loop each step calls its own norm."""

    def __init__(self, norms: nn.ModuleList):
        super().__init__()
        self.norms = norms
        self.whole = False
        self.t = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.norms(x)
        self.t += 1
        return self.norms[(self.t - 1) % len(self.norms)](x)


class NormsInARow(nn.Module):
    """A list of norms that has nothing to do with time."""

    def __init__(self, norms: nn.ModuleList):
        super().__init__()
        self.norms = norms

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x)
        return x


class Leaves:
    def __init__(self, case: Case):
        self.case = case

    def linear(self, shape: Shape, width: int, time: str) -> nn.Module:
        return nn.Linear(shape[0], width)

    def conv(self, shape: Shape, time: str) -> nn.Module:
        return nn.Conv2d(shape[0], 3, 3, padding=1)

    def norm(self, variant: str, shape: Shape, time: str) -> nn.Module:
        batch_norm = nn.BatchNorm2d if len(shape) > 1 else nn.BatchNorm1d
        if variant == "group":
            return nn.GroupNorm(3, shape[0])
        if variant == "layer":
            return nn.LayerNorm(shape)
        if variant == "through time":
            through_time = snntorch.BatchNormTT2d if len(shape) > 1 else snntorch.BatchNormTT1d
            return NormsOfSteps(through_time(shape[0], self.case.options.time_steps))
        if variant == "list":
            return NormsInARow(nn.ModuleList([batch_norm(shape[0]), batch_norm(shape[0])]))
        if variant == "instance" and len(shape) > 1:
            return nn.InstanceNorm2d(shape[0], affine=True, track_running_stats=True)
        return batch_norm(shape[0], **BATCH_NORM.get(variant, {}))

    def pool(self, variant: str, shape: Shape, time: str) -> nn.Module:
        if variant == "adaptive":
            return nn.AdaptiveAvgPool2d(shape[1] // 2)
        return {"average": nn.AvgPool2d, "max": nn.MaxPool2d}[variant](2)

    def flatten(self, time: str) -> nn.Module:
        return nn.Flatten()

    def dropout(self, variant: str) -> nn.Module:
        return nn.Dropout(0.0 if variant == "none" else 0.4)

    def neuron(self, variant: str, shape: Shape) -> nn.Module:
        known = {**NEURONS, **COMPUTING}
        if len(shape) == 1:
            known |= ONLY_DENSE
        if self.case.form != "stateful":
            known |= ONLY_HIDDEN
        return self._kept(known.get(variant, NEURONS[""]), shape)

    def recurrent(self, variant: str, shape: Shape) -> nn.Module:
        if self.case.form == "stateful":
            return self.neuron("", shape)
        return self._kept(RECURRENT.get(variant, RECURRENT[""]), shape)

    def _kept(self, make: Callable[..., nn.Module], shape: Shape) -> nn.Module:
        if self.case.form == "stateful":
            return Carried(make(shape))
        return make(shape, init_hidden=True)

    def readout(self, returns: str) -> nn.Module:
        if returns != "membrane" or self.case.form == "stateful":
            return nn.Identity()
        return NEURONS[""]((CLASSES,), init_hidden=True, output=True)


def build(case: Case) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inhibition is called unstable
        net = Builder(case, Leaves(case)).build()
    snntorch.SpikingNeuron.instances.clear()  # snnTorch keeps every neuron there ever was
    return net


def reset(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()


def detach(net: nn.Module) -> None:
    """Make what every neuron carries a constant."""
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            for kept in (module._buffers, vars(module)):
                _detach_potentials(kept)


def _detach_potentials(kept: dict[str, Any]) -> None:
    for name in POTENTIALS:
        if isinstance(kept.get(name), torch.Tensor):
            kept[name] = kept[name].detach()
