"""SpikingJelly's layers and neurons for `fuzz.networks`, and how its neurons' state is reset and cut."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from fuzz.description import Case
from fuzz.networks import BATCH_NORM, Builder, Shape
from fuzz.own_modules import Computed
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor, nn

_Neuron: Any = getattr(neuron, "SimpleBaseNode", neuron.BaseNode)


class LearnedDecay(_Neuron):
    """A user's own neuron that computes its decay from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.2))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) * self.raw.sigmoid()


class LearnedThreshold(neuron.LIFNode):
    def __init__(self) -> None:
        super().__init__()
        self.v_threshold = nn.Parameter(torch.tensor(0.7))


class LearnedStart(neuron.LIFNode):
    """Starts from a potential that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(0.5))

    def single_step_forward(self, x: Tensor) -> Tensor:
        if isinstance(self.v, float):
            self.v = self.start + torch.zeros_like(x)
        return super().single_step_forward(x)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.single_step_forward(x) for x in x_seq])


NEURONS: dict[str, Callable[[], nn.Module]] = {
    "": neuron.LIFNode,
    "soft reset": lambda: neuron.LIFNode(v_reset=None, tau=1.5),
    "no decay of the input": lambda: neuron.LIFNode(decay_input=False, v_reset=-0.2),
    "detached reset": lambda: neuron.LIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
    "unknown surrogate": lambda: neuron.LIFNode(surrogate_function=surrogate.S2NN()),
    "if": neuron.IFNode,
    "if, soft reset": lambda: neuron.IFNode(v_reset=None, surrogate_function=surrogate.ATan()),
    "plif": neuron.ParametricLIFNode,
    "plif, soft reset": lambda: neuron.ParametricLIFNode(v_reset=None, decay_input=False),
    "klif": neuron.KLIFNode,
    "eif": neuron.EIFNode,
    "qif": neuron.QIFNode,
    "izhikevich": neuron.IzhikevichNode,
}
COMPUTING: dict[str, Callable[[], nn.Module]] = {
    "learned decay": LearnedDecay,
    "learned start": LearnedStart,
    "computed threshold": lambda: Computed(neuron.IFNode(), "v_threshold"),
    "computed threshold, generic": lambda: Computed(neuron.KLIFNode(), "v_threshold"),
}
if hasattr(base.MemoryModule, "single_step_functional_forward"):  # 0.0.0.0.14 takes numbers only
    COMPUTING |= {
        "learned threshold": LearnedThreshold,
        "computed tau": lambda: Computed(neuron.LIFNode(), "tau"),
    }

MULTI_STEP_LAYERS = [name for name in dir(nn) if hasattr(layer, name)]
if not hasattr(base.MemoryModule, "single_step_functional_forward"):
    MULTI_STEP_LAYERS.remove("BatchNorm1d")  # 0.0.0.0.14's wants another axis


class Loop(nn.Module):
    """A network's own loop over the steps."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.inner(x) for x in x_seq])


class Unfold(nn.Module):
    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.batch))


class Feedback(base.MemoryModule):
    """Adds what it returned at the step before; in registered memory."""

    def __init__(self, step_mode: str):
        super().__init__()
        self.step_mode = step_mode
        self.strength = nn.Parameter(torch.tensor(0.4))
        self.register_memory("last", None)

    def single_step_forward(self, x: Tensor) -> Tensor:
        x = x if self.last is None else x + self.strength * self.last
        self.last = torch.tanh(x)
        return x

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.single_step_forward(x) for x in x_seq])


class Leaves:
    def __init__(self, case: Case):
        self.mode = "m" if case.form == "multi" else "s"
        self.case = case

    def _over_time(self, time: str, name: str, *args: Any, **settings: Any) -> nn.Module:
        """A layer of torch's name, given its steps as ``time`` says."""
        if self.mode == "m" and time == "layer" and name in MULTI_STEP_LAYERS:
            return getattr(layer, name)(*args, **settings, step_mode="m")
        plain = getattr(nn, name)(*args, **settings)
        if self.mode == "s":
            return plain
        if time == "fold":
            return nn.Sequential(nn.Flatten(0, 1), plain, Unfold(self.case.batch))
        return {"multi": layer.MultiStepContainer, "loop": Loop}.get(time, layer.SeqToANNContainer)(plain)

    def linear(self, shape: Shape, width: int, time: str) -> nn.Module:
        return self._over_time(time, "Linear", shape[0], width)

    def conv(self, shape: Shape, time: str) -> nn.Module:
        return self._over_time(time, "Conv2d", shape[0], 3, 3, padding=1)

    def norm(self, variant: str, shape: Shape, time: str) -> nn.Module:
        size = "2d" if len(shape) > 1 else "1d"
        if variant == "group":
            return self._over_time(time, "GroupNorm", 3, shape[0])
        if variant == "layer":
            return nn.LayerNorm(shape)
        if variant == "through time" and hasattr(layer, f"BatchNormThroughTime{size}"):
            through_time = getattr(layer, f"BatchNormThroughTime{size}")
            return through_time(self.case.options.time_steps, shape[0], step_mode=self.mode)
        if variant == "instance" and len(shape) > 1:
            return self._over_time(time, "InstanceNorm2d", shape[0], affine=True, track_running_stats=True)
        return self._over_time(time, f"BatchNorm{size}", shape[0], **BATCH_NORM.get(variant, {}))

    def pool(self, variant: str, shape: Shape, time: str) -> nn.Module:
        if variant == "adaptive":
            return self._over_time(time, "AdaptiveAvgPool2d", shape[1] // 2)
        return self._over_time(time, {"average": "AvgPool2d", "max": "MaxPool2d"}[variant], 2)

    def flatten(self, time: str) -> nn.Module:
        return self._over_time(time, "Flatten")

    def dropout(self, variant: str) -> nn.Module:
        if variant == "kept mask":
            return layer.Dropout(0.4, step_mode=self.mode)
        return nn.Dropout(0.0 if variant == "none" else 0.4)

    def neuron(self, variant: str, shape: Shape) -> nn.Module:
        made = {**NEURONS, **COMPUTING}.get(variant, neuron.LIFNode)()
        functional.set_step_mode(made, self.mode)
        return made

    def recurrent(self, variant: str, shape: Shape) -> nn.Module:
        if variant == "feedback":
            return Feedback(self.mode)
        return layer.LinearRecurrentContainer(neuron.LIFNode(), shape[0], shape[0], step_mode=self.mode)

    def readout(self, returns: str) -> nn.Module:
        return nn.Identity()


def build(case: Case) -> nn.Module:
    return Builder(case, Leaves(case)).build()


def reset(net: nn.Module) -> None:
    functional.reset_net(net)


def detach(net: nn.Module) -> None:
    """Make what every stateful module carries a constant."""
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            for name, value in module._memories.items():
                if isinstance(value, Tensor):
                    module._memories[name] = value.detach()


def cut_between_steps(net: nn.Module) -> None:
    """Let every stateful module run the steps of a call one by one, its state a constant between two."""
    for module in net.modules():
        if isinstance(module, base.MemoryModule) and module.step_mode == "m":
            module.multi_step_forward = functools.partial(_step_by_step, module)


def _step_by_step(module: nn.Module, x_seq: Tensor) -> Tensor:
    steps = []
    for t, x in enumerate(x_seq):
        if t:
            detach(module)
        steps.append(module.single_step_forward(x))
    return torch.stack(steps)
