"""Networks that run over time inside their own forward, and the gradient that they have to get."""

import oracle
import snntorch
import torch
from fuzz import networks_snntorch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

T = 4
X = 2 * torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 2, 1])


class Inside(nn.Module):
    """Repeats its input, and averages or not."""

    def __init__(self, body, averages=True, time_steps=T):
        super().__init__()
        self.T, self.body, self.averages = time_steps, body, averages

    def forward(self, x):
        s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1))
        return s.mean(0) if self.averages else s


class Loop(Inside):
    """Loops over single steps."""

    def forward(self, x):
        s = torch.stack([self.body(x) for _ in range(self.T)])
        return s.mean(0) if self.averages else s


def spikingjelly_net(*between, step_mode="m"):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, 6), neuron.LIFNode(v_threshold=0.3), *between, layer.Linear(6, 5))
    functional.set_step_mode(net, step_mode)
    return net


def snntorch_net(*between):
    torch.manual_seed(0)
    leaky = snntorch.Leaky(beta=0.9, threshold=1.0, init_hidden=True)
    return nn.Sequential(nn.Linear(6, 6), leaky, *between, nn.Linear(6, 5))


def oracle_gradients(net):
    """Single steps, the state detached between them."""
    functional.set_step_mode(net, "s")
    outputs = []
    for _ in range(T):
        outputs.append(net(X))
        oracle.detach_memories(net)
        networks_snntorch.detach(net)
    F.cross_entropy(torch.stack(outputs).mean(0), TARGET).backward()
    return oracle.gradients(net)
