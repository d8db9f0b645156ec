"""Launches are counted right, and there are no more of them than there were."""

import launches
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sltt_ext.models.nf_resnet import BasicBlock, NFResNet
from sltt_ext.neuron import TRACES_NEURONS


def plain():
    return nn.Sequential(
        layer.Conv2d(3, 4, 3, bias=False),
        layer.BatchNorm2d(4),
        neuron.LIFNode(),
        layer.Conv2d(4, 4, 3, bias=False),
        layer.BatchNorm2d(4),
        neuron.LIFNode(),
        layer.AvgPool2d(8),
        layer.Flatten(),
        layer.Linear(36, 10),
    )


def parametric():
    return nn.Sequential(
        layer.Conv2d(3, 2, 31), layer.Flatten(), neuron.ParametricLIFNode(), layer.Linear(8, 10)
    )


def normaliser_free():
    return NFResNet(BasicBlock, [1, 1, 1, 1], 10, width=4)


MOST = {
    (plain, "SLTT, single-step"): 162,
    (plain, "SLTT, single-step, pack_spikes"): 174,
    (plain, "SLTT-1, single-step"): 77,
    (plain, "SLTT, multi-step, chunk=1"): 163,
    (plain, "SLTT, multi-step, chunk=T"): 63,
    (parametric, "SLTT, single-step"): 127,
    (normaliser_free, "SLTT, single-step"): 578,
    (normaliser_free, "SLTT, multi-step, chunk=T"): 193,
}


@pytest.mark.skipif(not TRACES_NEURONS, reason="an older torch computes the same by other operators")
@pytest.mark.parametrize(("make", "method"), MOST, ids=lambda value: getattr(value, "__name__", value))
def test_launches_do_not_grow(make, method):
    torch.manual_seed(0)
    found = launches.by_kind(launches.count(launches.sltt(make, *launches.METHODS[method])))
    assert found["launches"] == MOST[make, method], found


def test_views_and_allocations_launch_nothing():
    x = torch.rand(2, 3)

    def iteration():
        y = x.view(6)[1:].unsqueeze(0).expand(4, -1).detach()
        return torch.empty_like(y), torch.exp(y), torch._foreach_add([x, x], 1)

    assert launches.count(iteration, 0) == {"exp": 1, "_foreach_add": 1}


def test_neurons_compute_what_they_do_without_counting():
    torch.manual_seed(0)
    net = launches.sltt_ext.convert(plain())
    x, spikes = 3 * torch.rand(2, 3, 32, 32), []

    def iteration():
        functional.reset_net(net)
        spikes.append(net[:3](x))

    found = launches.count(iteration, 1)
    assert found[launches.NEURON] == 1
    assert spikes[0].any()
    assert torch.equal(*spikes)
