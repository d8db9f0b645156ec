"""A trial of what a user's own code makes of sequences: bit for bit nothing is left of it."""

import networks
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import sltt_ext
from sltt_ext.sequence_trial import is_the_same_in_sequences


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.neuron, self.head = layer.Conv2d(1, 6, 3), neuron.LIFNode(), layer.Linear(216, 5)

    def forward(self, x):
        return self.function(self, x)


def plain(net, x):
    return net.head(net.neuron(net.conv(x)).flatten(-3))


FUNCTIONS = {
    "as it comes": (plain, True),
    "elementwise": (lambda net, x: torch.tanh(plain(net, 2 * x + 1)), True),
    "last axis": (lambda net, x: plain(net, x).softmax(-1), True),
    "flattened from axis 1": (lambda net, x: net.head(torch.flatten(net.neuron(net.conv(x)), 1)), False),
    "softmax over axis 1": (lambda net, x: plain(net, x).softmax(1), False),
    "mean of the batch": (lambda net, x: plain(net, x) - plain(net, x).mean(0), False),
    "a maximum of all": (lambda net, x: plain(net, x) / x.abs().max(), False),
    "rows": (lambda net, x: net.head(net.neuron(net.conv(x)).reshape(-1, 216)), False),
    "noise": (lambda net, x: plain(net, x) + torch.rand_like(x[..., :1, 0, :1]), False),
    "a gradient that is cut off by shape": (
        lambda net, x: plain(net, x).detach() if x.dim() == 5 else plain(net, x), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "same"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_the_users_own(function, same):
    torch.manual_seed(0)
    net = sltt_ext.convert(Net(function))
    x = torch.rand(3, 1, 8, 8)
    assert is_the_same_in_sequences(net, x.expand(4, *x.shape), 4) is same


def test_nothing_shows_of_a_trial():
    net = sltt_ext.convert(
        nn.Sequential(*networks.conv_net()[:1], layer.BatchNorm2d(6), *networks.conv_net()[1:])
    )
    state = {name: value.clone() for name, value in net.state_dict().items()}
    drawn = torch.get_rng_state()
    x, _ = networks.images(3)
    assert is_the_same_in_sequences(net, x.expand(4, *x.shape), 4)
    assert all(
        torch.equal(value, state[name]) and value.dtype is state[name].dtype
        for name, value in net.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(module.step_mode == "s" for module in net)
