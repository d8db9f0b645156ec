"""The networks of snnTorch's tutorials, small, in plain snnTorch; and SLTT's gradient by plain autograd."""

import copy
from collections.abc import Callable
from typing import Any

import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn
from torch.nn import functional as F


class TimeLoopInside(nn.Module):
    """Tutorial 5: fully connected, explicit states, the time loop inside forward; [N, 12] -> 2 x [T, N, 5]."""

    def __init__(self, time_steps: int = 6, **kwargs: Any) -> None:
        super().__init__()
        self.time_steps = time_steps
        self.fc1 = nn.Linear(12, 16)
        self.lif1 = snntorch.Leaky(beta=0.95, **kwargs)
        self.fc2 = nn.Linear(16, 5)
        self.lif2 = snntorch.Leaky(beta=0.95, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(self.time_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


class StatesPassed(TimeLoopInside):
    """The same network, one step at a time: takes and returns its states."""

    def forward(self, x: Tensor, state: Any) -> Any:
        mem1, mem2 = (self.lif1.init_leaky(), self.lif2.init_leaky()) if state is None else state
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return (spk2, mem2), (mem1, mem2)


def fully_connected(neuron: type = snntorch.Leaky, **kwargs: Any) -> nn.Module:
    """[N, 12] -> spikes and membrane potentials [N, 5]."""
    kwargs = {"beta": 0.9, **kwargs}
    return nn.Sequential(
        nn.Linear(12, 16),
        neuron(init_hidden=True, **kwargs),
        nn.Linear(16, 5),
        neuron(init_hidden=True, output=True, **kwargs),
    )


def convolutional(spike_grad: Any = None, norm: bool = False, **kwargs: Any) -> nn.Module:
    """Tutorial 6: [N, 1, 12, 12] -> spikes and membrane potentials [N, 5]."""
    kwargs = {"beta": 0.5, "spike_grad": spike_grad or surrogate.fast_sigmoid(slope=25), **kwargs}
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.MaxPool2d(2),
        snntorch.Leaky(init_hidden=True, **kwargs),
        nn.Conv2d(4, 6, 2),
        nn.MaxPool2d(2),
        snntorch.Leaky(init_hidden=True, **kwargs),
        nn.Flatten(),
        nn.Linear(24, 5),
        snntorch.Leaky(init_hidden=True, output=True, **kwargs),
    )


class Residual(nn.Module):
    """A forward of its own, functional layers, a skip; [N, 1, 12, 12] -> [N, 5]."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        kwargs = {"beta": 0.8, "init_hidden": True, **kwargs}
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.lif1 = snntorch.Leaky(**kwargs)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.lif2 = snntorch.Synaptic(alpha=0.7, **kwargs)
        self.fc = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif1(self.norm(self.stem(x)))
        x = x + self.lif2(self.conv(x))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


def strong(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights large enough for spikes everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.mul_(3 / parameter[0].numel() ** 0.5)
    return net


def detach_states(net: nn.Module) -> None:
    """Every state of every neuron, detached by hand, as the tutorials do it."""
    for module in net.modules():
        for name in ("spk", "syn", "syn_exc", "syn_inh", "mem", "mem_prev"):
            if isinstance(module, snntorch.SpikingNeuron) and isinstance(getattr(module, name, None), Tensor):
                setattr(module, name, getattr(module, name).detach())


def stepping(
    net: nn.Module,
    x_seq: Tensor,
    loss_fn: Callable[[Any, int], Tensor],
    step: Callable[..., Any] | None = None,
) -> tuple[nn.Module, list[Any]]:
    """A copy of the original network stepping through time, states detached on entry, one backward per step."""
    net = copy.deepcopy(net)
    net.zero_grad()
    outputs = []
    for t, x in enumerate(x_seq):
        detach_states(net)
        output = net(x) if step is None else step(net, x, t)
        loss_fn(output, t).backward()
        outputs.append(output)
    return net, outputs
