"""Whole iterations as CUDA graphs on a device: the same numbers as without, whatever stands around them."""

import copy

import pytest
import torch
from products import named
from torch import nn
from torch.nn import functional as F

import sltt_ext

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T = 4


def network(dropout):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(3, 16, 3, padding=1),
        layer.BatchNorm2d(16),
        neuron.ParametricLIFNode(),
        layer.Conv2d(16, 16, 3, padding=1),
        layer.BatchNorm2d(16),
        neuron.LIFNode(),
        layer.Dropout(dropout),
        layer.Flatten(),
        layer.Linear(16 * 64, 10),
    )
    functional.set_step_mode(net, "m")
    return sltt_ext.convert(net.cuda())


def batch(i, n=8):
    generator = torch.Generator().manual_seed(i)
    x = torch.rand(n, 3, 8, 8, generator=generator)
    return x.cuda(), torch.randint(0, 10, (n,), generator=generator).cuda()


def run(graph, before, dtype, size, dropout, **options):
    """What eight and more iterations leave, and the trainer."""
    net = copy.deepcopy(network(dropout))
    generator = torch.Generator().manual_seed(3)
    options = {"chunk": 1, "pack_spikes": False, "cache_invariant": True, **options}
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, generator=generator, graph=graph, **options)
    torch.manual_seed(5)
    found = []
    for i in range(40 if "k" in options else 10):
        before(net, i)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = online.forward_backward(*batch(i, size(i)))
        found += [result.loss.clone(), result.output.float()]
        found += [parameter.grad.clone() for parameter in net.parameters()]
        found += [buffer.clone() for buffer in net.buffers()]
    return found, online


def zero(net, i):
    net.zero_grad()


def keep(net, i):
    """Gradients add up."""


def fill(net, i):
    net.zero_grad(set_to_none=False)


def train_and_update(net, i):
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad)
    net.zero_grad()


def loads_data_meanwhile(net, i):
    net.zero_grad()
    torch.ones(1000).pin_memory()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3},
        {"before": keep},
        {"before": fill},
        {"before": train_and_update},
        {"before": loads_data_meanwhile},
        {"dtype": torch.bfloat16},
        {"chunk": T, "dropout": 0.3},
        {"chunk": "auto"},
        {"pack_spikes": True},
        {"k": 1},
        {"k": 1, "full_output": False, "dtype": torch.bfloat16},
        {"k": 2, "dropout": 0.3},
        {"size": lambda i: 4 if i == 9 else 8},
    ],
    ids=named,
)
def test_iterations_are_those_without_graphs(options):
    settings = {
        "before": zero,
        "dtype": torch.float32,
        "size": lambda i: 8,
        "dropout": 0.0,
        "chunk": 1,
        **options,
    }
    actual, online = run(True, **settings)
    expected, _ = run(False, **settings)
    assert online._graphs.captured > 0
    tolerance = 1e-5 if settings["dtype"] == torch.float32 else 2e-2
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 0.1)


def test_a_loss_that_reads_values_back_is_refused_and_the_device_goes_on():
    def loss(output, target):
        return F.cross_entropy(output, target) * (1 if output.sum().item() else 0)

    online = sltt_ext.OnlineTrainer(network(0.0), loss, T, chunk=1, pack_spikes=False, graph=True)
    for i in range(3):
        online.forward_backward(*batch(i))
    with pytest.raises(sltt_ext.SLTTError, match="must not read values back"):
        online.forward_backward(*batch(3))
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_graphs_share_the_memory_of_an_iteration():
    online = sltt_ext.OnlineTrainer(
        network(0.0), F.cross_entropy, T, k=1, chunk=1, pack_spikes=False, graph=True
    )
    reserved = []
    for i in range(60):
        online.forward_backward(*batch(i, 64))
        online.net.zero_grad()
        reserved.append((online._graphs.captured, torch.cuda.memory_reserved()))
    first = next(bytes_ for captured, bytes_ in reserved if captured == 1)
    assert reserved[-1][0] == T
    assert reserved[-1][1] < 2 * first
