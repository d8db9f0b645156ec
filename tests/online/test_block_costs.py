from itertools import combinations

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from torch import nn

import sltt_ext
from sltt_ext.errors import ConfigurationError
from sltt_ext.online.block_costs import Cost, costs, least_borders, most_parts, parts_of_batch, peak_bytes
from sltt_ext.online.chain import Chain
from sltt_ext.online.frames import frames
from sltt_ext.online.outputs import output_sequence
from sltt_ext.online.passes import CallSizes, Pass

NUMBERS = st.integers(0, 50)
COSTS = st.builds(
    Cost, value=NUMBERS, kept=NUMBERS, state=NUMBERS, saved=NUMBERS, static=st.just(False), border=st.booleans(),
    by_sample=st.booleans(),
)  # fmt: skip


@settings(max_examples=60)
@given(found=st.lists(COSTS, min_size=1, max_size=7), calls=st.integers(1, 4))
def test_the_borders_are_the_best_of_all(found, calls):
    places = [i for i, cost in enumerate(found[:-1]) if cost.border]
    found[-1] = Cost(**{**vars(found[-1]), "border": False})
    every = [list(chosen) for n in range(len(places) + 1) for chosen in combinations(places, n)]
    best = min(peak_bytes(found, chosen, calls, calls, 8) for chosen in every)
    chosen = least_borders(found, calls, calls, 8)
    assert peak_bytes(found, chosen, calls, calls, 8) == best
    assert len(parts_of_batch(found, chosen, calls, calls, 8)) == len(chosen) + 1


@pytest.mark.parametrize(("batch", "parts"), [(0, 1), (3, 1), (8, 2), (15, 3), (32, 8), (256, 8)])
def test_no_part_of_a_batch_has_fewer_than_four_samples_or_is_one_of_more_than_eight(batch, parts):
    assert most_parts(batch) == parts


def planned(net, x):
    net = sltt_ext.convert(net)
    neurons = [module for module in net.modules() if isinstance(module, sltt_ext.neuron.StatefulModule)]
    one = Pass(
        net, net, neurons, False, frames(x, 4, None, False), 4, (0, 1, 2, 3), True, CallSizes(1, 1, 1),
        lambda returned, steps: output_sequence(returned, steps, None, False),
    )  # fmt: skip
    return net, one, Chain(net)


def test_bytes_are_those_of_the_whole_batch():
    net, one, chain = planned(networks.conv_net(neuron.LIFNode), torch.rand(6, 1, 8, 8))
    before = torch.get_rng_state()
    found = dict(
        zip([node.meta.get("path") for node in chain.nodes], costs(chain, one, one.source.static, True, True))
    )
    assert found["0"].value == 6 * 6 * 64 * 4
    assert found["0"].static
    assert found["0"].by_sample
    assert found["1"].kept == found["1"].value // 32
    assert found["1"].state == found["1"].value
    assert found["2"].saved == found["1"].kept  # the spikes that it reads, as bits
    assert not found["2"].static
    assert found["4"].kept == found["4"].value // 32
    assert torch.equal(torch.get_rng_state(), before)
    assert net[1].v == 0.0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_batch_norms_see_the_whole_batch():
    net = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net, one, chain = planned(net, torch.rand(5, 4))
    found = costs(chain, one, one.source.static, True, False)
    assert [cost.by_sample for cost in found] == [True, True, False, True]
    assert int(net[2].num_batches_tracked) == 0


def test_a_forward_that_is_another_one_when_traced():
    class Counts(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(), nn.Linear(4, 2))

        def forward(self, x):
            Counts.calls += 1
            return self.layers(x) * Counts.calls

    _net, one, chain = planned(Counts(), torch.rand(5, 4))
    with pytest.raises(ConfigurationError, match="gives another output"):
        costs(chain, one, one.source.static, True, False)
