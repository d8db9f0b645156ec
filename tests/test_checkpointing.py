"""Neurons inside ``torch.utils.checkpoint``, which runs its part of the network again in the backward pass."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sltt_ext
from sltt_ext.errors import ConfigurationError

T, TARGET = 3, torch.tensor([0, 2])


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def snntorch_neuron(name, **options):
    return lambda: getattr(pytest.importorskip("snntorch"), name)(beta=0.8, init_hidden=True, **options)


NEURONS = {
    "LIFNode": neuron.LIFNode,
    "LIFNode, unknown surrogate": lambda: neuron.LIFNode(surrogate_function=torch.sigmoid),
    "QIFNode": neuron.QIFNode,
    "ParametricLIFNode": neuron.ParametricLIFNode,
    "Leaky": snntorch_neuron("Leaky"),
    "Leaky, inhibition": snntorch_neuron("Leaky", inhibition=True),
    "Synaptic": snntorch_neuron("Synaptic", alpha=0.7),
}


def gradients(net, **options):
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **options)
    torch.manual_seed(1)
    online.forward_backward(torch.rand(2, 4), TARGET)
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def network(part, use_reentrant=None):
    """Trained in all its layers, with ``part`` in the middle, checkpointed or not."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8), part)
    middle = part if use_reentrant is None else Checkpointed(part, use_reentrant)
    return nn.Sequential(nn.Linear(4, 8), middle, neuron.LIFNode(), nn.Linear(8, 3))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_a_neuron_that_would_go_on_from_a_later_state_says_so(make, use_reentrant):
    net = network(make(), use_reentrant)
    with pytest.raises(ConfigurationError, match=r"runs again in the backward pass"):
        gradients(net)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("chunk", [1, T])
def test_so_does_one_that_takes_sequences(chunk):
    net = network(neuron.LIFNode(), use_reentrant=False)
    functional.set_step_mode(net, "m")
    with pytest.raises(ConfigurationError, match=r"runs again in the backward pass"):
        gradients(net, chunk=chunk)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [nn.Tanh, lambda: layer.Dropout(0.5)], ids=["Tanh", "Dropout over time"])
def test_what_returns_the_same_again_may_be_run_again(make, use_reentrant):
    found = [gradients(network(make(), how)) for how in (use_reentrant, None)]
    torch.testing.assert_close(*found)
    assert len(found[0]) == 6


def test_a_state_that_is_passed_is_passed_again():
    snntorch = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)
            self.neuron = snntorch.Leaky(beta=0.8, threshold=0.3)
            self.checkpointed = checkpointed

        def step(self, x, mem):
            return self.neuron(self.fc(x), mem)

        def forward(self, x, state):
            mem = self.neuron.reset_mem() if state is None else state
            if self.checkpointed:
                return checkpoint(self.step, x, mem, use_reentrant=False)
            return self.step(x, mem)

    found = []
    for checkpointed in (True, False):
        net = sltt_ext.snntorch.Stateful(sltt_ext.convert(Net(checkpointed)))
        found.append(gradients(net))
    torch.testing.assert_close(*found)
