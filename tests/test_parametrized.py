"""Neurons and layers whose weights torch computes: before convert or after it, taken off or reverted at any time."""

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import sltt_ext
from sltt_ext.neuron import SLTTNeuron

T = 3
X, TARGET = networks.images()


class Clamped(nn.Module):
    sltt_time_invariant = True

    def forward(self, w):
        return w.clamp(-1, 1) + 0.1

    def right_inverse(self, w):
        return w - 0.1


def plif_net():
    return networks.conv_net(neuron.ParametricLIFNode)


def register(net):
    parametrize.register_parametrization(net[1], "w", Clamped())


def remove(net):
    parametrize.remove_parametrizations(net[1], "w")


def expected(change):
    """As `oracle.sltt_gradients`, which copies the network: older norms and pruning cannot be copied with their graph."""
    net = plif_net()
    change(net)
    for _ in range(T):
        (F.cross_entropy(net(X), TARGET) / T).backward()
        functional.detach_net(net)
    return oracle.gradients(net)


def trained(net):
    for _ in range(2):  # the second time, what is time-invariant is evaluated once
        net.zero_grad()
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T).forward_backward(X, TARGET)
    return oracle.gradients(net)


ORDERS = {
    "register, convert": ([register, sltt_ext.convert], True),
    "convert, register": ([sltt_ext.convert, register], True),
    "register, convert, convert": ([register, sltt_ext.convert, sltt_ext.convert], True),
    "register, convert, remove": ([register, sltt_ext.convert, remove], False),
    "convert, register, remove": ([sltt_ext.convert, register, remove], False),
    "convert, register, revert, convert": (
        [sltt_ext.convert, register, sltt_ext.revert, sltt_ext.convert],
        True,
    ),
    "register, convert, revert, remove, convert": (
        [register, sltt_ext.convert, sltt_ext.revert, remove, sltt_ext.convert],
        False,
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_parametrized_neuron(order):
    steps, stays = ORDERS[order]
    net = plif_net()
    for step in steps:
        step(net)
    assert isinstance(net[1], SLTTNeuron)
    assert parametrize.is_parametrized(net[1], "w") == stays
    right = expected(register if stays else lambda net: (register(net), remove(net)))
    assert oracle.relative_error(trained(net), right) < 1e-6


@pytest.mark.parametrize("first", [register, sltt_ext.convert])
def test_reverted_it_is_what_it_would_be_without(first):
    net, other = plif_net(), plif_net()
    first(net)
    (sltt_ext.convert if first is register else register)(net)
    sltt_ext.revert(net)
    register(other)
    assert not sltt_ext.is_converted(net)
    assert parametrize.type_before_parametrizations(net[1]) is neuron.ParametricLIFNode
    assert torch.equal(net(X), other(X))
    remove(net)
    remove(other)
    assert type(net[1]) is neuron.ParametricLIFNode
    functional.reset_net(net)
    functional.reset_net(other)
    assert torch.equal(net(X), other(X))


def test_a_snntorch_neuron():
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), snntorch.Leaky(beta=0.8, learn_beta=True, init_hidden=True), nn.Linear(8, 3)
    )
    parametrize.register_parametrization(net[1], "beta", Clamped())
    sltt_ext.convert(net)
    x = torch.rand(4, 8)
    online = sltt_ext.OnlineTrainer(net, lambda output, _: output.square().mean(), T)
    online.forward_backward(x, None)
    right = net[1].parametrizations.beta.original.grad
    assert right.abs() > 0
    net.zero_grad()
    parametrize.remove_parametrizations(net[1], "beta")
    online.forward_backward(x, None)
    assert torch.allclose(net[1].beta.grad, right)
    assert type(sltt_ext.revert(net)[1]) is snntorch.Leaky


def old_weight_norm(net):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[2])


LAYERS = {
    "weight_norm": lambda net: parametrizations.weight_norm(net[2]),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net[2]).eval(),
    "weight_norm, old": old_weight_norm,
    "spectral_norm, old": lambda net: nn.utils.spectral_norm(net[2]).eval(),
    "pruned": lambda net: prune.l1_unstructured(net[2], "weight", 0.3),
    "a pruned neuron": lambda net: prune.identity(net[1], "w"),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("first", ["it", "convert"])
def test_layers(kind, first):
    def change(net):
        torch.manual_seed(7)  # spectral norms draw
        LAYERS[kind](net)

    net = plif_net()
    for step in [change, sltt_ext.convert] if first == "it" else [sltt_ext.convert, change]:
        step(net)
    assert oracle.relative_error(trained(net), expected(change)) < 1e-5
    assert type(sltt_ext.revert(net)[1]) is neuron.ParametricLIFNode
