"""Networks over time whose neurons write over their state: backward runs steps again and leaves all as it was after forward."""

import oracle
import pytest
import torch
from spikingjelly.activation_based import base, functional
from torch import nn

import sltt_ext

T = 5


class InPlace(base.MemoryModule):
    """An integrator that writes into its state, before its output is computed of it or after."""

    def __init__(self, place):
        super().__init__()
        self.register_memory("v", 0.0)
        self.place = place

    def single_step_forward(self, x):
        if isinstance(self.v, float):
            self.v = torch.zeros_like(x)
        if self.place == 0:
            self.v.mul_(0.5).add_(x)
            return torch.tanh(self.v)
        output = torch.tanh(0.5 * self.v + x)
        with torch.no_grad():
            self.v.mul_(0.5).add_(x)
        return output


def build(place):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), InPlace(place), nn.Linear(6, 3))


@pytest.mark.parametrize("selected", [(0,), (2,), (1, 3), tuple(range(T))])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("carry", [False, True])
def test_a_state_that_is_written_over_is_that_after_forward(carry, place, selected):
    x_seq, reference = torch.randn(T, 2, 4), build(place)
    states = []
    for _ in range(2):
        for t, x in enumerate(x_seq):
            output = reference(x)
            if t in selected:
                (output.square().sum() / len(selected)).backward()
            reference[1].v = reference[1].v.detach().clone()
        states.append(reference[1].v.clone())
        if not carry:
            functional.reset_net(reference)
    net = sltt_ext.over_time(
        build(place), time_dim=0, returns="sequence", schedule=lambda *_: selected, carry=carry
    )
    for state in states:
        output_seq = net(x_seq)
        assert torch.equal(net[1].v, state)
        (output_seq[list(selected)].square().sum() / T).backward()
        assert torch.equal(net[1].v, state)
        assert not net[1].v.requires_grad
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6
