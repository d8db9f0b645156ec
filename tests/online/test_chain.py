import random

import networks
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import sltt_ext
from sltt_ext.errors import ConfigurationError
from sltt_ext.online.chain import Chain


def names(net):
    return [point.meta.get("path", point.name) for point in Chain(sltt_ext.convert(net)).points]


def test_points_of_a_sequential():
    assert names(networks.conv_net(neuron.LIFNode)) == ["0", "1", "2", "3", "4", "5"]
    assert names(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), neuron.LIFNode(), nn.Linear(4, 4))
    ) == ["1", "2"]


def test_points_of_a_residual_network():
    found = names(networks.resnet18())
    assert found[:6] == ["conv1", "bn1", "sn1", "maxpool", "add", "layer1.0.sn2"]
    assert found[-2:] == ["avgpool", "flatten"]
    assert not any("conv2" in name for name in found)


def test_blocks_give_what_the_network_gives():
    net = sltt_ext.convert(networks.resnet18())
    x = torch.randn(2, 3, 32, 32)
    expected = copy_run(net, x)
    chain = Chain(net)
    for borders in ([], chain.points[3:9:2], chain.points):
        y = x
        for module in net.modules():
            if isinstance(module, neuron.LIFNode):
                module.reset()
        for block in chain.blocks(borders):
            y = block(y)
        assert torch.equal(y, expected)


def copy_run(net, x):
    y = net(x)
    for module in net.modules():
        if isinstance(module, neuron.LIFNode):
            module.reset()
    return y


class Odd(nn.Module):
    """A block with a forward that a graph does not have."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear, self.kept = kind, nn.Linear(4, 4), None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        y = self.linear(x)
        if self.kind == "draws":
            return y if random.random() < 2 else x
        if self.kind == "keeps":
            self.kept = y
        elif self.kind == "counts":
            self.seen = self.seen + 1
        elif self.kind == "makes":
            return y + torch.rand(4)
        elif self.kind == "decides" and y.sum() > 0:
            return x
        elif self.kind == "loops":
            return sum(row for row in y)
        return y


@pytest.mark.parametrize("kind", ["draws", "keeps", "counts", "makes", "decides", "loops"])
def test_what_cannot_be_traced_is_one_node(kind):
    odd = Odd(kind)
    net = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(), odd, neuron.LIFNode(), nn.Linear(4, 4))
    state = torch.get_rng_state(), random.getstate()
    chain = Chain(sltt_ext.convert(net))
    assert [node.meta.get("path") for node in chain.nodes] == ["0", "1", "2", "3", "4"]
    assert odd.kept is None
    assert int(odd.seen) == 0
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_the_reason_is_said():
    with pytest.raises(ConfigurationError, match="random numbers"):
        Chain(sltt_ext.convert(nn.Sequential(OddNet("draws"))))


class OddNet(Odd):
    def __init__(self, kind):
        super().__init__(kind)
        self.neuron = neuron.LIFNode()

    def forward(self, x):
        return self.neuron(super().forward(x))
