"""Networks with parts that do not depend on time, and ways to call them."""

import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

T = 4


class Standardised(nn.Module):
    """A user's own parametrisation."""

    sltt_time_invariant = True

    def forward(self, weight):
        return weight - weight.mean()


class Counting(nn.Module):
    """A stateless module that counts its calls, and may say that it takes part."""

    def __init__(self, invariant=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.calls = 0
        if invariant is not None:
            self.sltt_time_invariant = invariant

    def forward(self, x):
        self.calls += 1
        return x * self.scale


class Net(nn.Module):
    """A stem of two paths, one of which joins after the neuron."""

    def __init__(self, *stem):
        super().__init__()
        self.stem = nn.ModuleList(stem)
        self.neuron = neuron.LIFNode(tau=1.5)
        self.conv = weight_norm(layer.Conv2d(4, 4, 3, padding=1))
        parametrize.register_parametrization(self.conv, "bias", Standardised())
        self.second = neuron.LIFNode(v_threshold=0.3)
        self.pool = layer.AdaptiveAvgPool2d(1)
        self.flatten = layer.Flatten()
        self.classify = layer.Linear(4, 3)

    def forward(self, x):
        for module in self.stem:
            x = module(x)
        s = self.second(self.conv(self.neuron(x)) + 0.3 * x)
        return self.classify(self.flatten(self.pool(s)))


STEMS = {
    "conv": lambda: [layer.Conv2d(2, 4, 3, padding=1)],
    "conv, batch norm": lambda: [layer.Conv2d(2, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4)],
    "batch norm without statistics": lambda: [
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4, track_running_stats=False),
    ],
    "batch norm, cumulative": lambda: [
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4, momentum=None),
    ],
    "conv, pool, conv": lambda: [
        layer.Conv2d(2, 4, 3, padding=1),
        layer.AvgPool2d(2),
        layer.Conv2d(4, 4, 1),
    ],
    "parametrised": lambda: [weight_norm(layer.Conv2d(2, 4, 3, padding=1)), layer.MaxPool2d(2)],
    "container": lambda: [nn.Sequential(layer.Conv2d(2, 4, 3, padding=1), layer.MaxPool2d(2))],
    "in place": lambda: [layer.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True)],
    "own module": lambda: [layer.Conv2d(2, 4, 3, padding=1), Counting(invariant=True)],
    "unknown module": lambda: [layer.Conv2d(2, 4, 3, padding=1), Counting(), layer.Conv2d(4, 4, 1)],
    "frozen": lambda: [layer.Conv2d(2, 4, 3, padding=1).requires_grad_(False), layer.BatchNorm2d(4)],
}


class Jittered(nn.Module):
    """A parametrisation that draws random numbers."""

    def forward(self, weight):
        return weight * (1 + 0.3 * torch.rand(4, 1, 1, 1))


class Untrained(nn.Module):
    """A stem that its network runs without gradients, its parameters trainable all the same."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


def jittered():
    conv = layer.Conv2d(2, 4, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Jittered())
    return conv


def pruned():
    conv = prune.random_unstructured(layer.Conv2d(2, 4, 3, padding=1), "weight", 0.4)
    conv.weight = conv.weight.detach()  # until the next call, so that it can be copied
    return conv


STEMS |= {
    "spectral norm, which iterates": lambda: [spectral_norm(layer.Conv2d(2, 4, 3, padding=1))],
    "spectral norm by a hook": lambda: [nn.utils.spectral_norm(layer.Conv2d(2, 4, 3, padding=1))],
    "pruned": lambda: [pruned(), layer.AvgPool2d(2)],
    "random parametrisation": lambda: [jittered()],
    "without gradients": lambda: [Untrained(layer.Conv2d(2, 4, 3, padding=1)), layer.Conv2d(4, 4, 1)],
    "without gradients, container": lambda: [
        Untrained(nn.Sequential(layer.Conv2d(2, 4, 3, padding=1), layer.AvgPool2d(2)))
    ],
}
CALLS = {
    "steps": ("s", {}),
    "steps, SLTT-2": ("s", {"schedule": lambda T, generator: [1, 2]}),
    "steps, first and last": ("s", {"schedule": lambda T, generator: [0, 3]}),
    "tail skipped": ("s", {"schedule": lambda T, generator: [1], "full_output": False}),
    "mean": ("s", {"loss_on": "mean"}),
    "sequence": ("m", {"chunk": T}),
    "chunks": ("m", {"chunk": 2}),
    "uneven chunks": ("m", {"chunk": 3}),
    "sequence, SLTT-2": ("m", {"schedule": lambda T, generator: [1, 2]}),
}
