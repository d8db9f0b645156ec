import copy

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext

T = 4


def gradients(net, x, target, step_mode="s", loss_fn=F.cross_entropy, iterations=2, time_steps=T, **options):
    net = copy.deepcopy(net)
    functional.set_step_mode(net, step_mode)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps, **{"blocks": "auto", **options})
    for _ in range(iterations):
        net.zero_grad()
        result = online.forward_backward(x, target)
    return oracle.gradients(net), result


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("cls", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_gradients_are_the_oracles(cls, step_mode):
    net = networks.conv_net(cls)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    for pack_spikes in (False, True):
        actual, result = gradients(net, x, target, step_mode, pack_spikes=pack_spikes)
        assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spiking_resnet18_in_training(step_mode):
    net = networks.resnet18()
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    actual, _ = gradients(net, x, target, step_mode, iterations=1, pack_spikes=True)
    assert oracle.relative_error(actual, expected) < 1e-6
