"""Networks whose iterations run as graphs, on operators that are recorded and run again: what tests of them share."""

import copy

import torch
from recorded_operators import RecordedOperators
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.online.cuda_graphs import IterationGraphs

T = 3
BATCH = 4


def net_of(step_mode="m", middle=nn.Identity, dropout=0.3):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1),
        layer.BatchNorm2d(4),
        neuron.ParametricLIFNode(),
        middle(),
        layer.Conv2d(4, 4, 3, padding=1),
        neuron.LIFNode(),
        layer.Dropout(dropout),
        layer.Flatten(),
        layer.Linear(256, 5),
    )
    with torch.no_grad():
        for parameter in (net[0].weight, net[1].weight, net[4].weight):
            parameter.mul_(4)
    functional.set_step_mode(net, step_mode)
    return sltt_ext.convert(net)


PLAN = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}
"""Nothing has to be measured before an iteration is captured."""


def online_of(net, graph=True, loss_fn=F.cross_entropy, **options):
    online = sltt_ext.OnlineTrainer(net, loss_fn, T, graph=graph, **{**PLAN, **options})
    if graph:
        online._graphs = IterationGraphs(RecordedOperators(net))
    return online


def batch(seed, n=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def twins(step_mode="m", dropout=0.3, **options):
    """The same network and options, with and without graphs."""
    net = net_of(step_mode, dropout=dropout)
    return [online_of(copy.deepcopy(net), graph, **options) for graph in (True, False)]


def seen(online, result):
    """All that a user can see of an iteration."""
    gradients = [None if p.grad is None else p.grad.clone() for p in online.net.parameters()]
    buffers = [buffer.clone() for buffer in online.net.buffers()]
    return [result.loss, result.output, *gradients, *buffers], (result.time_steps, result.output_steps)


def iterations(online, number, before=lambda online, i: online.net.zero_grad(), data=batch):
    """What each of several iterations shows."""
    torch.manual_seed(5)
    found = []
    for i in range(number):
        before(online, i)
        found.append(seen(online, online.forward_backward(*data(i))))
    return found


def assert_same(actual, expected):
    for (tensors, steps), (own, own_steps) in zip(actual, expected, strict=True):
        assert steps == own_steps
        for one, other in zip(tensors, own, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def assert_as_eager(
    number=8, before=lambda online, i: online.net.zero_grad(), data=batch, replays=4, **options
):
    graphed, eager = twins(**options)
    assert_same(iterations(graphed, number, before, data), iterations(eager, number, before, data))
    assert graphed._graphs.backend.replays >= replays
    return graphed
