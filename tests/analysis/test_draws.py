"""What K drawn steps keep of SLTT's gradient, against every choice of K steps by hand."""

import copy
import itertools

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn import functional as F

from sltt_ext.analysis.draws import DrawnSteps, drawn_steps

T = 4


def gradients_by_hand(net, x, target):
    """The gradient of each step's loss, from the original network with a constant state at each step."""
    net = copy.deepcopy(net)
    found = []
    for _ in range(T):
        net.zero_grad()
        oracle.detach_memories(net)
        F.cross_entropy(net(x), target).backward()
        found.append(torch.cat([parameter.grad.double().flatten() for parameter in net.parameters()]))
    return torch.stack(found)


def test_of_every_choice_of_k_steps():
    torch.manual_seed(1)
    net = nn.Sequential(layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 3))
    x, target = 5 * torch.rand(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    draws = drawn_steps(net, x, target, F.cross_entropy, T)
    gradients = gradients_by_hand(net, x, target)
    for k in range(1, T + 1):
        choices = [gradients[list(steps)].mean(0) for steps in itertools.combinations(range(T), k)]
        square = sum(float(choice @ choice) for choice in choices) / len(choices)
        assert draws.cosine(k) == pytest.approx(float(gradients.mean(0).norm()) / square**0.5, rel=1e-4)
    assert draws.cosine(1) < 0.999


def test_the_network_is_left_as_it_was():
    net = networks.conv_net(neuron.LIFNode, "m")
    x, target = networks.images()
    before = copy.deepcopy(net.state_dict())
    drawn_steps(net, x, target, F.cross_entropy, T)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert (
        type(next(module for module in net.modules() if isinstance(module, neuron.LIFNode))) is neuron.LIFNode
    )


@pytest.mark.parametrize(("spread", "k"), [(0.0, 1), (1.0, 3), (10.0, 6)])
def test_the_smallest_k(spread, k):
    assert DrawnSteps(6, spread).smallest(0.9) == k
    assert DrawnSteps(1, spread).smallest(0.9) == 1
