"""Spikes saved as bits: the same gradients, to the last bit, and the memory that is saved."""

from types import SimpleNamespace

import networks
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import ActivationMeter
from sltt_ext.forwards import Replacements
from sltt_ext.online import packing
from sltt_ext.online.packing import PackedSpikes, pack_bits, unpack_bits

T = 3


@given(st.lists(st.booleans(), max_size=70), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_bits_are_the_numbers(fired, dtype):
    numbers = torch.tensor(fired, dtype=dtype)
    bits = pack_bits(numbers)
    assert bits.numel() == -(-len(fired) // 8)
    assert torch.equal(unpack_bits(bits, len(fired), dtype), numbers)


def gradients(net, x, target, **options):
    net.zero_grad()
    sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **options).forward_backward(x, target)
    return [gradient.clone() for gradient in oracle.gradients(net)]


NETWORKS = {
    "conv": networks.conv_net,
    "resnet18": networks.resnet18,
    "generic neuron": lambda: networks.conv_net(neuron.QIFNode),
}


@pytest.mark.parametrize("step_mode", "sm")
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_the_same_to_the_last_bit(network, step_mode):
    net = sltt_ext.convert(network())
    functional.set_step_mode(net, step_mode)
    channels = 3 if network is networks.resnet18 else 1
    x, target = 2 * torch.rand(2, channels, 8, 8), torch.tensor([1, 3])
    if channels == 3:
        x = x.repeat(1, 1, 4, 4)
    chunk = T if step_mode == "m" else 1
    expected = gradients(net, x, target, chunk=chunk)
    assert all(map(torch.equal, gradients(net, x, target, chunk=chunk, pack_spikes=True), expected))


CONSUMERS = {
    "conv": (lambda: layer.Conv2d(8, 8, 3, padding=1), 1, 1 / 32),
    "linear": (lambda: layer.Linear(16, 4), 1, 1 / 32),
    "batch norm": (lambda: layer.BatchNorm2d(8), 1, 1 / 32),
    "max pooling, with the places of the maxima": (lambda: layer.MaxPool2d(2), 1 + 1 / 2, 1 / 32 + 1 / 2),
    "average pooling": (lambda: layer.AvgPool2d(2), 1, 0),
}


@pytest.mark.parametrize(("consumer", "floats", "packed"), CONSUMERS.values(), ids=CONSUMERS)
def test_what_a_layer_keeps_of_the_spikes_it_reads(consumer, floats, packed):
    net = sltt_ext.convert(nn.Sequential(neuron.IFNode(), consumer()))
    spiking, consumer = net
    x = torch.rand(32, 8, 16, 16, requires_grad=True)

    def kept(enabled):
        spiking.reset()
        packed = PackedSpikes(enabled)
        one = SimpleNamespace(net=net, replaced=Replacements())
        with one.replaced, ActivationMeter() as meter, packed.around_pass(one):
            with packed.saving():
                s = spiking(x)
                before = meter.live_bytes - s.nbytes
                y = consumer(s)
                del s
            return (meter.live_bytes - before - y.nbytes) / x.nbytes

    assert kept(False) == pytest.approx(floats, abs=2e-3)
    assert kept(True) == pytest.approx(packed, abs=2e-3)


def test_spikes_that_were_changed_are_kept_as_they_are():
    class Doubling(nn.Module):
        def forward(self, s):
            return s.mul_(2)

    net = sltt_ext.convert(nn.Sequential(neuron.IFNode(), Doubling(), nn.Linear(4, 2)))
    x, target = 3 * torch.rand(8, 4), torch.tensor([0, 1] * 4)
    expected = gradients(net, x, target)
    assert all(map(torch.equal, gradients(net, x, target, pack_spikes=True), expected))


class Weighted(nn.AvgPool2d):
    """Average pooling of the user's own, which saves what its backward reads."""

    def __init__(self):
        super().__init__(2)
        self.weight = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        return super().forward(x * self.weight)


def scaled(module):
    """A pooling layer with the user's hook on it, which computes with a parameter."""
    module.scale = nn.Parameter(torch.rand(6, 1, 1))
    module.register_forward_hook(lambda module, inputs, output: output * module.scale)
    return module


OTHERS = {
    "graded by the surrogate": lambda: [neuron.LIFNode(surrogate_function=surrogate.ATan(spiking=False))],
    "a surrogate nobody knows": lambda: [neuron.LIFNode(surrogate_function=Graded())],
    "pooling of one's own": lambda: [neuron.LIFNode(), Weighted()],
    "pooling with a hook": lambda: [neuron.LIFNode(), scaled(layer.AvgPool2d(2))],
}


class Graded(surrogate.ATan):
    """Fires in halves."""

    def forward(self, x):
        return super().forward(x) * 0.5 + super().forward(x - 0.1) * 0.25


@pytest.mark.parametrize("layers", OTHERS.values(), ids=OTHERS)
def test_only_what_is_known_is_packed(layers):
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1), *layers(), layer.Conv2d(6, 4, 3), layer.Flatten(), nn.LazyLinear(3)
    )
    x, target = 3 * torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    net(x)
    functional.reset_net(sltt_ext.convert(net))
    expected = gradients(net, x, target)
    assert all(map(torch.equal, gradients(net, x, target, pack_spikes=True), expected))


