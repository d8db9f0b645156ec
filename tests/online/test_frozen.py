"""What a graph would freeze, and what it cannot hold, is refused by name."""

import random
from types import SimpleNamespace

import pytest
import torch
from graphed import BATCH, T, assert_as_eager, batch, iterations, net_of, online_of
from products import named
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError

REFUSED_OPTIONS = [
    ({"on_step": print}, "on_step="),
    ({"backward": torch.Tensor.backward}, "backward="),
    ({"loss_on": "mean"}, "loss_on='mean'"),
    ({"loss_on": "sequence"}, "loss_on='sequence'"),
    ({"wrapper": nn.Identity()}, "wrapper="),
    ({"graph": "yes"}, "graph must be True or False"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED_OPTIONS, ids=named)
def test_options_that_cannot_be_captured_are_refused_by_name(options, name):
    with pytest.raises(ConfigurationError, match=name):
        sltt_ext.OnlineTrainer(net_of(), F.cross_entropy, T, **{"graph": True, **options})


def test_an_option_that_is_set_later_is_refused_too():
    online = online_of(net_of())
    online.backward = torch.Tensor.backward
    with pytest.raises(ConfigurationError, match="backward="):
        online.forward_backward(*batch(0))


def test_a_network_on_the_cpu_is_refused():
    online = sltt_ext.OnlineTrainer(net_of(), F.cross_entropy, T, graph=True)
    with pytest.raises(ConfigurationError, match="one CUDA device, and are on cpu"):
        online.forward_backward(*batch(0))


def forward_hook(net):
    net[1].register_forward_hook(lambda *_: None)


def backward_hook(net):
    net[1].register_full_backward_hook(lambda *_: None)


def gradient_hook(net):
    net[1].weight.register_hook(lambda gradient: gradient)


def accumulation_hook(net):
    net[1].weight.register_post_accumulate_grad_hook(lambda parameter: None)


def generator_elsewhere(net):
    net[1].source = _Elsewhere()


class _Elsewhere(torch.Generator):
    """A generator that says it is on another device."""

    device = torch.device("meta")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (forward_hook, "1: its hooks"),
        (backward_hook, "1: its hooks"),
        (gradient_hook, "1.weight: a hook"),
        (accumulation_hook, "1.weight: a hook"),
        (generator_elsewhere, "1.source: it is a generator"),
    ],
)
def test_what_a_replay_would_leave_out_is_refused_by_name(change, name):
    net = net_of()
    change(net)
    with pytest.raises(ConfigurationError, match=name):
        online_of(net).forward_backward(*batch(0))


@pytest.mark.parametrize(
    ("x", "target", "name"),
    [
        (iter([torch.ones(BATCH, 1, 8, 8)] * T), torch.zeros(BATCH).long(), "x: it is a"),
        ([torch.ones(BATCH, 1, 8, 8)] * T, torch.zeros(BATCH).long(), "x: it is a list"),
        (
            torch.ones(BATCH, 1, 8, 8, requires_grad=True),
            torch.zeros(BATCH).long(),
            "x: it requires a gradient",
        ),
        (torch.ones(BATCH, 1, 8, 8), SimpleNamespace(), "target: it is a SimpleNamespace"),
        (torch.ones(BATCH, 1, 8, 8), (SimpleNamespace(),), "target: there is a SimpleNamespace"),
    ],
)
def test_data_that_a_graph_cannot_read_is_refused_by_name(x, target, name):
    with pytest.raises(ConfigurationError, match=name):
        online_of(net_of()).forward_backward(x, target)


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0 * self.calls)


class KeepsAMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


class BuffersAMean(KeepsAMean):
    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("mean", torch.zeros(()))


class DrawsInPython(nn.Module):
    def forward(self, x):
        return x * random.random()


class DrawsInNumPy(nn.Module):
    def forward(self, x):
        import numpy

        return x * float(numpy.random.rand())


@pytest.mark.filterwarnings("ignore::sltt_ext.errors.SLTTWarning")
@pytest.mark.parametrize(
    ("middle", "name"),
    [
        (Counts, "3.calls: every iteration gives it another value"),
        (KeepsAMean, "3.mean: every iteration gives it another value"),
        (BuffersAMean, "3.mean: every iteration gives it another value"),
        (DrawsInPython, "Python's random: every iteration draws from it|draws from Python's random"),
        (DrawsInNumPy, "draws from NumPy's random"),
    ],
)
def test_what_a_graph_would_freeze_is_refused_by_name(middle, name):
    online = online_of(net_of(middle=middle))
    with pytest.raises(ConfigurationError, match=name):
        iterations(online, 6)


def test_draws_of_the_user_between_iterations_are_no_concern():
    def before(online, i):
        online.net.zero_grad()
        random.random()

    assert_as_eager(before=before)


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_a_network_that_changes_its_input_is_refused():
    net = nn.Sequential(InPlace(), *net_of())
    with pytest.raises(ConfigurationError, match="x: the network or the loss changes it in place"):
        online_of(net, cache_invariant=False).forward_backward(*batch(0))


def reads_its_value(output, target):
    loss = F.cross_entropy(output, target)
    return loss if loss.item() > 0 else 0 * loss


def test_a_loss_that_reads_values_back_is_refused_when_captured_and_nothing_is_lost():
    online = online_of(net_of(), loss_fn=reads_its_value)
    for i in range(3):
        online.net.zero_grad()
        online.forward_backward(*batch(i))
    before = [parameter.grad.clone() for parameter in online.net.parameters()]
    buffers = [buffer.clone() for buffer in online.net.buffers()]
    with pytest.raises(ConfigurationError, match="must not read values back from the device"):
        online.forward_backward(*batch(3))
    assert all(map(torch.equal, before, [parameter.grad for parameter in online.net.parameters()]))
    assert all(map(torch.equal, buffers, online.net.buffers()))
    assert isinstance(online.net[2].v, float)
