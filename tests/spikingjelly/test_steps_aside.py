"""Settings that the fused operator does not cover: the neuron runs by the generic rule, exactly as the original."""

import copy

import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError


class LearnableTau(neuron.LIFNode):
    def __init__(self, tau):
        super().__init__()
        self.tau = nn.Parameter(tau)


class TensorTau(neuron.LIFNode):
    def __init__(self):
        super().__init__()
        self.tau = torch.linspace(1.5, 3, 8)


class WideDecay(neuron.ParametricLIFNode):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, size))


def starting_from(node, shape):
    node.set_reset_value("v", torch.linspace(0, 0.9, 8).view(shape))
    node.reset()
    return node


NEURONS = {
    "w of one element": lambda: WideDecay(1),
    "w for each": lambda: WideDecay(8),
    "v for each": lambda: starting_from(neuron.LIFNode(), (8,)),
    "v of one sample": lambda: starting_from(neuron.IFNode(), (1, 8)),
    "parametric, v for each": lambda: starting_from(neuron.ParametricLIFNode(), (8,)),
}
if FUNCTIONAL_FORM:  # 0.0.0.0.14 takes numbers only
    NEURONS |= {
        "learnable tau": lambda: LearnableTau(torch.tensor(2.0)),
        "learnable tau for each": lambda: LearnableTau(torch.linspace(1.5, 3, 8)),
        "tau for each": TensorTau,
    }


@pytest.mark.parametrize("step_mode", "sm")
@pytest.mark.parametrize("name", NEURONS)
def test_gradients_are_the_oracles(name, step_mode):
    torch.manual_seed(0)
    dtype = (
        torch.float64 if "tau" in name else torch.float32
    )  # SpikingJelly's float32 kernel takes numbers only
    net = nn.Sequential(layer.Linear(6, 8), NEURONS[name](), layer.Linear(8, 3)).to(dtype)
    x, target = [2 * torch.rand(4, 6, dtype=dtype) for _ in range(4)], torch.tensor([0, 1, 2, 0])
    expected = oracle.sltt_gradients(net, x, target, F.cross_entropy)
    converted = sltt_ext.convert(copy.deepcopy(net))
    functional.set_step_mode(converted, step_mode)
    options = {"time_dim": 0, "chunk": 4 if step_mode == "m" else 1}
    sltt_ext.OnlineTrainer(converted, F.cross_entropy, 4, **options).forward_backward(torch.stack(x), target)
    assert all(gradient is not None for gradient in oracle.gradients(converted))
    assert oracle.relative_error(oracle.gradients(converted), expected) < 1e-6


def test_a_state_of_another_batch_is_still_refused_in_the_old_line():
    node = sltt_ext.convert(neuron.LIFNode())
    node(torch.ones(5, 8))
    if FUNCTIONAL_FORM:
        assert node(torch.ones(3, 8)).shape == (3, 8)  # 2.x starts from rest
    else:
        with pytest.raises(InputError, match="reset the network"):
            node(torch.ones(3, 8))


def test_a_gradient_penalty_is_refused_with_what_to_do():
    net = sltt_ext.convert(nn.Sequential(layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 3)))
    x = torch.rand(4, 6, requires_grad=True)
    loss = net(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ConfigurationError, match="surrogate function of your own"):
        (loss + gradient.square().sum()).backward()


def test_the_advice_works():
    class Own(surrogate.Sigmoid):
        pass

    penalties = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(layer.Linear(6, 8), neuron.LIFNode(surrogate_function=Own()), layer.Linear(8, 3))
        x = torch.rand(4, 6, requires_grad=True)
        net = sltt_ext.convert(net) if convert else net
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(oracle.gradients(net))
    assert all(map(torch.equal, *penalties))