@pytest.mark.parametrize(
    "factor", [torch.tensor(0.5), torch.tensor([0.5, 2.0, 1.0, 3.0])], ids=["one", "each"]
)
def test_graded_spikes_of_snntorch(factor):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    leaky = snntorch.Leaky(
        beta=0.9, init_hidden=True, graded_spikes_factor=factor, learn_graded_spikes_factor=True
    )
    net = sltt_ext.convert(nn.Sequential(nn.Linear(5, 4), leaky, nn.Linear(4, 3)))
    x, target = 3 * torch.rand(8, 5), torch.arange(8) % 3
    expected = gradients(net, x, target)
    assert all(map(torch.equal, gradients(net, x, target, pack_spikes=True), expected))


class Twice(nn.Module):
    """Its neuron runs twice in a step, and a layer learns from spikes that pass no gradient on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.neuron = layer.Linear(4, 6), neuron.LIFNode(v_threshold=0.4)
        self.between, self.head = layer.Linear(6, 6), layer.Linear(6, 3)

    def forward(self, x):
        s = self.neuron(self.fc(x))
        return self.head(self.neuron(2 * self.between(s))) + self.head(s.detach())


class HalfPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(layer.Linear(4, 6), neuron.IFNode(), layer.Linear(6, 3)).bfloat16()

    def forward(self, x):
        return self.layers(3 * x.bfloat16())


class OtherLayouts(nn.Module):
    """What enters its neuron lies in another order than its state, from the second step on."""

    step = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.neuron = layer.Conv2d(1, 4, 1), neuron.LIFNode(v_threshold=0.1)
        self.head = nn.Sequential(layer.Conv2d(4, 3, 2), layer.Flatten())

    def forward(self, x):
        self.step += 1
        y = self.conv(3 * x.view(-1, 1, 2, 2))
        y = y.contiguous(memory_format=torch.channels_last) if self.step % T else y
        return self.head(self.neuron(y))


@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
@pytest.mark.parametrize("make", [Twice, HalfPrecision, OtherLayouts])
def test_spikes_made_again_from_potentials_give_the_same_gradients(make):
    results = []
    for pack_spikes in (False, True):
        net = sltt_ext.convert(make())
        results.append(
            gradients(net, torch.linspace(0, 1, 16).view(4, 4), torch.arange(4) % 3, pack_spikes=pack_spikes)
        )
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("step_mode", "chunk", "bits"), [("s", 1, 0), ("m", 1, 0), ("m", T, 1)])
def test_bits_are_kept_where_no_potential_is(monkeypatch, step_mode, chunk, bits):
    packed, pack = [], packing.pack_bits
    monkeypatch.setattr(packing, "pack_bits", lambda numbers: packed.append(numbers) or pack(numbers))
    net = sltt_ext.convert(networks.conv_net())
    functional.set_step_mode(net, step_mode)
    gradients(net, torch.rand(2, 1, 8, 8), torch.tensor([1, 3]), chunk=chunk, pack_spikes=True)
    assert bool(packed) == bits


def test_spikes_whose_potential_was_overwritten_are_not_made_again():
    potential, call = torch.rand(4, 4), object()
    bits = packing._Bits(packing._Tables())
    spikes = packing._Spikes(potential, None, None, call, packing._Potential(potential, 0.5), bits)
    saved = spikes.pack(potential, call)
    assert torch.equal(saved.unpack(), (potential >= 0.5).float())
    potential.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.unpack()


class ReadsTheLastSpikes(nn.Module):
    """A step reads the spikes of the step before, whose potential is written over by then."""

    def __init__(self):
        super().__init__()
        self.first, self.neuron = layer.Linear(6, 8), neuron.LIFNode(v_threshold=0.3)
        self.recurrent, self.head = layer.Linear(8, 8), layer.Linear(8, 3)
        self.last = None

    def forward(self, x):
        last = torch.zeros(len(x), 8) if self.last is None else self.last
        spikes = self.neuron(self.first(x))
        self.last = spikes.detach()
        return self.head(spikes) + self.head(self.recurrent(last))


def test_spikes_that_a_later_step_reads_are_kept_as_bits():
    results = []
    for pack_spikes in (False, True):
        torch.manual_seed(0)
        net = sltt_ext.convert(ReadsTheLastSpikes())
        x, target = 3 * torch.rand(4, 6), torch.arange(4) % 3
        results.append(gradients(net, x, target, pack_spikes=pack_spikes))
    assert all(map(torch.equal, *results))
