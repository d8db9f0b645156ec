import networks
import pytest
import snntorch
import torch
import tutorials
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sltt_ext
from sltt_ext.analysis import dead_neurons, firing_rates, operation_counts
from sltt_ext.errors import InputError
from sltt_ext.snntorch import MultiStep

T = 5


def test_by_hand():
    """Inputs of 0, 0.5 and 1 to neurons that sum them up and fire at 1: never, every other step, always."""
    net = nn.Sequential(neuron.IFNode(v_reset=None))
    x = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    (row,) = firing_rates(net, x, time_steps=4).rows
    assert (row.neurons, row.rate, row.dead, row.saturated) == (3, (2 + 4 + 4) / (3 * 2 * 4), 1, 1)
    assert dead_neurons(net, x, time_steps=4).masks["0"].tolist() == [True, False, False]


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_counts_the_spikes_of_a_loop(step_mode):
    x, _ = networks.images()
    net = networks.conv_net(step_mode="s")
    counts = {"1": 0, "3": 0}
    for _ in range(T):
        hidden = x
        for path, module in net.named_children():
            hidden = module(hidden)
            if path in counts:
                counts[path] = counts[path] + (hidden != 0).sum(0)
    functional.reset_net(net)
    functional.set_step_mode(net, step_mode)
    rates = {row.layer: row.rate for row in firing_rates(net, x, T).rows}
    masks = dead_neurons(net, x, T).masks
    for path, count in counts.items():
        assert rates[path] == pytest.approx(count.double().mean().item() / (T * len(x)))
        assert torch.equal(masks[path], count == 0)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("module", [layer.Dropout(0.5), layer.Dropout2d(0.5), layer.SynapseFilter(tau=2.0)])
def test_what_carries_state_and_does_not_fire_is_no_neuron(module, step_mode):
    net = nn.Sequential(neuron.IFNode(), module, layer.Conv2d(1, 2, 1), neuron.LIFNode())
    functional.set_step_mode(net, step_mode)
    net[0].register_module("inside", layer.Dropout(0.5))  # a neuron with a dropout in it is still one
    x = torch.rand(2, 1, 3, 3)
    assert [row.layer for row in firing_rates(net, x, T).rows] == ["0", "3"]
    assert list(dead_neurons(net, x, T).masks) == ["0", "3"]
    assert operation_counts(net, x, "bptt", T).assumed == ()


def test_snntorch_in_sequences_and_steps():
    net = sltt_ext.convert(tutorials.strong(tutorials.convolutional()))
    x = torch.rand(3, 1, 12, 12)
    assert firing_rates(net, x, T).rows == firing_rates(MultiStep(net), x, T).rows


def test_neurons_that_are_shared_by_layers_of_different_size():
    lif = snntorch.Leaky(beta=0.9)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.fc = lif, nn.Linear(4, 2)

        def forward(self, x):
            return self.lif(self.fc(self.lif(x)[0]))

    with pytest.raises(InputError, match="neurons of its own"):
        firing_rates(Shared(), torch.rand(3, 4), 1)


def test_result_as_dataframe_and_plot():
    x, _ = networks.images()
    rates, dead = firing_rates(networks.conv_net(), x, 2), dead_neurons(networks.conv_net(), x, 2)
    assert list(rates.to_dataframe()["dead"]) == list(dead.to_dataframe()["dead"])
    assert "spikes per neuron" in rates.plot().axes[0].get_xlabel()
    assert "(%)" in dead.plot().axes[0].get_xlabel()
