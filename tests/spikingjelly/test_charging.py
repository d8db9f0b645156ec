"""Neurons with a forward of their own that begins each step with neuronal_charge, in both release lines."""

import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import sltt_ext
from sltt_ext.errors import ConversionError

Base = neuron.SimpleBaseNode if FUNCTIONAL_FORM else neuron.BaseNode


class Complementary(Base):
    """The step of complementary LIF neurons, as their code has it: in ``forward``."""

    def __init__(self, step_mode="s"):
        super().__init__(v_reset=None, surrogate_function=surrogate.ATan(), step_mode=step_mode)
        self.register_memory("m", 0.0)
        self.decay = nn.Parameter(torch.tensor(0.5))

    def neuronal_charge(self, x):
        self.v = self.decay * self.v + x

    def step(self, x):
        self.neuronal_charge(x)
        self.m = self.m * torch.sigmoid(self.v / 2)
        spike = self.neuronal_fire()
        self.m = self.m + spike
        self.neuronal_reset(spike)
        self.v = self.v - spike * torch.sigmoid(self.m)
        return spike

    def forward(self, x):
        return self.step(x) if self.step_mode == "s" else torch.stack([self.step(x_t) for x_t in x])


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_complementary_lif(step_mode):
    original, converted = Complementary(), sltt_ext.convert(Complementary(step_mode))
    x_seq, weight = torch.randn(6, 4, 7), torch.rand(6, 4, 7)
    expected = oracle.module_gradients(original, x_seq, weight, "s", detach=True)
    for actual, wanted in zip(oracle.module_gradients(converted, x_seq, weight, step_mode), expected):
        assert torch.allclose(actual, wanted, rtol=1e-6, atol=0)
    x_gradient = oracle.module_gradients(converted, x_seq, weight, step_mode)[0]
    assert torch.equal(x_gradient, expected[0])  # bit for bit; a parameter's is a sum over the steps


def test_in_the_trainer():
    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 6), Complementary(), nn.Linear(6, 3))

    x, target = torch.randn(4, 7), torch.randint(3, (4,))
    wanted = oracle.sltt_gradients(make(), [x] * 5, target, nn.functional.cross_entropy)
    converted = sltt_ext.convert(make())
    sltt_ext.OnlineTrainer(converted, nn.functional.cross_entropy, 5).forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(converted), wanted) < 1e-6
    functional.reset_net(converted)
    assert converted[1].v == 0.0


class DoublesItsInput(neuron.LIFNode):
    def forward(self, x):
        return super().forward(2 * x)


def test_a_forward_that_does_not_charge_is_refused_with_the_way_out():
    with pytest.raises(
        ConversionError,
        match=r"neuronal_charge, or declare its step: sltt_ext.declare_neuron\(DoublesItsInput",
    ):
        sltt_ext.convert(DoublesItsInput())
