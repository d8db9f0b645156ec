"""Small networks for tests of what a time step is, and what the trainer says of them."""

import warnings

import snntorch
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import SLTTWarning

T, N = 6, 5
X = 3 * torch.rand(T, N, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 3, 0])
SOFT = torch.rand(N, 4, generator=torch.Generator().manual_seed(2))


def trainer(net, loss_fn=F.cross_entropy, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, T, **{"time_dim": 0, **options})


def said(online, target=TARGET, iterations=2):
    """The warnings of some iterations, other than torch's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(iterations):
            online.forward_backward(X, target)
    return [str(one.message) for one in caught if issubclass(one.category, SLTTWarning)]


class Single(nn.Module):
    def __init__(self, make=neuron.LIFNode):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.lif, self.c = nn.Linear(8, 16), make(), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.lif(self.a(x)))


class Multi(Single):
    def __init__(self):
        super().__init__(lambda: neuron.LIFNode(step_mode="m"))


def leaky():
    return snntorch.Leaky(beta=0.9, init_hidden=True)
